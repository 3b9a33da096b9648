"""Stop a run on a signal: all processes agree on the step, then the loop saves a checkpoint and ends."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from pretrain.runtime import distributed
from pretrain.runtime.console import log_info


class StopRequest:
    """The signal to stop that this process received, if any; all processes agree on it before they stop."""

    def __init__(self) -> None:
        self.signal_number = 0
        """0 = no signal."""
        self._pending: Callable[[], int] | None = None
        """Waits for the maximum over all processes that was started a step before."""

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: remember it. Raises KeyboardInterrupt at the second Ctrl-C."""
        if self.signal_number and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait for a checkpoint
        if not self.signal_number:  # Slurm and the launcher may both forward the same signal
            log_info(f"{signal.Signals(number).name}: saving after this step, then stopping")
        self.signal_number = number

    def agreed_signal(self) -> str:
        """Return the name of the signal that any process received, or "". Collective.

        With several processes this is the state of the step before, whose reduction has finished: no step waits for it.
        """
        number = self.signal_number
        if distributed.world_size() > 1:
            number = self._pending() if self._pending is not None else 0
            self._pending = distributed.start_maximum(self.signal_number)
        return signal.Signals(number).name if number else ""


@contextmanager
def catch_stop_signals() -> Iterator[StopRequest]:
    """Yield a StopRequest that SIGINT (Ctrl-C), SIGTERM and SIGUSR1 set inside the block."""
    stop = StopRequest()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, stop.handle) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
