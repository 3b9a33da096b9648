"""End a process when its parent is gone: a parent that is killed by SIGKILL cannot end its children."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable


def is_orphan(parent: int) -> bool:
    """Return whether the process with pid `parent`, which started this one, has ended."""
    return os.getppid() != parent


def exit_with_parent(parent: int, every_seconds: float = 0.5, on_exit: Callable[[], None] | None = None) -> None:
    """Start a thread that ends this process with exit code 1 once `parent` has ended.

    every_seconds: interval of the checks; on_exit: called before this process ends.
    """

    def watch() -> None:
        while not is_orphan(parent):
            time.sleep(every_seconds)
        if on_exit is not None:
            on_exit()
        os._exit(1)

    threading.Thread(target=watch, name="exit-with-parent", daemon=True).start()
