"""Invariant 3 for one process: stopped anywhere, by anything, a run goes on bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import Small, environment, read_losses, read_sample_keys, run_clipfuse
from tests.support.launches import TIMEOUT_SECONDS

STEPS = 150


def settings(small: Small, run: Path, workers: int, *more: str) -> list[str]:
    return small.settings(
        run,
        f"train.steps={STEPS}",
        f"data.workers={workers}",
        "train.save_every=7",
        "train.audit=true",
        "image.patch_dropout=0.25",
        "optim.average=0.9",
        "data.augment.flip=true",
        *more,
    )


@pytest.fixture(scope="module")
def straight(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that was never stopped."""
    run = tmp_path_factory.mktemp("straight") / "run"
    run_clipfuse("pretrain", "scenes", *settings(small, run, 0), cwd=run.parent)
    return run


def start(small: Small, run: Path, workers: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "launch.cli", "pretrain", "scenes", *settings(small, run, workers)]
    with (run.parent / "log.txt").open("ab") as log:
        return subprocess.Popen(command, cwd=run.parent, env=environment(), stdout=log, stderr=log, start_new_session=True)


def same(run: Path, straight: Path) -> None:
    assert read_losses(run) == read_losses(straight)
    assert list(read_losses(run)) == list(range(1, STEPS + 1))
    assert read_sample_keys(run) == read_sample_keys(straight)
    last = f"checkpoints/step-{STEPS:07d}/model.safetensors"
    assert (run / last).read_bytes() == (straight / last).read_bytes()


STOPS = [
    (signal.SIGKILL, 0),
    (signal.SIGTERM, 3),
    (signal.SIGKILL, 3),
    (signal.SIGINT, 1),
    (signal.SIGUSR1, 0),
]
"""(signal, data.workers): each stops what the one before left."""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_stopped_by_anything_at_random_moments(small: Small, straight: Path, tmp_path: Path) -> None:
    """Five stops of one run: the two kill -9 say nothing, the others save, end with 75 and say how to go on."""
    run, dice, at = tmp_path / "run", random.Random(0), 0
    metrics, log = run / "metrics.jsonl", tmp_path / "log.txt"
    for number, workers in STOPS:
        at += dice.randint(2, 20)
        before = len(log.read_text()) if log.exists() else 0
        process = start(small, run, workers)
        try:
            while process.poll() is None and (not metrics.exists() or max(read_losses(run), default=0) < at):
                time.sleep(0.01)
            time.sleep(dice.random() * 0.05)
            assert process.poll() is None, log.read_text()[-3000:]
            if number != signal.SIGKILL:
                process.send_signal(number)
                assert process.wait(TIMEOUT_SECONDS) == 75
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if number != signal.SIGKILL:
            said = log.read_text()[before:]
            assert f"stopped by {number.name}" in said
            assert "resume with: clipfuse pretrain" in said
        at = max(read_losses(run))
        assert read_losses(run).items() <= read_losses(straight).items()
    run_clipfuse("pretrain", "scenes", *settings(small, run, 3), cwd=tmp_path)
    same(run, straight)
