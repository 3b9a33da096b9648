"""`clipfuse serve`: a page on this machine where a sentence finds images or sounds, and every word shows where it looked.

app.py           the addresses, their headers and forms
site.py          what they answer: searches and questions, as pages and as JSON
filter_form.py   inputs for each field of the index, and the condition that they make
orders.py        the order by embeddings and that after re-ranking, side by side
maps.py          heat maps of words; uploads.py: files that were uploaded lately
media.py         a sound, or the range of its bytes that a browser asks for
*.html.j2        results and questions; macros: what both show; style.css: how it looks

The page holds no script and loads nothing from elsewhere: words are radio buttons, and the style sheet shows the heat maps of
the one that is pressed. Captions, keys and queries are untrusted input, which the template engine escapes.

May import finetune, pretrain, and nothing else of launch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from finetune.search.answering import Answerer
from finetune.search.query import Searcher
from pretrain.errors import UserError


def serve(
    searcher: Searcher,
    host: str = "127.0.0.1",
    port: int = 8000,
    log: Callable[[dict[str, Any]], None] = lambda record: None,
    answerer: Answerer | None = None,
) -> None:
    """Answer requests until the process is interrupted. Raises UserError where the port is taken, or a package is missing.

    Args:
        searcher: answers the queries.
        host: the address to listen at; another than 127.0.0.1 lets other machines in.
        port: 0 = any that is free.
        log: called with a record of each query that was answered.
        answerer: answers questions about results; None = the page asks none.
    """
    import socket

    try:
        import uvicorn

        from launch.serve.app import build_app
    except ImportError as error:
        raise UserError(f"the page needs {error.name}: pip install 'clipfuse[search]'") from error
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UserError(f"cannot listen at {host}:{port}: {error.strerror or error}; --port names another") from error
    address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
    print(f"open {address} (Ctrl-C ends it)", flush=True)
    config = uvicorn.Config(build_app(searcher, [host], log, answerer), log_level="warning", access_log=False)
    uvicorn.Server(config).run(sockets=[listener])
