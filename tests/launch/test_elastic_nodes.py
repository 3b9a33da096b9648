"""A run of MIN:MAX nodes: it goes on without a node that is lost for good, and grows when one joins."""

from __future__ import annotations

import argparse
import re
import socket
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from launch import cli, rendezvous
from launch.nodes import find_usable, parse_nodes
from pretrain.config import find_config
from pretrain.errors import ConfigError
from tests.support import Small, read_losses, read_sample_keys
from tests.support.launches import (
    TIMEOUT_SECONDS,
    Launcher,
    clipfuse_command,
    free_port,
    kill,
    start_launcher,
    tiny_run_args,
)

STEPS = 30
FIRST, SECOND = r"1 node of 1:2: 1 process", r"2 nodes of 1:2: 2 processes"


def settings(small: Small, run: Path) -> list[str]:
    """Return the arguments of a run that takes three seconds for each step with one process, 0.3 with two."""
    more = ["train.save_every=5", "train.audit=true", "loss.name=tests.support.failing_loss", "loss.at=1000000"]
    return tiny_run_args(small, run, f"train.steps={STEPS}", *more, "loss.seconds=0.3", "loss.seconds_alone=3")


def read_keys(run: Path) -> dict[int, list[str]]:
    """Read {step: sample keys of the whole batch} of a run on one process or two."""
    first, second = (read_sample_keys(run, rank) if (run / f"audit-{rank}.jsonl").exists() else {} for rank in (0, 1))
    return {step: keys + second.get(step, []) for step, keys in first.items()}


def wait_for_step(run: Path, step: int, *launchers: Launcher) -> None:
    """Wait until the run has logged a step after `step`."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not (run / "metrics.jsonl").exists() or max(read_losses(run), default=0) <= step:
        for launched in launchers:
            assert launched.process.poll() is None, launched.output[-6000:]
        assert time.monotonic() < deadline, "".join(launched.output[-3000:] for launched in launchers)
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_node_that_is_lost_for_good_leaves_a_smaller_run_and_comes_back(small: Small, tmp_path: Path) -> None:
    """The node of process 0 is lost; the rendezvous is held elsewhere. The reference is a run of one process."""
    assert cli.main(["pretrain", *settings(small, tmp_path / "one"), "train.strategy=single", "loss.seconds_alone=0"]) == 0
    run, rdzv = tmp_path / "run", f"127.0.0.1:{free_port()}"
    node = clipfuse_command("pretrain", "--nproc", "1", "--nodes", "1:2", "--rdzv", rdzv, "--join", "5")
    words = [*node, *settings(small, run)]
    with ExitStack() as stack:
        held = stack.enter_context(start_launcher(sys.executable, "-m", "launch.rendezvous", rdzv, cwd=tmp_path))
        held.wait_for_output("the rendezvous is open")
        first, second = (stack.enter_context(start_launcher(*words, cwd=tmp_path)) for _ in range(2))
        wait_for_step(run, 7, first, second)
        lost, left = (first, second) if 0 in first.ranks() else (second, first)
        kill(lost.process.pid)
        lost.process.wait()
        left.wait_for_output(FIRST)
        wait_for_step(run, max(read_losses(run)) + 1, left)
        back = stack.enter_context(start_launcher(*words, cwd=tmp_path))
        left.wait_for_exit(0)
        back.wait_for_exit(0)
        output = left.output + back.output
    assert re.search(SECOND, output[output.index("a node joins: the run saves, and goes on with it") :])
    assert read_keys(run) == read_keys(tmp_path / "one")
    assert read_losses(run) == pytest.approx(read_losses(tmp_path / "one"), rel=2e-5)
    sizes = [len(read_sample_keys(run)[step]) for step in range(1, STEPS + 1)]
    assert re.fullmatch("2+1+2+", "".join("2" if size == 8 else "1" for size in sizes)), sizes


def test_numbers_of_nodes() -> None:
    assert [(parse_nodes(word).least, int(parse_nodes(word)), str(parse_nodes(word))) for word in ("3", "2:4", "2:2")] == [
        (3, 3, "3"),
        (2, 4, "2:4"),
        (2, 2, "2"),
    ]
    for word in ("", "0", "3:2", "0:2", "a", "1:2:3", "-1"):
        with pytest.raises(argparse.ArgumentTypeError, match=repr(word) if word else "''"):
            parse_nodes(word)


def test_nodes_that_do_not_divide_the_batch_wait(small: Small, tmp_path: Path) -> None:
    config, words = find_config("scenes", "pretrain"), tiny_run_args(small, tmp_path, "train.steps=1")[1:]
    assert find_usable("pretrain", config, words, parse_nodes("1:9"), 1, False) == [1, 2, 4, 8]
    assert find_usable("pretrain", config, [*words, "data.batch_size=48"], parse_nodes("2:9"), 2, False) == [2, 3, 4, 6, 8]
    with pytest.raises(ConfigError, match=r"--nodes 3:4 --nproc 1: the smallest run cannot start: data\.batch_size=16 must be"):
        find_usable("pretrain", config, words, parse_nodes("3:4"), 1, False)


def is_open(port: int) -> bool:
    """Return whether a server listens at a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_rendezvous_that_was_closed_can_be_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two starts of a command, one after the other, meet at the store that outlives both, and find nothing of each other."""
    monkeypatch.setattr(rendezvous, "CLOSED_SECONDS", 0.0)
    port, ended = free_port(), threading.Event()
    endpoint = f"127.0.0.1:{port}"
    holder = threading.Thread(target=rendezvous.hold, args=(endpoint, ended))
    holder.start()
    try:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not is_open(port):  # else the launcher of this host would serve it
            assert time.monotonic() < deadline
            time.sleep(0.1)
        for start in range(2):
            parameters = RendezvousParameters("c10d", endpoint, "run", 1, 1, local_addr="localhost")
            handler: Any = get_rendezvous_handler(parameters)
            info = handler.next_rendezvous()
            assert (info.rank, info.world_size) == (0, 1)
            assert not info.store.check(["of an earlier start"])
            info.store.set("of an earlier start", "")
            assert handler.shutdown()
            handler._store.set(rendezvous.CLOSED + "run", "")  # as launch() does
            deadline = time.monotonic() + TIMEOUT_SECONDS
            while handler._store.check([rendezvous.CLOSED + "run"]):
                assert time.monotonic() < deadline, start
                time.sleep(0.1)
    finally:
        ended.set()
        holder.join()
    for words in ([], ["somewhere"], [":1"]):
        assert rendezvous.main(words) == 2
