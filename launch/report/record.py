"""A run folder, read as far as it got: a run that is going on, was stopped, or lacks a file is read all the same.

record = read("runs/clipart")
record.steps[-1]["loss"], record.evaluations[-1]["val/image_to_text_R@1"], record.get("image.name")
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pretrain.errors import UserError

Line = dict[str, Any]


@dataclass
class Record:
    """What a run wrote about itself."""

    folder: Path
    config: dict[str, Any]
    """The resolved configuration; empty where it is missing."""
    config_text: str
    environment: dict[str, Any]
    status: dict[str, Any]
    """state (done, stopped, failed, running, unknown), why, step."""
    steps: list[Line]
    """Training lines of metrics.jsonl, by rising step."""
    evaluations: list[Line]
    """Evaluation lines, by rising step."""

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the configuration by its dotted name."""
        value: Any = self.config
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                return default
            value = value[part]
        return value

    def column(self, name: str) -> tuple[list[float], list[float | None]]:
        """(steps, values) of one number of the training lines; None where a line lacks it."""
        has = any(line.get(name) is not None for line in self.steps)
        lines = self.steps if has else []
        return [line["step"] for line in lines], [line.get(name) for line in lines]

    @property
    def step(self) -> int:
        """The last step that left a trace."""
        return max(
            [int(self.status.get("step") or 0)] + [int(lines[-1]["step"]) for lines in (self.steps, self.evaluations) if lines]
        )

    @property
    def samples_seen(self) -> int:
        """Samples consumed, repeats counted."""
        return max([0] + [int(lines[-1].get("samples_seen") or 0) for lines in (self.steps, self.evaluations) if lines])

    @property
    def training_seconds(self) -> float:
        """Seconds spent on steps, over all resumptions; evaluations, saving and the time between them are not in it."""
        total, before = 0.0, 0
        for line in self.steps:
            rate, seen = line.get("samples_per_second"), line.get("samples_seen") or before
            if rate:
                total += (seen - before) / rate
            before = seen
        return total

    def best(self) -> Line | None:
        """The evaluation with the highest mean of both recalls at 1; without recalls, the last one."""
        if not self.evaluations:
            return None
        names = ("val/image_to_text_R@1", "val/text_to_image_R@1")
        scored = [line for line in self.evaluations if all(line.get(name) is not None for name in names)]
        return max(scored, key=lambda line: sum(line[name] for name in names)) if scored else self.evaluations[-1]


def read(run: str | Path) -> Record:
    """Reads runs/NAME, or a run's folder by its path. Raises UserError where there is no run."""
    folder = Path(run)
    if not folder.exists() and len(folder.parts) == 1 and (Path("runs") / folder).exists():
        folder = Path("runs") / folder
    names = ("config.yaml", "metrics.jsonl", "status.json")
    if not any((folder / name).exists() for name in names):
        raise UserError(f"{folder} is not a run folder: it has none of {', '.join(names)}; give runs/NAME")
    text = _text(folder / "config.yaml")
    steps: list[Line] = []
    evaluations: list[Line] = []
    for line in _lines(folder / "metrics.jsonl"):
        (evaluations if any(name.startswith("val/") for name in line) else steps).append(line)
    return Record(
        folder=folder,
        config=_yaml(text),
        config_text=text,
        environment=_json(folder / "environment.json"),
        status={"state": "unknown", "why": "", **_json(folder / "status.json")},
        steps=_rising(steps),
        evaluations=_rising(evaluations),
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _yaml(text: str) -> dict[str, Any]:
    values = OmegaConf.to_container(OmegaConf.create(text), resolve=False) if text.strip() else {}
    return {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_text(path) or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _lines(path: Path) -> list[Line]:
    """Whole lines that name a step; a kill may have cut the last one."""
    found = []
    for text in _text(path).splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int | float):
            found.append(line)
    return found


def _rising(lines: list[Line]) -> list[Line]:
    """By step, the later line of two for the same step: a run that was killed may have repeated some before it resumed."""
    return [line for _, line in sorted({line["step"]: line for line in lines}.items())]
