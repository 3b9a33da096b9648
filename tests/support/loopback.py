"""An HTTP server on this machine, in a thread while a `with` block runs."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self


class LoopbackServer:
    """Answers at `url` by `handler`; the port is chosen by the system.

    released: an event that is set when stalled answers shall end, at the latest at the end of the block.
    """

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        self.released = threading.Event()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.handle_error = lambda *args: None  # type: ignore[method-assign]
        self.thread = threading.Thread(target=self.http.serve_forever)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.released.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()
