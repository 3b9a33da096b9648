"""The order of samples: pure functions of (seed, position), designed for a billion samples.

Position p = 0, 1, 2, ... is the p-th sample of the run, across epochs; global batch g is positions [g B, (g + 1) B), or as
batch_sizes.py has them where their size changes.
The order does not depend on workers or processes. There is no generator state: each permutation is drawn from a key of seed,
purpose and place, so any position can be looked up at any time. Memory holds the count of each shard and the windows in use.

    p -> source    t = p // C selects the source by van der Corput order and weights; p = t C + c is stream c
                   t is selection j = 0, 1, ... of its source; p' = j C + c is the position among that source's samples
    p' -> q        C streams of blocks of m samples: p' = b C m + k C + c reads q = b C m + c m + k (with C = 1, q = p')
    q -> sample    shuffle.py: shards permuted by (seed, epoch), then the samples of each window of K shards permuted

Legend: N = samples of all sources, B = global batch size, C = streams, m = block length, n = positions looked up at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import ceil, gcd, lcm
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pretrain.data.shuffle import Ints, ShuffledSource, random_words
from pretrain.errors import ConfigError

PERIOD_BITS = 16
PERIOD = 1 << PERIOD_BITS
"""Number of values of t after which the pattern of sources repeats; weights are rounded to multiples of 1 / PERIOD."""

STREAMS = 48
"""Streams that are chosen for remote shards, as far as the batch can be divided among them. 1, 2, 3, 4, 6, 8, 12, 16, 24 or 48
nodes divide it: each of them reads its own shards, and the order is the same for all of these."""


@dataclass(frozen=True)
class ShardSource:
    """A source: a collection of shards with its own epochs.

    Args:
        counts: samples in each shard.
        weight: its share of the positions, relative to the other sources: of weights 3 and 1, the first gets 3 of 4 positions.
    """

    counts: Sequence[int]
    weight: float = 1.0


class SampleLocations(NamedTuple):
    """Locations of n samples: source, shard of the source, and sample of the shard; (n,) int64 each."""

    source: Ints
    shard: Ints
    sample: Ints


class Order:
    """Order of the samples of a run: a function from positions to sources, shards and samples.

    Args:
        sources: the data. Empty shards are allowed, empty sources are not.
        seed: the seed of the run.
        window: shards whose samples are permuted together (K); it limits how far samples mix and how many files are open.
        streams: interleaved parts of the sequence, each read by one node (C); 1 unless many nodes share slow storage.
        block: consecutive samples of a stream (m); 0 = as many as a window holds. No effect with one stream.
        replacement: draw samples independently, instead of each once per epoch.

    Raises:
        ConfigError: a source is empty, its weight is not positive or too small, or a number is out of range.
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
        _require(window >= 1, f"data.window={window}: a window holds at least 1 shard")
        _require(streams >= 1, f"data.streams={streams}: there must be at least 1 stream")
        _require(block >= 0, f"data.block={block}: a block holds at least 1 sample; 0 = as many as a window holds")
        for i, source in enumerate(sources):
            _require(sum(source.counts) > 0 and min(source.counts) >= 0, f"source {i} of data.train holds no samples")

        max_windows = streams + 3  # windows in use by all streams of a source, and those at the boundaries between windows
        self._sequences = [ShuffledSource(s.counts, (seed, i), window, replacement, max_windows) for i, s in enumerate(sources)]
        self._blocks = np.array([block or max(1, min(s.mean_window, s.size // streams)) for s in self._sequences])
        for i, (sequence, m) in enumerate(zip(self._sequences, self._blocks, strict=True)):
            _require(
                sequence.largest_window < 2**31,
                f"data.window={window}: {sequence.largest_window:,} samples of source {i} of data.train would be "
                f"permuted together, but at most {2**31 - 1:,} can be",
            )
            _require(
                streams == 1 or streams * m <= sequence.size,
                f"data.streams={streams} x data.block={m}: source {i} of data.train holds {sequence.size:,} samples, "
                f"enough for blocks of at most {sequence.size // streams:,}",
            )

        # van der Corput: t selects the source whose part of [0, PERIOD) contains the reversed bits of t
        self._shares = _integer_shares([source.weight for source in sources])
        self._source_of_slot = np.searchsorted(np.cumsum(self._shares), _reversed_bits(), side="right")  # (PERIOD,)
        self._rank_of_slot = np.empty(PERIOD, dtype=np.int64)  # earlier slots of the period with the same source
        for i in range(len(sources)):
            slots = np.flatnonzero(self._source_of_slot == i)
            self._rank_of_slot[slots] = np.arange(len(slots))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments  # open windows are not pickled

    @property
    def epoch_size(self) -> int:
        """Samples in all sources together (N)."""
        return sum(sequence.size for sequence in self._sequences)

    @property
    def window_samples(self) -> int:
        """Samples in one window of each source, summed over the sources."""
        return sum(sequence.mean_window for sequence in self._sequences)

    def steps(self, epochs: float, batch_size: int) -> int:
        """Return the number of steps of `epochs` epochs: ceil(epochs x N / B), exact for decimals such as 0.1."""
        return ceil(Fraction(str(epochs)) * self.epoch_size / batch_size)

    def digest(self) -> str:
        """Return a digest of all that determines the order: counts, weights, seed, windows and streams."""
        hasher = hashlib.blake2b(repr((self._arguments[1:], self._shares.tolist())).encode(), digest_size=8)
        for sequence in self._sequences:
            hasher.update(sequence.counts.astype("<i8").tobytes())
        return hasher.hexdigest()

    def locate(self, positions: npt.ArrayLike) -> SampleLocations:
        """Return the locations of the samples at these positions; positions (n,) in any order."""
        source, q = self._map_to_sources(np.atleast_1d(np.asarray(positions, dtype=np.int64)))
        shard, sample = np.empty_like(q), np.empty_like(q)
        for i in np.unique(source):
            indices = np.flatnonzero(source == i)
            shard[indices], sample[indices] = self._sequences[i].locate(q[indices])
        return SampleLocations(source, shard, sample)

    def substitute(self, position: int, attempt: int) -> tuple[int, int, int]:
        """Return (source, shard, sample) to read instead of an unusable sample: another one of its window.

        Args:
            position: that of the unusable sample.
            attempt: counts from 0; each attempt is an independent draw among the other samples of the window.
        """
        source, q = self._map_to_sources(np.array([position], dtype=np.int64))
        word = int(random_words(1, self.seed, "substitute", position, attempt)[0])
        return (int(source[0]), *self._sequences[source[0]].substitute(int(q[0]), word))

    def check(self, batch_size: int, world: int = 1, nodes: int = 1) -> None:
        """Raise ConfigError where a batch cannot be divided among `world` processes on `nodes` nodes."""
        size = f"data.batch_size={batch_size}"
        _require(batch_size >= 1, f"{size}: a batch holds at least 1 sample")
        _require(
            batch_size <= self.epoch_size,
            f"{size} is more than data.train holds: a batch can have at most its {self.epoch_size:,} samples",
        )
        _require(batch_size % world == 0, f"{size} cannot be divided among {world} processes: use a multiple of {world}")
        _require(
            batch_size % self.streams == 0,
            f"{size} cannot be divided among data.streams={self.streams}: use a multiple of {self.streams}",
        )
        _require(world % nodes == 0, f"{world} processes on {nodes} nodes: each node must run the same number of processes")

    def positions(self, batch: int, batch_size: int, rank: int = 0, world: int = 1, nodes: int = 1) -> Ints:
        """Return the positions of one global batch that this process serves, where all batches have one size.

        (B / world,) int64, ascending; see `positions_from`.
        """
        return self.positions_from(batch * batch_size, batch_size, rank, world, nodes)

    def positions_from(self, start: int, batch_size: int, rank: int = 0, world: int = 1, nodes: int = 1) -> Ints:
        """Return the positions that this process serves of the global batch whose first position is `start`.

        (B / world,) int64, ascending. `start` is a multiple of the number of streams.

        A node serves whole streams (p mod C), and each of its processes a consecutive part of the node's positions. Where the
        number of nodes does not divide C, as few nodes as possible share streams as one node would: with one stream, all do.
        Ranks are numbered node by node.
        """
        positions = np.arange(start, start + batch_size, dtype=np.int64)
        per_rank = batch_size // world
        if self.streams > 1:
            group, rank = divmod(rank, world // gcd(self.streams, nodes))
            streams = self.node_streams(nodes)
            positions = positions.reshape(-1, self.streams)[:, group * streams : (group + 1) * streams].ravel()
        return positions[rank * per_rank : (rank + 1) * per_rank]

    def node_streams(self, nodes: int) -> int:
        """Return the number of streams that each of `nodes` nodes reads."""
        return self.streams // gcd(self.streams, nodes)

    def _map_to_sources(self, p: Ints) -> tuple[Ints, Ints]:
        """Return (source, q), (n,) each: the source of each position, and the index in that source's sequence."""
        t, c = np.divmod(p, self.streams)
        period, slot = t >> PERIOD_BITS, t & (PERIOD - 1)
        source = self._source_of_slot[slot]
        j = period * self._shares[source] + self._rank_of_slot[slot]  # earlier t with the same source
        if self.streams == 1:
            return source, j
        m = self._blocks[source]
        b, k = np.divmod(j, m)  # p' = j C + c = b C m + k C + c
        return source, (b * self.streams + c) * m + k


def choose_streams(window: int, batch_size: int, shards: int, nodes: int) -> tuple[int, int]:
    """Return (streams, shards of a window) for data whose shards are fetched; (1, window) where there are too few shards.

    All streams together read as many shards at a time as one window of one stream, or one shard each if they are more. So one
    node fetches no more shards before its first batch than it would with one stream.

    Args:
        window: shards that are to be mixed (data.window).
        shards: number of shards of the smallest source.
        nodes: they do not affect the result where they divide gcd(batch_size, STREAMS).
    """
    most = gcd(batch_size, STREAMS)
    if batch_size % nodes == 0:
        most = lcm(most, nodes)
    for streams in range(most, 1, -1):
        if most % streams == 0 and streams * -(-window // streams) <= shards:
            return streams, -(-window // streams)
    return 1, window


def _require(condition: bool, message: str) -> None:
    """Raise ConfigError unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


@cache
def _reversed_bits() -> Ints:
    """Return 0 .. PERIOD - 1 with reversed bits; (PERIOD,) int64.

    They are the first PERIOD points of the van der Corput sequence, times PERIOD.
    """
    t, out = np.arange(PERIOD), np.zeros(PERIOD, dtype=np.int64)
    for i in range(PERIOD_BITS):
        out |= (t >> i & 1) << (PERIOD_BITS - 1 - i)
    return out


def _integer_shares(weights: Sequence[float]) -> Ints:
    """Return the weights as integers that sum to PERIOD, by the largest remainder method; (sources,)."""
    for i, weight in enumerate(weights):
        _require(0 < weight < float("inf"), f"data.train: weight {weight} of source {i} must be a positive number")
    exact = [Fraction(weight) / sum(map(Fraction, weights)) * PERIOD for weight in weights]
    shares = np.array([int(x) for x in exact], dtype=np.int64)
    by_remainder = sorted(range(len(exact)), key=lambda i: (int(exact[i]) - exact[i], i))
    shares[by_remainder[: PERIOD - int(shares.sum())]] += 1
    for i, share in enumerate(shares):
        _require(
            share > 0,
            f"data.train: weight {weights[i]} of source {i} is less than 1/{PERIOD} of the sum, too small to have "
            "an effect: raise it, or merge the source with another",
        )
    return shares
