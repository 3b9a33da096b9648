"""Lines that say how far a long loop is, for work that would otherwise be silent; a signal to stop can end such a loop."""

from __future__ import annotations

import time
from collections.abc import Iterator

from pretrain.runtime.console import format_duration, log_info
from pretrain.runtime.signals import raise_if_stopped

FIRST_SECONDS, MOST_SECONDS = 5.0, 60.0
"""Seconds until the first line, and between lines at most: in between as long as the loop has run."""


def report_progress(text: str, total: int) -> Iterator[int]:
    """Yield 0 to total - 1, and log on rank 0 how far that is: "evaluating: batch 12 of 40, eta 0:30".

    Raises EvaluationStop where a signal to stop arrived and the loop may end for it.
    """
    begin = time.monotonic()
    due = begin + FIRST_SECONDS
    for number in range(total):
        raise_if_stopped()
        yield number
        now = time.monotonic()
        if now >= due and number + 1 < total:
            left = format_duration((now - begin) / (number + 1) * (total - number - 1))
            log_info(f"{text}: batch {number + 1:,} of {total:,}, eta {left}")
            due = now + min(MOST_SECONDS, max(FIRST_SECONDS, now - begin))
