"""Stopping on purpose: a signal becomes a wish, all processes agree on it, the loop saves and ends."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from pretrain.runtime import distributed
from pretrain.runtime.console import log_info


class Stop:
    """A wish to stop, by signal; all processes agree on it before any acts."""

    def __init__(self) -> None:
        self.wish = 0
        self._asked: Callable[[], int] | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.wish and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait for a checkpoint
        if not self.wish:  # Slurm and the launcher may both pass a signal on
            log_info(f"{signal.Signals(number).name}: saving after this step, then stopping")
        self.wish = number

    def agreed_signal(self) -> str:
        """The name of the signal that any process got, or nothing. Collective.

        With several processes the answer is the one to the question of the step before: no step waits for it.
        """
        number = self.wish
        if distributed.world_size() > 1:
            number = self._asked() if self._asked is not None else 0
            self._asked = distributed.start_maximum(self.wish)
        return signal.Signals(number).name if number else ""


@contextmanager
def catch_stop_signals() -> Iterator[Stop]:
    """Ctrl-C, SIGTERM and SIGUSR1 become a wish to stop inside."""
    stop = Stop()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, stop.handle) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
