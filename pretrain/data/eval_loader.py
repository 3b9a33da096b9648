"""Evaluation's reading: each sample exactly once, over any number of processes."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pretrain.data.batch import Batch, Decoder
from pretrain.data.config import count_samples_once, resolve_sources
from pretrain.data.shards.cache import ShardCache
from pretrain.data.shards.reader import ShardReader
from pretrain.data.worker import EvaluationDataset, SampleReader
from pretrain.data.worker_pool import run_workers
from pretrain.errors import UserError

log = logging.getLogger(__name__)

_MAX_NAMED = 20  # bad samples that are named in the log; all are counted


class EvalLoader:
    """Batches of this process's share, in the order of the shards; iterate again to read again. The last one is short.

    Samples whose content cannot be used are left out and counted in `bad`, by reason.
    """

    def __init__(
        self, store: SampleReader, numbers: Sequence[int], decoders: Mapping[str, Decoder], batch_size: int, workers: int,
        rank: int, world: int, max_samples: int,
    ) -> None:  # fmt: skip
        self.bad: Counter[str] = Counter()
        self.total = min(sum(numbers), max_samples or sys.maxsize)
        """Samples of all processes together."""
        self._evaluation, self._workers, self._size = EvaluationDataset(store, decoders), workers, batch_size
        self._numbers = np.asarray(numbers, dtype=np.int64)
        self._mine = range(self.total * rank // world, self.total * (rank + 1) // world)

    def __iter__(self) -> Iterator[Batch]:
        self.bad.clear()
        pieces_expected = -(-len(self._mine) // self._size)
        with run_workers(self._evaluation, self._places(), min(self._workers, pieces_expected)) as pieces:
            for _ in range(pieces_expected):
                piece = next(pieces)
                if piece.problem:
                    raise UserError(piece.problem)
                for bad in piece.bad:
                    self.bad[bad.reason] += 1
                    if self.bad.total() <= _MAX_NAMED:
                        log.warning("%s cannot be used and is left out: %s: %s", bad.key, bad.reason, bad.detail)
                if piece.batch is not None:
                    yield piece.batch

    def _places(self) -> Iterator[list[tuple[int, int]]]:
        ends = np.cumsum(self._numbers)
        for start in range(self._mine.start, self._mine.stop, self._size):
            each = np.arange(start, min(start + self._size, self._mine.stop))
            shard = np.searchsorted(ends, each, side="right")
            yield list(zip(shard.tolist(), (each - (ends - self._numbers)[shard]).tolist(), strict=True))


def build_eval_loader(
    shards: Any,
    decoders: Mapping[str, Decoder],
    batch_size: int,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    max_samples: int = 0,
    cache: ShardCache | None = None,
) -> EvalLoader:
    """Evaluation's batches: of the samples in the shards, each exactly once over `world` processes.

    Each process reads a consecutive part. Besides inputs, batches carry targets["json"], a dict a sample, and
    targets["captions"], all captions of each, where there is a text decoder.

    Args:
        shards: what data.val may be: a string, or a list of strings or of {shards: ...}.
        decoders: by modality; called with train=False.
        batch_size: of this process.
        workers: processes that read and decode; 0 does it in this process.
        rank: this process, of `world`.
        max_samples: only the first so many over all processes; 0 = all.
        cache: where fetched shards and indices go.

    Raises:
        ConfigError: no shards.
        UserError: shards that are damaged or cannot be read, or hold no samples.
    """
    paths = [path for source in resolve_sources(shards, "data.val") for path in source.shards]
    numbers = count_samples_once(paths, cache or ShardCache(), "data.val")
    store = ShardReader(paths, cache, numbers, keep=8)
    return EvalLoader(store, numbers, decoders, batch_size, workers, rank, world, max_samples)
