"""A run that fails ends with all its processes, says why, and loses nothing that was good."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest

from launch import cli
from pretrain.errors import UserError
from pretrain.runtime.orphans import kill
from pretrain.training.run_dir import RunFolder
from tests.support import Small, environment, read_jsonl, read_losses, read_sample_keys
from tests.support.launches import TIMEOUT_SECONDS, clipfuse_command, read_status, start_launcher, tiny_run_args


def pretrain(small: Small, run: str, *more: str) -> int:
    """Run `clipfuse pretrain` in this process and return its exit code."""
    return cli.main(["pretrain", "scenes", *small.settings(run, "data.batch_size=8", *more)])


def failing(how: str, at: int) -> list[str]:
    """Return the settings of a loss that fails at a step."""
    return ["loss.name=tests.support.failing_loss", f"loss.how={how}", f"loss.at={at}"]


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one error line of clipfuse."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("clipfuse: ")]
    return line


def assert_unlocked(run: str) -> None:
    """Assert that no process holds the lock of a run folder."""
    folder = RunFolder(run)
    folder.open()
    folder.close()


def steps(run: str) -> list[int]:
    """Return the steps of a run's complete checkpoints."""
    return sorted(int(path.parent.name[5:]) for path in Path("runs", run, "checkpoints").glob("step-*/manifest.json"))


def digests(run: str, step: int) -> dict[str, str]:
    """Return the SHA-256 of the weights and the state of a checkpoint."""
    manifest = json.loads(Path("runs", run, f"checkpoints/step-{step:07d}/manifest.json").read_text())
    return {name: entry["sha256"] for name, entry in manifest["files"].items() if name.endswith(("optimizer.pt", "tensors"))}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond `size` bytes, as a full disk would, inside the block."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# ---------------------------------------------------------------------------------------------------------------------
# Every failure ends the run with its processes


@pytest.fixture
def no_new_children() -> Iterator[None]:
    """Assert that a test leaves no process behind."""
    before = set(psutil.Process().children(recursive=True))
    yield
    left = set(psutil.Process().children(recursive=True)) - before
    assert not [process for process in left if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.usefixtures("no_new_children")
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("how", ["nan", "crash", "interrupt"])
def test_a_failure_in_a_step_ends_the_workers(
    small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str], how: str, workers: int
) -> None:
    more = ["train.steps=30", "train.max_skipped=2", f"data.workers={workers}", *failing(how, 3)]
    before = psutil.Process().children()
    if how == "crash":
        with pytest.raises(ValueError, match="a bug in a loss") as raised:
            pretrain(small, "r", *more)
        assert psutil.Process().children() == before, raised  # though the traceback still holds the loader
    else:
        assert pretrain(small, "r", *more) == 1
        assert ("not finite for 2 steps" if how == "nan" else "interrupted") in error_line(capsys)
    assert read_status(Path("runs/r"))["state"] == "failed"
    assert_unlocked("r")


@pytest.mark.usefixtures("no_new_children")
def test_a_damaged_validation_shard_ends_the_workers(small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source,) = Path(small.root, "scenes").glob("val-*.tar")
    shard = in_tmp / "val.tar"
    shard.write_bytes(source.read_bytes())
    Path(f"{shard.with_suffix('')}_stats.json").write_text('{"successes": 64}')
    data = shard.read_bytes()
    more = ["train.steps=6", "train.eval_every=3", f"data.val={shard}", "data.workers=1", "eval.workers=2"]
    assert pretrain(small, "whole", *more) == 0
    capsys.readouterr()
    with tarfile.open(shard) as tar:
        header = tar.getmembers()[20].offset
    shard.write_bytes(data[:header] + b"\xff" * 512 + data[header + 512 :])
    os.utime(shard, (1, 1))
    assert pretrain(small, "damaged", *more) == 1
    assert "val.tar" in error_line(capsys)


@pytest.mark.usefixtures("no_new_children")
def test_a_full_disk_at_a_save_leaves_no_partial_folder_and_says_failed(
    small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights fit, the optimizer state does not: torch's writer meets the error."""
    assert pretrain(small, "r", "train.steps=2") == 0
    checkpoint = Path("runs/r/checkpoints/step-0000002")
    limit = (checkpoint / "state/optimizer.pt").stat().st_size // 2
    capsys.readouterr()
    with largest_file(limit):
        assert pretrain(small, "r", "train.steps=4", "data.workers=1") == 1
    message = error_line(capsys)
    assert "cannot write the checkpoint of step 4" in message
    assert "File too large" in message
    assert [path.name for path in Path("runs/r/checkpoints").iterdir() if path.name.endswith("partial")] == []
    assert steps("r") == [2]
    status = read_status(Path("runs/r"))
    assert (status["state"], status["step"]) == ("failed", 4)
    assert "cannot write the checkpoint of step 4" in str(status["why"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_status_says_failed_when_no_new_file_can_be_written(in_tmp: Path) -> None:
    folder = RunFolder("r")
    folder.open()
    folder.write_status("running", "", 0)
    os.symlink("/dev/full", folder.path / f".status.json.{os.getpid()}.partial")
    folder.write_status("failed", "the disk is full", 7)
    folder.close()
    status = read_status(folder.path)
    assert (status["state"], status["why"], status["step"]) == ("failed", "the disk is full", 7)


PROGRAM = """
import os, sys, time
from pretrain.data.prefetch import run_prefetcher
from pretrain.data.shards.cache import ShardCache
from pretrain.data.shards.reader import ShardReader
from pretrain.data.worker_pool import run_workers
from pretrain.training.run_dir import RunFolder

class Slow:
    def __getitem__(self, job):
        if job:
            print(os.getpid(), flush=True)
            time.sleep(1000)
        return job

def batches():
    reader = ShardReader([], ShardCache())
    with run_workers(Slow(), iter(range(100)), 2) as results, run_prefetcher(reader, lambda batch: [], 0, 0):
        yield from results

folder = RunFolder("r")
folder.open()
iterator = batches()
next(iterator)
if sys.argv[1] == "wait":
    next(iterator)
raise ValueError("a bug")
"""
"""Iterates a loader whose workers compute for long, prints their pids, and fails without closing it."""


def test_workers_end_with_a_process_that_left_their_context_open(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "fail"],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("ValueError: a bug")
    assert not [pid for pid in map(int, done.stdout.split()) if psutil.pid_exists(pid)]


def test_workers_of_a_killed_process_end_and_do_not_hold_its_lock(in_tmp: Path) -> None:
    """The workers are within a call that does not return, as in a stalled fetch."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "wait"], env=environment(), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    try:
        for _ in range(2):
            process.stdout.readline()  # a worker computes
        with pytest.raises(UserError, match=f"in use by process {process.pid}"):
            RunFolder("r").open()
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while len(children := psutil.Process(process.pid).children()) < 3:  # and the prefetcher, which starts after them
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.kill()
        process.wait()
        assert_unlocked("r")  # at once, whether or not they have noticed
        _, alive = psutil.wait_procs(children, TIMEOUT_SECONDS)
        assert not alive
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what is left of them
        process.wait()
        process.stdout.close()


def wait_for_ever(started: Connection) -> None:
    """Report that this process runs, and sleep."""
    started.send(True)
    time.sleep(1000)


def test_a_forked_process_does_not_hold_the_lock(in_tmp: Path) -> None:
    folder = RunFolder("r")
    folder.open()
    parent, child = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=wait_for_ever, args=(child,), daemon=True)
    process.start()
    try:
        assert parent.recv()
        with pytest.raises(UserError, match="in use"):
            RunFolder("r").open()
        folder.close()
        assert_unlocked("r")
    finally:
        kill([process])
        parent.close()
        child.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("how", "message"), [("nan", "not finite for 2 steps"), ("interrupt", "interrupted")])
def test_a_failure_ends_a_run_of_two_processes(small: Small, tmp_path: Path, how: str, message: str) -> None:
    """The processes end by themselves: the launcher need not kill one."""
    more = ["data.workers=1", "train.max_skipped=2", "train.steps=30", *failing(how, 3)]
    words = clipfuse_command("pretrain", "--nproc", "2", *tiny_run_args(small, tmp_path / "run", *more))
    with start_launcher(*words, cwd=tmp_path) as launched:
        output = launched.wait_for_exit(1)
    assert message in output
    assert "SIGKILL" not in output
    assert read_status(tmp_path / "run")["state"] == "failed"
    assert_unlocked(f"{tmp_path}/run")


# ---------------------------------------------------------------------------------------------------------------------
# resume=PATH in the same run folder


def test_a_branch_wins_over_the_checkpoints_that_it_left(
    small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = ["train.save_every=2", "train.keep=3"]
    assert pretrain(small, "r", "train.steps=6", *every) == 0
    assert steps("r") == [2, 4, 6]
    # -- it fails before training: nothing is set aside
    assert pretrain(small, "r", "resume=runs/r/checkpoints/step-0000002", "train.steps=6", "seed=9", *every) == 2
    assert steps("r") == [2, 4, 6]
    # -- a branch with another learning rate
    branch = ["resume=runs/r/checkpoints/step-0000002", "train.steps=5", "optim.lr=1e-4", "train.save_every=1", "train.keep=2"]
    assert pretrain(small, "r", *branch, *failing("crash", 9)) == 0
    assert steps("r") == [4, 5]
    assert (in_tmp / "runs/r/checkpoints/latest").read_text() == "step-0000005\n"
    assert not (in_tmp / "runs/r/checkpoints/abandoned").exists()
    assert list(read_losses(in_tmp / "runs/r")) == [1, 2, 3, 4, 5]
    # -- the run goes on from the branch
    capsys.readouterr()
    assert pretrain(small, "r", "train.steps=7", "optim.lr=1e-4") == 0
    assert "resuming runs/r/checkpoints/step-0000005 at step 5 of 7" in capsys.readouterr().err


def test_a_branch_that_was_killed_before_it_saved_still_wins(small: Small, in_tmp: Path) -> None:
    assert pretrain(small, "r", "train.steps=6", "train.save_every=2") == 0
    branch = ["resume=runs/r/checkpoints/step-0000002", "train.steps=6", "train.save_every=5"]
    with pytest.raises(ValueError, match="a bug"):
        pretrain(small, "r", *branch, *failing("crash", 2))
    assert steps("r") == [2]
    assert sorted(path.name for path in Path("runs/r/checkpoints/abandoned").glob("step-*")) == ["step-0000004", "step-0000006"]
    assert pretrain(small, "r", "train.steps=4", "train.save_every=1") == 0
    assert steps("r") == [2, 3, 4]


def test_the_printed_command_and_a_repeated_one_go_on_with_the_branch(
    small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain(small, "r", "train.steps=4", "train.save_every=2") == 0
    resume = "resume=runs/r/checkpoints/step-0000002"
    branch = [resume, "train.steps=9", "train.save_every=1", "train.keep=1", "data.workers=1", *failing("terminate", 3)]
    capsys.readouterr()
    assert pretrain(small, "r", *branch) == 75
    output = capsys.readouterr().err
    assert resume not in output.partition("resume with: clipfuse pretrain scenes")[2]
    assert output.rstrip().endswith("resume=auto")
    assert steps("r")[-1] == 5
    # -- what a scheduler does: the same command again, though its checkpoint has been rotated away
    assert 2 not in steps("r")
    assert pretrain(small, "r", *branch) == 75
    assert "resuming runs/r/checkpoints/step-0000005 at step 5 of 9" in capsys.readouterr().err
    assert pretrain(small, "r", *branch) == 0
    assert steps("r")[-1] == 9
    assert list(read_losses(in_tmp / "runs/r")) == list(range(1, 10))
    # -- the same checkpoint with other settings is another branch
    assert pretrain(small, "r", "resume=runs/r/checkpoints/step-0000009", "train.steps=10", "optim.lr=1e-4") == 0
    assert "resuming runs/r/checkpoints/step-0000009 at step 9 of 10" in capsys.readouterr().err


def test_a_branch_in_another_folder_wins_over_what_lies_there(
    small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain(small, "a", "train.steps=4", "train.save_every=2") == 0
    assert pretrain(small, "b", "train.steps=6", "train.save_every=2", "optim.lr=1e-4", f"data.val={small.val}") == 0
    assert (in_tmp / "runs/b/checkpoints/best").exists()
    for folder in (in_tmp / "runs/b/checkpoints").glob("step-*"):  # usable ones would be refused, see below
        (folder / "model.safetensors").write_bytes(b"")
    branch = ["resume=runs/a/checkpoints/step-0000004", "train.steps=5", "train.keep=1"]
    # -- it is killed before it saves: neither its own checkpoints nor step 0 are gone on with
    with pytest.raises(ValueError, match="a bug"):
        pretrain(small, "b", *branch, *failing("crash", 1))
    capsys.readouterr()
    assert pretrain(small, "b", "train.steps=5") == 1
    assert "the run in runs/b reached step 4" in error_line(capsys)
    # -- it goes on
    assert pretrain(small, "b", *branch) == 0
    assert steps("b") == [5]
    assert digests("b", 5) != {}
    assert pretrain(small, "a", "train.steps=5") == 0
    assert digests("b", 5) == digests("a", 5)
    assert not (in_tmp / "runs/b/checkpoints/best").exists()
    # -- a copy of a checkpoint has any name
    shutil.copytree(in_tmp / "runs/a/checkpoints/step-0000004", in_tmp / "copy of 4")
    assert pretrain(small, "c", "resume=copy of 4", "train.steps=5") == 0
    assert digests("c", 5) == digests("a", 5)


def test_resume_never_is_refused_by_hand_and_goes_on_when_slurm_repeats_it(
    small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["resume=never", "train.steps=6", *failing("terminate", 2)]
    assert pretrain(small, "r", *words) == 75
    assert capsys.readouterr().err.rstrip().endswith("resume=auto")
    assert pretrain(small, "r", *words) == 2
    assert "resume=never would overwrite" in error_line(capsys)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert pretrain(small, "r", *words) == 75
    assert "at step 2 of 6" in capsys.readouterr().err
    assert pretrain(small, "r", *words, "optim.lr=1e-4") == 2


def test_a_damaged_newest_checkpoint_does_not_outlive_the_new_ones(small: Small, in_tmp: Path) -> None:
    assert pretrain(small, "r", "train.steps=6", "train.save_every=2") == 0
    (in_tmp / "runs/r/checkpoints/step-0000006/model.safetensors").write_bytes(b"damaged")
    assert pretrain(small, "r", "train.steps=5", "train.keep=1") == 0
    assert steps("r") == [5]
    assert (in_tmp / "runs/r/checkpoints/latest").read_text() == "step-0000005\n"


def test_the_best_checkpoint_is_one_of_the_branch(small: Small, in_tmp: Path) -> None:
    every = ["train.save_every=2", "train.eval_every=2", f"data.val={small.val}", "eval.workers=0"]
    assert pretrain(small, "r", "train.steps=12", *every) == 0
    best = int((in_tmp / "runs/r/checkpoints/best").read_text()[5:])
    assert pretrain(small, "r", "resume=runs/r/checkpoints/step-0000010", "train.steps=12", "optim.lr=1e-30", *every) == 0
    pointer = in_tmp / "runs/r/checkpoints/best"
    assert (pointer.parent / pointer.read_text().strip() / "manifest.json").exists()
    if best == 12:
        assert pointer.read_text() != "step-0000012\n" or digests("r", 12) == digests("r", 10)


# ---------------------------------------------------------------------------------------------------------------------
# Divergence


def test_divergence_rotates_no_good_checkpoint_away_and_names_it(
    small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checkpoint 4 is never followed by a finite loss: its own update may have broken it. Checkpoint 3 is good."""
    more = ["train.steps=30", "train.save_every=1", "train.keep=1", "train.max_skipped=6"]
    assert pretrain(small, "r", *more, *failing("nan", 5)) == 1
    message = error_line(capsys)
    assert "the last checkpoint with finite losses is runs/r/checkpoints/step-0000003" in message
    assert "not from the later ones" in message
    assert steps("r") == [3, 9]
    # -- it was stopped and resumed in between: the good one is still known
    assert pretrain(small, "r", *more, *failing("nan", 1), "train.max_skipped=3") == 1
    assert "finite losses is runs/r/checkpoints/step-0000003" in error_line(capsys)
    assert steps("r") == [3, 11]
    # -- the advice works
    assert pretrain(small, "r", "train.steps=6", "resume=runs/r/checkpoints/step-0000003") == 0
    assert all(loss is not None for loss in read_losses(in_tmp / "runs/r").values())


def test_divergence_after_a_good_checkpoint_names_that_one(
    small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["train.steps=30", "train.save_every=4", "train.max_skipped=2"]
    assert pretrain(small, "r", *more, *failing("nan", 6)) == 1
    message = error_line(capsys)
    assert "finite losses is runs/r/checkpoints/step-0000004: resume=runs/r/checkpoints/step-0000004 goes on" in message
    assert "later" not in message


def test_divergence_without_a_good_checkpoint_claims_none(
    small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["train.steps=30", "train.max_skipped=2"]
    assert pretrain(small, "none", *more, *failing("nan", 3)) == 1
    assert "no checkpoint was saved before" in error_line(capsys)
    assert pretrain(small, "one", *more, "train.save_every=2", *failing("nan", 3)) == 1
    assert "runs/one/checkpoints/step-0000002 gives no finite losses" in error_line(capsys)


def test_a_good_checkpoint_is_kept_however_its_path_is_written(
    small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """resume=PATH with an absolute path, then three skipped steps that save: the checkpoint of PATH is the good one."""
    assert pretrain(small, "r", "train.steps=2", "train.save_every=1") == 0
    path = in_tmp / "runs/r/checkpoints/step-0000002"
    more = ["train.steps=9", "train.save_every=1", "train.keep=1", "train.max_skipped=3", f"resume={path}"]
    capsys.readouterr()
    assert pretrain(small, "r", *more, *failing("nan", 2)) == 1
    assert "finite losses is runs/r/checkpoints/step-0000002" in error_line(capsys)
    assert 2 in steps("r")


def test_a_checkpoint_that_was_set_aside_is_not_replaced_by_resuming_from_it(
    small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep = ["train.keep=0", "train.save_every=2"]
    assert pretrain(small, "r", "train.steps=4", *keep) == 0
    assert pretrain(small, "r", "train.steps=4", *keep, "resume=runs/r/checkpoints/step-0000002", "optim.lr=1e-4") == 0
    aside = Path("runs/r/checkpoints/abandoned/step-0000004")
    before = (aside / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert pretrain(small, "r", "train.steps=6", *keep, f"resume={aside}") == 0
    assert (aside / "model.safetensors").read_bytes() == before
    assert [path.name for path in Path("runs/r/checkpoints/abandoned/2").iterdir()] == ["step-0000004"]
    assert steps("r") == [6]


def test_abandoned_checkpoints_stay_until_the_branch_has_a_good_one(small: Small, in_tmp: Path) -> None:
    """The first save of a branch whose later steps are all skipped: those weights may be bad, and what it left is kept."""
    every = ["train.save_every=1", "train.keep=1"]
    assert pretrain(small, "r", "train.steps=4", "train.keep=0", "train.save_every=2") == 0
    branch = ["resume=runs/r/checkpoints/step-0000002", "train.steps=9", "train.max_skipped=3", *every]
    assert pretrain(small, "r", *branch, *failing("nan", 1)) == 1
    assert (in_tmp / "runs/r/checkpoints/abandoned/step-0000004/manifest.json").exists()
    # -- a branch without the fault, from what was left: in the end it has a good checkpoint of its own
    assert pretrain(small, "r", "resume=runs/r/checkpoints/abandoned/step-0000004", "train.steps=6", *every) == 0
    assert not (in_tmp / "runs/r/checkpoints/abandoned").exists()


def test_resuming_from_another_run_sets_no_run_aside(small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`resume=runs/other/...` with `run` forgotten: the folder's own checkpoints stay where they are."""
    for run in ("one", "two"):
        assert pretrain(small, run, "train.steps=2") == 0
    capsys.readouterr()
    origin = "runs/two/checkpoints/step-0000002"
    assert pretrain(small, "one", "train.steps=3", f"resume={origin}") == 2
    line = error_line(capsys)
    for words in (origin, "outside the run folder runs/one", "resume=auto", "another run=NAME"):
        assert words in line
    assert steps("one") == [2]
    # -- damaged checkpoints do not count: resume=PATH is the way out of them
    (in_tmp / "runs/one/checkpoints/step-0000002/model.safetensors").write_bytes(b"")
    assert pretrain(small, "one", "train.steps=3", f"resume={origin}") == 0


def test_a_folder_that_is_removed_while_training_hides_no_error(in_tmp: Path) -> None:
    folder = RunFolder("gone")
    folder.open()
    shutil.rmtree(folder.path)
    folder.remove_empty()
    folder.close()


# ---------------------------------------------------------------------------------------------------------------------
# What lies in the folder


@pytest.mark.parametrize("loss", ["manifests", "checkpoints", "folder"])
def test_a_run_whose_checkpoints_are_gone_does_not_start_again(
    small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str], loss: str
) -> None:
    checkpoints = in_tmp / "runs/r/checkpoints"
    assert pretrain(small, "r", "train.steps=4", "train.save_every=2") == 0
    metrics = (in_tmp / "runs/r/metrics.jsonl").read_text()
    for folder in checkpoints.glob("step-*"):
        (folder / "manifest.json").unlink()
        if loss != "manifests":
            shutil.rmtree(folder)
    if loss == "folder":
        shutil.rmtree(checkpoints)
    capsys.readouterr()
    assert pretrain(small, "r", "train.steps=6") == 1
    message = error_line(capsys)
    assert "runs/r" in message
    assert "resume=PATH" in message
    assert "run=NEW" in message
    assert (in_tmp / "runs/r/metrics.jsonl").read_text() == metrics


def test_a_newest_checkpoint_without_its_manifest_is_reported(
    small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain(small, "r", "train.steps=4", "train.save_every=2") == 0
    (in_tmp / "runs/r/checkpoints/step-0000004/manifest.json").unlink()
    capsys.readouterr()
    assert pretrain(small, "r", "train.steps=4") == 0
    output = capsys.readouterr().err
    assert "skipping the damaged checkpoint runs/r/checkpoints/step-0000004: manifest.json" in output
    assert "resuming runs/r/checkpoints/step-0000002 at step 2" in output
    assert steps("r") == [2, 4]


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(small: Small, in_tmp: Path) -> None:
    with pytest.raises(ValueError, match="a bug"):
        pretrain(small, "r", "train.steps=4", *failing("crash", 3))
    assert pretrain(small, "r", "train.steps=4") == 0
    assert list(read_losses(in_tmp / "runs/r")) == [1, 2, 3, 4]


@pytest.mark.parametrize("audit", ["true", "false"])
def test_audits_of_ranks_that_are_gone_are_cut_on_resume(small: Small, in_tmp: Path, audit: str) -> None:
    more = ["train.save_every=2", "train.audit=true"]
    assert pretrain(small, "r", "train.steps=4", *more) == 0
    lines = (in_tmp / "runs/r/audit-0.jsonl").read_text()
    for rank in (1, 11):
        (in_tmp / f"runs/r/audit-{rank}.jsonl").write_text(lines)
    shutil.rmtree(in_tmp / "runs/r/checkpoints/step-0000004")
    assert pretrain(small, "r", "train.steps=5", *more, f"train.audit={audit}") == 0
    assert list(read_sample_keys(in_tmp / "runs/r", 1)) == [1, 2]
    assert list(read_sample_keys(in_tmp / "runs/r", 11)) == [1, 2]
    assert list(read_sample_keys(in_tmp / "runs/r", 0)) == ([1, 2, 3, 4, 5] if audit == "true" else [1, 2])
    assert [line["step"] for line in read_jsonl(in_tmp / "runs/r/metrics.jsonl")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "wrong", ["data.train=gone.tar", "image.name=vit_bas", "init=no/run", "resume=no/run", "text.tokenizer=no/folder"]
)
def test_a_failed_start_leaves_no_folder(small: Small, in_tmp: Path, wrong: str) -> None:
    assert pretrain(small, "r", "train.steps=2", wrong) in (1, 2)
    assert list(in_tmp.iterdir()) == []
    # -- folders that were there stay
    (in_tmp / "runs/r").mkdir(parents=True)
    (in_tmp / "runs/r/notes.txt").write_text("mine")
    assert pretrain(small, "r", "train.steps=2", wrong) in (1, 2)
    assert (in_tmp / "runs/r/notes.txt").read_text() == "mine"


def test_a_failed_start_of_a_run_leaves_what_the_run_saved(small: Small, in_tmp: Path) -> None:
    assert pretrain(small, "r", "train.steps=2") == 0
    status = read_status(in_tmp / "runs/r")
    assert pretrain(small, "r", "train.steps=4", "seed=9") == 2
    assert read_status(in_tmp / "runs/r") == status
    assert steps("r") == [2]
