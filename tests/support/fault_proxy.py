"""A proxy that forwards requests to an HTTP server on this machine, S3 or another, and spoils some of its answers."""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
import urllib.parse
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler

from tests.support.loopback import LoopbackServer

_OWN_HEADERS = {"connection", "content-length", "transfer-encoding", "keep-alive", "date", "server"}


@dataclass
class Exchange:
    """A request, and the answer of the server behind the proxy, which has not been sent yet."""

    proxy: FaultProxy
    handler: BaseHTTPRequestHandler
    number: int
    """Of the request, from 0."""
    status: int
    headers: list[tuple[str, str]]
    body: bytes
    length: int
    """Content-Length of the answer; with HEAD there is no body."""

    @property
    def is_shard(self) -> bool:
        """Whether a part of a shard is requested, rather than a listing or something beside it."""
        path = self.handler.path.partition("?")[0]
        return self.handler.command == "GET" and path.endswith(".tar")

    def send(self, status: int | None = None, body: bytes | None = None, length: int | None = None, **headers: str) -> None:
        """Send the answer, or what replaces it. length: Content-Length."""
        content = self.body if body is None else body
        default = self.length if body is None else len(content)
        self.handler.send_response(self.status if status is None else status)
        for name, value in [*self.headers, *((key.replace("_", "-"), value) for key, value in headers.items())]:
            self.handler.send_header(name, value)
        self.handler.send_header("Content-Length", str(default if length is None else length))
        self.handler.send_header("Connection", "close")
        self.handler.end_headers()
        if self.handler.command != "HEAD":
            self.handler.wfile.write(content)
            self.handler.wfile.flush()
        self.handler.close_connection = True


class FaultProxy(LoopbackServer):
    """A proxy at `url` in front of the server at the address `upstream`; a context manager.

    Attributes:
        fault: called for each exchange; returns True where it has sent something else than the answer.
        requests: "METHOD path" of those so far.
    """

    def __init__(self, upstream: str) -> None:
        host = urllib.parse.urlsplit(upstream)
        self.upstream = upstream
        self.fault: Callable[[Exchange], bool] = lambda exchange: False
        self.requests: list[str] = []
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                with suppress(ConnectionError, TimeoutError):  # the client has given up
                    exchange = proxy._forward(self, host.hostname or "", host.port or 80)
                    if not proxy.fault(exchange):
                        exchange.send()

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

            def log_message(self, *args: object) -> None:
                pass

        super().__init__(Handler)

    def _forward(self, handler: BaseHTTPRequestHandler, host: str, port: int) -> Exchange:
        """Send a request on, and return it with its answer."""
        with self._lock:
            number = len(self.requests)
            self.requests.append(f"{handler.command} {handler.path}")
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        connection = http.client.HTTPConnection(host, port, timeout=60)
        try:
            headers = {name: value for name, value in handler.headers.items() if name.lower() != "connection"}
            connection.request(handler.command, handler.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
            kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in _OWN_HEADERS]
            length = int(answer.getheader("Content-Length") or len(content))
            return Exchange(self, handler, number, answer.status, kept, content, length)
        finally:
            connection.close()


# ---- faults, by name -------------------------------------------------------------------------------------------------


def stall(exchange: Exchange) -> None:
    """Send half of the answer, and nothing more until the proxy ends."""
    exchange.send(body=exchange.body[: len(exchange.body) // 2], length=exchange.length)
    exchange.proxy.released.wait(120)


def reset(exchange: Exchange) -> None:
    """Send half of the answer, and reset the connection."""
    exchange.send(body=exchange.body[: len(exchange.body) // 2], length=exchange.length)
    exchange.handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    exchange.handler.connection.close()


def corrupt(exchange: Exchange) -> None:
    """Flip a bit, another one each time."""
    body = bytearray(exchange.body)
    if body:
        rng = random.Random(exchange.number)
        body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
    exchange.send(body=bytes(body))


REDIRECT = (
    b"<Error><Code>TemporaryRedirect</Code><Message>Please re-send this request to the specified endpoint.</Message></Error>"
)
"""What S3 sends with a redirect; others send anything."""

FAULTS: dict[str, Callable[[Exchange], None]] = {
    "stall": stall,
    "500": lambda exchange: exchange.send(500, b"internal error"),
    "503": lambda exchange: exchange.send(503, b"<Error><Code>SlowDown</Code><Message>Slow down</Message></Error>"),
    "reset half-way": reset,
    "short body": lambda exchange: exchange.send(body=exchange.body[:-100], length=exchange.length),
    "Content-Length too small": lambda exchange: exchange.send(length=max(0, exchange.length - 100)),
    "Content-Length too large": lambda exchange: exchange.send(length=exchange.length + 100),
    "corrupted bytes": corrupt,
    "redirect": lambda exchange: exchange.send(307, REDIRECT, Location=f"{exchange.proxy.upstream}{exchange.handler.path}"),
    "another file": lambda exchange: exchange.send(200, b"<html>log in</html>"),
}
"""Each sends something else than the answer of an exchange."""
