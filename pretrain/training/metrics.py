"""The numbers that a run records: metrics.jsonl, audit-RANK.jsonl and experiment trackers."""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import torch

from pretrain.errors import ConfigError
from pretrain.printable import format_count, one_safe_line
from pretrain.runtime import distributed
from pretrain.runtime.files import parse_json_object, write_text
from pretrain.training.run_dir import RunFolder

log = logging.getLogger(__name__)


class JsonLinesFile:
    """A jsonl file that a resumed run truncates to the step it resumes from.

    Args:
        after: lines of later steps are removed when the file is opened.
    """

    def __init__(self, path: Path, after: int) -> None:
        if path.exists():
            lines = [line for line in _read_complete_lines(path) if _step_of(line) <= after]
            write_text(path, "".join(line + "\n" for line in lines))
        self._path, self._file = path, path.open("ab", buffering=0)
        self._unwritten = b""
        self._is_failing = False

    def write(self, line: dict[str, Any]) -> None:
        """Write one line to the operating system: kill -9 loses no line that was written.

        Lines that cannot be written, because the disk is full, are written with later ones.
        """
        self._unwritten += (json.dumps(line) + "\n").encode()
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
            self._is_failing = False
        except OSError as error:
            if not self._is_failing:
                log.warning(one_safe_line(f"{self._path} cannot be written now: {error.strerror or error}"))
            self._is_failing = True

    def close(self) -> None:
        self._file.close()
        if self._unwritten:
            lines = self._unwritten.count(b"\n")
            log.warning(f"{self._path} lacks its last {format_count(lines, 'line')}")


def _read_complete_lines(path: Path) -> list[str]:
    """Read the lines that were written completely: a kill may have truncated the last one."""
    lines = path.read_text(errors="replace").split("\n")
    return [line for line in lines[:-1] if line.startswith("{") and line.endswith("}")]


def _step_of(line: str) -> float:
    """Return the step of a line; infinity for a line that no run has written, so that it is dropped."""
    try:
        step = parse_json_object(line.encode())["step"]
    except (ValueError, KeyError):
        return math.inf
    return step if type(step) is int else math.inf


class RunLog:
    """metrics.jsonl and trackers, on rank 0; audit-RANK.jsonl on every rank if `audit` is set.

    Args:
        config: the resolved configuration, for trackers.
        trackers: names of accelerate's trackers.
        after: lines of later steps are removed from files that exist.
    """

    def __init__(self, folder: RunFolder, config: dict[str, Any], trackers: list[str], audit: bool, after: int) -> None:
        self._trackers = [_build_tracker(name, folder, config) for name in trackers] if distributed.is_main() else []
        self._metrics = JsonLinesFile(folder.path / "metrics.jsonl", after) if distributed.is_main() else None
        self._audit = JsonLinesFile(folder.path / f"audit-{distributed.rank()}.jsonl", after) if audit else None
        if distributed.is_main():
            for path in folder.path.glob("audit-*.jsonl"):  # those of ranks that write none now
                rank = path.stem.removeprefix("audit-")
                if rank.isdigit() and (int(rank) >= distributed.world_size() or not audit):
                    JsonLinesFile(path, after).close()

    def write_metrics(self, line: dict[str, Any]) -> None:
        """Write one line of numbers; those that are not finite become null, because JSON cannot hold them."""
        if self._metrics is None:
            return
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self._metrics.write(clean)
        for tracker in list(self._trackers):
            try:
                tracker.log({k: v for k, v in clean.items() if isinstance(v, int | float)}, step=line["step"])
            except OSError as error:  # the disk is full, for example; metrics.jsonl will have the numbers
                log.warning(one_safe_line(f"a tracker of train.trackers fails, and gets no more numbers: {error}"))
                self._trackers.remove(tracker)

    def write_audit(self, step: int, keys: list[str]) -> None:
        """Write the keys of the samples that a step consumed, if the run is audited."""
        if self._audit is not None:
            self._audit.write({"step": step, "keys": keys})

    def close(self) -> None:
        for lines in (self._metrics, self._audit):
            if lines is not None:
                lines.close()
        for tracker in self._trackers:
            tracker.finish()


def describe_results(results: dict[str, float], primary: str, most: int = 4) -> str:
    """Describe an evaluation in one line: the primary metric and others like it, each with its level of chance.

    Where the primary metric is the recall of a direction, as in pretraining, all directions are in the line: with three towers,
    too, a pair of modalities that does not learn is seen while the run trains.

    Args:
        results: the metrics; chance_NAME is the level of NAME.
        primary: the metric that decides which checkpoint is best.
        most: metrics in the line, where the primary metric is another.
    """
    alike = [
        name for name in results if name.endswith(("R@1", "top1", "accuracy")) and not name.startswith(("chance_", "blind_"))
    ]
    names = list(dict.fromkeys(name for name in (primary, *alike) if name in results))
    names = names if re.fullmatch(r"\w+_to_\w+_R@1", primary) else names[:most]
    levels = [f" (chance {results[f'chance_{name}']:.3g})" if f"chance_{name}" in results else "" for name in names]
    return ", ".join(f"{name} {results[name]:.4g}{level}" for name, level in zip(names, levels, strict=True))


def check_trackers(names: list[str]) -> None:
    """Refuse trackers that accelerate does not know. Raises ConfigError."""
    names = [name for name in names if name != "tensorboard"]  # the default; importing accelerate takes half a second
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigError(
                f"train.trackers: there is no tracker {name!r}; the choices are {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}"
            )


def _build_tracker(name: str, folder: RunFolder, config: dict[str, Any]) -> Any:
    """Build and start a tracker: TensorBoard's, or one of accelerate's. Raises ConfigError where it is not installed."""
    if name == "tensorboard":
        return _TensorBoard(folder.path / name)
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    cls = LOGGER_TYPE_TO_CLASS[name]
    # accelerate's logger needs its PartialState, which joins a process group that exists.
    PartialState(cpu=not torch.cuda.is_available())
    try:
        if cls.requires_logging_directory:
            tracker = cls(run_name=name, logging_dir=str(folder.path))
        else:
            tracker = cls(run_name=folder.path.name)
        tracker.main_process_only = False  # only rank 0 builds trackers; accelerate need not check which process this is
        tracker.start()
    except ImportError as error:
        raise ConfigError(f"train.trackers={name} is not installed: {error}") from error
    tracker.store_init_configuration(config)
    return tracker


class _TensorBoard:
    """Writes TensorBoard's files into a folder."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(f"train.trackers=tensorboard is not installed: {error}") from error
        self._writer = SummaryWriter(str(folder))

    def log(self, values: dict[str, float], step: int) -> None:
        """Write the numbers of a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, global_step=step)
        self._writer.flush()

    def finish(self) -> None:
        """Close the file."""
        self._writer.close()
