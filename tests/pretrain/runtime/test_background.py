"""Tests of the thread that reads an iterator one item ahead."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterator

import pytest

from pretrain.runtime.background import run_ahead

WAIT_SECONDS = 30.0


def never() -> None:
    """Refuse to be called."""
    raise AssertionError("interrupted, though the thread ends by itself")


def wait_until(is_true: Callable[[], bool]) -> None:
    """Wait for another thread."""
    end = time.monotonic() + WAIT_SECONDS
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.001)


def is_running() -> bool:
    """Return whether a reading thread is there."""
    return any(thread.name == "run-ahead" for thread in threading.enumerate())


def test_results_are_those_of_the_iterator_in_order() -> None:
    with run_ahead(iter(range(100)), lambda n: n * n, never) as results:
        assert list(results) == [n * n for n in range(100)]
        assert list(results) == []
    assert not is_running()


def test_one_result_waits_and_one_item_is_read_beyond_it() -> None:
    read: list[int] = []
    finished: list[int] = []

    def items() -> Iterator[int]:
        for n in range(100):
            read.append(n)
            yield n

    def finish(n: int) -> int:
        finished.append(n)
        return n

    with run_ahead(items(), finish, never) as results:
        for taken in range(1, 5):
            assert next(results) == taken - 1
            wait_until(lambda last=taken + 1: read[-1] == last)  # type: ignore[misc]
            time.sleep(0.01)  # room for a mistake
            assert finished == list(range(taken + 1))
            assert read == list(range(taken + 2))
    assert not is_running()


@pytest.mark.parametrize("where", ["items", "finish"])
def test_errors_come_after_the_results_before_them_with_their_traceback(where: str) -> None:
    def fail_at(n: int, here: str) -> int:
        if n == 2 and where == here:
            raise OSError("the disk is gone")
        return n

    items = (fail_at(n, "items") for n in range(9))
    with run_ahead(items, lambda n: fail_at(n, "finish"), never) as results:
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(OSError, match="the disk is gone") as raised:
            next(results)
    names = [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)]
    assert names[-1] == "fail_at"
    assert "run" in names
    assert not is_running()


def test_an_error_of_the_caller_ends_the_thread() -> None:
    def fail_after(results: Iterator[int]) -> None:
        next(results)
        raise KeyError("a bug in a step")

    with pytest.raises(KeyError, match="a bug in a step"), run_ahead(iter(range(100)), int, never) as results:
        fail_after(results)
    assert not is_running()


def test_a_read_that_does_not_return_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.runtime.background.STOP_SECONDS", 0.05)
    is_interrupted = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        assert is_interrupted.wait(WAIT_SECONDS)
        raise ConnectionError("the other end is gone")  # as a killed process is seen

    with run_ahead(items(), int, is_interrupted.set) as results:
        assert next(results) == 1
    assert is_interrupted.is_set()
    assert not is_running()
