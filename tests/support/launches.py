"""Runs of several processes that tests start, watch, signal and end: by pid, and with a time limit."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.support import Small, environment, forked

BIN = Path(sys.executable).parent
TIMEOUT_SECONDS = 240.0
"""Time limit of every wait in a test: imports alone can take minutes on a busy machine."""
STEPS = 80
"""Steps of the undisturbed reference run, and of the runs that are compared with it."""


def free_port() -> int:
    """Return a TCP port that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def tiny_run_args(small: Small, run: Path, *more: str) -> list[str]:
    """Return the arguments of a tiny run on two processes."""
    return ["scenes", *small.settings(run, "train.strategy=ddp", "data.val=null", *more)]


def eventful_settings(small: Small, run: Path, processes: int, workers: int, *more: str) -> list[str]:
    """Settings of a run that has what a stop could lose: two weighted sources, evaluations, averaged weights, an audit."""
    return small.settings(
        run,
        f"data.train=[{{shards: {small.train}, weight: 3}}, {{shards: {small.val}, weight: 1}}]",
        f"data.val={small.val}",
        f"data.workers={workers}",
        f"train.strategy={'single' if processes == 1 else 'ddp'}",
        "train.audit=true",
        "optim.average=0.9",
        "data.augment.flip=true",
        "eval.workers=0",
        *more,
    )


class Launcher:
    """A launcher process, with all processes that it starts, and a log file of its output.

    `python -m MODULE` of this project is forked (tests.support.forked), any other command is a new process.
    """

    def __init__(self, command: list[str | Path], cwd: Path, **env: str) -> None:
        self.log = cwd / f"log-{time.monotonic_ns()}.txt"
        self.log.touch()
        self._ranks = Path(tempfile.mkdtemp(prefix="ranks-", dir=cwd))
        words = [str(argument) for argument in command]
        variables = environment(**{"OMP_NUM_THREADS": "1", forked.RANK_FOLDER: str(self._ranks), **env})
        self._is_forked = words[:2] == [sys.executable, "-m"]
        self.process: forked.Process | subprocess.Popen[bytes]
        if self._is_forked:
            self.process = forked.Process(words[2], words[3:], cwd, self.log, self.log, variables)
        else:
            with self.log.open("wb") as out:
                self.process = subprocess.Popen(words, cwd=cwd, env=variables, stdout=out, stderr=out, start_new_session=True)
        self._descendants: dict[int, psutil.Process] = {}

    @property
    def output(self) -> str:
        """All that was written to stdout and stderr so far."""
        return self.log.read_text(errors="replace")

    def ranks(self) -> dict[int, psutil.Process]:
        """Return {rank: process} of `python -m pretrain` (or a test's module) that this launcher started."""
        processes: dict[int, psutil.Process] = {}
        forked_ranks = {pid: rank for rank, pid in forked.read_ranks(self._ranks).items()}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            self._descendants[process.pid] = process
            try:
                if process.ppid() != self.process.pid:
                    continue
                if process.pid in forked_ranks:
                    processes[forked_ranks[process.pid]] = process
                elif not self._is_forked and process.environ().get("RANK") and "-m" in process.cmdline():
                    processes[int(process.environ()["RANK"])] = process
            except psutil.Error:
                continue
        return processes

    def wait_for_output(self, pattern: str) -> str:
        """Wait until the output matches the pattern and return it; fail the test if the launcher ends before."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not re.search(pattern, self.output):
            exit_code = self.process.poll()
            assert exit_code is None, f"ended with {exit_code} before {pattern!r}\n{self.output[-6000:]}"
            assert time.monotonic() < deadline, f"no {pattern!r} in {TIMEOUT_SECONDS} s\n{self.output[-6000:]}"
            time.sleep(0.1)
        self.ranks()
        return self.output

    def wait_for_exit(self, code: int | None, seconds: float = TIMEOUT_SECONDS) -> str:
        """Wait for the end, check the exit code (None: any code) and return the output."""
        try:
            exit_code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s\n{self.output[-6000:]}") from None
        assert code is None or exit_code == code, f"exit code {exit_code}, not {code}\n{self.output[-6000:]}"
        return self.output

    def close(self) -> None:
        """Kill the launcher and every process below it that still runs."""
        try:
            for process in psutil.Process(self.process.pid).children(recursive=True):
                self._descendants[process.pid] = process
        except psutil.Error:
            pass
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for process in self._descendants.values():
            try:
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    process.send_signal(signal.SIGKILL)
            except psutil.Error:
                continue


@contextmanager
def start_launcher(*command: str | Path, cwd: Path, **env: str) -> Iterator[Launcher]:
    """Start a launcher in `cwd` with `env` in its environment; kill its processes at the end of the block."""
    launcher = Launcher(list(command), cwd, **env)
    try:
        yield launcher
    finally:
        launcher.close()


def clipfuse_command(*arguments: str | Path) -> list[str | Path]:
    """Return the command line of clipfuse with `arguments`."""
    return [sys.executable, "-m", "launch.cli", *arguments]


def run_mistakes(commands: list[str], cwd: Path) -> list[tuple[int, str, list[str]]]:
    """Call clipfuse with each command in one new interpreter.

    Returns for each: exit code, what it wrote to stderr, and which heavy libraries had been imported by its end.
    """
    program = (
        "import contextlib, io, json, sys\nfrom launch import cli\n"
        f"for words in {[command.split() for command in commands]!r}:\n"
        "    with contextlib.redirect_stderr(io.StringIO()) as err:\n"
        "        try:\n"
        "            code = cli.main(words)\n"
        "        except SystemExit as done:\n"
        "            code = done.code\n"
        "    print(json.dumps([code, err.getvalue(), [m for m in ('torch', 'timm', 'transformers') if m in sys.modules]]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def torchrun_command(*options: str) -> list[str | Path]:
    """Return the command line of torchrun for `python -m pretrain`."""
    return [sys.executable, "-m", "torch.distributed.run", *options, "-m", "pretrain"]


def clipfuse_lines(output: str) -> list[str]:
    """Return the error lines of clipfuse in an output."""
    return [line for line in output.splitlines() if line.startswith("clipfuse: ")]


def read_status(run: Path) -> dict[str, object]:
    """Read status.json of a run folder."""
    status: dict[str, object] = json.loads((run / "status.json").read_text())
    return status


def kill(pid: int) -> None:
    """Kill a process with SIGKILL."""
    os.kill(pid, signal.SIGKILL)
