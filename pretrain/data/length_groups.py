"""Groups of texts of similar length, in the same shapes for every batch.

A batch is as long as its longest text, so most of it is padding. Sorted by length and cut into a few groups, it holds little.
Here neither the number of rows of a group nor its length depends on the batch: nothing on a GPU waits for the lengths, and a
compiled model sees one set of shapes. The shapes come from the lengths of a sample of the texts.

    lengths = LengthGroups(count_lengths(mask, longest), max_groups=6)      once a run
    groups = lengths.assign(mask.sum(dim=1))                                once a batch, on the host

A batch with more long texts than the shapes allow for is encoded in the same numbers of rows, each group at the length of the
next longer one. Where that does not suffice either, all groups have full length: there are three sets of shapes.

Legend: b = rows (texts) of a batch, T = tokens of the longest text that the tower reads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pretrain.data.shuffle import Ints

SAMPLES = 2048
"""Samples of the training data whose captions decide the shapes."""
GROUP_COST = 128
"""The fixed cost of one more group, which runs all layers once more, in tokens. Estimated, not measured on a GPU."""
OVERFLOW_RATES = (0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4)
"""Allowed fractions of batches that do not fit; the one with the fewest expected tokens is taken."""

Fit = Literal["fits", "longer", "longest"]
"""Which lengths the groups of a batch have: those chosen, those of the next longer group each, or the full length."""


@dataclass(eq=False)
class RowGroups:
    """The rows of one batch, divided into groups of similar length. Group g takes the next counts[g] rows of `order`."""

    order: Tensor
    """(b,) int64: the rows, the longest first."""
    counts: tuple[int, ...]
    """Rows of each group."""
    lengths: tuple[int, ...]
    """Tokens of each group, descending, where the batch fits."""
    fit: Fit
    """The smallest lengths that hold the rows. A word and not numbers: compiled models are specialized to words."""
    row_lengths: Ints
    """(b,) int64 on the host: tokens of each row."""
    source: LengthGroups

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RowGroups:
        """Return the groups with `order` on `device`."""
        return replace(self, order=self.order.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> RowGroups:
        """Return the groups with `order` in page-locked memory."""
        return replace(self, order=self.order.pin_memory())

    def slice(self, start: int, end: int) -> RowGroups:
        """Divide rows [start, end) into groups, on the same device. Reads nothing from the device."""
        groups = self.source.assign(self.row_lengths[start:end])
        if self.order.device.type == "cpu":
            return groups
        return (groups.pin_memory() if torch.cuda.is_available() else groups).to(self.order.device, non_blocking=True)

    def sections(self, longest: int) -> list[tuple[Tensor, int]]:
        """Return (rows, tokens) of each group of inputs that are `longest` tokens long."""
        lengths = group_lengths(self.lengths, self.fit, longest)
        return list(zip(self.order.split(self.counts), lengths, strict=True))


class LengthGroups:
    """Chooses the groups of every batch from the lengths of a sample of the texts.

    Args:
        histogram: number of sampled texts of each length, 0 to T.
        max_groups: the largest number of groups.
        group_cost: the fixed cost of one more group, in tokens.
    """

    def __init__(self, histogram: tuple[int, ...], max_groups: int, group_cost: int = GROUP_COST) -> None:
        self.histogram, self.max_groups, self.group_cost = histogram, max_groups, group_cost

    def shapes(self, rows: int) -> tuple[tuple[int, int], ...]:
        """Return (rows, tokens) of each group of a batch of `rows` rows, the longest first."""
        return choose_groups(self.histogram, rows, self.max_groups, self.group_cost)

    def assign(self, row_lengths: Ints) -> RowGroups:
        """Divide the rows of a batch, whose lengths (b,) int64 are on the host, into groups."""
        shapes = self.shapes(len(row_lengths))
        counts, lengths = tuple(count for count, _ in shapes), tuple(length for _, length in shapes)
        order = np.argsort(-row_lengths, kind="stable")
        first_rows = np.cumsum((0, *counts[:-1]))
        longest_rows = row_lengths[order[first_rows]] if len(row_lengths) else np.zeros(1, dtype=np.int64)
        fit: Fit = "longest"
        for shorter in ("fits", "longer"):
            if (longest_rows <= group_lengths(lengths, shorter, len(self.histogram) - 1)).all():
                fit = shorter
                break
        return RowGroups(torch.from_numpy(order), counts, lengths, fit, row_lengths, self)


def group_lengths(lengths: tuple[int, ...], fit: Fit, longest: int) -> tuple[int, ...]:
    """Return the lengths at which groups are encoded, from those chosen for them."""
    if fit == "fits":
        return lengths
    return (longest, *lengths[:-1]) if fit == "longer" else (longest,) * len(lengths)


def count_lengths(mask: Tensor, longest: int) -> tuple[int, ...]:
    """Return the number of texts of each length, 0 to `longest`, from a mask (..., T)."""
    return tuple(torch.bincount(mask.sum(dim=-1).flatten(), minlength=longest + 1).tolist())


@lru_cache(maxsize=64)
def choose_groups(
    histogram: tuple[int, ...], rows: int, max_groups: int, group_cost: int = GROUP_COST
) -> tuple[tuple[int, int], ...]:
    """Return (rows, tokens) of each group, the longest first, that need the fewest tokens in expectation.

    histogram: number of sampled texts of each length, 0 to T. rows: of every batch.

    The first group has length T, so it fits always. A shorter group fits where no more rows than those of the groups before
    it are longer. Their number follows a beta-binomial distribution (Jeffreys prior), whose quantile is the number of rows
    reserved. Batches that do not fit need the length of the next longer group. For each allowed rate the groups are optimal
    among those that fit: dynamic programming over the lengths.
    """
    longest = len(histogram) - 1
    if rows < 2 or max_groups < 2 or not sum(histogram):
        return ((rows, longest),)
    lengths = list(range(longest, 0, -1))
    longer = [sum(histogram[length + 1 :]) for length in lengths]  # sampled texts that are longer than each
    choices = []
    for rate in OVERFLOW_RATES:
        quantiles = _quantiles(tuple(longer), sum(histogram), rows, rate / (max_groups - 1))
        tokens, shapes = _fewest_tokens(lengths, [0, *quantiles[1:]], rows, max_groups, group_cost)
        longer_lengths = group_lengths(tuple(length for _, length in shapes), "longer", longest)
        more = sum(count * (new - old) for (count, old), new in zip(shapes, longer_lengths, strict=True))
        choices.append((tokens + rate * more, shapes))
    return min(choices, key=lambda choice: choice[0])[1]


def _fewest_tokens(
    lengths: list[int], reserved: list[int], rows: int, max_groups: int, group_cost: int
) -> tuple[int, tuple[tuple[int, int], ...]]:
    """Return the fewest tokens (with the cost of groups) and the groups that need them.

    lengths: descending, the first is T. reserved: rows that groups longer than each length must hold.
    """
    # best[j]: cost and groups of the rows before those of length lengths[j], which begin at row reserved[j]
    best: dict[int, tuple[int, tuple[tuple[int, int], ...]]] = {0: (0, ())}
    complete = []
    for _ in range(max_groups):
        following: dict[int, tuple[int, tuple[tuple[int, int], ...]]] = {}
        for i, (cost, groups) in best.items():
            left = rows - reserved[i]
            complete.append((cost + left * lengths[i] + group_cost, (*groups, (left, lengths[i]))))
            for j in range(i + 1, len(lengths)):
                count = reserved[j] - reserved[i]
                if not 0 < count < left:
                    continue
                total = cost + count * lengths[i] + group_cost
                if j not in following or total < following[j][0]:
                    following[j] = (total, (*groups, (count, lengths[i])))
        best = following
    return min(complete)


def _quantiles(longer: tuple[int, ...], samples: int, rows: int, rate: float) -> list[int]:
    """Return how many of `rows` texts exceed each length, but for a fraction `rate` of batches.

    longer: how many of the `samples` texts exceed it. The distribution is the beta-binomial with parameters
    longer + 1/2 and samples - longer + 1/2.
    """
    k = torch.arange(rows + 1, dtype=torch.float64)
    choose = torch.lgamma(torch.tensor(rows + 1.0, dtype=torch.float64)) - torch.lgamma(k + 1) - torch.lgamma(rows - k + 1)
    quantiles = []
    for count in longer:
        a, b = count + 0.5, samples - count + 0.5
        log_p = choose + torch.lgamma(k + a) + torch.lgamma(rows - k + b)
        cumulative = log_p.softmax(dim=0).cumsum(dim=0)
        quantiles.append(int((cumulative < 1 - rate).sum()))
    return quantiles
