"""The batches of a run by number: the size of each, and the position of its first sample.

Batches follow each other without gaps, so every position of the order is in one batch, whatever the sizes are.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class BatchRange:
    """Consecutive batches of one size."""

    first: int
    """Number of the first batch, from 0."""
    position: int
    """Position of its first sample."""
    size: int
    """B, samples per batch over all processes."""


class BatchSizes:
    """The ranges of batches of a run, the first from batch 0 on, the last without an end."""

    def __init__(self, ranges: Sequence[BatchRange]) -> None:
        self.ranges = tuple(ranges)
        self._firsts, self._positions = [r.first for r in self.ranges], [r.position for r in self.ranges]

    @classmethod
    def constant(cls, size: int) -> BatchSizes:
        """Return batches that all have one size."""
        return cls([BatchRange(0, 0, size)])

    def index(self, batch: int) -> int:
        """Return the index of the range that a batch is in."""
        return bisect_right(self._firsts, batch) - 1

    def index_at(self, position: int) -> int:
        """Return the index of the range whose batches hold a position."""
        return bisect_right(self._positions, position) - 1

    def size(self, batch: int) -> int:
        """Return the number of samples of a batch."""
        return self.ranges[self.index(batch)].size

    def position(self, batch: int) -> int:
        """Return the position of a batch's first sample: the number of samples of all batches before it."""
        found = self.ranges[self.index(batch)]
        return found.position + (batch - found.first) * found.size

    def batch_at(self, position: int) -> int:
        """Return the number of the batch that holds a position."""
        found = self.ranges[self.index_at(position)]
        return found.first + (position - found.position) // found.size
