"""Evaluation of a fine-tuned run on its own task, as json values or a table (`clipfuse evaluate RUN`)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from finetune.loading import Finetuned
from finetune.tasks import EvalConfig, Task
from pretrain.evaluation.chance import chance_levels, without_chance
from pretrain.printable import get_noun

COUNTS = ("samples", "captions", "questions", "bad_samples")
"""Metrics that are counts; the table shows them below."""


def run(
    tuned: Finetuned,
    shards: Any,
    device: torch.device,
    config: EvalConfig | None = None,
    precision: str = "fp32",
    train: Any = None,
) -> dict[str, Any]:
    """Compute the task's metrics on `shards`, as plain values for json. Collective. Raises UserError.

    `train` names shards from which baselines are computed, instead of the run's training shards.
    """
    begin = time.perf_counter()
    metrics = tuned.evaluate(shards, config or EvalConfig(), device, precision, train)
    seconds = round(time.perf_counter() - begin, 3)
    return build_result(tuned.folder, tuned.step, shards, tuned.config.task.name, tuned.task, metrics, seconds)


def build_result(
    folder: Path, step: int, shards: Any, name: str, task: Task, metrics: dict[str, float], seconds: float | None
) -> dict[str, Any]:
    """Build the result of `run` from the metrics of a checkpoint. name: of the task; seconds: None = not known."""
    return {
        "checkpoint": str(folder),
        "step": step,
        "data": shards,
        "tasks": [name],
        "primary": task.primary_metric,
        "subject": task.subject,
        "metrics": without_chance(metrics),
        "chance": chance_levels(metrics),
        "chance_is": task.describe_chance(),
        "seconds": seconds,
    }


def summary(result: dict[str, Any]) -> Table:
    """Format the result of `run` as a table: fractions in percent, chance and question-only baselines in columns."""
    metrics, chance = result["metrics"], result["chance"]
    counts = [f"{int(metrics[name]):,} {name.replace('_', ' ')}" for name in COUNTS if metrics.get(name)]
    title = f"{result['checkpoint']}, step {result['step']:,}: {result['tasks'][0]}"
    counts += [] if result["seconds"] is None else [f"{result['seconds']:.0f} s"]
    caption = ", ".join(counts) + (f"; chance: {result['chance_is']}" if chance else "")
    table = Table(title=title, caption=caption, min_width=len(title))
    table.add_column("metric")
    table.add_column("result", justify="right")
    if chance:
        table.add_column("chance", justify="right", style="dim")
    has_baseline = any(name.startswith("blind_") for name in metrics)
    if has_baseline:
        table.add_column(f"without {get_noun(result['subject'])}", justify="right", style="dim")
    for name, value in metrics.items():
        if name in COUNTS or name.startswith("blind_"):
            continue
        row = [name.replace("_", " "), _format(name, value)]
        if chance:
            row.append(_format(name, chance[name]) if name in chance else "")
        if has_baseline:
            row.append(_format(name, metrics[f"blind_{name}"]) if f"blind_{name}" in metrics else "")
        table.add_row(*row)
    return table


def _format(name: str, value: float) -> str:
    """Format a fraction in percent, any other number with two decimals."""
    # A rank of 1 or a time of 1 ms is not 100 %.
    is_fraction = isinstance(value, float) and 0 <= value <= 1 and not name.endswith(("_rank", "_ms"))
    return f"{100 * value:.1f} %" if is_fraction else f"{round(value, 2):g}"
