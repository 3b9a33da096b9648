"""Stop a run on a signal: all processes agree on the step, then the loop saves a checkpoint and ends.

No step sends a message for it, however many processes there are. A thread of each process waits in the shared store for a
request to stop; the store answers when there is one. Then

    1. every thread stores the step that its main thread is computing, and holds the main thread at the end of that step;
    2. rank 0 stores the latest of these steps, in which all processes stop: none has passed it.

The threads need no main thread for this, so a process that is held keeps no other from answering.
"""

from __future__ import annotations

import datetime
import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import torch.distributed as td

from pretrain.runtime import distributed
from pretrain.runtime.console import log_info

_FOREVER = datetime.timedelta(days=365)
_EXIT_SECONDS = 2.0
"""How long a process that ends waits for its thread, which ends as soon as no process awaits its answer."""


class EvaluationStop(BaseException):
    """A signal to stop arrived during an evaluation, which ends for it."""


_interruptible: list[StopRequest] = []
"""The request of the run that is evaluating, where its evaluation may end; else empty."""


def raise_if_stopped() -> None:
    """Raise EvaluationStop where an evaluation may end for a signal to stop, and one has arrived."""
    if any(stop.signal_number for stop in _interruptible):
        raise EvaluationStop


class StopRequest:
    """The signal to stop that this process received, if any; all processes agree on it before they stop."""

    def __init__(self) -> None:
        self.signal_number = 0
        """0 = no signal."""
        self._agreement: _Agreement | None = None
        """None for a process alone."""

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: remember it. Raises KeyboardInterrupt at the second Ctrl-C."""
        if self.signal_number and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait for a checkpoint
        if not self.signal_number:  # Slurm and the launcher may both forward the same signal
            log_info(f"{signal.Signals(number).name}: saving after this step, then stopping")
        self.signal_number = number

    def agreed_signal(self) -> str:
        """Return the name of the signal that any process received, or "". Every process calls it once a step.

        With several processes all return the name in the same step, a few milliseconds after the signal.
        """
        number = self.signal_number if self._agreement is None else self._agreement.end_step(self.signal_number)
        return signal.Signals(number).name if number else ""

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Let raise_if_stopped() raise inside the block, in a process alone: several finish what they do together."""
        if self._agreement is None:
            _interruptible.append(self)
        try:
            yield
        finally:
            _interruptible.clear()

    @contextmanager
    def agreement(self) -> Iterator[None]:
        """Let the processes agree inside the block. Collective."""
        if distributed.world_size() > 1:
            self._agreement = _Agreement()
        try:
            yield
        finally:
            if self._agreement is not None:
                self._agreement.close()


class _Agreement:
    """How the processes of a group agree on the step in which they stop. Collective."""

    def __init__(self) -> None:
        self._requests = distributed.open_shared_store("stop")
        # Its own connection: one that waits cannot be used meanwhile.
        self._answers: td.Store = self._requests.clone()
        self._answers.set_timeout(_FOREVER)
        self._lock = threading.Lock()
        self._steps = 0
        """Steps whose end the main thread has passed."""
        self._is_held = False
        self._is_requested = False
        self._decided = threading.Event()
        self._number, self._last_step = 0, math.inf
        self._thread = threading.Thread(target=self._answer, name="stop", daemon=True)
        self._thread.start()

    def end_step(self, number: int) -> int:
        """Pass the end of a step; return the signal that stops the run here, or 0. number: the one received here, or 0."""
        if number and not self._is_requested:
            self._request(number)
        with self._lock:
            if not self._is_held:
                self._steps += 1
                return 0
        self._decided.wait()
        self._steps += 1
        return self._number if self._steps >= self._last_step else 0

    def close(self) -> None:
        """End the thread."""
        self._request(0)
        self._thread.join(_EXIT_SECONDS)

    def _request(self, number: int) -> None:
        """Ask all processes to stop; 0: let all threads end, since the run ends in any case. The first request counts."""
        self._is_requested = True
        with suppress(RuntimeError):  # the store is gone, and the run ends
            self._requests.compare_set("signal", "", str(number))

    def _answer(self) -> None:
        """Wait for a request, answer with the step of the main thread, and wait for the decision."""
        store = self._answers
        try:
            store.wait(["signal"], _FOREVER)
            number = int(store.get("signal"))
            if number == 0:
                return
            with self._lock:
                self._is_held, step = True, self._steps + 1
            store.set(f"step/{distributed.rank()}", str(step))
            if distributed.rank() == 0:
                answers = [f"step/{rank}" for rank in range(distributed.world_size())]
                store.wait(answers, _FOREVER)
                store.set("last", str(max(map(int, store.multi_get(answers)))))
            store.wait(["last"], _FOREVER)
            self._number, self._last_step = number, int(store.get("last"))
        except RuntimeError:  # torch's store errors: the store is gone, and the watchdog or a collective says why
            pass
        finally:
            self._decided.set()


@contextmanager
def catch_stop_signals() -> Iterator[StopRequest]:
    """Yield a StopRequest that SIGINT (Ctrl-C), SIGTERM and SIGUSR1 set inside the block. Collective."""
    stop = StopRequest()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, stop.handle) for number in numbers}
    try:
        with stop.agreement():
            yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
