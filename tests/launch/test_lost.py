"""Processes and nodes that die, freeze, come back or run out of memory, below `clipfuse pretrain --nproc N`."""

import os
import re
import socket
import sys
import time
from pathlib import Path

import pytest

from tests.support import Small, read_losses
from tests.support.launches import (
    STEPS,
    Launcher,
    clipfuse_command,
    clipfuse_lines,
    free_port,
    kill,
    read_status,
    start_launcher,
    tiny_run_args,
    torchrun_command,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


# ---------------------------------------------------------------------------------------------------------------------
# Lost processes


def test_a_killed_process_ends_the_run_with_its_name(small: Small, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = clipfuse_command("pretrain", "--nproc", "2", *tiny_run_args(small, run, "train.steps=3000"))
    with start_launcher(*words, cwd=tmp_path) as launched:
        launched.wait_for_output("step 3/")
        victim = launched.ranks()[1]
        victim.kill()
        begin = time.monotonic()
        output = launched.wait_for_exit(1, 60)
    assert time.monotonic() - begin < 45
    assert f"process 1 ({_host()}, pid {victim.pid}) died" in output
    assert "process 1 was killed by SIGKILL" in output
    assert read_status(run)["state"] == "failed"
    assert f"pid {victim.pid}" in str(read_status(run)["why"])


def test_a_frozen_process_ends_the_run_within_the_timeout(small: Small, tmp_path: Path) -> None:
    """SIGSTOP: alive for the kernel, silent for everybody else."""
    run = tmp_path / "run"
    words = clipfuse_command("pretrain", "--nproc", "2", *tiny_run_args(small, run, "train.steps=3000", "train.timeout=15"))
    with start_launcher(*words, cwd=tmp_path) as launched:
        launched.wait_for_output("step 3/")
        victim = launched.ranks()[1]
        victim.suspend()
        begin = time.monotonic()
        launched.wait_for_output(rf"process 1 \({_host()}, pid {victim.pid}\) (is dead|stalled)")
        assert time.monotonic() - begin < 15 + 10
        launched.wait_for_exit(1, 90)  # the frozen one has to be killed
    assert read_status(run)["state"] == "failed"


def test_a_killed_launcher_leaves_nothing_behind(small: Small, tmp_path: Path) -> None:
    words = clipfuse_command("pretrain", "--nproc", "2", *tiny_run_args(small, tmp_path / "run", "train.steps=3000"))
    with start_launcher(*words, cwd=tmp_path) as launched:
        launched.wait_for_output("step 3/")
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
    words = tiny_run_args(small, run, f"train.steps={STEPS}", "train.save_every=5")
    with start_launcher(*clipfuse_command("pretrain", "--nproc", "2", "--restarts", "1", *words), cwd=tmp_path) as launched:
        launched.wait_for_output("step 2/")
        victim = launched.ranks()[1]  # found before, as the run takes about a second
        launched.wait_for_output("step 7/")
        victim.kill()
        output = launched.wait_for_exit(0)
    assert "restarting from the last checkpoint (0 restarts left)" in output
    assert read_losses(run) == undisturbed


# ---------------------------------------------------------------------------------------------------------------------
# Two nodes


@pytest.mark.parametrize("launcher", ["clipfuse", "torchrun"])
def test_a_node_that_is_lost_comes_back_and_the_run_goes_on(
    launcher: str, small: Small, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    run, port = tmp_path / "run", free_port()
    settings = tiny_run_args(small, run, f"train.steps={STEPS}", "train.save_every=5")
    env = {}
    if launcher == "clipfuse":
        words = clipfuse_command("pretrain", "--nproc", "1", "--nodes", "2", "--rdzv", f"127.0.0.1:{port}", *settings)
    else:
        meet = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
        words = [*torchrun_command(*meet, "--max-restarts", "3"), *settings]
        env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else torch looks for the lost node at its old address
    with start_launcher(*words, cwd=tmp_path, **env) as first:
        _wait_for_port(port, first)  # this one holds the rendezvous
        with start_launcher(*words, cwd=tmp_path, **env) as second:
            _until_either(rf"step 7/{STEPS} ", first, second)
            second.ranks()
            kill(second.process.pid)
            second.process.wait()
        with start_launcher(*words, cwd=tmp_path, **env) as back:
            first.wait_for_exit(0)
            back.wait_for_exit(0)
    assert "resuming" in first.output + back.output
    assert read_losses(run) == undisturbed


def _wait_for_port(port: int, launched: Launcher) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert launched.process.poll() is None, launched.output
        time.sleep(0.1)
    raise AssertionError(f"nobody listens at {port}\n{launched.output}")


def _until_either(pattern: str, *each: Launcher) -> None:
    end = time.monotonic() + 240
    while not re.search(pattern, "".join(one.output for one in each)):
        for one in each:
            assert one.process.poll() is None, one.output[-4000:]
        assert time.monotonic() < end, "".join(one.output for one in each)[-6000:]
        time.sleep(0.1)


def _host() -> str:
    return os.uname().nodename


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def test_out_of_memory_is_one_line_with_the_peak_and_three_settings(small: Small, tmp_path: Path) -> None:
    """A model whose gradients and moments are more than the process may have."""
    settings = [
        *tiny_run_args(small, tmp_path / "run", "train.steps=4")[1:],
        "train.strategy=single",
        "data.batch_size=64",
        "image.args={patch_size: 16, embed_dim: 2048, depth: 2, num_heads: 2, global_pool: avg, fc_norm: false}",
    ]
    code = (
        "import resource, sys, timm, torch, transformers\n"
        "from launch.cli import main\n"
        "limit = 4096 * int(open('/proc/self/statm').read().split()[0]) + (3 << 29)  # 1.5 GiB more than now\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    with start_launcher(sys.executable, "-c", code, "pretrain", "scenes", *settings, cwd=tmp_path) as launched:
        output = launched.wait_for_exit(1)
    line = clipfuse_lines(output)
    assert len(line) == 1
    assert "out of memory after step 0: peak " in line[0]
    assert "train.chunks=2" in line[0]
    assert "image.checkpointing=true text.checkpointing=true" in line[0]
    assert "data.batch_size=32" in line[0]
