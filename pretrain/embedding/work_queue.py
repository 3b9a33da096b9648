"""What processes that share work tell each other while they do it, without waiting for one another; and how far they are.

A collective would make the fast wait for the slow; these are counters in the store that the processes met at.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any

from pretrain.errors import UserError
from pretrain.runtime import distributed
from pretrain.runtime.console import console, format_duration, log_info

SAY_SECONDS = 10.0
"""Between two lines of progress, where there is no terminal."""


class WorkQueue:
    """Counters that all processes of the run see."""

    def __init__(self) -> None:
        self._store = distributed.open_shared_store("embed") if distributed.world_size() > 1 else None
        self._own: Counter[str] = Counter()
        self._result: dict[str, float] = {}

    def add(self, name: str, number: int) -> int:
        """The new value."""
        if self._store is not None:
            return int(self._store.add(name, number))
        self._own[name] += number
        return self._own[name]

    def fail(self, line: str) -> None:
        """Tells the others to stop."""
        if self._store is not None and self._store.add("failed", 1) == 1:
            self._store.set("failure", line)

    def check(self) -> None:
        """Raises the UserError of another process."""
        if self._store is not None and self._store.add("failed", 0):
            raise UserError(self._store.get("failure").decode())

    def finish(self, result: dict[str, float]) -> None:
        """What this process brings to the end."""
        if self._store is not None:
            self._store.set(f"result/{distributed.rank()}", json.dumps(result))
        else:
            self._result = result
        self.add("finished", 1)

    def results(self) -> list[dict[str, float]]:
        """Of all processes, once they have finished; empty where there was nothing to do."""
        if not self.add("finished", 0):
            return []
        if self._store is None:
            return [self._result]
        return [json.loads(self._store.get(f"result/{rank}")) for rank in range(distributed.world_size())]


class ProgressBar:
    """Progress of all processes, on rank 0: a bar on a terminal, elsewhere a line now and then."""

    def __init__(self, there: int, total: int, board: WorkQueue) -> None:
        self.there, self.total, self.board = there, total, board
        self._begin = self._said = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> ProgressBar:
        if distributed.is_main() and console.is_terminal and self.there < self.total:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            rate = TextColumn("{task.fields[rate]:,.1f} samples/s  eta")
            self._bar = Progress(
                TextColumn("embedding"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn(), console=console,
                transient=True,
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task("embedding", total=self.total, completed=self.there, rate=0.0)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self) -> None:
        """After each batch."""
        now = time.monotonic()
        if not distributed.is_main() or now - self._said < (0.2 if self._bar else SAY_SECONDS):
            return
        self._said = now
        done = self.board.add("samples", 0)
        rate = done / max(now - self._begin, 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, completed=self.there + done, rate=rate)
            return
        eta = format_duration((self.total - self.there - done) / rate) if rate else "?"
        log_info(f"embedded {self.there + done:,} of {self.total:,}  {rate:,.1f} samples/s  eta {eta}")

    def until_finished(self) -> None:
        """Waits for the other processes: longer than any collective's time limit, if they need it."""
        while self.board.add("finished", 0) < distributed.world_size():
            self.board.check()
            self.update()
            time.sleep(0.05)
