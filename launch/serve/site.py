"""What the addresses answer: searches and questions, as pages and as JSON. One model answers one query at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jinja2
from fastapi import Response
from fastapi.responses import HTMLResponse, JSONResponse

from finetune.explain.heatmap import LEGEND, SIMILARITY_LEGEND
from finetune.explain.word_maps import METHOD, METHODS, SIMILARITY, check_method, format_share
from finetune.search import query as queries
from finetune.search.answering import Answerer
from finetune.search.fields import MODALITIES
from finetune.search.modalities import preview
from finetune.search.query import Searcher
from launch.serve import filter_form
from launch.serve.filter_form import Control
from launch.serve.maps import ItemReference, MapDrawer
from launch.serve.orders import BAND, CELL, LABEL, STEP, draw_orders
from launch.serve.uploads import Upload, Uploads
from pretrain.data import BadSample
from pretrain.data.audio_files import find_media_type
from pretrain.errors import UserError
from pretrain.printable import get_noun

PAGE = queries.InputNames("a sentence", "the file", "the file", "but not", "where", "captions", value="")
"""What the page calls the inputs of a query."""
FIELDS = queries.InputNames("q", "image", "audio", "unwanted", "condition", "hybrid", value="")
"""What a program sends; a file may have any name."""
MAX_RESULTS = 100
"""Most results of a page."""


class Site:
    """What the addresses answer."""

    def __init__(self, searcher: Searcher, log: Callable[[dict[str, Any]], None], answerer: Answerer | None) -> None:
        self.searcher, self.log, self.answerer = searcher, log, answerer
        self.lock = threading.RLock()  # of models, index and uploads
        self.uploads = Uploads()
        self.maps = MapDrawer(searcher, answerer, self.uploads, self.lock)
        self.suggestions = filter_form.list_suggestions(searcher.index)
        self.templates = jinja2.Environment(
            loader=jinja2.PackageLoader("launch.serve", "."),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self.templates.globals.update(
            place=searcher.index.place,
            noun=searcher.index.describe().noun,
            accepted=[name for name in MODALITIES if name in searcher.loaded.decoders],
            can_rerank=searcher.reranker is not None,
            can_ask=answerer is not None,
            methods=METHODS,
            layout=(CELL, STEP, BAND, LABEL),
        )

    # -----------------------------------------------------------------------------------------------------------------
    # Searches

    def show_results(self, parameters: Mapping[str, str], upload: Upload | None = None) -> Response:
        results, words, problem, name = None, list[str](), "", ""
        controls = self._read_controls(parameters)
        query, method = self._read_query(parameters, upload, PAGE), parameters.get("maps") or METHOD
        with self.lock:
            try:
                if upload is not None:
                    upload.check(PAGE.image)
                check_method(method)
                name = self._keep(upload.content, PAGE.image) if upload is not None else ""
                if upload is not None or query.text.strip() or query.like:
                    results = self._search(query, controls)
                    words = self._find_words(query, results, method)
            except UserError as error:
                problem = str(error)
            total = self.searcher.index.count()
        content = self.templates.get_template("results.html.j2").render(
            query=query,
            state=_describe_state(parameters),
            results=results,
            orders=draw_orders(results) if results is not None else None,
            words=words,
            problem=problem,
            controls=controls,
            upload=name,
            is_heard=bool(query.audio),
            method=method,
            legend=SIMILARITY_LEGEND if method == SIMILARITY else LEGEND,
            total=total,
            map_text=self.maps.shorten(query.text, "rerank"),
        )
        return HTMLResponse(content, status_code=400 if problem else 200)

    def list_results(self, parameters: Mapping[str, str], upload: Upload | None = None) -> Response:
        try:
            names = FIELDS
            if upload is not None:
                upload.check(upload.field)
                names = replace(FIELDS, image=upload.field, audio=upload.field)
            with self.lock:
                results = self._search(self._read_query(parameters, upload, names), self._read_controls(parameters))
        except UserError as error:
            return JSONResponse({"error": str(error)}, status_code=400)
        return JSONResponse({"results": results.to_records(), "milliseconds": results.milliseconds, "notes": results.notes})

    def _read_query(self, parameters: Mapping[str, str], upload: Upload | None, names: queries.InputNames) -> queries.Query:
        """Return the query of a request, whose filter is the written condition alone."""
        file = upload.content if upload is not None else b""
        is_sound = bool(file) and self._identify(file) == "audio"
        text, k = parameters.get("q", ""), parameters.get("k", "")
        count = int(k) if k.isdecimal() and len(k) <= 6 and 0 < int(k) <= MAX_RESULTS else 12
        unwanted = parameters.get("unwanted", "")
        return queries.Query(
            text,
            b"" if is_sound else file,
            "" if file else parameters.get("like", ""),
            [unwanted] if unwanted.strip() else [],
            parameters.get("condition", "").strip() or None,
            count,
            is_hybrid=bool(parameters.get("hybrid")) and bool(text.strip()) and not file,
            audio=file if is_sound else b"",
            names=names,
        )

    def _read_controls(self, parameters: Mapping[str, str]) -> list[Control]:
        return filter_form.build_controls(self.searcher.index.describe().fields, parameters, self.suggestions)

    def _search(self, query: queries.Query, controls: list[Control]) -> queries.Results:
        whole = replace(query, filter=filter_form.build_condition(controls, query.filter or "", query.names.filter))
        results = self.searcher.search(whole)
        self.log(results.to_record(whole))
        return results

    def _find_words(self, query: queries.Query, results: queries.Results, method: str) -> list[str]:
        """Return the words that have heat maps; none where the first result has none, which a note explains."""
        if self.searcher.reranker is None or not query.text.strip() or not results.results:
            return []
        try:
            maps = self.maps.draw(ItemReference(results.results[0].hit.item.key), query.text, "rerank", method)
        except UserError as error:
            results.notes.append(f"there are no heat maps: {error}")  # the results themselves stay
            return []
        return [word for word, _ in maps.tiles]

    def _keep(self, upload: bytes, name: str) -> str:
        """Keep an upload for the page, and return its name there. Raises UserError where it is no image and no sound.

        name: what messages call the file.
        """
        modality = self._identify(upload)
        try:
            return self.uploads.put(upload, preview(upload, modality)[0])
        except BadSample as error:
            raise UserError(f"{name} is not a usable {get_noun(modality)}: {error}") from error

    def _identify(self, upload: bytes) -> str:
        """Return whether an upload is an image or a sound: what it begins as, or what the model takes if that is neither."""
        takes_images = "image" in self.searcher.loaded.decoders
        return "audio" if find_media_type(upload) or not takes_images else "image"

    # -----------------------------------------------------------------------------------------------------------------
    # Questions

    def show_answer(self, parameters: Mapping[str, str]) -> Response:
        image, question = (
            ItemReference(parameters.get("key", ""), parameters.get("upload", "")),
            parameters.get("question", ""),
        )
        answer, problem = None, ""
        try:
            caption = self.maps.describe(image)
            if question.strip():
                answer = self._answer(image, question)
        except UserError as error:
            caption, problem = "", str(error)
        content = self.templates.get_template("question.html.j2").render(
            image=image,
            caption=caption,
            question=question,
            answer=answer,
            shares=[(name, value, format_share(value)) for name, value in answer.answers] if answer is not None else [],
            words=[word for word, _ in answer.tiles] if answer is not None else [],
            problem=problem,
            legend=LEGEND,
            map_text=self.maps.shorten(question, "vqa"),
        )
        return HTMLResponse(content, status_code=400 if problem else 200)

    def list_answers(self, parameters: Mapping[str, str], upload: Upload | None = None) -> Response:
        try:
            if upload is not None:
                upload.check(upload.field)
            with self.lock:
                name = self._keep(upload.content, upload.field) if upload is not None else parameters.get("upload", "")
            answer = self._answer(ItemReference(parameters.get("key", ""), name), parameters.get("question", ""))
        except UserError as error:
            return JSONResponse({"error": str(error)}, status_code=400)
        return JSONResponse(
            {
                "answers": [{"answer": name, "probability": value} for name, value in answer.answers],
                "words": [word for word, _ in answer.tiles],
                "upload": name or None,
                "milliseconds": answer.milliseconds,
                "notes": answer.notes,
            }
        )

    def _answer(self, image: ItemReference, question: str) -> Any:
        """Return the answers and maps of a question, and log them. Raises UserError."""
        answer = self.maps.draw(image, question, "vqa")
        best = answer.answers[0] if answer.answers else None
        self.log({"question": question, "key": image.key or None, "answer": best, "milliseconds": answer.milliseconds})
        return answer


def _describe_state(parameters: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the parameters that another query on the page keeps: filters and the number of results."""
    kept = ("condition", "k", "unwanted", "maps")
    names = [name for name in parameters if name in kept or name.startswith(("from.", "to.", "is."))]
    return [(name, parameters[name]) for name in names if parameters[name]]
