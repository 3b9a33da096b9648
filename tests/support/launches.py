"""Runs of several processes that tests start, watch, disturb and end: by pid, and with a time limit."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.support import Small, environment

BIN = Path(sys.executable).parent
TIMEOUT_SECONDS = 240.0
"""Seconds that a test waits for anything: imports alone take many on a busy machine."""
STEPS = 80
"""Of the run that nobody stops, and of those that are held against it."""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def tiny_run_args(small: Small, run: Path, *more: str) -> list[str]:
    """Words of a run on two processes."""
    return ["scenes", *small.settings(run, "train.strategy=ddp", "data.val=null", *more)]


class Launcher:
    """A launcher and all that it starts."""

    def __init__(self, words: list[str | Path], cwd: Path, **env: str) -> None:
        self.log = cwd / f"log-{time.monotonic_ns()}.txt"
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [str(word) for word in words],
                cwd=cwd,
                env=environment(**{"OMP_NUM_THREADS": "1", **env}),
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self._all: dict[int, psutil.Process] = {}

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def ranks(self) -> dict[int, psutil.Process]:
        """Rank -> process of `python -m pretrain` (or a test's module) below this launcher."""
        found: dict[int, psutil.Process] = {}
        for each in psutil.Process(self.process.pid).children(recursive=True):
            self._all[each.pid] = each
            try:
                if each.environ().get("RANK") and each.ppid() == self.process.pid and "-m" in each.cmdline():
                    found[int(each.environ()["RANK"])] = each
            except psutil.Error:
                continue
        return found

    def wait_for_output(self, pattern: str) -> str:
        """Waits until the output has the pattern; ends the test where the launcher ends before."""
        end = time.monotonic() + TIMEOUT_SECONDS
        while not re.search(pattern, self.output):
            ended = self.process.poll()
            assert ended is None, f"ended with {ended} before {pattern!r}\n{self.output[-6000:]}"
            assert time.monotonic() < end, f"no {pattern!r} in {TIMEOUT_SECONDS} s\n{self.output[-6000:]}"
            time.sleep(0.1)
        self.ranks()
        return self.output

    def wait_for_exit(self, code: int | None, seconds: float = TIMEOUT_SECONDS) -> str:
        """Waits for the end, checks the exit code, returns the output."""
        try:
            got = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s\n{self.output[-6000:]}") from None
        assert code is None or got == code, f"exit code {got}, not {code}\n{self.output[-6000:]}"
        return self.output

    def close(self) -> None:
        """Ends what is left."""
        try:
            for each in psutil.Process(self.process.pid).children(recursive=True):
                self._all[each.pid] = each
        except psutil.Error:
            pass
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for each in self._all.values():
            try:
                if each.is_running() and each.status() != psutil.STATUS_ZOMBIE:
                    each.send_signal(signal.SIGKILL)
            except psutil.Error:
                continue


@contextmanager
def start_launcher(*words: str | Path, cwd: Path, **env: str) -> Iterator[Launcher]:
    made = Launcher(list(words), cwd, **env)
    try:
        yield made
    finally:
        made.close()


def clipfuse_command(*words: str | Path) -> list[str | Path]:
    return [sys.executable, "-m", "launch.cli", *words]


def torchrun_command(*options: str) -> list[str | Path]:
    return [BIN / "torchrun", *options, "-m", "pretrain"]


def clipfuse_lines(output: str) -> list[str]:
    """Our own lines of an output."""
    return [line for line in output.splitlines() if line.startswith("clipfuse: ")]


def read_status(run: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((run / "status.json").read_text())
    return found


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
