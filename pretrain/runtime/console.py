"""The terminal: one line from rank 0, a progress bar, durations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from pretrain.runtime import distributed

console = Console(stderr=True, soft_wrap=True, highlight=False)


def log_info(message: str) -> None:
    """One line for the person, from rank 0 only."""
    if distributed.is_main():
        console.print(message, markup=False)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields.get("said", ""))


class ProgressBar:
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

    def log(self, line: dict[str, Any], eta_seconds: float) -> None:
        """The numbers of a log step."""
        wait = 100 * line["data_wait_share"]
        text = (
            f"loss {line['loss']:.4f}  {line['samples_per_second']:.1f} samples/s  data wait {wait:.0f}%  lr {line['lr']:.2e}"
        )
        if self._live:
            self._progress.update(self._task, said=text)
        else:
            log_info(f"step {line['step']}/{self._total}  {text}  eta {duration(eta_seconds)}")

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


Log = Callable[[str], None]
