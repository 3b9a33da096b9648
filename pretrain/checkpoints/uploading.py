"""Copy complete checkpoints to train.copy_to in a thread of rank 0, the newest first."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from pretrain.checkpoints import remote
from pretrain.checkpoints.store import read_pointer
from pretrain.errors import UserError
from pretrain.printable import one_safe_line
from pretrain.runtime.console import format_duration, log_info

FIRST_SECONDS, MOST_SECONDS = 5.0, 60.0
"""Seconds until the first line of who waits for an upload, and between lines at most; in between they double."""


class Uploader:
    """Uploads one checkpoint at a time. Where saves are faster, those before the newest are left out, but not the best one.

    An upload that fails is one line, and changes nothing else.

    Args:
        address: of a store with a prefix, or a folder.
        keep: the newest copies to keep, as train.keep.
    """

    def __init__(self, address: str, keep: int) -> None:
        self.address, self._keep = address.rstrip("/"), keep
        self._condition = threading.Condition()
        self._next: list[tuple[Path, Path | None]] = []
        self._current: Path | None = None
        self._phase = ""
        self._thread: threading.Thread | None = None

    def check(self) -> None:
        """Refuse a store that cannot be read. Raises UserError."""
        try:
            remote.list_files(self.address)
        except OSError as error:
            raise UserError(one_safe_line(f"train.copy_to={self.address} cannot be used: {error}")) from error

    def start(self, checkpoint: Path, good: Path | None) -> Path | None:
        """Begin to upload a complete checkpoint, after the present upload.

        good: rotation keeps its copy. Returns the folder that is being read, which must stay until then; None = no other.
        """
        best = read_pointer(checkpoint.parent, "best")
        with self._condition:
            self._next = [*[waiting for waiting in self._next if waiting[0] == best != checkpoint], (checkpoint, good)]
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="upload", daemon=True)
                self._thread.start()
            return self._current

    def finish(self) -> None:
        """Wait until the last checkpoint is uploaded, or could not be; lines say how far that is."""
        begin, due = time.monotonic(), FIRST_SECONDS
        with self._condition:
            while self._thread is not None:
                self._condition.wait(1.0)
                seconds = time.monotonic() - begin
                if self._thread is not None and seconds >= due:
                    name = self._current.name if self._current is not None else ""
                    log_info(f"uploading {name} to {self.address} since {format_duration(seconds)}: {self._phase}")
                    due = seconds + min(MOST_SECONDS, seconds)

    def _run(self) -> None:
        try:
            self._upload_all()
        finally:  # of a bug, too: who waits would wait for ever
            with self._condition:
                self._current = self._thread = None
                self._condition.notify_all()

    def _upload_all(self) -> None:
        while True:
            with self._condition:
                if not self._next:
                    self._current = self._thread = None
                    return
                checkpoint, good = self._next.pop(0)
                self._current = checkpoint
            try:
                remote.upload(checkpoint, self.address, self._report)
                self._report("rotating")
                remote.rotate(self.address, self._keep, checkpoint, good)
            except (OSError, UserError, ValueError) as error:
                log_info(one_safe_line(f"{checkpoint} could not be copied to {self.address}: {error}"))

    def _report(self, phase: str) -> None:
        self._phase = phase
