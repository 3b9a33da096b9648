"""What a run says while it works: metrics.jsonl, trackers, audit, status, environment, progress on the terminal."""

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
from pretrain.runtime import distributed
from pretrain.runtime.agree import on_main
from pretrain.runtime.files import write_json

LIBRARIES = ("torch", "torchvision", "timm", "transformers", "accelerate", "deepspeed", "webdataset", "omegaconf", "numpy")


class RunFolder:
    """runs/NAME: locked by one run at a time. Rank 0 writes; the others only keep their audit file."""

    def __init__(self, run: str) -> None:
        self.path = Path(run) if os.sep in run else Path("runs") / run
        self.checkpoints = self.path / "checkpoints"
        self._lock: IO[str] | None = None

    def open(self) -> None:
        """Creates the folder and takes its lock. Raises UserError where it cannot be written or another run holds it."""
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
            raise UserError(f"{self.path} is in use by {holder}; give this one another run=NAME") from error
        except OSError as error:
            raise UserError(
                f"cannot write into the run folder {self.path}: {error.strerror or error}; choose another run=PATH"
            ) from error

    def close(self) -> None:
        """Gives the lock back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def status(self, state: str, why: str, step: int, anyone: bool = False) -> None:
        """status.json: running | done | stopped | failed, and why. anyone: rank 0 may be the one that was lost."""
        if (anyone or distributed.is_main()) and self.path.is_dir():
            write_json(self.path / "status.json", {"state": state, "why": why, "step": step, "time": time.time()})

    def environment(self, threads: int) -> None:
        """environment.json: versions, revision, command, threads, devices."""
        if not distributed.is_main():
            return
        installed = {name: metadata.version(name) for name in LIBRARIES if _has(name)}
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        write_json(
            self.path / "environment.json",
            {
                "command": shlex.join(sys.argv),
                "git": _revision(),
                "python": platform.python_version(),
                "platform": platform.platform(),
                "versions": installed,
                "processes": distributed.world_size(),
                "threads": threads,
                "gpus": gpus,
            },
        )


def _has(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _revision() -> str | None:
    """The commit of this code, with + where files differ from it; None outside a checkout."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


# ---------------------------------------------------------------------------------------------------------------------
# Files of lines


# ---------------------------------------------------------------------------------------------------------------------
# Terminal
