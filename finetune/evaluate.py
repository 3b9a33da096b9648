"""A fine-tuned run's own evaluation, with what was measured on what: for `clipfuse evaluate RUN`, --json or a table."""

from __future__ import annotations

import time
from typing import Any

import torch
from rich.table import Table

from finetune.loading import Finetuned
from finetune.tasks import EvalConfig

COUNTS = ("samples", "captions", "questions", "bad_samples")
"""What is not a figure of its own: goes below the table."""


def run(
    tuned: Finetuned,
    shards: Any,
    device: torch.device,
    config: EvalConfig | None = None,
    precision: str = "fp32",
    train: Any = None,
) -> dict[str, Any]:
    """The task's figures on `shards` as plain values. `train`: shards that baselines are learnt from, instead of the run's.

    Collective. Raises UserError.
    """
    begin = time.perf_counter()
    metrics = tuned.evaluate(shards, config or EvalConfig(), device, precision, train)
    return {
        "checkpoint": str(tuned.folder),
        "step": tuned.step,
        "data": shards,
        "tasks": [tuned.config.task.name],
        "primary": tuned.task.primary_metric,
        "metrics": metrics,
        "seconds": round(time.perf_counter() - begin, 3),
    }


def summary(result: dict[str, Any]) -> Table:
    """The result of `run` for people: shares in percent, and beside a figure that of who saw no picture."""
    metrics = result["metrics"]
    counted = [f"{int(metrics[name]):,} {name.replace('_', ' ')}" for name in COUNTS if metrics.get(name)]
    title = f"{result['checkpoint']}, step {result['step']:,}: {result['tasks'][0]}"
    table = Table(title=title, caption=f"{', '.join(counted)}, {result['seconds']:.0f} s", min_width=len(title))
    table.add_column("measure")
    table.add_column("result", justify="right")
    blind = any(name.startswith("blind_") for name in metrics)
    if blind:
        table.add_column("without picture", justify="right", style="dim")
    for name, value in metrics.items():
        if name in COUNTS or name.startswith("blind_"):
            continue
        row = [name.replace("_", " "), _shown(name, value)]
        if blind:
            row.append(_shown(name, metrics[f"blind_{name}"]) if f"blind_{name}" in metrics else "")
        table.add_row(*row)
    return table


def _shown(name: str, value: float) -> str:
    share = isinstance(value, float) and 0 <= value <= 1 and not name.endswith(("_rank", "_ms"))  # rank 1 is no 100 %
    return f"{100 * value:.1f} %" if share else f"{round(value, 2):g}"
