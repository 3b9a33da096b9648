"""Raise an error of one rank on every rank, so that no rank waits for one that stopped.

    on_main(f)            rank 0 calls f; every rank returns its result or raises its error
    on_all(f)             every rank calls f and returns its own result; an error of one rank is raised on all
    gather_or_raise(f)    every rank calls f; every rank gets all results in rank order, or raises the error

Only expected failures are shared: UserError and its subclasses (ConfigError stays one: its exit code differs), and OSError.
Where several ranks fail, all raise the error of the lowest rank. Any other exception is a bug: its rank raises it at once,
and the watchdog names that rank on the others. Each function is ONE object collective; without a process group, none.
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

    The result is broadcast and must be picklable. `work` may not contain collectives: the other ranks do not call it. It may
    take longer than the timeout of collectives, because the others wait outside of one.
    """
    with distributed.others_wait():
        value, error = _attempt(work) if distributed.is_main() else (None, None)
    value, received = distributed.broadcast_object((value, _picklable(error)))
    if received is not None:
        raise error or received
    result: T = value
    return result


def on_all(work: Callable[[], T]) -> T:
    """Return what `work` returns on this rank; raise an error of any rank on every rank. Collective.

    The result stays on its rank and need not be picklable.
    """
    value, error = _attempt(work)
    _raise_first(error, distributed.gather_objects(_picklable(error)))
    result: T = value
    return result


def gather_or_raise(work: Callable[[], T]) -> list[T]:
    """Return the results of `work` on all ranks in rank order, or raise an error of any rank. Collective."""
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


def _raise_first(local_error: Failure | None, errors: list[Failure | None]) -> None:
    """Raise the error of the lowest rank that has one; there, the original object with its traceback."""
    for rank, error in enumerate(errors):
        if error is not None:
            raise local_error if local_error is not None and rank == distributed.rank() else error


def _picklable(error: Failure | None) -> Failure | None:
    """Return an error that pickle can rebuild: `error`, or one of its nearest base class with its message."""
    if error is None:
        return None
    try:
        copy = pickle.loads(pickle.dumps(error))
        if type(copy) is type(error) and str(copy) == str(error):
            return error
    except Exception:  # any error of a class whose constructor takes other arguments
        pass
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror, error.filename) if error.errno is not None else OSError(str(error))
    return (ConfigError if isinstance(error, ConfigError) else UserError)(str(error))
