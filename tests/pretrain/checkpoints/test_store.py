"""A checkpoint folder is complete or not there, and a damaged one is reported and skipped."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pretrain.checkpoints import rotation, store, writing
from pretrain.errors import UserError


def save(checkpoints: Path, step: int, *, keep: int = 3, **more: Any) -> Path:
    content: writing.Content = {
        "state/trainer.pt": lambda path: path.write_bytes(b"state"),
        "model.safetensors": writing.weights_file({"w": torch.full((4,), float(step))}),
        "config.yaml": lambda path: path.write_text("a: 1\n"),
    }
    return writing.save(checkpoints, step, content, keep=keep, **more)


def test_a_checkpoint_is_complete_and_latest_and_best_name_it(tmp_path: Path) -> None:
    folder = save(tmp_path, 7, best=True)
    assert folder.name == "step-0000007"
    assert sorted(p.name for p in folder.iterdir()) == ["config.yaml", "manifest.json", "model.safetensors", "state"]
    assert (tmp_path / "latest").read_text() == "step-0000007\n" == (tmp_path / "best").read_text()
    assert store.integrity_error(folder) is None
    assert not list(tmp_path.glob(".*partial"))
    torch.testing.assert_close(store.read_weights(folder)["w"], torch.full((4,), 7.0))
    modes = {path.stat().st_mode for path in folder.iterdir() if path.is_file()}
    assert len(modes) == 1  # whoever may read the configuration may read the weights


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in range(1, 7):
        save(tmp_path, step, keep=2, best=step == 2)
    assert [store.parse_step(folder) for folder in store.list_complete(tmp_path)] == [2, 5, 6]


@pytest.mark.parametrize("damage", ["cut", "flip", "remove", "manifest"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_is_used(tmp_path: Path, damage: str) -> None:
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    target = bad / "model.safetensors"
    data = target.read_bytes()
    if damage == "cut":
        target.write_bytes(data[:-1])
    elif damage == "flip":
        target.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "remove":
        target.unlink()
    else:
        (bad / "manifest.json").write_text("{")
    messages: list[str] = []
    assert store.find_newest(tmp_path, messages.append) == good
    assert len(messages) == 1
    assert "step-0000002" in messages[0]
    with pytest.raises(UserError, match="step-0000002"):
        store.find(bad)


def test_a_file_that_cannot_be_read_is_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bad disk: reading raises OSError. The line is no part of what commands print."""
    good, bad = save(tmp_path / "checkpoints", 1), save(tmp_path / "checkpoints", 2)
    (bad / "config.yaml").unlink()
    (bad / "config.yaml").symlink_to("/proc/self/mem")
    manifest = json.loads((bad / "manifest.json").read_text())
    manifest["files"]["config.yaml"]["size"] = 0
    (bad / "manifest.json").write_text(json.dumps(manifest))
    assert store.find(tmp_path) == good
    output = capsys.readouterr()
    assert "skipping the damaged checkpoint" in output.err
    assert "a file cannot be read: [Errno 5] Input/output error" in output.err
    assert not output.out


def test_a_failed_write_leaves_no_folder_and_earlier_checkpoints_intact(tmp_path: Path) -> None:
    good = save(tmp_path, 1)

    def fail(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"step 2 .*No space left on device; older ones are intact"):
        writing.save(tmp_path, 2, {"config.yaml": Path.touch, "model.safetensors": fail}, keep=1)
    assert store.find_newest(tmp_path, print) == good
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-0000001"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_error_line_whichever_library_meets_it(tmp_path: Path) -> None:
    """Real ENOSPC through torch.save's zip writer."""

    def write(path: Path) -> None:
        os.symlink("/dev/full", path)
        writing.tensors_file({"x": torch.zeros(100_000)})(path)

    with pytest.raises(UserError, match=r"cannot write the checkpoint of step 3 .*No space left"):
        writing.save(tmp_path, 3, {"state/trainer.pt": write}, keep=1)


def test_weights_of_another_architecture_are_counted_and_named() -> None:
    weights = {"weight": torch.zeros(3, 2), "extra": torch.zeros(1)}
    with pytest.raises(UserError) as raised:
        store.load_weights(nn.Linear(4, 3), weights, "here")
    message = str(raised.value)
    for words in ("here", "another architecture", "1 weights are missing (first bias)", "1 are not in the model (first extra)"):
        assert words in message
    assert "first weight: [3, 2], the model has [3, 4]" in message


def test_a_path_that_holds_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run or checkpoint at"):
        store.find(tmp_path / "gone")
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        store.find(tmp_path)


def test_rotation_deletes_a_link_and_not_what_it_leads_to(tmp_path: Path) -> None:
    """Somebody moved a checkpoint to a larger disk and left a link."""
    checkpoints, elsewhere = tmp_path / "checkpoints", tmp_path / "disk"
    checkpoints.mkdir()
    save(checkpoints, 1).rename(elsewhere)
    (checkpoints / "step-0000001").symlink_to(elsewhere)
    save(checkpoints, 2, keep=1)
    assert [folder.name for folder in store.list_folders(checkpoints)] == ["step-0000002"]
    assert not os.path.lexists(checkpoints / "step-0000001")
    assert store.integrity_error(elsewhere) is None


def test_a_checkpoint_that_cannot_be_deleted_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file on a network disk that another process reads: the folder around it cannot be removed."""
    save(tmp_path, 1)
    remove = shutil.rmtree

    def busy(folder: Path, **options: bool) -> None:
        if folder.name == "step-0000001":
            raise OSError(39, "Directory not empty", str(folder))
        remove(folder, **options)

    monkeypatch.setattr(shutil, "rmtree", busy)
    assert save(tmp_path, 2, keep=1).name == "step-0000002"
    assert store.integrity_error(tmp_path / "step-0000002") is None
    assert store.find_newest(tmp_path, print) == tmp_path / "step-0000002"


def test_abandoned_checkpoints_are_removed_only_for_a_good_one_of_the_branch(tmp_path: Path) -> None:
    one, _ = save(tmp_path, 1), save(tmp_path, 2)
    assert [folder.name for folder in rotation.set_aside(tmp_path, one, 1)] == ["step-0000002"]
    aside = tmp_path / "abandoned/step-0000002"

    two = save(tmp_path, 2)
    save(tmp_path, 3, good=one)  # of the branch's origin: it says nothing about the branch
    assert store.integrity_error(aside) is None
    save(tmp_path, 4, good=two)
    assert not aside.exists()
    rotation.set_aside(tmp_path, one, 1)
    save(tmp_path, 5, is_good=True)
    assert not (tmp_path / "abandoned").exists()
