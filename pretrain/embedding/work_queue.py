"""Divide work among processes that do not wait for each other, and show the progress of all of them.

A collective would make fast processes wait for slow ones. These are counters in the key-value store through which the
processes met at the start.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any

from pretrain.errors import UserError
from pretrain.runtime import distributed
from pretrain.runtime.console import console, format_duration, log_info

LOG_SECONDS = 10.0
"""Seconds between two lines of progress, where there is no terminal."""


class WorkQueue:
    """Counters and results that all processes of the run share.

    With one process, they are plain variables.
    """

    def __init__(self) -> None:
        self._store = distributed.open_shared_store("embed") if distributed.world_size() > 1 else None
        self._counters: Counter[str] = Counter()
        self._result: dict[str, float] = {}

    def add(self, name: str, number: int) -> int:
        """Add `number` to the counter `name` and return its new value."""
        if self._store is not None:
            return int(self._store.add(name, number))
        self._counters[name] += number
        return self._counters[name]

    def fail(self, message: str) -> None:
        """Make the next `check` of every other process raise `message`."""
        if self._store is not None and self._store.add("failed", 1) == 1:
            self._store.set("failure", message)

    def check(self) -> None:
        """Raise the UserError of another process, if one has failed."""
        if self._store is not None and self._store.add("failed", 0):
            raise UserError(self._store.get("failure").decode())

    def finish(self, result: dict[str, float]) -> None:
        """Publish this process's result and count it as finished."""
        if self._store is not None:
            self._store.set(f"result/{distributed.rank()}", json.dumps(result))
        else:
            self._result = result
        self.add("finished", 1)

    def results(self) -> list[dict[str, float]]:
        """Return the results of all processes, which must have finished; empty if there was nothing to do."""
        if not self.add("finished", 0):
            return []
        if self._store is None:
            return [self._result]
        return [json.loads(self._store.get(f"result/{rank}")) for rank in range(distributed.world_size())]


class ProgressBar:
    """Progress of all processes, on rank 0: a bar on a terminal, elsewhere a line every LOG_SECONDS.

    Args:
        done: samples that were embedded before.
        total: samples of the whole data set.
        queue: counts the samples that all processes have embedded since, as "samples".
    """

    def __init__(self, done: int, total: int, queue: WorkQueue) -> None:
        self.done, self.total, self.queue = done, total, queue
        self._begin = self._updated = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> ProgressBar:
        if distributed.is_main() and console.is_terminal and self.done < self.total:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            rate = TextColumn("{task.fields[rate]:,.1f} samples/s  eta")
            self._bar = Progress(
                TextColumn("embedding"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn(), console=console,
                transient=True,
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task("embedding", total=self.total, completed=self.done, rate=0.0)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self) -> None:
        """Show the progress, unless it was shown a moment ago. Call it after each batch."""
        now = time.monotonic()
        if not distributed.is_main() or now - self._updated < (0.2 if self._bar else LOG_SECONDS):
            return
        self._updated = now
        embedded = self.queue.add("samples", 0)
        rate = embedded / max(now - self._begin, 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done + embedded, rate=rate)
            return
        eta = format_duration((self.total - self.done - embedded) / rate) if rate else "?"
        log_info(f"embedded {self.done + embedded:,} of {self.total:,}  {rate:,.1f} samples/s  eta {eta}")

    def wait_for_others(self) -> None:
        """Wait until every process has finished, however long: a collective would hit its time limit."""
        while self.queue.add("finished", 0) < distributed.world_size():
            self.queue.check()
            self.update()
            time.sleep(0.05)
