"""The slowest process is named, and waiting for data is told apart from computing."""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.data.loader import Loader
from pretrain.runtime import distributed, entrypoint
from pretrain.training.objective import Contrastive
from pretrain.training.rank_times import RankTimes, TimedObjective
from tests.support import Small, read_jsonl, world

COMPUTING, WAITING = range(1, 7), range(7, 10)
"""Steps in which the last process is slow to encode, and in which it is slow to read."""

SLEEP = 2.0
"""Seconds by which it is slow in each of these steps, so that a busy machine does not hide them."""


def run_with_a_slow_process(folder: str, arguments: list[str]) -> str:
    """Run one rank of `python -m pretrain ARGUMENTS`, the last of which is slow; return what it prints."""
    os.chdir(folder)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="1")  # checked, but the group exists
    is_slow = distributed.rank() == distributed.world_size() - 1
    encode, iterate = Contrastive.encode, Loader.__iter__
    calls = 0

    def encode_slowly(self: Contrastive, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        time.sleep(SLEEP if is_slow and calls in COMPUTING else 0)
        return encode(self, *args)

    def read_slowly(self: Loader) -> Iterator[Any]:
        with contextlib.closing(iterate(self)) as batches:
            for step, batch in enumerate(batches, 1):
                time.sleep(SLEEP if is_slow and step in WAITING else 0)
                yield batch

    Contrastive.encode, Loader.__iter__ = encode_slowly, read_slowly  # type: ignore[method-assign,assignment]
    output = io.StringIO()
    with contextlib.redirect_stderr(output):
        assert entrypoint.main(arguments) == 0
    return output.getvalue()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_slow_process_is_named_and_so_is_its_cause(small: Small, tmp_path: Path) -> None:
    more = [f"train.steps={WAITING.stop - 1}", "train.strategy=ddp", "train.threads=1"]
    words = ["scenes", *small.settings(tmp_path / "run", *more)]
    output = world.run(run_with_a_slow_process, 2, str(tmp_path), words)[0]
    lines = read_jsonl(tmp_path / "run/metrics.jsonl")
    for line in lines[1:]:
        assert line["step_seconds"] >= line["slowest_rank_seconds"] > line["median_rank_seconds"] > 0
    assert Counter(line["slowest_rank"] for line in lines).most_common(1)[0][0] == 1
    (slow,) = [line for line in output.splitlines() if " is slow, and the others wait for it" in line]
    assert "process 1 (" in slow
    assert "it computes more slowly" in slow
    (starved,) = [line for line in output.splitlines() if " waits for data for " in line]
    assert "process 1 (" in starved
    assert "data.workers=0 reads in the training process itself" in starved
    assert lines[-1]["data_wait_share_max"] > 0.25
    assert lines[-1]["data_wait_share"] < lines[-1]["data_wait_share_max"]  # of rank 0, which waits in collectives


@pytest.fixture
def rank_times() -> RankTimes:
    """Build the comparison of a run of any size, as rank 0 of it has it."""
    return RankTimes(TimedObjective(Contrastive(torch.nn.Identity()), torch.device("cpu")), "process {}".format, 64)


def test_a_process_is_reported_once_and_again_after_it_was_fast(
    rank_times: RankTimes, capsys: pytest.CaptureFixture[str]
) -> None:
    fast, slow = [[0.0] * 4, [0.1, 0.1, 0.1, 0.12]], [[0.0, 0.0, 0.3, 0.0], [0.1] * 4]
    reported = []
    for step, times in enumerate([slow, fast, slow, slow, slow, slow, fast, slow, slow, slow]):
        numbers = rank_times.compare(torch.tensor(times), step, 2.0)
        reported += [step] * len(capsys.readouterr().err.splitlines())
        assert numbers["slowest_rank"] == (3 if times is fast else 2)
        assert numbers["median_rank_seconds"] == pytest.approx(0.1)
    assert reported == [4, 9]


def test_a_run_of_one_process_is_told_that_it_waits(rank_times: RankTimes, capsys: pytest.CaptureFixture[str]) -> None:
    for step, wait in enumerate([0.3, 0.2, 0.3, 0.3, 0.3, 0.2, 0.3, 0.3, 0.3]):
        assert rank_times.compare(torch.tensor([[wait], [0.1]]), step, 1.0) == {}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "step 4: the run waits for data for 30 % of the time, not for computing; data.workers=64 already uses"
    )
