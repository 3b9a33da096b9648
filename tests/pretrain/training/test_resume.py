"""A run of one process that was stopped, by a signal or kill -9 at any moment, resumes bit for bit."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.support import Small, read_losses, read_sample_keys, run_clipfuse
from tests.support.launches import clipfuse_command, start_launcher

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
def uninterrupted(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    run_clipfuse("pretrain", "scenes", *settings(small, run, 0), cwd=run.parent)
    return run


def assert_equal_runs(run: Path, uninterrupted: Path) -> None:
    assert read_losses(run) == read_losses(uninterrupted)
    assert list(read_losses(run)) == list(range(1, STEPS + 1))
    assert read_sample_keys(run) == read_sample_keys(uninterrupted)
    last = f"checkpoints/step-{STEPS:07d}/model.safetensors"
    assert (run / last).read_bytes() == (uninterrupted / last).read_bytes()


STOPS = [
    (signal.SIGKILL, 0),
    (signal.SIGTERM, 3),
    (signal.SIGKILL, 3),
    (signal.SIGINT, 1),
    (signal.SIGUSR1, 0),
]
"""(signal, data.workers) of each stop; the run resumes after each."""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_stopped_five_times_at_random_moments_equals_one_never_stopped(
    small: Small, uninterrupted: Path, tmp_path: Path
) -> None:
    """Two stops are kill -9; the others save, exit with 75 and print the command that resumes."""
    run, rng, stop_step = tmp_path / "run", random.Random(0), 0
    metrics = run / "metrics.jsonl"
    for number, workers in STOPS:
        stop_step += rng.randint(2, 20)
        with start_launcher(*clipfuse_command("pretrain", "scenes", *settings(small, run, workers)), cwd=tmp_path) as started:
            while started.process.poll() is None and (not metrics.exists() or max(read_losses(run), default=0) < stop_step):
                time.sleep(0.01)
            time.sleep(rng.random() * 0.05)
            assert started.process.poll() is None, started.output[-3000:]
            if number != signal.SIGKILL:
                started.process.send_signal(number)
                output = started.wait_for_exit(75)
                assert f"stopped by {number.name}" in output
                assert "resume with: clipfuse pretrain" in output
            else:
                os.killpg(started.process.pid, number)
                started.wait_for_exit(-number)
        stop_step = max(read_losses(run))
        assert read_losses(run).items() <= read_losses(uninterrupted).items()
    run_clipfuse("pretrain", "scenes", *settings(small, run, 3), cwd=tmp_path)
    assert_equal_runs(run, uninterrupted)
