"""The addresses of the page.

    GET  /            the page; parameters: q, unwanted, condition, like, k, hybrid, maps, and from.FIELD, to.FIELD, is.FIELD
    POST /            the same, without like and hybrid, with a file, an image or a sound
    GET  /api/search  and POST /api/search: the same as JSON
    GET  /ask         a question about a result: question, and key (of the index) or upload (its name)
    GET  /api/ask     and POST /api/ask with a file: the same as JSON
    GET  /thumbnail   key or upload
    GET  /audio       key or upload: the sound itself, or a range of its bytes
    GET  /map         key or upload, q, word, by (rerank or vqa), method: the heat map of a word
    GET  /style.css

One model answers one query at a time. Requests must name this machine as their host, so that no other page can reach it.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import jinja2
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from finetune.explain.heatmap import LEGEND, SIMILARITY_LEGEND
from finetune.explain.word_maps import METHOD, METHODS, SIMILARITY, check_method, format_share
from finetune.search import query as queries
from finetune.search.answering import Answerer
from finetune.search.fields import MODALITIES
from finetune.search.modalities import preview
from finetune.search.query import Searcher
from launch.serve import filter_form
from launch.serve.filter_form import Control
from launch.serve.maps import MAX_WORDS, ItemReference, MapDrawer
from launch.serve.media import send_sound
from launch.serve.orders import BAND, CELL, LABEL, STEP, draw_orders
from launch.serve.uploads import Uploads
from pretrain.data import BadSample
from pretrain.data.audio_files import find_media_type
from pretrain.errors import UserError
from pretrain.printable import get_noun

MAX_UPLOAD = 64 << 20
"""Most bytes of an uploaded file."""
PAGE = queries.InputNames("a sentence", "the file", "the file", "but not", "where", "captions", value="")
"""What the page calls the inputs of a query."""
FIELDS = queries.InputNames("q", "image", "audio", "unwanted", "condition", "hybrid", value="")
"""What a program sends; a file may have any name."""


@dataclass(frozen=True)
class Upload:
    """The file of a form."""

    content: bytes = b""
    field: str = ""
    """The name under which it was sent; empty = there is none."""

    def check(self, name: str) -> None:
        """Refuse a form without a file, and files that are empty or too large. name: of the file. Raises UserError."""
        if not self.field:
            raise UserError("the form holds no file: add one")
        if not self.content:
            raise UserError(f"{name} is empty: choose another file")
        if len(self.content) > MAX_UPLOAD:
            raise UserError(f"{name} has more than {MAX_UPLOAD >> 20} MB, which is the most that can be uploaded")


"""An uploaded file, empty where there is none; or why it cannot be used."""
MAX_RESULTS = 100
"""Most results of a page."""
_POLICY = "default-src 'none'; img-src 'self'; style-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def build_app(
    searcher: Searcher,
    hosts: list[str] | None = None,
    log: Callable[[dict[str, Any]], None] = lambda record: None,
    answerer: Answerer | None = None,
) -> FastAPI:
    """Build the application.

    Args:
        searcher: answers the queries.
        hosts: names under which requests may come, besides those of this machine.
        log: called with a record of each query that was answered.
        answerer: answers questions about images; None = the page asks none.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]", *(hosts or [])])
    site = _Site(searcher, log, answerer)
    policy = f"{_POLICY}; media-src 'self'" if "audio" in searcher.loaded.decoders else _POLICY
    style = resources.files("launch.serve").joinpath("style.css").read_text() + "".join(
        f"body:has(#w{i}:checked) .m{i}{{display:block}}\n" for i in range(MAX_WORDS)
    )

    @app.middleware("http")
    async def add_headers(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        response.headers.update(_HEADERS | {"Content-Security-Policy": policy})
        return response

    # Handlers are not async: each runs in a thread, and waits there for the model.

    @app.get("/")
    def show(request: Request) -> Response:
        return site.show_results(request.query_params)

    @app.get("/api/search")
    def search(request: Request) -> Response:
        return site.list_results(request.query_params)

    @app.post("/")
    async def show_upload(request: Request) -> Response:
        return await _with_upload(request, site.show_results)

    @app.post("/api/search")
    async def search_upload(request: Request) -> Response:
        return await _with_upload(request, site.list_results)

    @app.get("/ask")
    def ask(request: Request) -> Response:
        return site.show_answer(request.query_params)

    @app.get("/api/ask")
    def ask_json(request: Request) -> Response:
        return site.list_answers(request.query_params)

    @app.post("/api/ask")
    async def ask_upload(request: Request) -> Response:
        return await _with_upload(request, site.list_answers)

    @app.get("/thumbnail")
    def show_thumbnail(key: str = "", upload: str = "") -> Response:
        return _send_jpeg(site.maps.read_thumbnail(ItemReference(key, upload)))

    @app.get("/map")
    def show_map(word: int, q: str = "", key: str = "", upload: str = "", by: str = "rerank", method: str = METHOD) -> Response:
        try:
            maps = site.maps.draw(ItemReference(key, upload), q, by, method)
        except UserError:
            return Response(status_code=404)
        return _send_jpeg(maps.tiles[word][1] if 0 <= word < len(maps.tiles) else b"")

    @app.get("/audio")
    def play(request: Request, key: str = "", upload: str = "") -> Response:
        try:
            content = site.maps.read(ItemReference(key, upload))
        except UserError:
            return Response(status_code=404)
        return send_sound(content, request.headers.get("range", ""))

    @app.get("/favicon.ico")
    def show_no_icon() -> Response:
        return Response(status_code=204)

    @app.get("/style.css")
    def show_style() -> Response:
        return Response(style, media_type="text/css")

    return app


async def _with_upload(request: Request, respond: Callable[[Mapping[str, str], Upload | None], Response]) -> Response:
    """Respond in a thread to a form with a file."""
    async with request.form() as form:
        parameters = {name: value for name, value in form.items() if isinstance(value, str)}
        name, file = next(((name, value) for name, value in form.items() if not isinstance(value, str)), ("", None))
        upload = Upload(await file.read(MAX_UPLOAD + 1) if file is not None else b"", name)
        return await run_in_threadpool(respond, parameters, upload)


def _send_jpeg(content: bytes) -> Response:
    if not content:
        return Response(status_code=404)
    return Response(content, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=60"})


class _Site:
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
