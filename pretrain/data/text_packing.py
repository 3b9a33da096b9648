"""Texts packed into rows of fixed length, several in a row, in the same shapes for every batch.

A batch of short captions becomes a few full rows. A text attends to itself alone and has positions of its own, so embeddings
are those of texts that are encoded one by one (Krell et al. 2021, "Efficient sequence packing without cross-contamination").
It needs a causal text tower that accepts positions and an attention mask, and pools at the end token.

    packing = TextPacking(count_lengths(mask, longest))       once a run
    packed = packing.assign(mask.sum(dim=1))                  once a batch, on the host

A batch that needs more rows than usual takes the larger of two numbers of rows. Where that does not suffice either, each text
has a row of its own: there are three sets of shapes.

Legend: b = texts of a batch, T = tokens of the longest text that the tower reads, R = packed rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from pretrain.data.shuffle import Ints

DRAWS = 16
"""Batches that are drawn and packed to choose the number of rows."""
DEVIATIONS = (2.0, 5.0)
"""The two numbers of rows, in standard deviations of the number that a batch needs above its mean."""


@dataclass(eq=False)
class PackedTexts:
    """Where each text of a batch is in the packed rows."""

    tokens: Tensor
    """(3, R, T) int64. [0]: the index of each token in the flattened ids (b, T). [1]: the text that it belongs to, -1 for
    padding. [2]: its position in that text."""
    starts: Tensor
    """(b,) int64: index of each text's first token in the flattened rows (R, T)."""
    row_lengths: Ints
    """(b,) int64 on the host: tokens of each text."""
    source: TextPacking

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedTexts:
        """Return the same with tensors on `device`."""
        tokens, starts = (tensor.to(device, non_blocking=non_blocking) for tensor in (self.tokens, self.starts))
        return replace(self, tokens=tokens, starts=starts)

    def pin_memory(self) -> PackedTexts:
        """Return the same with tensors in page-locked memory."""
        return replace(self, tokens=self.tokens.pin_memory(), starts=self.starts.pin_memory())

    def slice(self, start: int, end: int) -> PackedTexts:
        """Pack texts [start, end), on the same device. Reads nothing from the device."""
        packed = self.source.assign(self.row_lengths[start:end])
        if self.starts.device.type == "cpu":
            return packed
        return (packed.pin_memory() if torch.cuda.is_available() else packed).to(self.starts.device, non_blocking=True)


class TextPacking:
    """Packs the texts of every batch; the number of rows comes from the lengths of a sample of the texts.

    histogram: number of sampled texts of each length, 0 to T.
    """

    def __init__(self, histogram: tuple[int, ...]) -> None:
        self.histogram = histogram

    def row_counts(self, texts: int) -> tuple[int, int, int]:
        """Return the usual number of rows of a batch, the larger one, and one for each text."""
        return count_rows(self.histogram, texts)

    def assign(self, row_lengths: Ints) -> PackedTexts:
        """Pack the texts of a batch, whose lengths (b,) int64 are on the host."""
        texts, longest = len(row_lengths), len(self.histogram) - 1
        rows, offsets, needed = pack_texts(row_lengths, longest)
        count = next(count for count in self.row_counts(texts) if count >= needed)
        starts = rows * longest + offsets
        owners = np.repeat(np.arange(texts), row_lengths)  # of each token
        positions = np.arange(len(owners)) - np.repeat(np.cumsum(row_lengths) - row_lengths, row_lengths)
        tokens = np.zeros((3, count * longest), dtype=np.int64)
        tokens[1] = -1
        targets = starts[owners] + positions
        tokens[:, targets] = np.stack((owners * longest + positions, owners, positions))
        shaped = torch.from_numpy(tokens.reshape(3, count, longest))
        return PackedTexts(shaped, torch.from_numpy(starts), row_lengths, self)


def pack_texts(lengths: Ints, longest: int) -> tuple[Ints, Ints, int]:
    """Return the row of each text and its offset in it, and the number of rows: best fit, the longest texts first.

    lengths: (b,), each at most `longest`, which is the length of a row.
    """
    rows, offsets = np.zeros_like(lengths), np.zeros_like(lengths)
    by_room: list[list[int]] = [[] for _ in range(longest + 1)]  # rows by the tokens that still fit
    count = 0
    for text in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[text])
        room = next((room for room in range(length, longest) if by_room[room]), longest)
        if room == longest:
            row, count = count, count + 1
        else:
            row = by_room[room].pop()
        rows[text], offsets[text] = row, longest - room
        by_room[room - length].append(row)
    return rows, offsets, count


@lru_cache(maxsize=64)
def count_rows(histogram: tuple[int, ...], texts: int) -> tuple[int, int, int]:
    """Return the usual number of rows that packed batches of `texts` texts need, the larger one, and one for each text.

    histogram: number of sampled texts of each length, 0 to T. The standard deviation is that of the sum of lengths, of a batch
    and of the sample.
    """
    longest, samples = len(histogram) - 1, sum(histogram)
    if not samples or not texts:
        return texts, texts, texts
    lengths = np.repeat(np.arange(longest + 1), histogram)
    rng = np.random.Generator(np.random.Philox(0))
    mean = sum(pack_texts(rng.choice(lengths, texts), longest)[2] for _ in range(DRAWS)) / DRAWS
    deviation = math.sqrt(texts * float(lengths.var()) * (1 + texts / samples)) / longest
    usual, larger = (min(texts, math.ceil(mean + factor * deviation)) for factor in DEVIATIONS)
    return usual, larger, texts
