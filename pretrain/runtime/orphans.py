"""No process outlives the one that started it, however that one ends.

A parent that is killed by SIGKILL cannot end its children: they watch for it (exit_with_parent). A parent that ends by an
error may not have stopped its children yet: they are killed at its exit (kill_at_exit).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import util
from multiprocessing.process import BaseProcess


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


def kill_at_exit(processes: Sequence[BaseProcess]) -> Callable[[], None]:
    """Kill `processes` when this process exits, unless the returned function has been called before.

    At exit multiprocessing sends SIGTERM to its daemons and waits for them without a limit: for ever, where one ignores
    SIGTERM or is blocked. This runs before that.
    """
    # An exit priority of 0 or more: multiprocessing calls it before it waits for its daemons. Forked processes do not call it.
    return util.Finalize(None, kill, (list(processes),), exitpriority=100).cancel


def kill(processes: Sequence[BaseProcess]) -> None:
    """Kill the processes that still run, and wait until they have ended."""
    for process in processes:
        with suppress(ValueError):  # it ended before and was closed
            process.kill()
    for process in processes:
        with suppress(ValueError):
            process.join()
