"""An HTTP server that sends byte ranges of the files it holds in memory, counts what it sends, and makes faults on request."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, NamedTuple

from pretrain.data.shards import counts, retries
from tests.support.loopback import LoopbackServer

if TYPE_CHECKING:
    import pytest


class Request(NamedTuple):
    """One request: the path, the bytes [start, end) it asked for (None = all), and the bytes of the right body."""

    path: str
    range: tuple[int, int] | None
    sent: int


class RangeServer(LoopbackServer):
    """Serves `files`, by name, at `url`; a context manager.

    Attributes:
        requests: those answered so far.
        fault: called with the handler, the content that would be sent, and the range before a shard's part is sent; returns
            True where it has sent something else instead.
        tag: the ETag of every file.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.fault: Callable[[BaseHTTPRequestHandler, bytes, tuple[int, int] | None], bool] = lambda *_: False
        self.tag = '"1"'
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with suppress(ConnectionError, TimeoutError):  # the client has given up
                    server._answer(self)

            def log_message(self, *args: object) -> None:
                pass

        super().__init__(Handler)

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer one request."""
        path = handler.path.partition("?")[0]
        content = self.files.get(path.lstrip("/"))
        if content is None:
            self._record(handler.path, None, 0)
            handler.send_error(404)
            return
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
        asked = (int(match[1]), min(int(match[2]) + 1, len(content))) if match else None
        body = content[asked[0] : asked[1]] if asked else content
        self._record(handler.path, asked, len(body))  # before the client goes on
        if path.endswith(".tar") and self.fault(handler, body, asked):
            return
        self.send(handler, body, asked, len(content))

    def send(self, handler: BaseHTTPRequestHandler, body: bytes, asked: tuple[int, int] | None, size: int) -> None:
        """Send a correct response."""
        handler.send_response(206 if asked else 200)
        if asked:
            handler.send_header("Content-Range", f"bytes {asked[0]}-{asked[1] - 1}/{size}")
        handler.send_header("ETag", self.tag)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def _record(self, path: str, asked: tuple[int, int] | None, sent: int) -> None:
        with self._lock:
            self.requests.append(Request(path, asked, sent))


@contextmanager
def serve_ranges(monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    """Yield a running server; reads are retried at once, and nothing is known of the files beside its shards."""
    monkeypatch.setattr(retries, "RETRY_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(counts, "_answers", {})
    with RangeServer() as server:
        yield server
