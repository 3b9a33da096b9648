"""The run folder runs/NAME: its lock, status.json and environment.json."""

from __future__ import annotations

import fcntl
import os
import platform
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import IO

import torch

from pretrain.errors import UserError
from pretrain.printable import hide_secrets, one_safe_line
from pretrain.runtime import distributed
from pretrain.runtime.agree import on_main
from pretrain.runtime.files import write_json

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
        self._lock: IO[str] | None = None

    def open(self) -> None:
        """Create the folder and take its lock. Collective.

        Raises:
            UserError: the folder cannot be written, or another run holds the lock.
        """
        on_main(self._take_lock)

    def _take_lock(self) -> None:
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a+")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._lock.truncate(0)
            self._lock.write(f"process {os.getpid()} on {platform.node()}")
            self._lock.flush()
        except BlockingIOError as error:
            assert self._lock is not None
            self._lock.seek(0)
            holder = self._lock.read() or "another run"
            raise UserError(f"{self.path} is in use by {holder}; choose another run=NAME for this run") from error
        except OSError as error:
            raise UserError(
                f"cannot write into the run folder {self.path}: {error.strerror or error}; choose another run=PATH"
            ) from error

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write_status(self, state: str, reason: str, step: int, any_rank: bool = False) -> None:
        """Write status.json: running, done, stopped or failed, and the reason.

        any_rank: write from whichever rank calls, because rank 0 may be the one that was lost.
        """
        if (any_rank or distributed.is_main()) and self.path.is_dir():
            write_json(self.path / "status.json", {"state": state, "why": one_safe_line(reason), "step": step, "time": time.time()})

    def write_environment(self, threads: int) -> None:
        """Write environment.json: versions, git revision, command, CPU threads per process, GPUs."""
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
            },
        )


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
