"""The pool of worker processes, on torch's DataLoader: results come in the order of the jobs."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from pretrain.data import worker
from pretrain.data.worker import PartialBatch
from pretrain.errors import UserError
from pretrain.runtime import orphans

EXIT_SECONDS = 10.0
"""Seconds to wait for a killed worker to exit."""
STOP_SECONDS = 2.0
"""Seconds that all workers together have to finish what they compute, before they are killed."""


class WorkerResults(Iterator[PartialBatch]):
    """The results of worker processes, in the order of their jobs. `next` raises UserError where a worker died.

    loader_iterator: of torch's DataLoader.
    """

    def __init__(self, loader_iterator: Any) -> None:
        self._iterator = loader_iterator
        self.first_dead: list[Any] = []
        """The worker that died, once `_watch_deaths` has noticed."""

    def __next__(self) -> PartialBatch:
        try:
            result: PartialBatch = next(self._iterator)
        except (RuntimeError, OSError, EOFError) as error:  # the latter two: it died while it sent a result
            explained = _explain_death(error, self.first_dead or self.processes)
            if explained is None:
                raise
            raise explained from None
        return result

    @property
    def processes(self) -> list[Any]:
        """The worker processes; empty where the results are computed in this process."""
        return list(getattr(self._iterator, "_workers", []))

    def kill(self) -> None:
        """Kill the workers, so that a `next` in another thread returns."""
        for process in self.processes:
            process.kill()


@contextmanager
def run_workers(dataset: Any, jobs: Iterator[Any], workers: int) -> Iterator[WorkerResults]:
    """Run worker processes while the context is open.

    Args:
        dataset: its `__getitem__` computes the result of a job.
        jobs: the indices into `dataset`, in order.
        workers: number of processes; 0 computes in this process.

    Yields:
        The results, in the order of the jobs.

    The workers end with the context. Where an error leaves it open, they end with this process.
    """
    sigchld = signal.getsignal(signal.SIGCHLD)
    with warnings.catch_warnings():
        # The configuration may ask for more workers than cores.
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=None,
            sampler=jobs,
            collate_fn=_identity,
            num_workers=workers,
            worker_init_fn=partial(worker.init_worker, os.getpid()) if workers else None,
            generator=torch.Generator().manual_seed(0),  # otherwise DataLoader draws from the global generator
            # Forked workers start at once, and on Linux all that is used here works in forked processes.
            multiprocessing_context=multiprocessing.get_context("fork") if workers and sys.platform == "linux" else None,
        )
        results: Any = iter(loader)
    # torch raises from its SIGCHLD handler when a worker dies, in the middle of whatever the trainer does. The handler is
    # removed, because requesting the next result detects the death as well.
    if signal.getsignal(signal.SIGCHLD) is not sigchld:
        signal.signal(signal.SIGCHLD, sigchld)
    cancel = orphans.kill_at_exit(list(getattr(results, "_workers", [])))
    outputs = WorkerResults(results)
    try:
        with _watch_deaths(outputs):
            yield outputs
    finally:
        _stop_workers(results)
        cancel()


@contextmanager
def _watch_deaths(results: WorkerResults) -> Iterator[None]:
    """Let `next` raise, inside the block, whenever a worker dies.

    A worker that is killed while it sends a result leaves half of it in the pipe, and the others wait for its lock for ever.
    So a thread kills them all when one has died, and nothing but workers holds the pipe open: reading it ends.
    """
    processes = results.processes
    queue = getattr(results._iterator, "_worker_result_queue", None)
    if not processes or queue is None:
        yield
        return
    queue._writer.close()  # this process only reads from it
    stopped, stop = multiprocessing.Pipe(duplex=False)

    def watch() -> None:
        waiting = {process.sentinel: process for process in processes}
        while stopped not in (ready := multiprocessing.connection.wait([stopped, *waiting])):
            for process in [waiting.pop(sentinel) for sentinel in ready]:
                if _wait_for_exit_code(process):
                    results.first_dead.append(process)
                    results.kill()
                    return

    thread = threading.Thread(target=watch, name="worker-deaths", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.send(None)
        thread.join(EXIT_SECONDS)
        stop.close()
        stopped.close()


def _stop_workers(results: Any) -> None:
    """End the worker processes: those that do not stop within STOP_SECONDS are killed."""
    processes = list(getattr(results, "_workers", []))
    if not any(process.is_alive() for process in processes):
        if processes:
            results._shutdown_workers()
        return
    # torch joins one worker after another with a limit of five seconds for each; killed workers are joined at once.
    timer = threading.Timer(STOP_SECONDS, lambda: [process.kill() for process in processes])
    timer.daemon = True
    timer.start()
    try:
        results._shutdown_workers()  # torch would call it only at garbage collection
    finally:
        timer.cancel()
        orphans.kill(processes)  # those that ignored torch's SIGTERM


def _explain_death(error: Exception, processes: list[Any]) -> UserError | None:
    """Return the UserError for an error of DataLoader that a dead worker caused; None where it had another cause."""
    message = str(error)
    is_from_dataset = "in DataLoader worker process" in message  # raised by the data set in a live worker
    if not processes or is_from_dataset or (isinstance(error, RuntimeError) and "DataLoader worker" not in message):
        return None
    dead_workers = _find_dead_workers(processes)
    if not dead_workers:
        return None
    code = dead_workers[0].exitcode
    end = f"was killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"
    likely_cause = {
        -signal.SIGKILL: ": most often the machine ran out of memory; lower data.workers or data.window",
        -signal.SIGBUS: ": most often /dev/shm is full; enlarge it (docker: --shm-size) or lower data.workers",
    }.get(code, "")
    return UserError(f"a data worker (process {dead_workers[0].pid}) {end}{likely_cause}")


def _find_dead_workers(workers: list[Any]) -> list[Any]:
    """Return the workers that ended unexpectedly.

    It waits for the first one, because a broken pipe is noticed before the process has exited.
    """
    ending = multiprocessing.connection.wait([w.sentinel for w in workers], timeout=EXIT_SECONDS)
    for w in workers:
        if w.sentinel in ending:
            _wait_for_exit_code(w)
    return [w for w in workers if w.exitcode]


def _wait_for_exit_code(process: Any) -> int | None:
    """Return the exit code of a process whose files are closed: on a busy machine it may not have exited yet.

    Where two threads join a process, one of them returns before the other has noted the exit code.
    """
    end = time.monotonic() + EXIT_SECONDS
    process.join(EXIT_SECONDS)
    while process.exitcode is None and time.monotonic() < end:
        time.sleep(0.001)
    code: int | None = process.exitcode
    return code


def _identity(value: Any) -> Any:
    return value
