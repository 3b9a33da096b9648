"""clipfuse pretrain --nproc N, and the other launchers: the same losses, our exit codes, signals, restarts."""

import json
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.launch.worlds import (
    BIN,
    Started,
    clipfuse_words,
    free_port,
    kill,
    said,
    started,
    tiny,
    torchrun_words,
)
from tests.support import ROOT, Small, losses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STEPS = 30


@pytest.fixture(scope="module")
def undisturbed(small: Small, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Step -> loss of a run of two processes that nobody stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    words = tiny(small, folder / "run", f"train.steps={STEPS}")
    with started(*clipfuse_words("pretrain", "--nproc", "2", *words), cwd=folder) as run:
        run.end(0)
    found = losses(folder / "run")
    assert list(found) == list(range(1, STEPS + 1))
    return found


def status(run: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((run / "status.json").read_text())
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Four ways to start, one loss


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param([BIN / "torchrun", "--nproc-per-node", "2", "--standalone", "-m", "pretrain"], id="torchrun"),
        pytest.param(
            [BIN / "accelerate", "launch", "--config_file", ROOT / "launch/accelerate/cpu.yaml", "-m", "pretrain"],
            id="accelerate",
        ),
        pytest.param([BIN / "deepspeed", "--num_gpus", "2", "--master_port", "PORT", "--module", "pretrain"], id="deepspeed"),
    ],
)
def test_every_launcher_gives_the_same_losses(
    launcher: list[str | Path], small: Small, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    words = [str(free_port()) if word == "PORT" else word for word in launcher]
    run = tmp_path / "run"
    path = f"{BIN}:/usr/bin:/bin"  # deepspeed finds its own programs there
    with started(*words, *tiny(small, run, f"train.steps={STEPS}"), cwd=tmp_path, PATH=path) as launched:
        launched.end(0)
    assert losses(run) == undisturbed


def test_processes_that_do_not_know_each_other_are_refused(small: Small, tmp_path: Path) -> None:
    words = [BIN / "accelerate", "launch", "--cpu", "--num_processes", "2", "-m", "pretrain"]
    with started(*words, *tiny(small, tmp_path / "run", "train.steps=4"), cwd=tmp_path) as launched:
        output = launched.end(1)
    assert [line for line in said(output) if "several processes and started ONE" in line]
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Exit codes


def test_wrong_usage_is_two_and_said_once(small: Small, tmp_path: Path) -> None:
    words = tiny(small, tmp_path / "run", "train.steps=4", "optim.lrr=1")
    with started(*clipfuse_words("pretrain", "--nproc", "2", *words), cwd=tmp_path) as launched:
        output = launched.end(2)
    assert len(said(output)) == 1
    assert "unknown key optim.lrr" in output
    assert "Traceback" not in output


def test_the_launcher_refuses_before_it_starts_anything(tmp_path: Path) -> None:
    for words, line in (
        (["no-such-config", "--nproc", "2"], "no configuration 'no-such-config'"),
        (["scenes", "--nproc", "two"], "--nproc 'two' must be a number"),
        (["scenes", "--nproc", "gpus"], "no GPU here"),
        (["scenes", "--nproc", "2", "--nodes", "2"], "--nodes 2 needs --rdzv HOST:PORT"),
    ):
        with started(*clipfuse_words("pretrain", *words), cwd=tmp_path) as launched:
            output = launched.end(2)
        assert line in output
        assert len(output.splitlines()) == 1


def test_signals_are_agreed_saved_and_resumed(small: Small, undisturbed: dict[int, float], tmp_path: Path) -> None:
    """Stopped three times in three ways, the run has the losses of the one that was not."""
    run = tmp_path / "run"
    words = clipfuse_words("pretrain", "--nproc", "2", *tiny(small, run, f"train.steps={STEPS}", "train.save_every=1000"))
    for number, after in ((signal.SIGTERM, 3), (signal.SIGINT, 8), (signal.SIGUSR1, 13)):
        with started(*words, cwd=tmp_path) as launched:
            launched.until(rf"step {after}/{STEPS} ")
            launched.process.send_signal(number)
            output = launched.end(75)
        assert f"stopped by {number.name} at step" in output
        assert "go on with: clipfuse pretrain scenes --nproc=2" in output
        assert status(run)["state"] == "stopped"
        assert status(run)["why"] == f"stopped by {number.name}"
    with started(*words, cwd=tmp_path) as launched:
        launched.end(0)
    assert status(run)["state"] == "done"
    assert losses(run) == undisturbed


def test_a_signal_before_training_is_resumable(small: Small, tmp_path: Path) -> None:
    words = clipfuse_words("pretrain", "--nproc", "2", *tiny(small, tmp_path / "run", "train.steps=4"))
    with started(*words, cwd=tmp_path) as launched:
        end = time.monotonic() + 120
        while len(launched.ranks()) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        launched.process.send_signal(signal.SIGTERM)
        assert "stopped by SIGTERM before training began" in launched.end(75)


# ---------------------------------------------------------------------------------------------------------------------
# Lost processes


def test_a_killed_process_ends_the_run_with_its_name(small: Small, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = clipfuse_words("pretrain", "--nproc", "2", *tiny(small, run, "train.steps=3000"))
    with started(*words, cwd=tmp_path) as launched:
        launched.until("step 3/")
        victim = launched.ranks()[1]
        victim.kill()
        begin = time.monotonic()
        output = launched.end(1, 60)
    assert time.monotonic() - begin < 45
    assert f"process 1 ({_host()}, pid {victim.pid}) died" in output
    assert "process 1 was killed by SIGKILL" in output
    assert status(run)["state"] == "failed"
    assert f"pid {victim.pid}" in str(status(run)["why"])


def test_a_frozen_process_ends_the_run_within_the_timeout(small: Small, tmp_path: Path) -> None:
    """SIGSTOP: alive for the kernel, silent for everybody else."""
    run = tmp_path / "run"
    words = clipfuse_words("pretrain", "--nproc", "2", *tiny(small, run, "train.steps=3000", "train.timeout=15"))
    with started(*words, cwd=tmp_path) as launched:
        launched.until("step 3/")
        victim = launched.ranks()[1]
        victim.suspend()
        begin = time.monotonic()
        launched.until(rf"process 1 \({_host()}, pid {victim.pid}\) (is gone|hangs)")
        assert time.monotonic() - begin < 15 + 10
        launched.end(1, 90)  # the frozen one has to be killed
    assert status(run)["state"] == "failed"


def test_a_killed_launcher_leaves_nothing_behind(small: Small, tmp_path: Path) -> None:
    words = clipfuse_words("pretrain", "--nproc", "2", *tiny(small, tmp_path / "run", "train.steps=3000"))
    with started(*words, cwd=tmp_path) as launched:
        launched.until("step 3/")
        ranks = launched.ranks()
        assert len(ranks) == 2
        kill(launched.process.pid)
        launched.process.wait()
        end = time.monotonic() + 30
        while any(each.is_running() for each in ranks.values()) and time.monotonic() < end:
            time.sleep(0.2)
        assert not [each for each in ranks.values() if each.is_running()]


def test_a_lost_process_is_started_again(small: Small, undisturbed: dict[int, float], tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = tiny(small, run, f"train.steps={STEPS}", "train.save_every=5")
    with started(*clipfuse_words("pretrain", "--nproc", "2", "--restarts", "1", *words), cwd=tmp_path) as launched:
        launched.until("step 7/")
        launched.ranks()[1].kill()
        output = launched.end(0)
    assert "again from the last checkpoint (0 restarts left)" in output
    assert losses(run) == undisturbed


# ---------------------------------------------------------------------------------------------------------------------
# Two nodes


@pytest.mark.parametrize("launcher", ["clipfuse", "torchrun"])
def test_a_node_that_is_lost_comes_back_and_the_run_goes_on(
    launcher: str, small: Small, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    run, port = tmp_path / "run", free_port()
    settings = tiny(small, run, f"train.steps={STEPS}", "train.save_every=5")
    env = {}
    if launcher == "clipfuse":
        words = clipfuse_words("pretrain", "--nproc", "1", "--nodes", "2", "--rdzv", f"127.0.0.1:{port}", *settings)
    else:
        meet = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
        words = [*torchrun_words(*meet, "--max-restarts", "3"), *settings]
        env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else torch looks for the lost node at its old address
    with started(*words, cwd=tmp_path, **env) as first:
        _wait_for_port(port, first)  # this one holds the rendezvous
        with started(*words, cwd=tmp_path, **env) as second:
            _until_either(rf"step 7/{STEPS} ", first, second)
            second.ranks()
            kill(second.process.pid)
            second.process.wait()
        with started(*words, cwd=tmp_path, **env) as back:
            first.end(0)
            back.end(0)
    assert "resuming" in first.output + back.output
    assert losses(run) == undisturbed


def _wait_for_port(port: int, launched: Started) -> None:
    import socket

    end = time.monotonic() + 120
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert launched.process.poll() is None, launched.output
        time.sleep(0.1)
    raise AssertionError(f"nobody listens at {port}\n{launched.output}")


def _until_either(pattern: str, *each: Started) -> None:
    import re

    end = time.monotonic() + 240
    while not re.search(pattern, "".join(one.output for one in each)):
        for one in each:
            assert one.process.poll() is None, one.output[-4000:]
        assert time.monotonic() < end, "".join(one.output for one in each)[-6000:]
        time.sleep(0.1)


def _host() -> str:
    import os

    return os.uname().nodename


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def test_out_of_memory_is_one_line_with_the_peak_and_three_settings(small: Small, tmp_path: Path) -> None:
    """A model whose gradients and moments are more than the process may have."""
    settings = [
        *tiny(small, tmp_path / "run", "train.steps=4")[1:],
        "train.strategy=single",
        "data.batch_size=64",
        "image.args={patch_size: 16, embed_dim: 4096, depth: 2, num_heads: 2, global_pool: avg, fc_norm: false}",
    ]
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (9 << 30, 9 << 30)); "
    code = limit + "from launch.cli import main; sys.exit(main(sys.argv[1:]))"
    with started(sys.executable, "-c", code, "pretrain", "scenes", *settings, cwd=tmp_path) as launched:
        output = launched.end(1)
    line = said(output)
    assert len(line) == 1
    assert "out of memory after step 0: peak " in line[0]
    assert "train.chunks=2" in line[0]
    assert "image.checkpointing=true text.checkpointing=true" in line[0]
    assert "data.batch_size=32" in line[0]
