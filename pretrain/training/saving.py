"""The saves of a run: at most one in flight, and failures counted alike on all ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from pretrain.checkpoints.background import CheckpointWriter, Report
from pretrain.checkpoints.uploading import Uploader
from pretrain.checkpoints.writing import Content, SaveError, capture_files, write_checkpoint
from pretrain.errors import UserError
from pretrain.printable import format_count
from pretrain.runtime import distributed
from pretrain.runtime.agree import on_main
from pretrain.runtime.console import log_info
from pretrain.training.config import RunPlan, TrainConfig


@dataclass
class Save:
    """A save: of which step, after how many skipped ones, where, and how it ended."""

    step: int
    skipped: int
    path: Path
    best_score: float | None
    """The score of the best checkpoint so far, where this is the one."""
    failure: SaveError | None = None

    def is_there(self) -> bool:
        """Return whether the checkpoint is complete: what follows its rename may have failed."""
        return self.failure is None or self.failure.is_complete


class Saves:
    """Starts the saves of a run, one after the other.

    Args:
        checkpoints: the folder.
        train: whether saves run in the background, how many may fail, how many are kept, where they are copied to.

    `with saves:` waits at its end for a save and an upload in flight, unless Ctrl-C ends it.
    """

    def __init__(self, checkpoints: Path, train: TrainConfig) -> None:
        self.writer = CheckpointWriter(train.background_saves)
        """Writes them, on rank 0."""
        self.files: Content = {}
        """What lies beside the weights in every checkpoint, on rank 0."""
        self._uploader = Uploader(train.copy_to, train.keep) if train.copy_to and distributed.is_main() else None
        self._checkpoints, self._keep, self._max_failed = checkpoints, train.keep, train.max_failed_saves
        self._in_flight: Save | None = None
        """The save whose end is not known yet: the same on all ranks."""
        self._failed = 0
        """Saves that failed since the last one that did not."""

    def prepare(self, plan: RunPlan) -> None:
        """Keep what lies beside the weights, which does not change in a run, and try train.copy_to. Collective.

        Raises UserError.
        """

        def prepare() -> None:
            if self._uploader is not None:
                self._uploader.check()
            try:
                self.files = capture_files(plan.save_files)
            except OSError as error:
                raise UserError(f"the tokenizer cannot be written into a temporary folder: {error}") from error

        on_main(prepare)

    def start(self, save: Save, content: Content, **options: Any) -> None:
        """Begin a save, after the one before has been waited for. options: those of write_checkpoint."""
        self._in_flight = save
        if distributed.is_main():
            work = partial(self._write, save.step, content, options)
            self.writer.start(f"the checkpoint of step {save.step}", work)

    def _write(self, step: int, content: Content, options: dict[str, Any], report: Report) -> Path:
        if not self._checkpoints.is_dir():
            log_info(f"{self._checkpoints} was deleted under the run; it is made anew")
        if self._uploader is not None:
            options = {**options, "upload": self._uploader.start}
        return write_checkpoint(self._checkpoints, step, content, keep=self._keep, report=report, **options)

    def finish(self) -> None:
        """Wait until the last checkpoint is copied to train.copy_to, or could not be. Collective."""
        on_main(lambda: self._uploader.finish() if self._uploader is not None else None)

    def __enter__(self) -> Saves:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.writer.finish(is_waiting=not isinstance(error, KeyboardInterrupt))
        if self._uploader is not None and not isinstance(error, KeyboardInterrupt):
            self._uploader.finish()

    def is_done(self) -> bool:
        """Return whether a save has ended that was not waited for: always false on other ranks than 0."""
        return self.writer.is_done()

    def wait(self) -> Save | None:
        """Wait for the save in flight and return it, with how it ended, on all ranks; None where there is none. Collective."""
        save, self._in_flight = self._in_flight, None
        if save is None:
            return None
        try:
            on_main(self.writer.wait)
        except SaveError as error:
            save.failure = error
        self._failed = 0 if save.failure is None else self._failed + 1
        return save

    def report_failure(self, failure: SaveError, is_last: bool, may_end: bool) -> None:
        """Print what failed and how many more failures end the run, or raise it where this one does.

        is_last, may_end: see Run.settle.
        """
        if is_last:
            raise failure
        if not may_end:
            log_info(str(failure))
            return
        left = self._max_failed - self._failed
        if left <= 0:
            count = f"; {self._failed} saves in a row failed (train.max_failed_saves)" if self._failed > 1 else ""
            raise SaveError(f"{failure}{count}") from failure
        in_a_row = f"{format_count(left, 'more failed save')} in a row (train.max_failed_saves={self._max_failed})"
        log_info(f"{failure}; training goes on, and ends after {in_a_row}")
