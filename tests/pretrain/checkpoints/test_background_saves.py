"""Saves in the background write the files of a save at once, and change no number of the training around them."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path

import pytest

from pretrain.checkpoints import background, store
from pretrain.checkpoints.background import CheckpointWriter, Report
from pretrain.checkpoints.writing import SaveError
from tests.support import Small, read_losses
from tests.support.faulty_disk import Disk, run_pretraining

STEPS, EVERY = 7, 3
SLOW = Disk(0.4, delayed_file="optimizer.pt")
"""The file that is written first: training goes on by several steps before the copies are read."""


def settings(small: Small, run: Path, *more: str) -> list[str]:
    """Return the arguments of a run whose weights and optimizer state change much from step to step."""
    return [
        "scenes",
        *small.settings(
            run,
            f"train.steps={STEPS}",
            f"train.save_every={EVERY}",
            "train.keep=0",
            "optim.lr=1e-2",
            "optim.average=0.9",
            *more,
        ),
    ]


def digests(run: Path) -> dict[str, dict[str, str]]:
    """Return by checkpoint and file the SHA-256 of its manifest, without config.yaml, which names the run."""
    folders = store.list_complete(run / "checkpoints")
    entries = {folder.name: json.loads((folder / "manifest.json").read_text())["files"] for folder in folders}
    return {
        name: {file: entry["sha256"] for file, entry in files.items() if file != "config.yaml"}
        for name, files in entries.items()
    }


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("strategy", "processes"), [("single", 1), ("fsdp2", 2)])
def test_the_files_are_those_of_a_save_at_once(small: Small, tmp_path: Path, strategy: str, processes: int) -> None:
    more = [f"train.strategy={strategy}"]
    if processes == 1:
        more += [f"data.val={small.val}", "eval.workers=0", "train.eval_every=4", "eval.max_samples=16"]
    for name, word, disk in (("once", "false", Disk()), ("background", "true", SLOW)):
        words = settings(small, tmp_path / name, *more, f"train.background_saves={word}")
        codes, _ = run_pretraining(processes, words, tmp_path, disk)
        assert codes == [0] * processes
    once, in_background = digests(tmp_path / "once"), digests(tmp_path / "background")
    assert len(once) >= 3
    assert in_background == once
    assert read_losses(tmp_path / "background") == read_losses(tmp_path / "once")
    if processes > 1:
        return
    for name in ("best", "latest"):
        assert (tmp_path / "background/checkpoints" / name).read_text() == (tmp_path / "once/checkpoints" / name).read_text()
    words = settings(small, tmp_path / "unsaved", *more, "train.save_every=1000", "train.eval_every=0")
    assert run_pretraining(1, words, tmp_path, Disk())[0] == [0]
    assert read_losses(tmp_path / "unsaved") == read_losses(tmp_path / "once")
    last = f"checkpoints/step-{STEPS:07d}/state/weights/model.safetensors"
    assert (tmp_path / "unsaved" / last).read_bytes() == (tmp_path / "background" / last).read_bytes()


@pytest.mark.timeout(200)
def test_a_run_that_fails_or_stops_waits_for_the_save_in_flight(small: Small, tmp_path: Path) -> None:
    """A bug in the step after the save began; a signal in that step."""
    for how, code in (("crash", None), ("terminate", 75)):
        run = tmp_path / how
        words = settings(small, run, "loss.name=tests.support.failing_loss", f"loss.how={how}", f"loss.at={EVERY + 1}")
        if code is None:
            with pytest.raises(AssertionError, match="a bug in a loss"):
                run_pretraining(1, words, tmp_path, SLOW)
        else:
            assert run_pretraining(1, words, tmp_path, SLOW)[0] == [code]
        saved = store.list_complete(run / "checkpoints")
        assert [store.parse_step(folder) for folder in saved] == [EVERY, EVERY + 1][: 1 if code is None else 2]
        assert all(store.integrity_error(folder) is None for folder in saved)
        assert not list((run / "checkpoints").glob(".*"))


def test_a_long_wait_is_said_with_what_it_is_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(background, "FIRST_SECONDS", 1.0)
    release = threading.Event()

    def work(report: Report) -> Path:
        report("writing state/optimizer.pt")
        release.wait(30)
        return tmp_path

    writer = CheckpointWriter(True)
    writer.start("the checkpoint of step 7", work)
    assert not writer.is_done()
    threading.Timer(1.5, release.set).start()
    assert writer.wait() == tmp_path
    line = capsys.readouterr().err.splitlines()[0]
    assert re.fullmatch(r"waiting for the checkpoint of step 7 since 0:0\d: writing state/optimizer\.pt", line)


def test_an_error_of_the_thread_is_raised_where_it_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(report: Report) -> Path:
        raise SaveError("the disk is full")

    writer = CheckpointWriter(True)
    writer.start("a checkpoint", fail)
    with pytest.raises(SaveError, match="the disk is full"):
        writer.wait()
    writer.start("a checkpoint", lambda report: tmp_path)
    assert writer.wait() == tmp_path
    writer.start("a checkpoint", fail)
    writer.finish()
    assert capsys.readouterr().err == "the disk is full\n"


def test_ctrl_c_twice_ends_the_save_before_its_next_file(tmp_path: Path) -> None:
    started, files = threading.Event(), []

    def work(report: Report) -> Path:
        for number in range(100):
            report("writing")
            files.append(number)
            started.set()
            time.sleep(0.1)
        return tmp_path

    writer = CheckpointWriter(True)
    writer.start("a checkpoint", work)
    started.wait()
    writer.finish(is_waiting=False)
    count = len(files)
    time.sleep(0.3)
    assert len(files) == count < 100
