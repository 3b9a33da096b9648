"""Run a function on several ranks: one call forks them, joins them in a gloo group, and ends them all.

A fork server imports torch, DeepSpeed and the towers once; processes are forked from it in a fraction of a second.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import io
import multiprocessing
import multiprocessing.forkserver
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as td

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
}
PRELOAD = ["torch", "torch.distributed.tensor", "timm", "transformers", "deepspeed", "tests.support.preload"]


def run(work: Callable[..., Any], processes: int, *args: Any, timeout: float = 540.0) -> list[Any]:
    """Call work(*args) on each rank of a gloo group of `processes`; return the results by rank.

    Raises AssertionError if a rank raises, dies, or does not end within `timeout` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = server()
        pipes = [context.Pipe(duplex=False) for _ in range(processes)]
        ranks = [
            context.Process(target=_main, args=(rank, processes, folder, pipes[rank][1], work, args), daemon=True)
            for rank in range(processes)
        ]
        try:
            for rank in ranks:
                rank.start()
            for _, sender in pipes:
                sender.close()
            return _collect([receiver for receiver, _ in pipes], time.monotonic() + timeout)
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()


def _collect(receivers: list[Connection], deadline: float) -> list[Any]:
    """Receive one result from every rank, in any order; deadline: monotonic seconds."""
    results: dict[int, Any] = {}
    while len(results) < len(receivers):
        waiting = [r for i, r in enumerate(receivers) if i not in results]
        ready = multiprocessing.connection.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        assert ready, f"ranks {[i for i in range(len(receivers)) if i not in results]} did not end in time"
        for receiver in ready:
            rank = receivers.index(receiver)  # type: ignore[arg-type]
            try:
                succeeded, value = receivers[rank].recv()
            except EOFError:
                raise AssertionError(f"rank {rank} died without a result") from None
            assert succeeded, f"rank {rank}:\n{value}"
            results[rank] = torch.load(io.BytesIO(value), weights_only=False)
    return [results[rank] for rank in range(len(receivers))]


def server() -> Any:
    """Start the fork server if it does not run, with ENVIRONMENT, and return its multiprocessing context."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    previous = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        for name, value in previous.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return context


def _main(rank: int, processes: int, folder: str, result: Connection, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Run one rank: join the group, call `work`, send (True, its result) or (False, its traceback)."""
    warnings.simplefilter("ignore")
    faulthandler.enable()  # prints a traceback if a library crashes the process
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(processes))
    try:
        if processes > 1:
            store = td.FileStore(str(Path(folder) / "store"), processes)
            limit = datetime.timedelta(seconds=300)
            td.init_process_group("gloo", store=store, rank=rank, world_size=processes, timeout=limit)
        value = io.BytesIO()
        torch.save(work(*args), value)  # serialized: a tensor sent as such lives only as long as this process
        result.send((True, value.getvalue()))
        if td.is_initialized():
            td.barrier()  # no rank leaves while another still communicates with it
    except BaseException:
        with contextlib.suppress(OSError):
            result.send((False, traceback.format_exc()))
    os._exit(0)  # threads of DeepSpeed and gloo would block a normal exit
