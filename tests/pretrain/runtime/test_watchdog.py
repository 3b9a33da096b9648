"""A process that dies, fails or stalls is named by the others, in time."""

import json
import re
import signal
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.launches import clipfuse_lines, free_port, start_launcher

TIMEOUT = 10.0


def run_program(mode: str, folder: Path, size: int = 2) -> tuple[list[int], str]:
    """Run watchdog_program.py on `size` ranks; return the exit codes and the output of all.

    A frozen process is killed once the others have ended.
    """
    env = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "tests.support.watchdog_program", mode, str(TIMEOUT)]
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(start_launcher(*command, cwd=folder, RANK=str(rank), LOCAL_RANK=str(rank), **env))
            for rank in range(size)
        ]
        for rank, launcher in enumerate(ranks):
            if rank != 1:
                launcher.wait_for_exit(None)
        if mode == "freeze":
            ranks[1].process.kill()
        ranks[1].wait_for_exit(None)
        return [launcher.process.poll() for launcher in ranks], "".join(launcher.output for launcher in ranks)


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("mode", "pattern", "codes"),
    [
        ("nothing", None, [0, 0]),
        ("save", None, [0, 0]),
        ("die", r"process 1 \(.*, pid \d+\) died, last at step \d+, ", [1, -signal.SIGKILL]),
        ("raise", r"process 1 \(.*\) failed: ValueError: boom; ", [1, 1]),
        ("refuse", r"process 1 \(.*\) failed: the disk is full; ", [1, 1]),
        ("data", r"process 1 \(.*\) stalled: for \d+ s at step 10, waiting for data while others wait; ", [1, 1]),
        ("compute", r"process 1 \(.*\) stalled, last at step 10, computing; ", [1, 1]),
        ("freeze", r"process 1 \(.*\) is dead: no heartbeat for \d+ s, last at step \d+, ", [1, -signal.SIGKILL]),
    ],
)
def test_the_lost_process_is_named(mode: str, pattern: str | None, codes: list[int], tmp_path: Path) -> None:
    exit_codes, output = run_program(mode, tmp_path)
    if mode == "data":  # the stalled process finds the store gone, at a point that depends on timing
        assert exit_codes[0] == codes[0], output
        assert exit_codes[1] != 0, output
    else:
        assert exit_codes == codes, output
    errors = clipfuse_lines(output)
    if pattern is None:
        assert errors == []
        return
    named = [line for line in errors if re.search(pattern, line)]
    assert len(named) == 1, f"named {len(named)} times\n{output}"
    assert "the run ends, the last checkpoint is intact" in named[0]
    if mode == "die":  # the save in flight on rank 0 is not lost with the run
        assert "saved\n" in output
    if mode not in ("refuse", "data"):  # the process reports its own error as well
        assert len(errors) == 1, output
    if mode == "compute":  # a collective of step 10 is missing: eleven barriers and reductions before it
        missing = r"process 1 has not begun collective \d+ \(all_?reduce of Long \[\[?\]?\].*, gloo\), in which process 0 waits"
        assert re.search(missing, named[0]), output
        last = [json.loads((tmp_path / f"flight-recorder-gloo-{rank}.json").read_text())["entries"][-1] for rank in range(2)]
        assert last[0]["collective_seq_id"] == last[1]["collective_seq_id"] + 1
    assert f"recorded: {named[0].removeprefix('clipfuse: ')}" in output


def test_one_process_needs_no_watchdog() -> None:
    from pretrain.runtime.watchdog import Watchdog

    with Watchdog(1.0, lambda reason: None) as watchdog:
        watchdog.mark(0, "computing")
        assert watchdog.diagnose(RuntimeError("gloo")) is None
