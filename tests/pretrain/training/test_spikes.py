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
        "image.patch_dropout=0.25",
        "loss.name=tests.support.failing_loss",
        "loss.how=spike",
        *more,
    )


def run(small: Small, name: str, *more: str) -> Path:
    """Train in this process; return the run folder."""
    assert cli.main(["pretrain", "scenes", *settings(small, name, *more)]) == 0
    return Path("runs", name)


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


def test_a_logged_spike_changes_no_number(small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logged = run(small, "logged", *spike(10))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "is a spike" in line]
    assert line.startswith("step 10: loss ")
    ignored = run(small, "ignored", "train.on_spike=ignore", *spike(10))
    assert read_losses(logged) == read_losses(ignored)
    assert weights(logged) == weights(ignored)
    assert [line["spikes"] for line in read_jsonl(logged / "metrics.jsonl")] == [0, 0, 1, 1, 1]
    assert "spikes" not in read_jsonl(ignored / "metrics.jsonl")[0]


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_skipped_spike_is_skipped_like_a_gradient_that_is_not_finite(small: Small, in_tmp: Path, chunks: int) -> None:
    more = [f"train.chunks={chunks}", "train.log_every=1", "image.patch_dropout=0"]
    skipped = run(small, "skipped", "train.on_spike=skip", *spike(10), *more)
    reference = run(small, "nan", "train.on_spike=ignore", "loss.how=nan", *spike(10), *more)
    losses, expected = read_losses(skipped), read_losses(reference)
    assert losses.pop(10) > 20
    assert expected.pop(10) is None
    assert losses == expected
    assert weights(skipped) == weights(reference)
    last = read_jsonl(skipped / "metrics.jsonl")[-1]
    assert (last["skipped"], last["spikes"]) == (1, 1)


def reference_after(small: Small, origin: Path, good: int, step: int, name: str) -> Path:
    """Train on from the checkpoint `good` of a run that has no spikes, but with the data that follow `step`."""
    copy = Path(f"at-{step}-from-{good}")
    shutil.copytree(origin / f"checkpoints/step-{good:07d}", copy)
    (copy / "manifest.json").unlink()
    path = copy / "state/trainer.pt"
    state = torch.load(path, weights_only=True)
    state["step"], state["loader"]["position"] = step, step * state["loader"]["batch_size"]
    torch.save(state, path)
    return run(small, name, f"resume={copy}", "train.on_spike=ignore", "loss.at=1000")


def test_a_rollback_goes_on_from_the_good_checkpoint_with_the_next_data(
    small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checkpoint 8 is followed by the spike in step 9 and may have caused it; checkpoint 4 is good."""
    undisturbed = run(small, "undisturbed", "train.keep=0", "loss.at=1000")
    capsys.readouterr()
    rolled = run(small, "rolled", "train.on_spike=rollback", *spike(9, 10))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "is a spike" in line]
    assert "back to step-0000004, on with step 13: the updates of steps 5 to 12 are undone (rollback 1 of at most 3)" in line
    reference = reference_after(small, undisturbed, 4, 12, "reference")
    losses = read_losses(rolled)
    assert {step: losses[step] for step in (4, 8)} == {step: read_losses(undisturbed)[step] for step in (4, 8)}
    assert {step: losses[step] for step in (16, 20)} == read_losses(reference)
    assert weights(rolled) == weights(reference)
    assert read_sample_keys(rolled) == read_sample_keys(undisturbed)  # a step is a consumed batch
    last = read_jsonl(rolled / "metrics.jsonl")[-1]
    assert (last["spikes"], last["rollbacks"], last["undone_steps"]) == (2, 1, 8)
    # -- stopped while the spike is open, and after the rollback: the same bits, keys and counts
    stopped = Path("runs/stopped")
    for stop in (10, 14, 0):
        begun = max(read_sample_keys(stopped), default=0) if stopped.exists() else 0
        spikes = [f"loss.at={9 - begun}", f"loss.until={10 - begun}", f"loss.stop_at={max(0, stop - begun)}"]
        words = settings(small, "stopped", "train.on_spike=rollback", *spikes)
        assert cli.main(["pretrain", "scenes", *words]) == (75 if stop else 0)
    assert read_losses(stopped) == read_losses(rolled)
    assert weights(stopped) == weights(rolled)
    assert read_sample_keys(stopped) == read_sample_keys(undisturbed)


# ---------------------------------------------------------------------------------------------------------------------
# Two processes


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", ["skip", "rollback"])
def test_two_processes_decide_as_one_does(small: Small, tmp_path: Path, mode: str) -> None:
    """One process of two sees the spike in its own loss only; the mean counts."""
    runs = {processes: tmp_path / str(processes) for processes in (1, 2)}
    for processes, path in runs.items():
        strategy = f"train.strategy={'single' if processes == 1 else 'ddp'}"
        more = [f"train.on_spike={mode}", strategy, "image.patch_dropout=0", *spike(10)]
        assert run_processes(processes, ["scenes", *settings(small, path, *more)], tmp_path) == 0
    assert read_batch_keys(runs[2], 2) == read_batch_keys(runs[1], 1)
    assert read_losses(runs[2]) == pytest.approx(read_losses(runs[1]), rel=2e-5)
    lines = [read_jsonl(path / "metrics.jsonl")[-1] for path in runs.values()]
    for name in ("skipped", "spikes", "rollbacks", "undone_steps"):
        assert lines[0].get(name) == lines[1].get(name)
    assert lines[0]["spikes"] == 1


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
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "is a spike" in line]
    assert "there is no checkpoint to go back to (none is known to be good), so the run goes on" in line
    for value, words in (("rewind", "train.on_spike"), ("1e9", "train.spike_window")):
        setting = f"{words}={value}"
        assert cli.main(["pretrain", "scenes", *settings(small, "wrong", setting)]) == 2
        assert words in capsys.readouterr().err
