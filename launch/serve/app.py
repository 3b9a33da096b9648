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

from collections.abc import Awaitable, Callable, Mapping
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from starlette.middleware.trustedhost import TrustedHostMiddleware

from finetune.explain.word_maps import METHOD
from finetune.search.answering import Answerer
from finetune.search.query import Searcher
from launch.serve.maps import MAX_WORDS, ItemReference
from launch.serve.media import send_sound
from launch.serve.site import Site
from launch.serve.uploads import MAX_UPLOAD, Upload
from pretrain.errors import UserError

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
    site = Site(searcher, log, answerer)
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
