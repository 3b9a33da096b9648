"""A save that fails ends no run, until too many in a row have; all processes decide alike, and nothing incomplete is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launch import cli
from pretrain.checkpoints import store, writing
from pretrain.checkpoints.writing import SaveError
from pretrain.training.config import TrainConfig
from pretrain.training.metrics import JsonLinesFile
from pretrain.training.spikes import SpikeWatch
from tests.support import Small, read_jsonl, read_losses
from tests.support.faulty_disk import Disk, run_pretraining
from tests.support.launches import read_status


def settings(small: Small, run: Path, *more: str) -> list[str]:
    return ["scenes", *small.settings(run, "train.steps=8", "train.save_every=2", "train.keep=0", *more)]


def saved_steps(run: Path) -> list[int]:
    folders = store.list_folders(run / "checkpoints")
    assert all(store.integrity_error(folder) is None for folder in folders)
    return [store.parse_step(folder) for folder in folders]


def failure_lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if "cannot write the checkpoint" in line]


@pytest.mark.parametrize(("background", "strategy", "processes"), [("false", "single", 1), ("true", "ddp", 2)])
def test_training_goes_on_after_a_failed_save(
    small: Small, tmp_path: Path, background: str, strategy: str, processes: int
) -> None:
    """The disk is full at two saves in a row, then not, then at one more: three would end the run."""
    run = tmp_path / "run"
    words = settings(small, run, f"train.strategy={strategy}", f"train.background_saves={background}", "train.steps=12")
    disk = Disk(full_at=(2, 4, 8))
    codes, output = run_pretraining(processes, words, tmp_path, disk)
    assert codes == [0] * processes
    first, second, third = failure_lines(output)
    assert first.startswith(f"cannot write the checkpoint of step 2 into {run}/checkpoints: [Errno 28] No space left on device")
    assert "training goes on, and ends after 2 more failed saves in a row (train.max_failed_saves=3)" in first
    assert "step 4" in second
    assert "ends after 1 more failed save in a row" in second
    assert "step 8" in third
    assert "ends after 2 more" in third
    assert saved_steps(run) == [6, 10, 12]
    assert list(read_losses(run)) == list(range(1, 13))
    assert read_status(run)["state"] == "done"


def test_too_many_failed_saves_end_the_run(small: Small, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = settings(small, run, "train.max_failed_saves=2", "train.strategy=ddp")
    codes, output = run_pretraining(2, words, tmp_path, Disk(full_at=(4, 6)))
    assert codes == [1, 1]
    line = failure_lines(output)[-1]
    assert line.startswith("clipfuse: cannot write the checkpoint of step 6")
    assert "2 saves in a row failed (train.max_failed_saves)" in line
    assert saved_steps(run) == [2]
    assert read_status(run)["state"] == "failed"
    assert read_status(run)["step"] in (6, 7, 8)


@pytest.mark.parametrize(("background", "step"), [("false", 8), ("true", 3)])
def test_a_last_save_that_fails_is_an_error(small: Small, tmp_path: Path, background: str, step: int) -> None:
    """At the end, and at a signal to stop: nothing else would hold the work."""
    run = tmp_path / "run"
    signal = ["loss.name=tests.support.failing_loss", "loss.how=terminate", "loss.at=3"] if step == 3 else []
    words = settings(small, run, f"train.background_saves={background}", "train.max_failed_saves=9", *signal)
    codes, output = run_pretraining(1, words, tmp_path, Disk(full_at=(step,)))
    assert codes == [1]
    assert failure_lines(output)[-1].startswith(f"clipfuse: cannot write the checkpoint of step {step}")
    assert saved_steps(run) == list(range(2, step, 2))


def test_a_folder_that_is_deleted_under_the_run_is_made_anew(small: Small, tmp_path: Path) -> None:
    run = tmp_path / "run"
    codes, output = run_pretraining(1, settings(small, run), tmp_path, Disk(deleted_at=(4,)))
    assert codes == [0]
    (line,) = failure_lines(output)
    assert "step 4" in line
    assert "No such file or directory" in line
    assert f"{run}/checkpoints was deleted under the run; it is made anew" in output
    assert saved_steps(run) == [6, 8]


def test_a_spike_goes_back_to_a_checkpoint_that_could_be_written(small: Small, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ["train.on_spike=rollback", "train.spike_window=3", "train.steps=13", "train.save_every=4", "train.log_every=2"]
    spike = ["loss.name=tests.support.failing_loss", "loss.how=spike", "loss.at=11", "loss.until=11"]
    codes, output = run_pretraining(1, settings(small, run, *more, *spike), tmp_path, Disk(full_at=(8,)))
    assert codes == [0]
    assert len(failure_lines(output)) == 1
    assert "back to step-0000004, on with step 13" in output


def test_a_checkpoint_that_could_not_be_written_is_none_to_go_back_to() -> None:
    spikes = SpikeWatch(TrainConfig(on_spike="rollback", spike_window=3), torch.device("cpu"))

    def step(number: int) -> None:
        spikes.record({"loss": torch.tensor(1.0), "skipped": torch.tensor(0.0)})
        spikes.judge(spikes.pending(), number)

    step(1)
    spikes.note_checkpoint(1)
    spikes.forget_checkpoint(1)
    step(2)
    assert (spikes.good, spikes.candidate) == (0, 0)
    spikes.note_checkpoint(2)
    step(3)
    spikes.note_checkpoint(3)
    step(4)
    assert spikes.good == 3
    spikes.forget_checkpoint(3)  # found out later, in the background
    assert (spikes.good, spikes.candidate) == (2, 0)
    spikes.forget_checkpoint(2)  # not the newest: it was written
    assert spikes.good == 2


def test_a_best_checkpoint_that_could_not_be_written_is_not_the_best(small: Small, tmp_path: Path) -> None:
    """The first evaluation is the best so far; since it is nowhere, the second one is, whatever its score."""
    run = tmp_path / "run"
    more = [f"data.val={small.val}", "eval.workers=0", "eval.max_samples=16", "train.eval_every=2", "train.steps=4"]
    codes, output = run_pretraining(1, settings(small, run, *more, "optim.lr=1e-30"), tmp_path, Disk(full_at=(2,)))
    assert codes == [0]  # the weights hardly change, so that the scores are equal
    assert len(failure_lines(output)) == 1
    assert store.read_pointer(run / "checkpoints", "best") == run / "checkpoints/step-0000004"


def test_a_file_that_is_gone_when_the_manifest_is_written_fails_the_save(tmp_path: Path) -> None:
    """Somebody deletes files of the hidden folder: what is left would be complete by its manifest."""

    def delete(path: Path) -> None:
        path.touch()
        (path.parent / "state/optimizer.pt").unlink()

    with pytest.raises(SaveError, match=r"No such file.*optimizer\.pt"):
        writing.save(tmp_path, 1, {"state/optimizer.pt": Path.touch, "config.yaml": delete}, keep=0)
    assert list(tmp_path.iterdir()) == []


def test_what_fails_after_the_rename_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "latest").mkdir()
    with pytest.raises(SaveError, match="Is a directory") as raised:
        writing.save(tmp_path, 1, {"config.yaml": Path.touch}, keep=0)
    assert raised.value.is_complete
    assert store.integrity_error(tmp_path / "step-0000001") is None


def test_max_failed_saves_is_at_least_one(small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrain", *settings(small, in_tmp / "r", "train.max_failed_saves=0")]) == 2
    assert "train.max_failed_saves=0 must be at least 1" in capsys.readouterr().err


def test_lines_that_a_full_disk_takes_no_more_are_written_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from tests.pretrain.training.test_failures import largest_file

    lines = JsonLinesFile(tmp_path / "metrics.jsonl", 0)
    lines.write({"step": 1})
    with largest_file(20):  # within the second line
        for step in (2, 3, 4):
            lines.write({"step": step})
    assert len(caplog.records) == 1
    assert "metrics.jsonl cannot be written now: File too large" in caplog.text
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1}]
    lines.write({"step": 5})
    lines.close()
    assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
