"""Runs of forked processes that call what a launcher starts, for tests of stops and of changing numbers of processes."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pretrain.train
from pretrain.runtime import distributed, entrypoint
from pretrain.training.run_state import Run
from tests.support import read_sample_keys, world

Moment = Literal["computing", "evaluating", "saving"]
"""When a signal arrives; "computing" is left to the loss (failing_loss)."""


def run_processes(processes: int, arguments: list[str], cwd: Path, moment: Moment = "computing") -> int:
    """Run `python -m pretrain ARGUMENTS` as so many processes of a group; return the exit code, which all must share.

    moment: "evaluating" or "saving": the last rank receives SIGTERM in the first evaluation or while saving first.
    """
    (code,) = set(world.run(_run, processes, str(cwd), arguments, moment))
    assert isinstance(code, int)
    return code


def read_batch_keys(run: Path, processes: int) -> dict[int, list[str]]:
    """Read {step: sample keys of the whole batch, in order} from the audit files of a run on so many processes.

    Steps that fewer processes computed are left out.
    """
    by_rank = [read_sample_keys(run, rank) for rank in range(processes)]
    return {step: [key for keys in by_rank for key in keys[step]] for step in by_rank[-1]}


def _run(folder: str, arguments: list[str], moment: Moment) -> int:
    os.chdir(folder)
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # it starts data workers
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="1")  # checked, but the group exists
    if moment == "evaluating":
        pretrain.train.evaluate = _signal_first(pretrain.train.evaluate)
    elif moment == "saving":
        Run.save = _signal_first(Run.save)  # type: ignore[method-assign]
    return entrypoint.main(arguments)


def _signal_first(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, which sends SIGTERM to its process at the beginning of its first call, on the last rank."""
    calls = 0

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1 and distributed.rank() == distributed.world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args, **kwargs)

    return call
