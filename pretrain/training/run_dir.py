"""What a run says while it works: metrics.jsonl, trackers, audit, status, environment, progress on the terminal."""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from pretrain.checkpoints.store import write_json
from pretrain.config import ConfigError, UserError
from pretrain.runtime import distributed
from pretrain.runtime.agree import on_main

console = Console(stderr=True, soft_wrap=True, highlight=False)
LIBRARIES = ("torch", "torchvision", "timm", "transformers", "accelerate", "deepspeed", "webdataset", "omegaconf", "numpy")


def say(message: str) -> None:
    """One line for the person, from rank 0 only."""
    if distributed.is_main():
        console.print(message, markup=False)


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


class Lines:
    """A jsonl file that a resumed run cuts back to the step it goes on from."""

    def __init__(self, path: Path, after: int) -> None:
        if path.exists():
            kept = [line for line in _whole(path) if json.loads(line)["step"] <= after]
            partial = path.with_name(f".{path.name}.partial")
            partial.write_text("".join(line + "\n" for line in kept))
            partial.replace(path)
        self._file = path.open("a")

    def write(self, line: dict[str, Any]) -> None:
        """One line, on disk before the call returns to the loop (a kill -9 loses none that was written)."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _whole(path: Path) -> list[str]:
    """The lines that were written whole: a kill may have cut the last."""
    lines = path.read_text().split("\n")
    return [line for line in lines[:-1] if line.startswith("{") and line.endswith("}")]


class RunLog:
    """metrics.jsonl and trackers, on rank 0; audit-RANK.jsonl on every rank that is asked for it."""

    def __init__(self, folder: RunFolder, config: dict[str, Any], trackers: list[str], audit: bool, after: int) -> None:
        self._trackers = [_tracker(name, folder, config) for name in trackers] if distributed.is_main() else []
        self._metrics = Lines(folder.path / "metrics.jsonl", after) if distributed.is_main() else None
        self._audit = Lines(folder.path / f"audit-{distributed.rank()}.jsonl", after) if audit else None

    def metrics(self, line: dict[str, Any]) -> None:
        """One line of numbers; non-finite ones become null, as JSON has no others."""
        if self._metrics is None:
            return
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self._metrics.write(clean)
        for tracker in self._trackers:
            tracker.log({k: v for k, v in clean.items() if isinstance(v, int | float)}, step=line["step"])

    def audit(self, step: int, keys: list[str]) -> None:
        """The samples a step consumed."""
        if self._audit is not None:
            self._audit.write({"step": step, "keys": keys})

    def close(self) -> None:
        for lines in (self._metrics, self._audit):
            if lines is not None:
                lines.close()
        for tracker in self._trackers:
            tracker.finish()


def check_trackers(names: list[str]) -> None:
    """Raises ConfigError for a tracker that accelerate does not know."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigError(f"train.trackers: no {name!r}; the choices are {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")


def _tracker(name: str, folder: RunFolder, config: dict[str, Any]) -> Any:
    """A tracker of accelerate. Raises ConfigError for one that is not installed."""
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    cls = LOGGER_TYPE_TO_CLASS[name]
    PartialState(cpu=not torch.cuda.is_available())  # accelerate's logger wants it; a group that exists is taken as it is
    try:
        if cls.requires_logging_directory:
            tracker = cls(run_name=name, logging_dir=str(folder.path))
        else:
            tracker = cls(run_name=folder.path.name)
        tracker.main_process_only = False  # only rank 0 comes here; accelerate need not set up its own process state
        tracker.start()
    except ImportError as error:
        raise ConfigError(f"train.trackers={name} is not installed: {error}") from error
    if name != "tensorboard":  # its hparams file is one more run in the list of curves
        tracker.store_init_configuration(config)
    return tracker


# ---------------------------------------------------------------------------------------------------------------------
# Terminal


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields.get("said", ""))


class Bar:
    """Progress on a terminal: a live bar; elsewhere a line at each log step."""

    def __init__(self, total: int, done: int) -> None:
        self._live = distributed.is_main() and console.is_terminal
        self._total = total
        if self._live:
            self._progress = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(),
                _Rate(),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                console=console,
            )
            self._progress.start()
            self._task = self._progress.add_task("train", total=total, completed=done, said="")

    def step(self, step: int) -> None:
        if self._live:
            self._progress.update(self._task, completed=step)

    def said(self, line: dict[str, Any], eta_seconds: float) -> None:
        """The numbers of a log step."""
        wait = 100 * line["data_wait_share"]
        text = (
            f"loss {line['loss']:.4f}  {line['samples_per_second']:.1f} samples/s  data wait {wait:.0f}%  lr {line['lr']:.2e}"
        )
        if self._live:
            self._progress.update(self._task, said=text)
        else:
            say(f"step {line['step']}/{self._total}  {text}  eta {duration(eta_seconds)}")

    def close(self) -> None:
        if self._live:
            self._progress.stop()


def duration(seconds: float) -> str:
    """90 -> 1:30; 5400 -> 1:30:00."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


Say = Callable[[str], None]
