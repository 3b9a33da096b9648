"""Ensure that an error on one rank is raised on every rank, so that no rank waits for one that gave up.

    on_main(f)            rank 0 calls f; its result, or its error, is every rank's
    on_all(f)             every rank calls f; each keeps its own result, an error of one is raised by all
    gather_or_raise(f)    every rank calls f; every rank gets all results in rank order, or the error

Shared are the expected failures: UserError with its subclasses (ConfigError stays one: its exit code differs) and OSError.
Where several ranks fail, all raise the error of the lowest. Any other exception is a bug: its rank raises it at once, and the
watchdog names that rank on the others. Each function is ONE object collective, and none without a group of processes.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

from pretrain.errors import ConfigError, UserError
from pretrain.runtime import distributed

T = TypeVar("T")
Failure = UserError | OSError


def on_main(work: Callable[[], T]) -> T:
    """Return on every rank what `work` returns on rank 0, or raise its error on every rank. Collective.

    The result travels and must be picklable. `work` may not contain collectives: the other ranks do not call it.
    """
    value, error = _attempt(work) if distributed.is_main() else (None, None)
    value, received = distributed.broadcast_object((value, _picklable(error)))
    if received is not None:
        raise error or received
    result: T = value
    return result


def on_all(work: Callable[[], T]) -> T:
    """Return what `work` returns on this rank; if any rank fails, raise its error on every rank. Collective.

    The result does not travel.
    """
    value, error = _attempt(work)
    _raise_first(error, distributed.gather_objects(_picklable(error)))
    result: T = value
    return result


def gather_or_raise(work: Callable[[], T]) -> list[T]:
    """Return the results of `work` on all ranks, in rank order; if any rank fails, raise its error. Collective."""
    value, error = _attempt(work)
    outcomes = distributed.gather_objects((value, _picklable(error)))
    _raise_first(error, [received for _, received in outcomes])
    return [result for result, _ in outcomes]


def _attempt(work: Callable[[], Any]) -> tuple[Any, Failure | None]:
    """Call `work` and return its result, or the expected failure it raised."""
    try:
        return work(), None
    except (UserError, OSError) as error:
        return None, error


def _raise_first(own: Failure | None, received: list[Failure | None]) -> None:
    """Raise the error of the lowest rank that has one; that rank raises its own object, with its traceback."""
    for rank, error in enumerate(received):
        if error is not None:
            raise own if own is not None and rank == distributed.rank() else error


def _picklable(error: Failure | None) -> Failure | None:
    """Return the error as it can travel: a class that pickle cannot rebuild becomes the nearest that it can."""
    if error is None:
        return None
    try:
        copy = pickle.loads(pickle.dumps(error))
        if type(copy) is type(error) and str(copy) == str(error):
            return error
    except Exception:  # whatever a class's own constructor raises when it is called with other arguments
        pass
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror, error.filename) if error.errno is not None else OSError(str(error))
    return (ConfigError if isinstance(error, ConfigError) else UserError)(str(error))
