"""The addresses of the page.

    GET  /            the page; q, unwanted, condition, like, k, hybrid      POST /            the same with a file `image`
    GET  /api/search  the same as JSON                               POST /api/search
    GET  /thumbnail   key                                            GET  /map         key, q, word: a heat map
    GET  /style.css

One model answers one query at a time. Requests must name this machine as their host, so that no other page can reach it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any

import jinja2
from fastapi import FastAPI, Form, Request, Response, UploadFile
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from finetune.explain.heatmap import LEGEND
from finetune.explain.word_maps import compute_word_maps
from finetune.search import query as queries
from finetune.search.image_sources import Location, read_image
from finetune.search.query import Searcher
from pretrain.data import BadSample
from pretrain.data.thumbnails import encode_jpeg
from pretrain.errors import UserError

MAX_UPLOAD = 64 << 20
"""Most bytes of an uploaded image."""
MAX_RESULTS = 100
"""Most results of a page."""
MAX_WORDS = 24
"""Most words of a query that have heat maps."""
MAP_SIDE = 320
"""Pixels of a heat map's longer side."""
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self'; style-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def build_app(
    searcher: Searcher, hosts: list[str] | None = None, log: Callable[[dict[str, Any]], None] = lambda record: None
) -> FastAPI:
    """Build the application.

    Args:
        searcher: answers the queries.
        hosts: names under which requests may come, besides those of this machine.
        log: called with a record of each query that was answered.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]", *(hosts or [])])
    page = jinja2.Environment(
        loader=jinja2.PackageLoader("launch.serve", "."), autoescape=True, undefined=jinja2.StrictUndefined
    ).get_template("page.html.j2")
    style = resources.files("launch.serve").joinpath("style.css").read_text() + "".join(
        f"body:has(#w{i}:checked) .m{i}{{display:block}}\n" for i in range(MAX_WORDS)
    )
    lock = threading.Lock()  # of model and index

    @app.middleware("http")
    async def add_headers(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        response.headers.update(_HEADERS)
        return response

    @functools.lru_cache(64)
    def draw_maps(key: str, text: str) -> list[tuple[str, bytes]]:
        """Return each word with its heat map as a JPEG. Raises UserError."""
        image = searcher.index.get([key])[0]
        if image is None or searcher.reranker is None:
            raise UserError(f"no image {key}, or no re-ranker")
        data = read_image(Location(image.source, image.offset, image.size))
        try:
            tiles = compute_word_maps(searcher.reranker, data, text).tiles(MAP_SIDE)
        except BadSample as error:
            raise UserError(f"{key} is not a usable image: {error}") from error
        return [(word, encode_jpeg(tile)) for word, tile in tiles[:MAX_WORDS]]

    def answer(query: queries.Query) -> queries.Results:
        results = searcher.search(query)
        log(results.to_record(query))
        return results

    def find_words(query: queries.Query, results: queries.Results) -> list[str]:
        """Return the words that have heat maps; none where the first result has none."""
        if searcher.reranker is None or not query.text.strip() or not results.results:
            return []
        try:
            return [word for word, _ in draw_maps(results.results[0].hit.image.key, query.text)]
        except UserError:
            return []  # the image is no longer where it was: the result itself stays

    def render(query: queries.Query) -> Response:
        results, words, problem = None, [], ""
        is_empty = not (query.text.strip() or query.image or query.like)
        with lock:
            try:
                if not is_empty:
                    results = answer(query)
                    words = find_words(query, results)
            except UserError as error:
                problem = str(error)
            total = searcher.index.count()
        content = page.render(
            query=query,
            results=results,
            words=words,
            legend=LEGEND,
            problem=problem,
            place=searcher.index.place,
            fields=searcher.index.describe().fields,
            total=total,
            can_rerank=searcher.reranker is not None,
        )
        return HTMLResponse(content, status_code=400 if problem else 200)

    def render_json(query: queries.Query) -> Response:
        try:
            with lock:
                results = answer(query)
        except UserError as error:
            return JSONResponse({"error": str(error)}, status_code=400)
        return JSONResponse({"results": results.to_records(), "milliseconds": results.milliseconds, "notes": results.notes})

    def build_query(q: str, unwanted: str, condition: str, like: str, k: str, hybrid: str, image: bytes = b"") -> queries.Query:
        count = int(k) if k.isdecimal() and 0 < int(k[:6]) <= MAX_RESULTS else 12
        unwanted_texts = [unwanted] if unwanted.strip() else []
        is_hybrid = bool(hybrid) and bool(q.strip())
        return queries.Query(q, image, like, unwanted_texts, condition.strip() or None, count, is_hybrid=is_hybrid)

    @app.get("/")
    def show(q: str = "", unwanted: str = "", condition: str = "", like: str = "", k: str = "", hybrid: str = "") -> Response:
        return render(build_query(q, unwanted, condition, like, k, hybrid))

    @app.get("/api/search")
    def search(q: str = "", unwanted: str = "", condition: str = "", like: str = "", k: str = "", hybrid: str = "") -> Response:
        return render_json(build_query(q, unwanted, condition, like, k, hybrid))

    @app.post("/")
    def show_upload(
        image: UploadFile, q: str = Form(""), unwanted: str = Form(""), condition: str = Form(""), k: str = Form("")
    ) -> Response:
        return render(build_query(q, unwanted, condition, "", k, "", image.file.read(MAX_UPLOAD)))

    @app.post("/api/search")
    def search_upload(
        image: UploadFile, q: str = Form(""), unwanted: str = Form(""), condition: str = Form(""), k: str = Form("")
    ) -> Response:
        return render_json(build_query(q, unwanted, condition, "", k, "", image.file.read(MAX_UPLOAD)))

    @app.get("/thumbnail")
    def show_thumbnail(key: str) -> Response:
        with lock:
            image = searcher.index.get([key])[0]
        if image is None or not image.thumbnail:
            return Response(status_code=404)
        return Response(image.thumbnail, media_type="image/jpeg")

    @app.get("/map")
    def show_map(key: str, q: str, word: int) -> Response:
        try:
            with lock:
                maps = draw_maps(key, q)
        except UserError:
            return Response(status_code=404)
        if not 0 <= word < len(maps):
            return Response(status_code=404)
        return Response(maps[word][1], media_type="image/jpeg")

    @app.get("/favicon.ico")
    def show_no_icon() -> Response:
        return Response(status_code=204)

    @app.get("/style.css")
    def show_style() -> Response:
        return Response(style, media_type="text/css")

    return app
