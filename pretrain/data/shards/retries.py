"""Retries after input/output errors of what is read from disks and networks."""

from __future__ import annotations

import http.client
import time
import urllib.error
from collections.abc import Callable
from typing import TypeVar

from pretrain.errors import UserError

T = TypeVar("T")

RETRY_SECONDS = (0.2, 1.0, 5.0)
"""Seconds to wait before each retry after an input/output error; after the last retry the run stops."""

_PERMANENT_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def is_permanent(error: Exception) -> bool:
    """Return whether trying again does not help after an error: a 4xx of HTTP, for example, except 408, 425 and 429."""
    status = getattr(error, "code", None)
    return isinstance(error, (*_PERMANENT_ERRORS, UserError)) or (
        isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)
    )


def retry_io(action: Callable[[], T], what: str) -> T:
    """Return action(), retried after input/output errors.

    Args:
        action: the operation.
        what: what is read, for the error message.

    Raises:
        UserError: the error is permanent, or the last retry failed.
    """
    retries = 0
    while True:
        try:
            return action()
        except OSError as error:
            if is_permanent(error) or retries == len(RETRY_SECONDS):
                attempts = f", tried {retries + 1} times" if retries else ""
                hint = "; its token may have expired" if getattr(error, "code", None) in (401, 403) else ""
                raise UserError(f"cannot read {what}: {error}{hint}{attempts}") from error
            time.sleep(RETRY_SECONDS[retries])
            retries += 1


def retry_part(action: Callable[[], T], is_abandoned: Callable[[], bool] = lambda: False) -> T:
    """Return action(), which reads a part of a file, tried up to two times more: the other parts need not come again."""
    for seconds in RETRY_SECONDS[:2]:
        try:
            return action()
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()  # it holds the connection
            if is_permanent(error) or is_abandoned():
                raise
            time.sleep(seconds)
    return action()
