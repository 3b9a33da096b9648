"""`python -m MODULE` in processes that are forked from a server with the libraries imported, instead of new interpreters.

A new interpreter spends five to eight CPU seconds on imports, a forked one none. In all else the two are alike: the process
has its own pid, session, working folder, environment and standard streams, receives signals, and its launcher is the parent
of the ranks that it starts. Tests of new interpreters remain: those of torchrun, accelerate, DeepSpeed, Slurm and the README.
"""

from __future__ import annotations

import atexit
import json
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from multiprocessing import util
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from tests.support import environment

RANK_FOLDER = "CLIPFUSE_TEST_RANKS"
"""Environment variable: a folder in which each forked rank writes its pid, into a file named by its rank."""


class Process:
    """A process that the fork server started, with the methods of subprocess.Popen that tests use."""

    def __init__(self, module: str, arguments: Sequence[str], cwd: Path, out: Path, err: Path, env: dict[str, str]) -> None:
        from tests.support import world

        work = (module, list(arguments), str(cwd), str(out), str(err), env)
        self._process = world.server().Process(target=_main, args=work)
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """Return the exit code, -N after signal N; None while the process runs."""
        code: int | None = self._process.exitcode
        return code

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit code. Raises subprocess.TimeoutExpired after `timeout` seconds."""
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired("a forked process", timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL, unless the process has ended."""
        self.send_signal(signal.SIGKILL)


def run(module: str, arguments: Sequence[str], cwd: Path, timeout: float, **more: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE ARGUMENTS` to its end, with `more` in its environment; return exit code and output.

    Raises subprocess.TimeoutExpired after `timeout` seconds; the process and its children are killed.
    """
    with tempfile.TemporaryDirectory() as name:
        out, err = Path(name, "out"), Path(name, "err")
        process = Process(module, arguments, cwd, out, err, environment(**more))
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise subprocess.TimeoutExpired(module, timeout, out.read_text(), err.read_text()) from None
        stdout, stderr = (path.read_text(errors="replace") if path.exists() else "" for path in (out, err))
        return subprocess.CompletedProcess([module, *arguments], code, stdout, stderr)


def _main(module: str, arguments: list[str], cwd: str, out: str, err: str, env: dict[str, str]) -> NoReturn:
    os.setsid()
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(cwd)
    run_module(module, arguments, env)


def run_module(module: str, arguments: Sequence[str], env: dict[str, str]) -> NoReturn:
    """Be `python -m MODULE ARGUMENTS` with `env`, in a process that was forked: run it, and end."""
    os.environ.clear()
    os.environ.update(env)
    for number in signal.Signals:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # What the parent registered to clean up, and its connections, are the parent's.
    atexit._clear()
    util._finalizer_registry.clear()  # type: ignore[attr-defined]
    atexit.register(util._exit_function)  # type: ignore[attr-defined]
    multiprocessing.process._children.clear()  # type: ignore[attr-defined]
    multiprocessing.process.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    multiprocessing.forkserver._forkserver.__init__()  # type: ignore[misc]
    multiprocessing.resource_tracker._resource_tracker.__init__()  # type: ignore[misc]
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    if module == "launch.demo":  # it computes before it starts ranks, and its threads would not survive a fork
        _Rank.spares = []
        for _ in range(4):
            _Rank.spares.append(_fork_spare())  # two commands, two ranks each
    SubprocessHandler._popen = _fork_rank  # type: ignore[method-assign]
    sys.argv = [module, *arguments]
    code: Any = 1
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # as an interpreter ends: threads, then functions of atexit
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    finally:
        os._exit(int(code or 0))


class _Rank(subprocess.Popen[Any]):
    """A process that torch's elastic agent starts: forked from the launcher, and waited for as any other."""

    spares: ClassVar[list[tuple[int, int]] | None] = None
    """Where the launcher cannot fork when it starts ranks: those that it forked before it computed, see _fork_spare."""

    def __init__(self, args: Sequence[str], env: dict[str, str]) -> None:
        self.env = env
        super().__init__(args)

    def _execute_child(self, args: Sequence[str], *others: Any) -> None:  # type: ignore[override]
        env, begin = self.env, args.index("-m") + 1
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        if self.spares is None:
            self.pid = os.fork()
            if self.pid == 0:
                _be_rank(args[begin], args[begin + 1 :], env)
        else:
            self.pid, pipe = self.spares.pop()
            with open(pipe, "w") as file:
                file.write(json.dumps([args[begin:], env]) + "\n")
        self._child_created = True
        if RANK_FOLDER in env:
            path = Path(env[RANK_FOLDER], env["RANK"])
            path.with_suffix(".new").write_text(f"{self.pid}")
            path.with_suffix(".new").replace(path)


def _be_rank(module: str, arguments: Sequence[str], env: dict[str, str]) -> NoReturn:
    """Be `python -m MODULE ARGUMENTS` in a session of its own, without the launcher's open files, and end."""
    try:
        os.setsid()
        os.closerange(3, min(os.sysconf("SC_OPEN_MAX"), 65536))
        run_module(module, arguments, env)
    finally:
        os._exit(1)


def _fork_spare() -> tuple[int, int]:
    """Fork a process that becomes a rank when its words and environment come through a pipe; return its pid and the pipe.

    It ends if nobody writes into the pipe any more.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(reading)
        return pid, writing
    os.close(writing)
    for _, other in _Rank.spares or []:
        os.close(other)
    with open(reading) as file:
        line = file.readline()
    if not line:
        os._exit(0)
    _Rank.spares = None
    (module, *arguments), env = json.loads(line)
    _be_rank(module, arguments, env)


def _fork_rank(handler: Any, args: Sequence[str], env: dict[str, str]) -> subprocess.Popen[Any]:
    """Replace SubprocessHandler._popen. Logs of ranks are not redirected by our launcher."""
    assert handler._stdout is None
    assert handler._stderr is None
    return _Rank(args, env)


def read_ranks(folder: Path) -> dict[int, int]:
    """Return {rank: pid} of the ranks that a launcher with RANK_FOLDER=folder has started last."""
    return {int(path.name): int(path.read_text()) for path in folder.iterdir() if path.name.isdigit()}
