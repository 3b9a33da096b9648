"""clipfuse pretrain --nproc N, and the other launchers: the same losses, our exit codes, signals."""

import signal
import time
from pathlib import Path

import pytest

from tests.support import ROOT, Small, read_losses
from tests.support.launches import (
    BIN,
    STEPS,
    clipfuse_command,
    clipfuse_lines,
    free_port,
    read_status,
    start_launcher,
    tiny_run_args,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


# ---------------------------------------------------------------------------------------------------------------------
# Four ways to start, one loss


def launch(launcher: list[str | Path], small: Small, run: Path, *more: str) -> dict[int, float]:
    path = f"{BIN}:/usr/bin:/bin"  # deepspeed finds its own programs there
    with start_launcher(
        *launcher, *tiny_run_args(small, run, f"train.steps={STEPS}", *more), cwd=run.parent, PATH=path
    ) as launched:
        launched.wait_for_exit(0)
    return read_losses(run)


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param([BIN / "torchrun", "--nproc-per-node", "2", "--standalone", "-m", "pretrain"], id="torchrun"),
        pytest.param(
            [BIN / "accelerate", "launch", "--config_file", ROOT / "launch/accelerate/cpu.yaml", "-m", "pretrain"],
            id="accelerate",
        ),
    ],
)
def test_every_launcher_gives_the_same_losses(
    launcher: list[str | Path], small: Small, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    assert launch(launcher, small, tmp_path / "run") == undisturbed


def test_deepspeeds_launcher_and_file_give_the_same_losses(small: Small, undisturbed: dict[int, float], tmp_path: Path) -> None:
    """ZeRO adds up in another order."""
    pytest.importorskip("deepspeed")
    words: list[str | Path] = [BIN / "deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "--module", "pretrain"]
    file = ROOT / "launch/deepspeed/zero2.json"
    got = launch(words, small, tmp_path / "run", "train.strategy=zero2", f"train.deepspeed={file}")
    assert got == pytest.approx(undisturbed, rel=5e-6)


def test_processes_that_do_not_know_each_other_are_refused(small: Small, tmp_path: Path) -> None:
    words = [BIN / "accelerate", "launch", "--cpu", "--num_processes", "2", "-m", "pretrain"]
    with start_launcher(*words, *tiny_run_args(small, tmp_path / "run", "train.steps=4"), cwd=tmp_path) as launched:
        output = launched.wait_for_exit(1)
    assert [line for line in clipfuse_lines(output) if "several processes and started ONE" in line]
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Exit codes


def test_wrong_usage_is_two_and_said_once(small: Small, tmp_path: Path) -> None:
    words = tiny_run_args(small, tmp_path / "run", "train.steps=4", "optim.lrr=1")
    with start_launcher(*clipfuse_command("pretrain", "--nproc", "2", *words), cwd=tmp_path) as launched:
        output = launched.wait_for_exit(2)
    assert len(clipfuse_lines(output)) == 1
    assert "unknown key optim.lrr" in output
    assert "Traceback" not in output


def test_the_launcher_refuses_before_it_starts_anything(tmp_path: Path) -> None:
    for words, line in (
        (["no-such-config", "--nproc", "2"], "no configuration 'no-such-config'"),
        (["scenes", "--nproc", "two"], "--nproc: 'two' must be a whole number"),
        (["scenes", "--nproc", "gpus"], "no GPU here"),
        (["scenes", "--nproc", "2", "--nodes", "2"], "--nodes 2 needs --rdzv HOST:PORT"),
    ):
        with start_launcher(*clipfuse_command("pretrain", *words), cwd=tmp_path) as launched:
            output = launched.wait_for_exit(2)
        assert line in output
        assert len(output.splitlines()) == 1


def test_signals_are_agreed_saved_and_resumed(small: Small, undisturbed: dict[int, float], tmp_path: Path) -> None:
    """Stopped in two ways (Slurm's, SIGUSR1, is in test_slurm.py), the run has the losses of the one that was not."""
    run = tmp_path / "run"
    words = clipfuse_command(
        "pretrain", "--nproc", "2", *tiny_run_args(small, run, f"train.steps={STEPS}", "train.save_every=1000")
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        with start_launcher(*words, cwd=tmp_path) as launched:
            launched.wait_for_output(rf"step \d+/{STEPS} ")  # any: on a busy machine the first stop may come late
            launched.process.send_signal(number)
            output = launched.wait_for_exit(75)
        assert f"stopped by {number.name} at step" in output
        assert "resume with: clipfuse pretrain scenes --nproc=2" in output
        assert read_status(run)["state"] == "stopped"
        assert read_status(run)["why"] == f"stopped by {number.name}"
    with start_launcher(*words, cwd=tmp_path) as launched:
        launched.wait_for_exit(0)
    assert read_status(run)["state"] == "done"
    assert read_losses(run) == undisturbed


def test_a_signal_before_training_is_resumable(small: Small, tmp_path: Path) -> None:
    words = clipfuse_command("pretrain", "--nproc", "2", *tiny_run_args(small, tmp_path / "run", "train.steps=4"))
    with start_launcher(*words, cwd=tmp_path) as launched:
        end = time.monotonic() + 120
        while len(launched.ranks()) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        launched.process.send_signal(signal.SIGTERM)
        assert "stopped by SIGTERM before training began" in launched.wait_for_exit(75)
