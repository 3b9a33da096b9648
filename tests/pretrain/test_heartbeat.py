"""Who was lost, said by who is left, in time."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.launch.worlds import free_port, said
from tests.support import ROOT, environment

TIMEOUT = 10.0


def world(mode: str, size: int = 2) -> tuple[list[int | None], str, float]:
    """Exit codes, output and seconds between the disturbance (half a second after the start of the loop) and the end of the
    processes that were not disturbed. A frozen process is killed here: its code is None."""
    port = str(free_port())
    processes = []
    for rank in range(size):
        env = environment(
            OMP_NUM_THREADS="1", RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )  # fmt: skip
        words = [sys.executable, "-m", "tests.pretrain.pulse", mode, str(TIMEOUT)]
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(words, cwd=ROOT, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True))
    try:
        others = [process for rank, process in enumerate(processes) if rank != 1]
        outputs = {process.pid: process.communicate(timeout=200)[0] for process in others}
        ended = time.monotonic()
        codes: list[int | None] = [process.returncode for process in processes]
        if mode == "freeze":
            os.kill(processes[1].pid, signal.SIGKILL)
        outputs[processes[1].pid] = processes[1].communicate(timeout=TIMEOUT + 60)[0]
        if mode != "freeze":
            codes[1] = processes[1].returncode
        return codes, "".join(outputs.values()), time.monotonic() - ended
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("mode", "line", "codes"),
    [
        ("nothing", None, [0, 0]),
        ("die", r"process 1 \(.*, pid \d+\) died, last at step \d+, ", [1, -signal.SIGKILL]),
        ("raise", r"process 1 \(.*\) failed: ValueError: boom; ", [1, 1]),
        ("refuse", r"process 1 \(.*\) failed: the disk is full; ", [1, 1]),
        ("data", r"process 1 \(.*\) hangs: for \d+ s at step 10, waiting for data while others wait; ", [1, 1]),
        ("compute", r"process 1 \(.*\) hangs, last at step 10, computing; ", [1, 1]),
        ("freeze", r"process 1 \(.*\) is gone: no sign of it for \d+ s, last at step \d+, ", [1, None]),
    ],
)
def test_the_lost_process_is_named(mode: str, line: str | None, codes: list[int | None]) -> None:
    got, output, _ = world(mode)
    if mode == "data":  # the hung process wakes up to a store that is gone: how it ends is up to the moment
        assert got[0] == codes[0], output
        assert got[1] != 0, output
    else:
        assert got == codes, output
    own = said(output)
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
    from pretrain.heartbeat import Heartbeat

    with Heartbeat(1.0, lambda why: None) as pulse:
        pulse.at(0, "computing")
        assert pulse.explain(RuntimeError("gloo")) is None
