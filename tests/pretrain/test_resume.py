"""Invariant 3 for one process: stopped anywhere, by anything, a run goes on bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import Small, clipfuse, environment, keys, losses

STEPS = 60


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
    clipfuse("pretrain", "scenes", *settings(small, run, 0), cwd=run.parent)
    return run


def start(small: Small, run: Path, workers: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "launch.cli", "pretrain", "scenes", *settings(small, run, workers)]
    with (run.parent / "log.txt").open("ab") as log:
        return subprocess.Popen(command, cwd=run.parent, env=environment(), stdout=log, stderr=log, start_new_session=True)


def same(run: Path, straight: Path) -> None:
    assert losses(run) == losses(straight)
    assert list(losses(run)) == list(range(1, STEPS + 1))
    assert keys(run) == keys(straight)
    last = f"checkpoints/step-{STEPS:07d}/model.safetensors"
    assert (run / last).read_bytes() == (straight / last).read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("workers", [0, 3])
def test_killed_at_random_moments(small: Small, straight: Path, tmp_path: Path, workers: int) -> None:
    """kill -9 twice at random steps, then left alone."""
    run, dice = tmp_path / "run", random.Random(workers)
    metrics = run / "metrics.jsonl"
    at = 0
    for _ in range(2):
        at = dice.randint(at + 2, at + 26)
        process = start(small, run, workers)
        try:
            while process.poll() is None and (not metrics.exists() or max(losses(run), default=0) < at):
                time.sleep(0.01)
            time.sleep(dice.random() * 0.05)
            assert process.poll() is None, (tmp_path / "log.txt").read_text()[-3000:]
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    clipfuse("pretrain", "scenes", *settings(small, run, workers), cwd=tmp_path)
    same(run, straight)


def test_signals_save_end_with_75_and_say_how_to_go_on(small: Small, straight: Path, tmp_path: Path) -> None:
    """Each of three stops the run that the one before it stopped."""
    run, before = tmp_path / "run", 0
    for number, workers in ((signal.SIGTERM, 1), (signal.SIGINT, 3), (signal.SIGUSR1, 0)):
        process = start(small, run, workers)
        try:
            while process.poll() is None and (not (run / "metrics.jsonl").exists() or max(losses(run), default=0) < before + 8):
                time.sleep(0.01)
            process.send_signal(number)
            assert process.wait(60) == 75
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log = (tmp_path / "log.txt").read_text()
        assert number.name in log
        assert "clipfuse pretrain" in log
        assert "go on" in log
        before = max(losses(run))
    clipfuse("pretrain", "scenes", *settings(small, run, 3), cwd=tmp_path)
    same(run, straight)
