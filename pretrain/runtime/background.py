"""An iterator that a thread reads, one item ahead of the caller."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

STOP_SECONDS = 2.0
"""Seconds that the thread has to end by itself, before what it waits for is interrupted."""
EXIT_SECONDS = 20.0
"""Seconds to wait for it after that. It is a daemon: this process ends in any case."""


@dataclass
class _Failure:
    """What ended the thread: an error, or None at the end of the items."""

    error: BaseException | None


@contextmanager
def run_ahead(items: Iterator[T], finish: Callable[[T], R], interrupt: Callable[[], None]) -> Iterator[Iterator[R]]:
    """Read `items` in a thread while the context is open.

    The next item is read while the caller works with the last one. It is finished once the one before it has been taken, so
    that at most one result waits.

    Args:
        items: read by the thread alone.
        finish: turns an item into a result, in the thread.
        interrupt: makes a read of `items` that does not return fail; called where the thread does not end by itself.

    Yields:
        The results, in order. Its `next` raises what was raised in the thread, with that traceback.
    """
    results: queue.SimpleQueue[R | _Failure] = queue.SimpleQueue()
    room = threading.Semaphore()
    is_closed = threading.Event()

    def run() -> None:
        try:
            for item in items:
                room.acquire()
                if is_closed.is_set():
                    return
                results.put(finish(item))
            results.put(_Failure(None))
        except BaseException as error:  # raised again by the caller; after the end of the context nobody is there to see it
            results.put(_Failure(error))

    def take() -> Iterator[R]:
        while True:
            result = results.get()
            if isinstance(result, _Failure):
                if result.error is None:
                    return
                raise result.error
            room.release()
            yield result
            del result  # otherwise it would occupy memory until the next one is there

    thread = threading.Thread(target=run, name="run-ahead", daemon=True)
    thread.start()
    try:
        yield take()
    finally:
        is_closed.set()
        room.release()
        thread.join(STOP_SECONDS)
        if thread.is_alive():
            interrupt()
            thread.join(EXIT_SECONDS)
