"""Which sample is read when: pure functions of (seed, position), written for a billion samples.

Position p = 0, 1, 2, ... is the p-th sample of the run, across epochs; global batch g is positions [g B, (g + 1) B).
Nothing here knows of workers, and there is no generator state: every permutation is drawn anew from (seed, what for,
where), so any position can be looked up at any time. Held in memory: the count of each shard, and the windows in use.

    p -> source    t = p // C, in van der Corput order against the weights; the source's own clock is p' = j C + c
    p' -> q        C streams of blocks of m: p' = b C m + k C + c reads q = b C m + c m + k (with C = 1, q = p')
    q -> sample    sequence.py: shards permuted by (seed, epoch), windows of K shards permuted sample by sample

Legend: N samples of all sources, B global batch size, C streams, m block length, n positions looked up at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import ceil
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pretrain.data.shuffle import Ints, ShuffledSource, random_words
from pretrain.errors import ConfigError

PERIOD_BITS = 16
PERIOD = 1 << PERIOD_BITS
"""Values of t after which the pattern of sources repeats; weights are rounded to multiples of 1 / PERIOD."""


@dataclass(frozen=True)
class ShardSource:
    """A collection of shards that is read in its own epochs.

    Args:
        counts: samples in each shard.
        weight: its share of the positions, relative to the other sources: 3 and 1 mean three positions in four.
    """

    counts: Sequence[int]
    weight: float = 1.0


class SampleLocations(NamedTuple):
    """Where positions are read: which source, which shard of the source, which sample of the shard; (n,) int64 each."""

    source: Ints
    shard: Ints
    sample: Ints


class Order:
    """The sequence of samples of a run.

    Args:
        sources: what is read. Shards with no sample are allowed, sources with none are not.
        seed: the run's.
        window: shards whose samples are permuted together (K): how far samples mix, and what is held open.
        streams: parts of the sequence that nodes read on their own (C); 1 unless many nodes share slow storage.
        block: consecutive samples of a stream (m); 0 = as many as a window holds. Of no effect with one stream.
        replacement: draw samples independently, instead of each once an epoch.

    Raises:
        ConfigError: an empty source, a weight not positive or too small to be honoured, a number out of range.
    """

    def __init__(
        self,
        sources: Sequence[ShardSource],
        seed: int,
        window: int = 16,
        streams: int = 1,
        block: int = 0,
        replacement: bool = False,
    ) -> None:
        self._arguments = (tuple(sources), int(seed), int(window), int(streams), int(block), bool(replacement))
        self.sources, self.seed, self.streams = tuple(sources), int(seed), int(streams)
        _require(len(sources) > 0, "data.train names no source: give at least one set of shards")
        _require(window >= 1, f"data.window={window}: a window is at least 1 shard")
        _require(streams >= 1, f"data.streams={streams}: there is at least 1 stream")
        _require(block >= 0, f"data.block={block}: a block is at least 1 sample, or 0 for as many as a window holds")
        for i, source in enumerate(sources):
            _require(sum(source.counts) > 0 and min(source.counts) >= 0, f"source {i} of data.train holds no samples")

        keep = streams + 3  # windows in use by all streams of a source, and those at the seams
        self._sequences = [ShuffledSource(s.counts, (seed, i), window, replacement, keep) for i, s in enumerate(sources)]
        self._blocks = np.array([block or max(1, min(s.mean_window, s.size // streams)) for s in self._sequences])
        for i, (sequence, m) in enumerate(zip(self._sequences, self._blocks, strict=True)):
            _require(
                sequence.largest_window < 2**31,
                f"data.window={window}: {sequence.largest_window:,} samples of source {i} of data.train would be "
                f"permuted together, at most {2**31 - 1:,} can be",
            )
            _require(
                streams == 1 or streams * m <= sequence.size,
                f"data.streams={streams} x data.block={m}: source {i} of data.train holds {sequence.size:,} samples, "
                f"enough for blocks of at most {sequence.size // streams:,}",
            )

        # van der Corput: the t-th position takes the source whose share of [0, PERIOD) contains the reversed bits of t
        self._shares = _integer_shares([source.weight for source in sources])
        self._pick = np.searchsorted(np.cumsum(self._shares), _reversed_bits(), side="right")  # (PERIOD,)
        self._rank = np.empty(PERIOD, dtype=np.int64)  # of t among the positions of the period with the same source
        for i in range(len(sources)):
            mine = np.flatnonzero(self._pick == i)
            self._rank[mine] = np.arange(len(mine))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments  # open windows stay behind

    @property
    def epoch_size(self) -> int:
        """Samples in all sources together (N)."""
        return sum(each.size for each in self._sequences)

    @property
    def window_samples(self) -> int:
        """Samples in one window of each source."""
        return sum(each.mean_window for each in self._sequences)

    def steps(self, epochs: float, batch_size: int) -> int:
        """Steps that `epochs` epochs take: ceil(epochs x N / B), exact for decimals such as 0.1."""
        return ceil(Fraction(str(epochs)) * self.epoch_size / batch_size)

    def digest(self) -> str:
        """A name for all that fixes the sequence (counts, weights, seed, windows, streams); resuming refuses others."""
        h = hashlib.blake2b(repr((self._arguments[1:], self._shares.tolist())).encode(), digest_size=8)
        for each in self._sequences:
            h.update(each.counts.astype("<i8").tobytes())
        return h.hexdigest()

    def locate(self, positions: npt.ArrayLike) -> SampleLocations:
        """Where the samples of these positions are; positions (n,) in any order."""
        source, q = self._queue(np.atleast_1d(np.asarray(positions, dtype=np.int64)))
        shard, sample = np.empty_like(q), np.empty_like(q)
        for i in np.unique(source):
            mine = np.flatnonzero(source == i)
            shard[mine], sample[mine] = self._sequences[i].read(q[mine])
        return SampleLocations(source, shard, sample)

    def substitute(self, position: int, attempt: int) -> tuple[int, int, int]:
        """(source, shard, sample) to read when the sample of this position cannot be used: another one of its window.

        attempt counts from 0; each attempt draws anew among the other samples of the window.
        """
        source, q = self._queue(np.array([position], dtype=np.int64))
        word = int(random_words(1, self.seed, "substitute", position, attempt)[0])
        return (int(source[0]), *self._sequences[source[0]].another(int(q[0]), word))

    def check(self, batch_size: int, world: int = 1, nodes: int = 1) -> None:
        """Raises ConfigError where batches of this size cannot be divided among `world` processes on `nodes` nodes."""
        size = f"data.batch_size={batch_size}"
        _require(batch_size >= 1, f"{size}: a batch holds at least 1 sample")
        _require(
            batch_size <= self.epoch_size,
            f"{size} is more than data.train holds: {self.epoch_size:,} samples, the most a batch can be",
        )
        _require(batch_size % world == 0, f"{size} does not divide among {world} processes: take a multiple of {world}")
        _require(
            batch_size % self.streams == 0,
            f"{size} does not divide among data.streams={self.streams}: take a multiple of {self.streams}",
        )
        _require(world % nodes == 0, f"{world} processes on {nodes} nodes: each node must have the same number")
        _require(
            self.streams == 1 or self.streams % nodes == 0,
            f"data.streams={self.streams} does not divide among {nodes} nodes: take 1 or a multiple of {nodes}",
        )

    def positions(self, batch: int, batch_size: int, rank: int = 0, world: int = 1, nodes: int = 1) -> Ints:
        """The positions of one global batch that this process serves; (B / world,) ascending.

        A node serves whole streams (p mod C), and each of its processes a consecutive part of what the node serves.
        With one stream, each process simply serves a consecutive part of the batch. Ranks are numbered node by node.
        """
        mine = np.arange(batch * batch_size, (batch + 1) * batch_size, dtype=np.int64)
        share = batch_size // world
        if self.streams > 1:
            node, rank = divmod(rank, world // nodes)
            served = self.streams // nodes
            mine = mine.reshape(-1, self.streams)[:, node * served : (node + 1) * served].ravel()
        return mine[rank * share : (rank + 1) * share]

    def _queue(self, p: Ints) -> tuple[Ints, Ints]:
        """(source, q): which source each position reads, and which element of its sequence; (n,) each."""
        t, c = np.divmod(p, self.streams)
        period, slot = t >> PERIOD_BITS, t & (PERIOD - 1)
        source = self._pick[slot]
        j = period * self._shares[source] + self._rank[slot]  # earlier t with the same source
        if self.streams == 1:
            return source, j
        m = self._blocks[source]
        b, k = np.divmod(j, m)  # p' = j C + c = b C m + k C + c
        return source, (b * self.streams + c) * m + k


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@cache
def _reversed_bits() -> Ints:
    """The bits of 0 .. PERIOD - 1 in reverse: the first PERIOD points of the van der Corput sequence, times PERIOD."""
    t, out = np.arange(PERIOD), np.zeros(PERIOD, dtype=np.int64)
    for i in range(PERIOD_BITS):
        out |= (t >> i & 1) << (PERIOD_BITS - 1 - i)
    return out


def _integer_shares(weights: Sequence[float]) -> Ints:
    """Weights as whole numbers that add up to PERIOD, by largest remainder; (sources,)."""
    for i, weight in enumerate(weights):
        _require(0 < weight < float("inf"), f"data.train: weight {weight} of source {i} must be a positive number")
    exact = [Fraction(weight) / sum(map(Fraction, weights)) * PERIOD for weight in weights]
    shares = np.array([int(x) for x in exact], dtype=np.int64)
    by_remainder = sorted(range(len(exact)), key=lambda i: (int(exact[i]) - exact[i], i))
    shares[by_remainder[: PERIOD - int(shares.sum())]] += 1
    for i, share in enumerate(shares):
        _require(
            share > 0,
            f"data.train: weight {weights[i]} of source {i} is less than 1/{PERIOD} of the sum, too small to be "
            "honoured: raise it, or join the source to another",
        )
    return shares
