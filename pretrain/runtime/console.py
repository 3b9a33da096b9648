"""Terminal output: log lines of rank 0, a progress bar, formatted durations."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from pretrain.printable import one_safe_line
from pretrain.runtime import distributed

console = Console(stderr=True, soft_wrap=True, highlight=False)


def log_info(message: str) -> None:
    """Print one line to stderr, on rank 0 only; without passwords, tokens and control characters."""
    if distributed.is_main():
        console.print(one_safe_line(message), markup=False)


class _MetricsColumn(ProgressColumn):
    """The metrics of the last log step, as text."""

    def render(self, task: Task) -> Text:
        return Text(task.fields.get("metrics", ""))


class ProgressBar:
    """Training progress on rank 0: a live bar on a terminal, elsewhere a line for each log step.

    total: steps of the run; done: steps done before this start.
    """

    def __init__(self, total: int, done: int) -> None:
        self._live = distributed.is_main() and console.is_terminal
        self._total = total
        if self._live:
            self._progress = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(),
                _MetricsColumn(),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                console=console,
            )
            self._progress.start()
            self._task = self._progress.add_task("train", total=total, completed=done, metrics="")

    def step(self, step: int) -> None:
        """Show that `step` steps are done."""
        if self._live:
            self._progress.update(self._task, completed=step)

    def show(self, text: str) -> None:
        """Show a text in the live bar, until the next metrics."""
        if self._live:
            self._progress.update(self._task, metrics=text)

    def log(self, line: dict[str, Any], eta_seconds: float) -> None:
        """Show the metrics of a log step.

        line: a line of metrics.jsonl; eta_seconds: estimated time that remains.
        """
        wait = 100 * line["data_wait_share"]
        text = (
            f"loss {line['loss']:.4f}  {line['samples_per_second']:.1f} samples/s  data wait {wait:.0f}%  lr {line['lr']:.2e}"
        )
        if self._live:
            self._progress.update(self._task, metrics=text)
        else:
            log_info(f"step {line['step']}/{self._total}  {text}  eta {format_duration(eta_seconds)}")

    def close(self) -> None:
        """Stop the live bar."""
        if self._live:
            self._progress.stop()


def format_duration(seconds: float) -> str:
    """Format seconds: 90 -> 1:30, 5400 -> 1:30:00; "?" for infinity and NaN."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
