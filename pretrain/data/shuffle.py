"""The shuffled, endless sample sequence of one source, and counter-based random numbers.

Element q = 0, 1, 2, ... of the sequence is one sample; every epoch of the source contains each sample once. The shards are
permuted by (seed, epoch) and split into windows of K shards, and the samples of a window are permuted together. With
replacement, the shards of a window and its samples are drawn at random instead. Any element can be looked up without its
predecessors, and only the windows in use are held in memory.

Legend: N = samples in the source, K = shards in a window, n = elements looked up at once. q = index in the sequence,
r = index in a window, u = index in the concatenated samples of the shards of a window.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


# ---- counter-based random numbers, keyed by their purpose ------------------------------------------------------------


def philox_key(*words: int | str) -> int:
    """Return a 128-bit Philox key for a purpose, such as philox_key(seed, "window", epoch, 3)."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, words)).encode(), digest_size=16).digest(), "little")


def random_words(n: int, *words: int | str) -> npt.NDArray[np.uint64]:
    """Return n random 64-bit integers keyed by a purpose; (n,).

    numpy's compatibility promise covers raw Philox output, but not the distributions derived from it.
    """
    return np.asarray(np.random.Philox(key=philox_key(*words)).random_raw(n), dtype=np.uint64)


class KeyedGenerator:
    """Numpy generator that is rekeyed for each purpose.

    It equals np.random.Generator(np.random.Philox(key=philox_key(...))). The same object is reset each time, at a thirtieth
    of the cost of a new one.
    """

    def __init__(self) -> None:
        self._bits = np.random.Philox(key=0)
        self._generator = np.random.Generator(self._bits)
        self._start: Any = self._bits.state

    def rekey(self, *words: int | str) -> np.random.Generator:
        """Return the generator for a purpose; it is valid until the next call."""
        self._start["state"]["key"] = np.frombuffer(philox_key(*words).to_bytes(16, "little"), dtype="<u8")
        self._bits.state = self._start
        return self._generator


def permutation(n: int, *words: int | str) -> Ints:
    """Return a random permutation of range(n); (n,) int64.

    It is the stable argsort of n random 64-bit integers without their lowest bits. Each index is stored in place of those
    bits, so that a plain sort, which is several times faster, yields the argsort.
    """
    bits = np.uint64(max(n - 1, 0).bit_length())
    packed = random_words(n, *words) >> bits << bits | np.arange(n, dtype=np.uint64)
    packed.sort()
    packed &= (np.uint64(1) << bits) - np.uint64(1)
    return packed.view(np.int64)


# ---- the sequence ----------------------------------------------------------------------------------------------------


class Window(NamedTuple):
    """K shards whose samples are shuffled together.

    The r-th sample of the window is u = order[r], counted through the concatenated samples of its shards; shards[i] holds
    those from starts[i] to starts[i + 1] - 1.
    """

    order: npt.NDArray[np.int32]  # (samples read from the window,)
    starts: Ints  # (K + 1,)
    shards: Ints  # (K,)

    def locate(self, u: Any) -> tuple[Any, Any]:
        """Return (shard of the source, sample of the shard) for u of any shape."""
        slot = np.searchsorted(self.starts, u, side="right") - 1
        return self.shards[slot], u - self.starts[slot]


class ShuffledSource:
    """Shuffled, endless sample sequence of one source.

    Args:
        counts: samples in each shard; at least one is positive.
        key: (seed, number of the source), which distinguishes the random numbers of this sequence from others.
        window: shards whose samples are shuffled together (K).
        replacement: draw each element from all samples with equal probability; shards are still read by windows.
        max_windows: windows held in memory.
    """

    def __init__(self, counts: Sequence[int], key: tuple[int, ...], window: int, replacement: bool, max_windows: int) -> None:
        self.counts, self.key, self.window, self.replacement = np.asarray(counts, np.int64), key, window, replacement
        self.size = int(self.counts.sum())
        num_windows = -(-len(self.counts) // window)
        self.mean_window = max(1, round(self.size / num_windows))  # samples; with replacement, of every window
        largest_counts = np.repeat(self.counts.max(), window) if replacement else np.sort(self.counts)[-window:]
        self.largest_window = int(largest_counts.sum())
        self._epoch: Callable[[int], tuple[Ints, Ints]] = _cache_last(self._permute_shards, 3)
        self._window: Callable[[tuple[int, int]], Window] = _cache_last(self._build_window, max_windows)

    def locate(self, q: Ints) -> tuple[Ints, Ints]:
        """Return (shard, sample) of elements q (n,) of the sequence; (n,) each."""
        shard, sample = np.empty_like(q), np.empty_like(q)
        for indices, window_id, r in self._group_by_window(q):
            window = self._window(window_id)
            shard[indices], sample[indices] = window.locate(window.order[r])
        return shard, sample

    def substitute(self, q: int, word: int) -> tuple[int, int]:
        """Return (shard, sample) of another sample in the window of element q; the same one where it is alone.

        `word` is a random 64-bit integer that selects it.
        """
        ((_, window_id, r),) = self._group_by_window(np.array([q], dtype=np.int64))
        window = self._window(window_id)
        total, u = int(window.starts[-1]), int(window.order[r[0]])
        shard, sample = window.locate((u + 1 + word % (total - 1)) % total if total > 1 else u)
        return int(shard), int(sample)

    def _group_by_window(self, q: Ints) -> list[tuple[Ints, tuple[int, int], Ints]]:
        """Group elements q by window: [(indices into q, (epoch, window), r of each in the window)]."""
        if self.replacement:
            epoch, (window, r) = np.zeros_like(q), np.divmod(q, self.mean_window)
        else:
            epoch, rest = np.divmod(q, self.size)
            window, r = np.empty_like(q), np.empty_like(q)
            for e in np.unique(epoch):
                _, starts = self._epoch(int(e))
                indices = np.flatnonzero(epoch == e)
                window[indices] = np.searchsorted(starts, rest[indices], side="right") - 1
                r[indices] = rest[indices] - starts[window[indices]]
        by_window = np.lexsort((window, epoch))
        change = np.flatnonzero(np.diff(epoch[by_window]) | np.diff(window[by_window])) + 1
        groups = np.split(by_window, change) if len(q) else []
        return [(group, (int(epoch[group[0]]), int(window[group[0]])), r[group]) for group in groups]

    def _permute_shards(self, epoch: int) -> tuple[Ints, Ints]:
        """Return (shards in the order of an epoch, index in the epoch of the first sample of each window)."""
        shards = permutation(len(self.counts), *self.key, "shards", epoch)
        sizes = np.add.reduceat(self.counts[shards], np.arange(0, len(shards), self.window))
        return shards, np.cumsum(sizes) - sizes

    def _build_window(self, window_id: tuple[int, int]) -> Window:
        """Build the window (epoch, number of the window)."""
        epoch, window = window_id
        if not self.replacement:
            shards = self._epoch(epoch)[0][window * self.window : (window + 1) * self.window]
            starts = np.concatenate([[0], np.cumsum(self.counts[shards])])
            order = permutation(int(starts[-1]), *self.key, "samples", epoch, window)
            return Window(order.astype(np.int32), starts, shards)
        # Shards are drawn in proportion to their size, then uniformly within the window: every sample is equally probable.
        points = random_words(self.window, *self.key, "shards drawn", window) % np.uint64(self.size)
        shards = np.searchsorted(np.cumsum(self.counts), points.astype(np.int64), side="right")
        starts = np.concatenate([[0], np.cumsum(self.counts[shards])])
        word, slot = np.divmod(random_words(self.mean_window, *self.key, "samples drawn", window), np.uint64(self.window))
        slot = slot.astype(np.int64)
        sample = (word % self.counts[shards].astype(np.uint64)[slot]).astype(np.int64)
        return Window((starts[slot] + sample).astype(np.int32), starts, shards)


def _cache_last(function: Callable[[Any], Any], size: int) -> Callable[[Any], Any]:
    """Return `function` of one argument with a cache of the `size` most recently used results.

    Unlike lru_cache on a method, the cache belongs to one instance.
    """
    results: OrderedDict[Any, Any] = OrderedDict()

    def call(argument: Any) -> Any:
        if argument in results:
            results.move_to_end(argument)
            return results[argument]
        results[argument] = result = function(argument)
        if len(results) > size:
            results.popitem(last=False)
        return result

    return call
