"""Random choices that are the same on every machine and in every version of Python."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class KeyedRandom:
    """A random number generator seeded by a key, for example (seed, split, index, purpose).

    It uses only the raw `random()` of Python's generator, whose sequence is guaranteed across versions. Two generators with
    the same key return the same values; any difference in the key makes them independent.
    """

    def __init__(self, *key: int | str) -> None:
        digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
        self.random = random.Random(int.from_bytes(digest, "little")).random

    def randbelow(self, count: int) -> int:
        """Return a random integer from 0 to count - 1."""
        return int(self.random() * count)

    def uniform(self, low: float, high: float) -> float:
        """Return a random number in [low, high)."""
        return low + (high - low) * self.random()

    def bernoulli(self, probability: float) -> bool:
        """Return True with the given probability."""
        return self.random() < probability

    def choice(self, choices: Sequence[T], weights: Sequence[float] | None = None) -> T:
        """Return one of the choices, with equal probability or in proportion to `weights`."""
        if weights is None:
            return choices[self.randbelow(len(choices))]
        remaining = self.random() * sum(weights)
        for item, weight in zip(choices, weights, strict=True):
            remaining -= weight
            if remaining < 0:
                return item
        return choices[-1]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """Return the items in random order (Fisher-Yates)."""
        out = list(items)
        for last in range(len(out) - 1, 0, -1):
            other = self.randbelow(last + 1)
            out[last], out[other] = out[other], out[last]
        return out
