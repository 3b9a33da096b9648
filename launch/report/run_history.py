"""What a run wrote into its folder, as far as it got.

A run that continues, was stopped, or lacks a file can be read too.

history = read_run("runs/clipart")
history.steps[-1]["loss"], history.evaluations[-1]["val/image_to_text_R@1"], history.get("image.name")
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain import config as configuration
from pretrain.errors import ConfigError
from pretrain.runtime.files import parse_json_object, read_bytes, read_json_object

Line = dict[str, Any]
"""One line of metrics.jsonl."""


@dataclass
class RunHistory:
    """Configuration, environment, status and metrics of a run."""

    folder: Path
    config: dict[str, Any]
    """The resolved configuration; empty where it is missing."""
    config_text: str
    """The same as YAML text."""
    environment: dict[str, Any]
    """environment.json; empty where it is missing."""
    status: dict[str, Any]
    """state (done, stopped, failed, running, unknown), why, step."""
    steps: list[Line]
    """Training lines of metrics.jsonl, in the order of their steps."""
    evaluations: list[Line]
    """Evaluation lines, in the order of their steps."""

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value of the configuration by its dotted name."""
        value: Any = self.config
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                return default
            value = value[part]
        return value

    def get_dict(self, key: str) -> dict[str, Any]:
        """Return a section of the configuration; empty where it is missing or is no section."""
        value = self.get(key)
        return value if isinstance(value, dict) else {}

    def get_int(self, key: str) -> int:
        """Return a whole number of the configuration; 0 where it is missing or is no such number."""
        value = self.get(key)
        return int(value) if _is_number(value) and float(value).is_integer() else 0

    def column(self, name: str) -> tuple[list[float], list[float | None]]:
        """Return (steps, values) of one number of the training lines; None where a line lacks it."""
        has_values = any(line.get(name) is not None for line in self.steps)
        lines = self.steps if has_values else []
        return [line["step"] for line in lines], [line.get(name) for line in lines]

    @property
    def step(self) -> int:
        """The last step that status.json or metrics.jsonl records."""
        recorded = self.status.get("step")
        return max(
            [int(recorded) if recorded is not None and _is_step(recorded) else 0]
            + [int(lines[-1]["step"]) for lines in (self.steps, self.evaluations) if lines]
        )

    @property
    def samples_seen(self) -> int:
        """Samples consumed, repeats counted."""
        return max([0] + [max(0, int(lines[-1].get("samples_seen") or 0)) for lines in (self.steps, self.evaluations) if lines])

    @property
    def training_seconds(self) -> float:
        """Seconds spent on steps, over all resumptions; evaluation and saving are excluded."""
        total, before = 0.0, 0
        for line in self.steps:
            rate, samples_seen = line.get("samples_per_second"), line.get("samples_seen") or before
            if rate and rate > 0 and samples_seen > before:
                total += (samples_seen - before) / rate
            before = samples_seen
        return total

    def best_evaluation(self) -> Line | None:
        """Return the evaluation with the highest mean of both recalls at 1; without recalls, the last one."""
        if not self.evaluations:
            return None
        recalls = (re.fullmatch(r"val/(\w+)_to_text_R@1", name) for line in self.evaluations for name in line)
        others = (match[1] for match in recalls if match is not None)
        for subject in dict.fromkeys(("image", "audio", *others)):
            names = (f"val/{subject}_to_text_R@1", f"val/text_to_{subject}_R@1")
            if lines := [line for line in self.evaluations if all(line.get(name) is not None for name in names)]:
                return max(lines, key=lambda line: sum(line[name] for name in names))
        return self.evaluations[-1]


def read_run(run: str | Path) -> RunHistory:
    """Read runs/NAME by its name, or a run folder by its path. Raises ConfigError where there is no run."""
    folder = Path(run)
    if not folder.exists() and len(folder.parts) == 1 and (Path("runs") / folder).exists():
        folder = Path("runs") / folder
    names = ("config.yaml", "metrics.jsonl", "status.json")
    if not any((folder / name).exists() for name in names):
        raise ConfigError(f"{folder} is not a run folder: it has none of {', '.join(names)}; give runs/NAME")
    text = _read_text(folder / "config.yaml")
    steps: list[Line] = []
    evaluations: list[Line] = []
    for line in _read_lines(folder / "metrics.jsonl"):
        (evaluations if any(name.startswith("val/") for name in line) else steps).append(line)
    return RunHistory(
        folder=folder,
        config=_read_config(folder / "config.yaml"),
        config_text=text,
        environment=_read_json(folder / "environment.json"),
        status={"state": "unknown", "why": "", **_read_json(folder / "status.json")},
        steps=_sort_by_step(steps),
        evaluations=_sort_by_step(evaluations),
    )


_MAX_LOG_BYTES = 1 << 30


def _read_text(path: Path, most: int = 1 << 22) -> str:
    """Return the text of a file; "" where it is missing, too large, or no ordinary file."""
    try:
        return read_bytes(path, most).decode("utf-8", "replace")
    except OSError:
        return ""


def _read_config(path: Path) -> dict[str, Any]:
    """Return the values of a saved configuration; {} where they cannot be read."""
    try:
        return configuration.read_yaml(path)
    except ConfigError:
        return {}


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; {} where there is none."""
    try:
        return read_json_object(path)
    except (OSError, ValueError):
        return {}


def _is_number(value: Any) -> bool:
    """Return whether a value is a number that charts and tables can hold."""
    return type(value) in (int, float) and abs(value) < 1e30


def _is_step(value: Any) -> bool:
    """Return whether a value can be the step of a run."""
    return _is_number(value) and 0 <= value < 1 << 53 and float(value).is_integer()


def _read_lines(path: Path) -> list[Line]:
    """Read the complete lines that have a step; a kill may have truncated the last one."""
    lines = []
    for text in _read_text(path, _MAX_LOG_BYTES).splitlines():
        try:
            line = parse_json_object(text.encode())
        except ValueError:
            continue
        if _is_step(line.get("step")):  # runs write nothing but numbers; whatever else a line holds was not written by one
            numbers = {name: value for name, value in line.items() if value is None or _is_number(value)}
            lines.append(numbers | {"step": int(line["step"])})
    return lines


def _sort_by_step(lines: list[Line]) -> list[Line]:
    """Sort lines by step, and of two for the same step keep the later.

    A run that was killed may have repeated some steps before it resumed.
    """
    return [line for _, line in sorted({line["step"]: line for line in lines}.items())]
