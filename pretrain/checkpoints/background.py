"""Write one checkpoint at a time on rank 0, in a thread while training goes on, or at once.

The thread calls no collective. What it writes lies in host memory and changes no more, so the files are those of a save at
once. torch.distributed.checkpoint.async_save writes another format, and coordinates its ranks by collectives in the thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from pretrain.checkpoints.writing import SaveError
from pretrain.runtime.console import format_duration, log_info

FIRST_SECONDS, MOST_SECONDS = 10.0, 300.0
"""Seconds until the first line of who waits for a save, and between lines at most; in between they double."""
EXIT_SECONDS = 20.0
"""How long a process that must end waits for a save."""

Report = Callable[[str], None]


class _Cancelled(BaseException):
    """The user does not wait for the save: the thread ends before its next file."""


class CheckpointWriter:
    """Writes checkpoints one after the other; `wait` returns how the last one ended.

    is_background: write in a thread; else `wait` itself writes.
    """

    def __init__(self, is_background: bool) -> None:
        self.is_background = is_background
        self._work: Callable[[Report], Path] | None = None
        self._title = self._phase = ""
        self._thread: threading.Thread | None = None
        self._result: Path | BaseException | None = None
        self._done = threading.Event()
        self._is_cancelled = False

    def start(self, title: str, work: Callable[[Report], Path]) -> None:
        """Begin a save; the one before must have been waited for.

        Args:
            title: what is written, for lines about it.
            work: writes and returns the checkpoint. It calls the function that it is given with what it does next.
        """
        assert self._work is None, "a save is in flight"
        self._work, self._title, self._phase, self._result = work, title, "starting", None
        self._done.clear()
        if self.is_background:
            self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
            self._thread.start()

    def is_done(self) -> bool:
        """Return whether there is a save that has ended, so that `wait` returns at once."""
        return self._work is not None and self._done.is_set()

    def wait(self) -> Path:
        """Wait for the save, and return its checkpoint. Raises what it raised: SaveError where it could not be written.

        A line says every now and then what a long wait is for.
        """
        assert self._work is not None, "no save is in flight"
        work, thread = self._work, self._thread
        if thread is None:
            self._run(work)
        begin, due = time.monotonic(), FIRST_SECONDS
        while not self._done.wait(1.0):
            seconds = time.monotonic() - begin
            if seconds >= due:
                log_info(f"waiting for {self._title} since {format_duration(seconds)}: {self._phase}")
                due = seconds + min(MOST_SECONDS, seconds)
        self._work = self._thread = None  # with them goes the memory that the save held
        result, self._result = self._result, None
        if isinstance(result, BaseException):
            raise result
        assert result is not None
        return result

    def wait_briefly(self) -> None:
        """Give a save in flight some seconds to end: the process is about to."""
        if self._thread is not None:
            self._done.wait(EXIT_SECONDS)

    def _run(self, work: Callable[[Report], Path]) -> None:
        try:
            self._result = work(self._report)
        except BaseException as error:  # raised again by wait()
            if isinstance(error, SaveError):  # its traceback would hold the tensors
                error.__cause__ = error.__context__ = error.__traceback__ = None
            self._result = error
        finally:
            self._done.set()

    def _report(self, phase: str) -> None:
        if self._is_cancelled:
            raise _Cancelled
        self._phase = phase

    def finish(self, is_waiting: bool = True) -> None:
        """Wait for a save in flight where the run ends by an error; a failure is a line. is_waiting: else end it soon."""
        if self._thread is None:
            return
        if not is_waiting:  # who presses Ctrl-C twice does not wait for a checkpoint
            self._is_cancelled = True
            self._done.wait(2.0)
            return
        try:
            self.wait()
        except SaveError as failure:  # the run ends by another error
            log_info(str(failure))
