"""Loss spikes are logged, skipped or undone, alike on all processes and however often the run is stopped.

The losses of a tiny run stay between 2 and 3; a spike is 20 times as large. The references are runs that were never disturbed.
"""

from __future__ import annotations

import math
import shutil
import statistics
from pathlib import Path

import pytest
import torch

from launch import cli
from pretrain.training.config import TrainConfig
from pretrain.training.spikes import RollingMedian, SpikeWatch
from tests.support import Small, read_jsonl, read_losses, read_sample_keys
from tests.support.relay import read_batch_keys, run_processes

STEPS = 20
EVERY = 4
"""Steps between log lines, and between checkpoints."""


def settings(small: Small, run: Path | str, *more: str) -> list[str]:
    """Return the settings of a run whose losses are judged from the fifth step on."""
    return small.settings(
        run,
        f"train.steps={STEPS}",
        f"train.log_every={EVERY}",
        f"train.save_every={EVERY}",
        "train.keep=1",
        "train.audit=true",
        "train.spike_window=5",
        "optim.schedule=constant",
        "optim.average=0.9",
        "loss.name=tests.support.failing_loss",
        "loss.how=spike",
        *more,
    )


def run(small: Small, path: Path, *more: str) -> Path:
    """Train in this process; return the run folder."""
    assert cli.main(["pretrain", "scenes", *settings(small, path, *more)]) == 0
    return path


def spike(first: int, last: int | None = None) -> list[str]:
    """Return the settings of a spike in the calls of the loss from `first` to `last`."""
    return [f"loss.at={first}", f"loss.until={last or first}"]


def weights(run: Path, step: int = STEPS) -> bytes:
    return (run / f"checkpoints/step-{step:07d}/state/weights/model.safetensors").read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# The threshold


def test_the_threshold_is_the_median_and_six_robust_deviations() -> None:
    generator = torch.Generator().manual_seed(0)
    losses = [2 + 0.1 * float(torch.randn((), generator=generator)) for _ in range(40)]
    losses[10], losses[20] = math.nan, 30.0  # the first is left out, the second hardly counts
    median = RollingMedian(15, 6.0)
    for i, loss in enumerate(losses):
        finite = [x for x in losses[:i] if math.isfinite(x)][-15:]
        if len(finite) < 15:
            assert math.isnan(float(median.threshold()))
        else:
            center = statistics.median(finite)
            deviation = 1.4826 * statistics.median(abs(x - center) for x in finite)
            assert float(median.threshold()) == pytest.approx(center + 6 * max(deviation, 0.01 * center), rel=1e-6)
        median.add(torch.tensor(loss))


def test_a_plateau_and_normal_noise_have_no_spikes() -> None:
    noise = torch.randn(3000, generator=torch.Generator().manual_seed(1))
    for losses in (torch.full((300,), 2.0) + 1e-5 * noise[:300], 2 + 0.2 * noise):
        watch = SpikeWatch(TrainConfig(steps=1), torch.device("cpu"))
        for step, loss in enumerate(losses, 1):
            watch.record({"loss": loss, "skipped": torch.zeros(())})
            watch.judge(watch.pending(), step)
        assert watch.metrics() == {"spikes": 0}


# ---------------------------------------------------------------------------------------------------------------------
# One process


@pytest.fixture(scope="module")
def undisturbed(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a spike, with all its checkpoints."""
    return run(small, tmp_path_factory.mktemp("spikes") / "undisturbed", "train.keep=0", "loss.at=1000")


@pytest.fixture(scope="module")
def rolled(small: Small, undisturbed: Path) -> Path:
    """The same run with spikes in steps 9 and 10, and a rollback."""
    return run(small, undisturbed.parent / "rolled", "train.on_spike=rollback", *spike(9, 10))


@pytest.fixture(scope="module")
def skipped(small: Small, undisturbed: Path) -> Path:
    """The same run with a spike in step 10 that is skipped."""
    return run(small, undisturbed.parent / "skipped", "train.on_spike=skip", "train.log_every=1", *spike(10))


def test_a_logged_spike_changes_no_number(small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logged = run(small, tmp_path / "logged", "train.steps=12", *spike(10))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "is a spike" in line]
    assert line.startswith("step 10: loss ")
    ignored = run(small, tmp_path / "ignored", "train.steps=12", "train.on_spike=ignore", *spike(10))
    assert read_losses(logged) == read_losses(ignored)
    assert weights(logged, 12) == weights(ignored, 12)
    assert [line["spikes"] for line in read_jsonl(logged / "metrics.jsonl")] == [0, 0, 1]
    assert "spikes" not in read_jsonl(ignored / "metrics.jsonl")[0]


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_skipped_spike_is_skipped_like_a_gradient_that_is_not_finite(
    small: Small, skipped: Path, tmp_path: Path, chunks: int
) -> None:
    more = [f"train.chunks={chunks}", "train.log_every=1"]
    if chunks > 1:
        skipped = run(small, tmp_path / "skipped", "train.on_spike=skip", *spike(10), *more)
    reference = run(small, tmp_path / "nan", "train.on_spike=ignore", "loss.how=nan", *spike(10), *more)
    losses, expected = read_losses(skipped), read_losses(reference)
    assert losses.pop(10) > 20
    assert expected.pop(10) is None
    assert losses == expected
    assert weights(skipped) == weights(reference)
    last = read_jsonl(skipped / "metrics.jsonl")[-1]
    assert (last["skipped"], last["spikes"]) == (1, 1)


def train_on_from(small: Small, origin: Path, good: int, step: int, folder: Path) -> Path:
    """Train on from the checkpoint `good` of a run, but with the data that follow `step`."""
    copy = folder / f"step-{good:07d}"
    shutil.copytree(origin / "checkpoints" / copy.name, copy)
    (copy / "manifest.json").unlink()
    path = copy / "state/trainer.pt"
    state = torch.load(path, weights_only=True)
    state["step"], state["loader"]["position"] = step, step * state["loader"]["batch_size"]
    torch.save(state, path)
    return run(small, folder / "reference", f"resume={copy}", "train.on_spike=ignore", "loss.at=1000")


def test_a_rollback_goes_on_from_the_good_checkpoint_with_the_next_data(
    small: Small, undisturbed: Path, rolled: Path, tmp_path: Path
) -> None:
    """Checkpoint 8 is followed by the spike in step 9 and may have caused it; checkpoint 4 is good."""
    reference = train_on_from(small, undisturbed, 4, 12, tmp_path)
    losses = read_losses(rolled)
    assert {step: losses[step] for step in (4, 8)} == {step: read_losses(undisturbed)[step] for step in (4, 8)}
    assert {step: losses[step] for step in (16, 20)} == read_losses(reference)
    assert weights(rolled) == weights(reference)
    assert read_sample_keys(rolled) == read_sample_keys(undisturbed)  # a step is a consumed batch
    last = read_jsonl(rolled / "metrics.jsonl")[-1]
    assert (last["spikes"], last["rollbacks"], last["undone_steps"]) == (2, 1, 8)


def test_a_rollback_is_exact_however_often_the_run_is_stopped(
    small: Small, rolled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped while the spike waits for its rollback, and after it."""
    stopped = tmp_path / "stopped"
    for stop in (10, 14, 0):
        begun = max(read_sample_keys(stopped), default=0) if stopped.exists() else 0
        spikes = [f"loss.at={9 - begun}", f"loss.until={10 - begun}", f"loss.stop_at={max(0, stop - begun)}"]
        words = settings(small, stopped, "train.on_spike=rollback", *spikes)
        assert cli.main(["pretrain", "scenes", *words]) == (75 if stop else 0)
    assert read_losses(stopped) == read_losses(rolled)
    assert weights(stopped) == weights(rolled)
    assert read_sample_keys(stopped) == read_sample_keys(rolled)
    spike_line, rollback_line = [line for line in capsys.readouterr().err.splitlines() if "is a spike" in line]
    assert spike_line.startswith("step 9: loss ")
    assert rollback_line == (
        "step 12: the loss of step 9 is a spike; back to step-0000004, on with step 13: the updates of steps 5 to 12 are "
        "undone (rollback 1 of at most 3)"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Two processes


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", ["skip", "rollback"])
def test_two_processes_decide_as_one_does(small: Small, request: pytest.FixtureRequest, tmp_path: Path, mode: str) -> None:
    one: Path = request.getfixturevalue("skipped" if mode == "skip" else "rolled")
    more = ["train.log_every=1", *spike(10)] if mode == "skip" else spike(9, 10)
    words = settings(small, tmp_path / "two", f"train.on_spike={mode}", "train.strategy=ddp", *more)
    assert run_processes(2, ["scenes", *words], tmp_path) == 0
    assert read_batch_keys(tmp_path / "two", 2) == read_batch_keys(one, 1)
    assert read_losses(tmp_path / "two") == pytest.approx(read_losses(one), rel=2e-5)
    lines = [read_jsonl(path / "metrics.jsonl")[-1] for path in (one, tmp_path / "two")]
    for name in ("skipped", "spikes", "rollbacks", "undone_steps"):
        assert lines[0].get(name) == lines[1].get(name)


# ---------------------------------------------------------------------------------------------------------------------
# Bounds


def test_rollbacks_are_bounded_and_without_a_checkpoint_there_is_none(
    small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["train.on_spike=rollback", "train.max_rollbacks=1", "train.log_every=1", "train.save_every=6"]
    words = settings(small, "again", *more, "train.max_skipped=2", "loss.how=nan", *spike(9, 14))
    assert cli.main(["pretrain", "scenes", *words]) == 1  # the second two NaN in a row are after the rollback
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("clipfuse: ")]
    assert "step 12: 2 steps in a row were skipped, after 1 rollback to " in line
    assert "checkpoints/step-0000006 (train.max_rollbacks)" in line
    assert cli.main(["pretrain", "scenes", *settings(small, "early", *more, "train.save_every=50", *spike(8))]) == 0
    *_, line = [line for line in capsys.readouterr().err.splitlines() if "is a spike" in line]
    assert "there is no checkpoint to go back to (none is known to be good), so the run goes on" in line
    for key, value in (("train.on_spike", "rewind"), ("train.spike_window", "2000000")):
        assert cli.main(["pretrain", "scenes", *settings(small, "wrong", f"{key}={value}")]) == 2
        assert key in capsys.readouterr().err
