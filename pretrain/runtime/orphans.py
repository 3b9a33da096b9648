"""Processes that end with the one that started them: a parent that is killed by SIGKILL cannot end its children."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable


def is_orphan(parent: int) -> bool:
    """Whether `parent`, the process that started this one, is gone."""
    return os.getppid() != parent


def exit_with_parent(parent: int, every_seconds: float = 0.5, last_words: Callable[[], None] | None = None) -> None:
    """Start a thread that ends this process with exit code 1, after `last_words`, once `parent` is gone."""

    def watch() -> None:
        while not is_orphan(parent):
            time.sleep(every_seconds)
        if last_words is not None:
            last_words()
        os._exit(1)

    threading.Thread(target=watch, name="exit-with-parent", daemon=True).start()
