"""One source as an endless sequence S(q): each sample once an epoch, and nothing held but the windows in use.

Shards are permuted by (seed, epoch), dealt into windows of K, and the samples of a window permuted together. With
replacement, the shards of a window and its samples are drawn instead of dealt. Either way S(q) can be looked up
anywhere, without what came before it.

Legend: N samples in the source, K shards in a window, n elements looked up at once.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


# ---- randomness: a counter-based generator keyed on words ------------------------------------------------------------


def philox_key(*words: int | str) -> int:
    """128 bits for a Philox generator, from what they are for: key(seed, "window", epoch, 3)."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, words)).encode(), digest_size=16).digest(), "little")


def random_words(n: int, *words: int | str) -> npt.NDArray[np.uint64]:
    """n random 64-bit words. Raw Philox output is part of numpy's compatibility promise; its distributions are not."""
    return np.asarray(np.random.Philox(key=philox_key(*words)).random_raw(n), dtype=np.uint64)


class KeyedGenerator:
    """One numpy generator after the other, by what they are for: np.random.Generator(np.random.Philox(key=key(...))).

    It is the same object every time, started anew, at a thirtieth of the price of another one.
    """

    def __init__(self) -> None:
        self._bits = np.random.Philox(key=0)
        self._generator = np.random.Generator(self._bits)
        self._start: Any = self._bits.state

    def of(self, *words: int | str) -> np.random.Generator:
        """The generator for this; good until the next is asked for."""
        self._start["state"]["key"] = np.frombuffer(philox_key(*words).to_bytes(16, "little"), dtype="<u8")
        self._bits.state = self._start
        return self._generator


def permutation(n: int, *words: int | str) -> Ints:
    """A permutation of range(n): the stable argsort of n random words, of which the lowest bits are left out.

    The index takes the place of those bits, so that a plain sort, which is several times faster, gives the argsort.
    """
    bits = np.uint64(max(n - 1, 0).bit_length())
    packed = random_words(n, *words) >> bits << bits | np.arange(n, dtype=np.uint64)
    packed.sort()
    packed &= (np.uint64(1) << bits) - np.uint64(1)
    return packed.view(np.int64)


# ---- the sequence ----------------------------------------------------------------------------------------------------


class Window(NamedTuple):
    """K shards that are read together. Its r-th read is sample u = order[r] of their samples laid end to end, of which
    those from starts[i] up to starts[i + 1] lie in shards[i]."""

    order: npt.NDArray[np.int32]  # (reads,)
    starts: Ints  # (K + 1,)
    shards: Ints  # (K,)

    def at(self, u: Any) -> tuple[Any, Any]:
        """(shard of the source, sample of the shard) for u of any shape."""
        slot = np.searchsorted(self.starts, u, side="right") - 1
        return self.shards[slot], u - self.starts[slot]


class ShuffledSource:
    """S(q) for q = 0, 1, 2, ...

    Args:
        counts: samples in each shard, some positive.
        name: what makes the sequence differ from others: (seed, source).
        window: shards read together (K).
        replacement: draw instead of deal: each element is any sample with equal chance, shards still come by windows.
        keep: windows kept open.
    """

    def __init__(self, counts: Sequence[int], name: tuple[int, ...], window: int, replacement: bool, keep: int) -> None:
        self.counts, self.name, self.window, self.replacement = np.asarray(counts, np.int64), name, window, replacement
        self.size = int(self.counts.sum())
        num_windows = -(-len(self.counts) // window)
        self.mean_window = max(1, round(self.size / num_windows))  # reads; with replacement, of every window
        worst = np.repeat(self.counts.max(), window) if replacement else np.sort(self.counts)[-window:]
        self.largest_window = int(worst.sum())
        self._epoch: Callable[[int], tuple[Ints, Ints]] = _cache_last(self._deal, 3)
        self._window: Callable[[tuple[int, int]], Window] = _cache_last(self._open, keep)

    def read(self, q: Ints) -> tuple[Ints, Ints]:
        """(shard, sample) of S(q); (n,) each."""
        shard, sample = np.empty_like(q), np.empty_like(q)
        for chosen, where, r in self._by_window(q):
            window = self._window(where)
            shard[chosen], sample[chosen] = window.at(window.order[r])
        return shard, sample

    def another(self, q: int, word: int) -> tuple[int, int]:
        """(shard, sample) of another sample in the window of S(q), chosen by a random word; the same if alone."""
        ((_, where, r),) = self._by_window(np.array([q], dtype=np.int64))
        window = self._window(where)
        total, u = int(window.starts[-1]), int(window.order[r[0]])
        shard, sample = window.at((u + 1 + word % (total - 1)) % total if total > 1 else u)
        return int(shard), int(sample)

    def _by_window(self, q: Ints) -> list[tuple[Ints, tuple[int, int], Ints]]:
        """Splits q: [(indices into q, (epoch, window), place r in the window)]."""
        if self.replacement:
            epoch, (window, r) = np.zeros_like(q), np.divmod(q, self.mean_window)
        else:
            epoch, rest = np.divmod(q, self.size)
            window, r = np.empty_like(q), np.empty_like(q)
            for e in np.unique(epoch):
                _, starts = self._epoch(int(e))
                chosen = np.flatnonzero(epoch == e)
                window[chosen] = np.searchsorted(starts, rest[chosen], side="right") - 1
                r[chosen] = rest[chosen] - starts[window[chosen]]
        by_window = np.lexsort((window, epoch))
        change = np.flatnonzero(np.diff(epoch[by_window]) | np.diff(window[by_window])) + 1
        groups = np.split(by_window, change) if len(q) else []
        return [(each, (int(epoch[each[0]]), int(window[each[0]])), r[each]) for each in groups]

    def _deal(self, epoch: int) -> tuple[Ints, Ints]:
        """(shards in the order of this epoch, first sample of each window)."""
        shards = permutation(len(self.counts), *self.name, "shards", epoch)
        sizes = np.add.reduceat(self.counts[shards], np.arange(0, len(shards), self.window))
        return shards, np.cumsum(sizes) - sizes

    def _open(self, where: tuple[int, int]) -> Window:
        epoch, window = where
        if not self.replacement:
            shards = self._epoch(epoch)[0][window * self.window : (window + 1) * self.window]
            starts = np.concatenate([[0], np.cumsum(self.counts[shards])])
            order = permutation(int(starts[-1]), *self.name, "samples", epoch, window)
            return Window(order.astype(np.int32), starts, shards)
        # Shards are drawn by their size, and then each as often as the other: every sample has the same chance.
        points = random_words(self.window, *self.name, "shards drawn", window) % np.uint64(self.size)
        shards = np.searchsorted(np.cumsum(self.counts), points.astype(np.int64), side="right")
        starts = np.concatenate([[0], np.cumsum(self.counts[shards])])
        word, slot = np.divmod(random_words(self.mean_window, *self.name, "samples drawn", window), np.uint64(self.window))
        slot = slot.astype(np.int64)
        sample = (word % self.counts[shards].astype(np.uint64)[slot]).astype(np.int64)
        return Window((starts[slot] + sample).astype(np.int32), starts, shards)


def _cache_last(make: Callable[[Any], Any], keep: int) -> Callable[[Any], Any]:
    """make(where), with the `keep` results used last at hand."""
    kept: OrderedDict[Any, Any] = OrderedDict()

    def get(where: Any) -> Any:
        if where in kept:
            kept.move_to_end(where)
            return kept[where]
        kept[where] = made = make(where)
        if len(kept) > keep:
            kept.popitem(last=False)
        return made

    return get
