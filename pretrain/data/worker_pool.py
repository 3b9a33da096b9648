"""Worker processes: pieces made for jobs, in order, whoever makes them. torch's DataLoader underneath."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader

from pretrain.data import worker
from pretrain.data.worker import PartialBatch
from pretrain.errors import UserError

EXIT_SECONDS = 10.0
"""Seconds that a killed worker may take until the kernel lets go of it."""


@contextmanager
def run_workers(dataset: Any, jobs: Iterator[Any], workers: int) -> Iterator[Iterator[PartialBatch]]:
    """The pieces for the jobs, in order, made by worker processes (or here, for 0), which end with the context."""
    sigchld = signal.getsignal(signal.SIGCHLD)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)  # more workers than cores: as told
        loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=None,
            sampler=jobs,
            collate_fn=_identity,
            num_workers=workers,
            worker_init_fn=worker.init_worker if workers else None,
            generator=torch.Generator().manual_seed(0),  # its own: the global generator is not drawn from
            # Forked workers start at once; on Linux nothing we use minds.
            multiprocessing_context=multiprocessing.get_context("fork") if workers and sys.platform == "linux" else None,
        )
        pieces: Any = iter(loader)
    # torch raises from SIGCHLD when a worker dies, in whatever the trainer is doing then; asking for the next piece finds
    # out as well.
    if signal.getsignal(signal.SIGCHLD) is not sigchld:
        signal.signal(signal.SIGCHLD, sigchld)
    try:
        yield _raise_on_death(pieces)
    finally:
        end = getattr(pieces, "_shutdown_workers", None)  # otherwise whenever it is collected
        if end is not None:
            end()


def _raise_on_death(pieces: Any) -> Iterator[PartialBatch]:
    """The same pieces; a worker that died is a UserError."""
    while True:
        try:
            piece = next(pieces)
        except StopIteration:
            return
        except (RuntimeError, ConnectionError, EOFError) as error:  # the latter two: it died while it handed a tensor over
            said = str(error)
            raised = "in DataLoader worker process" in said  # by what it ran: it lives
            if raised or (isinstance(error, RuntimeError) and "DataLoader worker" not in said):
                raise
            dead = _find_dead_workers(pieces)
            if not dead:
                raise
            code = dead[0].exitcode
            how = f"was killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"
            why = {
                -signal.SIGKILL: ": most often the machine ran out of memory; lower data.workers or data.window",
                -signal.SIGBUS: ": most often /dev/shm is full; enlarge it (docker: --shm-size) or lower data.workers",
            }.get(code, "")
            raise UserError(f"a data worker (process {dead[0].pid}) {how}{why}") from None
        yield piece


def _find_dead_workers(pieces: Any) -> list[Any]:
    """The workers that ended and should not have: waits for the first, for a broken pipe is seen before its process is gone."""
    workers = list(getattr(pieces, "_workers", []))
    closing = multiprocessing.connection.wait([w.sentinel for w in workers], timeout=EXIT_SECONDS)
    for w in workers:
        if w.sentinel in closing:  # its files are closed; on a busy machine it may take a while until it can be reaped
            w.join(EXIT_SECONDS)
    return [w for w in workers if not w.is_alive() and w.exitcode]


def _identity(piece: Any) -> Any:
    return piece
