"""Who was lost, said by who is left, in time."""

import re
import signal
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.launches import clipfuse_lines, free_port, start_launcher

TIMEOUT = 10.0


def world(mode: str, folder: Path, size: int = 2) -> tuple[list[int], str]:
    """Exit codes and output of all. A frozen process is killed here, once the others have ended."""
    env = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    words = [sys.executable, "-m", "tests.support.watchdog_program", mode, str(TIMEOUT)]
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(start_launcher(*words, cwd=folder, RANK=str(rank), LOCAL_RANK=str(rank), **env))
            for rank in range(size)
        ]
        for rank, each in enumerate(ranks):
            if rank != 1:
                each.wait_for_exit(None)
        if mode == "freeze":
            ranks[1].process.kill()
        ranks[1].wait_for_exit(None)
        return [each.process.returncode for each in ranks], "".join(each.output for each in ranks)


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("mode", "line", "codes"),
    [
        ("nothing", None, [0, 0]),
        ("die", r"process 1 \(.*, pid \d+\) died, last at step \d+, ", [1, -signal.SIGKILL]),
        ("raise", r"process 1 \(.*\) failed: ValueError: boom; ", [1, 1]),
        ("refuse", r"process 1 \(.*\) failed: the disk is full; ", [1, 1]),
        ("data", r"process 1 \(.*\) stalled: for \d+ s at step 10, waiting for data while others wait; ", [1, 1]),
        ("compute", r"process 1 \(.*\) stalled, last at step 10, computing; ", [1, 1]),
        ("freeze", r"process 1 \(.*\) is dead: no heartbeat for \d+ s, last at step \d+, ", [1, -signal.SIGKILL]),
    ],
)
def test_the_lost_process_is_named(mode: str, line: str | None, codes: list[int], tmp_path: Path) -> None:
    got, output = world(mode, tmp_path)
    if mode == "data":  # the hung process wakes up to a store that is gone: how it ends is up to the moment
        assert got[0] == codes[0], output
        assert got[1] != 0, output
    else:
        assert got == codes, output
    own = clipfuse_lines(output)
    if line is None:
        assert own == []
        return
    named = [one for one in own if re.search(line, one)]
    assert len(named) == 1, f"said {len(named)} times\n{output}"
    assert "the run ends, the last checkpoint is intact" in named[0]
    if mode not in ("refuse", "data"):  # its own error is said as well
        assert len(own) == 1, output
    assert f"recorded: {named[0].removeprefix('clipfuse: ')}" in output


def test_one_process_has_no_heartbeat() -> None:
    from pretrain.runtime.watchdog import Watchdog

    with Watchdog(1.0, lambda why: None) as watchdog:
        watchdog.mark(0, "computing")
        assert watchdog.diagnose(RuntimeError("gloo")) is None
