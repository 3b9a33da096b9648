"""A save that fails or is killed at any file operation hides no checkpoint and leaves nothing behind after the next one."""

import os
import shutil
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoints import rotation, store, writing
from pretrain.checkpoints.background import CheckpointWriter
from pretrain.errors import UserError

OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.link", "os.symlink")
"""Events of sys.addaudithook(), which Python raises just before it asks the system for a change of files."""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
DONE, REFUSED, KILLED, NOT_REACHED, BROKEN = 0, 3, 9, 4, 5


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a loss of power leaves is not tested here."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def save(checkpoints: Path, step: int, value: float, is_background: bool = False, **more: Any) -> Path:
    content: writing.Content = {
        "state/trainer.pt": lambda path: path.write_bytes(b"state"),
        "model.safetensors": writing.weights_file({"w": torch.full((4,), value)}),
        "config.yaml": lambda path: path.write_text("a: 1\n"),
    }
    work = partial(writing.write_checkpoint, checkpoints, step, content, keep=2, **more)
    writer = CheckpointWriter(is_background)
    writer.start(f"step {step}", lambda report: work(report=report))
    return writer.wait()


def run_until(work: Callable[[], Any], folder: Path, count: int, kill: bool) -> int:
    """Run `work` in a forked process whose file operation number `count` in `folder` fails, or kills it; return how it ended.

    An operation that fails raises OSError, and those after it succeed.
    """
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    operations = 0

    def interrupt() -> None:
        nonlocal operations
        operations += 1
        if operations == count and kill:
            os._exit(KILLED)
        if operations == count:
            raise OSError(28, "No space left on device")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        is_change = event in OPERATIONS and (event != "open" or arguments[2] & WRITES)
        path = str(arguments[0]) if is_change else "/"
        if not os.path.isabs(path) or path.startswith(os.fspath(folder)):  # relative to an open folder, in shutil.rmtree
            interrupt()

    code = BROKEN
    try:
        os.fsync = lambda handle: interrupt()  # it raises no audit event
        sys.addaudithook(hook)  # for the rest of this process only
        work()
        code = DONE if operations >= count else NOT_REACHED
    except UserError:
        code = REFUSED
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


@pytest.mark.parametrize("is_background", [False, True], ids=["at once", "in the background"])
@pytest.mark.parametrize("kill", [False, True], ids=["fails", "killed"])
def test_a_save_of_the_same_step_can_be_interrupted_anywhere(tmp_path: Path, kill: bool, is_background: bool) -> None:
    """After each file operation that fails or kills, the newest checkpoint is there and loads, for readers and for the run."""
    intact = tmp_path / "intact"
    save(intact, 1, 1.0)
    save(intact, 2, 2.0, best=True)
    ends, values = [], set()
    for count in range(1, 1000):
        checkpoints = Path(shutil.copytree(intact, tmp_path / "run" / "checkpoints"))
        work = partial(save, checkpoints, 2, 2.5, is_background, best=True)
        ends.append(run_until(work, checkpoints, count, kill))
        if ends[-1] == NOT_REACHED:
            break
        messages: list[str] = []
        newest = store.find_newest(checkpoints, messages.append)
        assert newest is not None, count
        assert not messages, count
        assert store.parse_step(newest) == 2, count
        for found in (newest, store.find(checkpoints.parent), store.find(checkpoints / "step-0000002")):
            value = float(store.read_weights(found)["w"][0])
            assert value in (2.0, 2.5), count
            values.add(value)
        assert store.integrity_error(checkpoints / "step-0000001") is None, count
        writing.recover(checkpoints)
        assert store.find_newest(checkpoints, messages.append) == checkpoints / "step-0000002", count
        assert store.read_pointer(checkpoints, "best") == checkpoints / "step-0000002", count
        save(checkpoints, 3, 3.0)
        names = sorted(path.name for path in checkpoints.iterdir())
        assert [name for name in names if "latest." not in name and "best." not in name] == [
            "best", "latest", "step-0000002", "step-0000003",
        ], count  # fmt: skip
        shutil.rmtree(checkpoints.parent)
    assert len(ends) > 30, len(ends)
    assert values == {2.0, 2.5}
    assert set(ends[:-1]) == ({KILLED} if kill else {DONE, REFUSED})
    assert ends[-1] == NOT_REACHED


@pytest.mark.parametrize("is_background", [False, True], ids=["at once", "in the background"])
def test_a_killed_save_of_the_best_checkpoint_is_finished(tmp_path: Path, is_background: bool) -> None:
    """Else `best` would name a worse one for good: the run has this one's score, which no later one may reach."""
    intact = tmp_path / "intact"
    save(intact, 1, 1.0, best=True)
    ends, best = [], set()
    for count in range(1, 1000):
        checkpoints = Path(shutil.copytree(intact, tmp_path / "run"))
        ends.append(run_until(partial(save, checkpoints, 2, 2.0, is_background, best=True), checkpoints, count, True))
        if ends[-1] == NOT_REACHED:
            break
        writing.recover(checkpoints)
        newest = store.find_newest(checkpoints, print)
        assert newest is not None
        assert store.read_pointer(checkpoints, "best") == store.read_pointer(checkpoints, "latest") == newest, count
        best.add(newest.name)
        shutil.rmtree(checkpoints)
    assert best == {"step-0000001", "step-0000002"}


def test_a_rename_that_fails_is_undone(tmp_path: Path) -> None:
    """Without the next start's recovery: whoever reads the folder meanwhile finds the checkpoint under its name."""
    save(tmp_path, 2, 2.0)
    renames = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename" and renames and str(arguments[1]).endswith("step-0000002"):
            renames.clear()
            raise OSError(5, "Input/output error")

    sys.addaudithook(hook)  # for good, but it does nothing after its one failure
    with pytest.raises(UserError, match="Input/output error; older ones are intact"):
        save(tmp_path, 2, 2.5)
    assert not renames
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-0000002"]
    assert float(store.read_weights(tmp_path / "step-0000002")["w"][0]) == 2.0


def test_abandoned_checkpoints_without_their_marker_stay(tmp_path: Path) -> None:
    """As an earlier version left them, or a deletion of the marker: whether a branch of its own has begun is not known."""
    save(tmp_path, 1, 1.0)
    save(tmp_path / "abandoned", 5, 5.0)
    aside = tmp_path / "abandoned" / "step-0000005"
    for marker in (None, "", "x"):
        if marker is not None:
            (tmp_path / "abandoned" / "branch_step").write_text(marker)
        for step in (2, 3):
            save(tmp_path, step, 2.0, good=tmp_path / "step-0000001", is_good=step == 3)
            assert store.integrity_error(aside) is None


def test_a_killed_deletion_of_abandoned_checkpoints_is_finished_later(tmp_path: Path) -> None:
    intact = tmp_path / "intact"
    one = save(intact, 1, 1.0)
    save(intact, 2, 2.0)
    rotation.set_aside(intact, one, 1)
    for count in range(1, 1000):
        checkpoints = Path(shutil.copytree(intact, tmp_path / "run"))
        end = run_until(lambda folder=checkpoints: save(folder, 2, 2.5, is_good=True), checkpoints / "abandoned", count, True)
        save(checkpoints, 3, 3.0, is_good=True)
        assert not (checkpoints / "abandoned").exists(), count
        shutil.rmtree(checkpoints)
        if end != KILLED:
            break
    assert count > 4


def test_a_link_to_another_disk_is_replaced_and_not_what_it_leads_to(tmp_path: Path) -> None:
    """Also one that leads nowhere: the disk is not mounted."""
    checkpoints, disk = tmp_path / "checkpoints", tmp_path / "disk"
    save(checkpoints, 2, 2.0).rename(disk)
    for target in (disk, tmp_path / "unmounted"):
        shutil.rmtree(checkpoints / "step-0000002", ignore_errors=True)
        (checkpoints / "step-0000002").symlink_to(target)
        save(checkpoints, 2, 2.5)
        assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step-0000002"]
        assert float(store.read_weights(checkpoints / "step-0000002")["w"][0]) == 2.5
    assert float(store.read_weights(disk)["w"][0]) == 2.0
