"""The run folder runs/NAME: its lock, status.json and environment.json."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
import weakref
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch

from pretrain.errors import UserError
from pretrain.printable import hide_secrets, one_safe_line
from pretrain.runtime import distributed
from pretrain.runtime.agree import on_main
from pretrain.runtime.console import log_info
from pretrain.runtime.files import overwrite_json, write_json, write_text

LIBRARIES = ("torch", "torchvision", "timm", "transformers", "accelerate", "deepspeed", "webdataset", "omegaconf", "numpy")
"""Libraries whose versions environment.json records."""


class RunFolder:
    """The folder of a run, locked by one run at a time.

    Rank 0 writes into it; other ranks write only their audit file.

    Args:
        run: a name (the folder is runs/NAME), or a path that contains a slash.
    """

    def __init__(self, run: str) -> None:
        self.path = Path(run) if os.sep in run else Path("runs") / run
        self.checkpoints = self.path / "checkpoints"
        self.new_command: str | None = None
        """A digest of the configuration, where this start does not go on from the newest checkpoint of the folder."""
        self._lock: IO[str] | None = None
        self._created: list[Path] = []
        """The folders that open() created, outermost first."""

    def open(self) -> None:
        """Create the folder and take its lock. Collective.

        Raises:
            UserError: the folder cannot be written, or another run holds the lock.
        """
        on_main(self._take_lock)

    def _take_lock(self) -> None:
        try:
            self._open_lock()
            assert self._lock is not None
            self._lock.truncate(0)
            self._lock.write(f"process {os.getpid()} on {platform.node()}")
            self._lock.flush()
        except BlockingIOError as error:
            assert self._lock is not None
            self._lock.seek(0)
            holder = self._lock.read() or "another run"
            self.close()
            raise UserError(f"{self.path} is in use by {holder}; choose another run=NAME for this run") from error
        except OSError as error:
            self.remove_empty()
            self.close()
            raise UserError(
                f"cannot write into the run folder {self.path}: {error.strerror or error}; choose another run=PATH"
            ) from error

    def refuse_unusable(self) -> None:
        """Raise the UserError that open() would raise where the folder cannot be written or another run holds its lock.

        Creates nothing.
        """
        folder = next(path for path in (self.path.absolute(), *self.path.absolute().parents) if path.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            reason = "no permission" if folder.is_dir() else f"{folder} is a file"
            raise UserError(f"cannot write into the run folder {self.path}: {reason}; choose another run=PATH")
        with suppress(OSError), (self.path / ".lock").open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = lock.read() or "another run"
                raise UserError(f"{self.path} is in use by {holder}; choose another run=NAME for this run") from None

    def _open_lock(self) -> None:
        """Create the folders and lock .lock. Raises BlockingIOError where another process holds the lock; OSError."""
        while True:
            folders = [self.checkpoints, *self.checkpoints.parents]
            self._created += [folder for folder in reversed(folders) if not folder.exists()]
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a+")
            _locked.add(self)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._lock.fileno()), (self.path / ".lock").stat()):
                    return
            self._lock.close()  # its holder removed the folder as remove_empty() does, and only then ended

    def close(self) -> None:
        """Release the lock."""
        lock, self._lock = self._lock, None
        if lock is not None:
            with suppress(OSError):  # a full disk: what could not be written before is written once more here
                lock.close()

    def remove_empty(self) -> None:
        """Remove what a start created that failed before training began: the folder, and those above it, if empty."""
        if self.path not in self._created or not self.checkpoints.is_dir():  # somebody may have removed it since
            return
        if self._lock is not None:
            written = {".lock", ".command", "config.yaml", "environment.json"}
            content = {path.name for path in [*self.path.iterdir(), *self.checkpoints.iterdir()]}
            if content - written - {"checkpoints", "tokenizer"}:
                return
            shutil.rmtree(self.path / "tokenizer", ignore_errors=True)  # trained anew by the next start
            for name in sorted(written):
                (self.path / name).unlink(missing_ok=True)
        for folder in reversed(self._created):
            with suppress(OSError):  # another run has written into it
                folder.rmdir()

    # -----------------------------------------------------------------------------------------------------------------
    # Which command began what lies in the folder

    def step_begun_by(self, command: str) -> int | None:
        """Return the step at which resume=PATH or resume=never began with this configuration; None where it did not.

        command: a digest of the configuration.
        """
        with suppress(OSError, ValueError):
            recorded, step = (self.path / ".command").read_text().split()
            return int(step) if recorded == command else None
        return None

    def record_command(self, step: int) -> None:
        """Record the command that begins a branch at a step, so that a scheduler may repeat it. Raises OSError."""
        if self.new_command is not None:
            write_text(self.path / ".command", f"{self.new_command} {step}")

    def saved_step(self) -> int:
        """Return a step from which the run can only have a checkpoint, as far as its files show; 0 where none shows it."""
        with suppress(OSError, ValueError):
            return int((self.checkpoints / "latest").read_text().strip().removeprefix("step-"))
        with suppress(OSError, ValueError, IndexError):
            if step := int((self.path / ".command").read_text().split()[1]):
                return step
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            status = json.loads((self.path / "status.json").read_text())
            return int(status["step"]) if status["state"] in ("done", "stopped", "running") else 0
        return 0

    # -----------------------------------------------------------------------------------------------------------------
    # What is written into it

    def write_status(self, state: str, reason: str, step: int, any_rank: bool = False) -> None:
        """Write status.json: running, done, stopped or failed, and the reason.

        any_rank: write from whichever rank calls, because rank 0 may be the one that was lost.
        """
        if not (any_rank or distributed.is_main()) or not self.path.is_dir():
            return
        path, status = (
            self.path / "status.json",
            {"state": state, "why": one_safe_line(reason), "step": step, "time": time.time()},
        )
        try:
            write_json(path, status)
        except OSError as error:
            if state != "failed":
                raise
            try:
                overwrite_json(path, status)  # the disk may be full, which is why the run failed
            except OSError:
                log_info(f"{path} does not say that the run failed: {error}")

    def write_environment(self, threads: int, performance: dict[str, Any]) -> None:
        """Write environment.json: versions, git revision, command, CPU threads per process, GPUs, settings of torch.

        performance: the settings in force, as they were read back.
        """
        if not distributed.is_main():
            return
        versions = {name: metadata.version(name) for name in LIBRARIES if _is_installed(name)}
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        write_json(
            self.path / "environment.json",
            {
                "command": hide_secrets(shlex.join(sys.argv)),
                "git": _git_revision(),
                "python": platform.python_version(),
                "platform": platform.platform(),
                "versions": versions,
                "processes": distributed.world_size(),
                "threads": threads,
                "gpus": gpus,
                "performance": performance,
            },
        )


_locked: weakref.WeakSet[RunFolder] = weakref.WeakSet()
"""The run folders whose lock this process may hold."""


def _close_inherited_locks() -> None:
    """Close the locks in a forked process: a lock lasts while any process has its file open."""
    for folder in list(_locked):
        folder.close()


os.register_at_fork(after_in_child=_close_inherited_locks)


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _git_revision() -> str | None:
    """Return the commit of this code, with + where files differ from it; None outside a git checkout."""
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return process.stdout.strip() or None if process.returncode == 0 else None
