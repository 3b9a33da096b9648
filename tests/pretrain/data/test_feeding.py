"""Tests of batches that a thread merges ahead of the trainer: the same batches, the same state, no process left."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor

from pretrain.data import BadSample
from pretrain.data.batch import Batch, merge
from pretrain.data.loader import Loader
from pretrain.data.order import Order, ShardSource
from pretrain.data.shards.paths import RawSample
from pretrain.errors import UserError

BATCH = 12
DAMAGED = 7


class Numbers:
    """A reader of 200 samples in ten shards, which hold nothing but their key."""

    def read(self, shard: int, sample: int) -> RawSample:
        """Return a sample without members."""
        return RawSample(self.key(shard, sample), {})

    def key(self, shard: int, sample: int) -> str:
        """Return "shard/number"."""
        return f"{shard}/{20 * shard + sample}"


class Decode:
    """Decodes a sample to its number and a random number.

    damaged: every sample whose number this divides is unusable. fails_at, hangs_at: the key of a sample.
    """

    def __init__(self, damaged: int = DAMAGED, fails_at: str = "", hangs_at: str = "") -> None:
        self.damaged, self.fails_at, self.hangs_at = damaged, fails_at, hangs_at

    def __call__(self, sample: RawSample, rng: np.random.Generator, train: bool) -> tuple[int, int]:
        number = int(sample.key.split("/")[1])
        if number % self.damaged == 0:
            raise BadSample("no number", sample.key)
        if sample.key == self.fails_at:
            raise ZeroDivisionError("a bug in a decoder")
        if sample.key == self.hangs_at:
            time.sleep(1000)
        return number, int(rng.integers(1 << 30))

    def collate(self, items: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Return (b, 2) and a mask (b, 2)."""
        values = torch.tensor(items)
        return values, values > 0

    def targets(self, items: list[tuple[int, int]]) -> dict[str, Any]:
        """Return tensors and lists, some of them in a nested dict."""
        numbers = torch.tensor([number for number, _ in items])
        return {"number": numbers, "nested": {"double": 2 * numbers, "deeper": {"name": [str(n) for n, _ in items]}}}


def build(decoder: Decode | None = None, **changes: Any) -> Loader:
    """Build a loader whose batches are merged from three parts."""
    order = Order([ShardSource([20] * 10)], seed=1, window=3)
    arguments: dict[str, Any] = {"workers": 2, "is_ahead": True, "max_bad_rate": 0.3, "partial_size": 5, **changes}
    return Loader(order, Numbers(), {"thing": decoder or Decode()}, BATCH, **arguments)


def take(loader: Loader, count: int) -> list[tuple[Batch, dict[str, Any]]]:
    """Take batches, each with the loader's state after it was taken."""
    batches = iter(loader)
    try:
        return [(batch, loader.state_dict()) for batch in itertools.islice(batches, count)]
    finally:
        batches.close()


def find_new_key(taken: list[tuple[Batch, dict[str, Any]]], number: int) -> str:
    """Return the key of a sample that batch `number` holds and none before it, not even as a substitute."""
    before = {key for batch, _ in taken[:number] for key in batch.keys}
    return next(key for key in taken[number][0].keys if key not in before)


def assert_equal(actual: list[tuple[Batch, dict[str, Any]]], expected: list[tuple[Batch, dict[str, Any]]]) -> None:
    """Assert that batches and states are equal."""
    assert [state for _, state in actual] == [state for _, state in expected]
    for (one, _), (other, _) in zip(actual, expected, strict=True):
        assert one.keys == other.keys
        assert torch.equal(one.inputs["thing"], other.inputs["thing"])
        assert torch.equal(one.masks["thing"], other.masks["thing"])
        assert torch.equal(one.targets["nested"]["double"], 2 * other.targets["number"])
        assert one.targets["nested"]["deeper"]["name"] == [key.split("/")[1] for key in other.keys]


@pytest.fixture(scope="module")
def reference() -> list[tuple[Batch, dict[str, Any]]]:
    """Ten batches and states, read in this process without a thread."""
    return take(build(workers=0, is_ahead=False), 10)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Assert that neither processes nor threads are left behind."""
    before = set(psutil.Process().children(recursive=True))
    yield
    assert set(psutil.Process().children(recursive=True)) <= before
    assert not [thread for thread in threading.enumerate() if thread.name == "run-ahead"]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_and_states_are_those_without_a_thread(reference: list[tuple[Batch, dict[str, Any]]], workers: int) -> None:
    assert reference[-1][1]["bad"]["no number"] > 5
    assert_equal(take(build(workers=workers), 10), reference)


def test_a_run_resumes_at_the_batch_that_the_trainer_took(reference: list[tuple[Batch, dict[str, Any]]]) -> None:
    """Batches that were merged ahead, and the bad samples in them, are not in the state."""
    first, second = build(), build()
    assert_equal(take(first, 4), reference[:4])
    second.load_state_dict(first.state_dict())
    assert_equal(take(second, 6), reference[4:])


def test_errors_come_at_their_batch() -> None:
    """A run without workers tells at which one."""
    taken: dict[bool, list[str]] = {}
    for is_ahead in (False, True):
        loader = build(Decode(2), max_bad_rate=0.01, max_bad_run=50, workers=2 * is_ahead, is_ahead=is_ahead)
        batches = iter(loader)
        taken[is_ahead] = []
        with pytest.raises(UserError, match=r"samples cannot be used, more than data.max_bad_rate=0.01"):
            taken[is_ahead] += [key for batch in batches for key in batch.keys]
        taken[is_ahead].append(str(loader.state_dict()))
    assert taken[True] == taken[False]


@pytest.mark.parametrize("is_ahead", [False, True])
def test_too_many_in_a_row_stop_the_run_where_a_part_has_no_batch(is_ahead: bool) -> None:
    loader = build(Decode(1), max_bad_rate=1.0, max_bad_run=4, is_ahead=is_ahead)
    with pytest.raises(UserError, match=r"^5 samples in a row cannot be used"):
        take(loader, 1)
    assert loader.bad.total() == 5


def test_a_bug_in_a_decoder_is_raised_at_its_batch_with_the_traceback(reference: list[tuple[Batch, dict[str, Any]]]) -> None:
    batches = iter(build(Decode(fails_at=find_new_key(reference, 2))))
    assert [next(batches).keys, next(batches).keys] == [batch.keys for batch, _ in reference[:2]]
    with pytest.raises(ZeroDivisionError, match="a bug in a decoder") as raised:
        next(batches)
    assert "_merge" in {frame.name for frame in traceback.extract_tb(raised.value.__traceback__)}


def test_a_killed_worker_is_a_clear_error() -> None:
    before = set(psutil.Process().children(recursive=True))
    batches = iter(build())
    next(batches)
    worker = next(iter(set(psutil.Process().children(recursive=True)) - before))
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"a data worker \(process \d+\) was killed by signal 9 \(SIGKILL\): most often"):
        list(itertools.islice(batches, 1000))


def test_a_worker_that_hangs_does_not_keep_the_run_from_ending(
    reference: list[tuple[Batch, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread waits for a sample that never comes while the trainer fails."""
    monkeypatch.setattr("pretrain.runtime.background.STOP_SECONDS", 0.1)
    batches = iter(build(Decode(hangs_at=find_new_key(reference, 1)), workers=1))
    assert next(batches).keys == reference[0][0].keys
    batches.close()


def test_merged_batches_have_nested_targets_and_name_all_their_tensors() -> None:
    decoder = Decode()
    items = [(n, n + 100) for n in range(6)]

    def batch_of(part: list[tuple[int, int]]) -> Batch:
        inputs, mask = decoder.collate(part)
        return Batch({"thing": inputs}, {"thing": mask}, [f"s/{n}" for n, _ in part], decoder.targets(part))

    merged, whole = merge([batch_of(items[:4]), batch_of(items[4:])], {"thing": decoder}), batch_of(items)
    assert torch.equal(merged.targets["nested"]["double"], whole.targets["nested"]["double"])
    assert merged.targets["nested"]["deeper"] == {"name": ["0", "1", "2", "3", "4", "5"]}
    assert merged.slice(2, 4).targets["nested"]["deeper"] == {"name": ["2", "3"]}
    moved = whole.to("meta")
    assert len(list(moved.tensors())) == 4
    assert all(tensor.device.type == "meta" for tensor in moved.tensors())
    assert moved.targets["nested"]["deeper"] == whole.targets["nested"]["deeper"]


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_a_gpu_gets_the_same_batches(reference: list[tuple[Batch, dict[str, Any]]], workers: int) -> None:
    """All tensors are copied, also while the GPU is busy with memory that was freed."""
    device = torch.device("cuda", 0)
    loader = build(workers=workers, device=device, is_ahead=None)
    batches, kept = iter(loader), []
    try:
        for batch in itertools.islice(batches, 10):
            assert all(tensor.device == device for tensor in batch.tensors())
            torch.cuda._sleep(20_000_000)  # some 10 ms: the copies of the next batches run before this one is read
            kept.append((batch.to("cuda", non_blocking=True)._map(_copy), loader.state_dict()))
            del batch
    finally:
        batches.close()
    assert_equal([(batch.to("cpu"), state) for batch, state in kept], reference)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
