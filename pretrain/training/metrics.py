"""metrics.jsonl, audit-RANK.jsonl and trackers: the numbers that a run records."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from pretrain.errors import ConfigError
from pretrain.runtime import distributed
from pretrain.runtime.files import write_text
from pretrain.training.run_dir import RunFolder


class Lines:
    """A jsonl file that a resumed run cuts back to the step it goes on from."""

    def __init__(self, path: Path, after: int) -> None:
        if path.exists():
            kept = [line for line in _whole(path) if json.loads(line)["step"] <= after]
            write_text(path, "".join(line + "\n" for line in kept))
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
