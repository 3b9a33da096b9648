"""Processes that work on one job after the other, as those that write shards: stopped by Ctrl-C without a trace.

They are started anew, not forked, because pyarrow and matrix products have threads. Imports no torch.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from typing import Any

from pretrain.errors import UserError
from pretrain.runtime.orphans import exit_with_parent

_stop_event: Event | None = None


class JobStopped(Exception):  # noqa: N818 - a request, not an error
    """The parent process stops: the job is given up."""


def raise_if_stopped() -> None:
    """Raise JobStopped in a worker process whose parent stops; long jobs call it now and then."""
    if _stop_event is not None and _stop_event.is_set():
        raise JobStopped


def run_jobs(
    function: Callable[..., Any], jobs: Iterator[tuple[int, tuple[Any, ...]]], workers: int
) -> Iterator[tuple[int, Any]]:
    """Yield (number of the job, result) as jobs finish, in processes if `workers` is more than one.

    Args:
        function: called with the arguments of a job; pickled, as are arguments and results.
        jobs: (number, arguments). Few are taken ahead, because they may contain images.
        workers: number of processes.

    Raises:
        UserError: a process died. Errors of the function are raised as they are.
    """
    if workers == 1:
        for number, arguments in jobs:
            yield number, function(*arguments)
        return
    pending: dict[Future[Any], int] = {}
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(workers, context, _initialize_worker, (os.getpid(), stop))
    try:
        for number, arguments in jobs:
            with _block_interrupts():
                future = pool.submit(function, *arguments)
            pending[future] = number
            if len(pending) > workers:
                yield from _pop_finished(pending)
        while pending:
            yield from _pop_finished(pending)
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process died, perhaps because memory ran out: run the same command again with fewer workers to resume"
        ) from error
    finally:
        stop.set()  # all jobs are done, or those in work are given up
        with _block_interrupts():  # a second Ctrl-C would leave processes that start without what they need
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _block_interrupts() -> Iterator[None]:
    """Delay Ctrl-C, also for processes that are started inside: they inherit this and never print a traceback of it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _pop_finished(pending: dict[Future[Any], int]) -> Iterator[tuple[int, Any]]:
    """Wait until at least one job has finished; remove and yield all that have."""
    for future in wait(pending, return_when=FIRST_COMPLETED).done:
        yield pending.pop(future), future.result()


def _initialize_worker(parent: int, stop: Event) -> None:
    """Leave Ctrl-C to the parent process, and end this worker when the parent ends or sets `stop`."""
    global _stop_event
    _stop_event = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exit_with_parent(parent)
