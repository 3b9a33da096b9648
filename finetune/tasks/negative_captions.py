"""Negative captions from the data, which are wrong about their image in one word or more.

The configuration and the json of samples call them `foils`.
Shapes: b = samples, F = negative captions per sample, T = tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.data.shards.paths import RawSample
from pretrain.data.text import TextDecoder
from pretrain.data.training_captions import read_negative_captions
from pretrain.printable import format_count

LOOKED_AT = 256
"""Samples of the training data whose json is looked at when a run starts."""


class NegativeCaptions(TextDecoder):
    """A text decoder whose items are the negative captions of a sample."""

    def __init__(self, text: TextDecoder, field: str, draw: int) -> None:
        super().__init__(text.tokenizer, text.length, text.caption, text.trim, text.multiple)
        self.field, self.draw = field, draw

    def __call__(self, sample: RawSample, rng: np.random.Generator, train: bool) -> tuple[str, ...]:
        """Return up to `draw` of them: random ones in training, else the first ones. Raises BadSample."""
        captions = read_negative_captions(sample, self.field)
        order = rng.permutation(len(captions)) if train else range(len(captions))
        return tuple(captions[int(i)] for i in order)[: self.draw]

    def collate(self, items: list[tuple[str, ...]]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return ids (b, F, T) int64 and mask (b, F, T) bool; empty texts fill up samples with fewer than F."""
        ids, mask = self.encode([text for item in items for text in [*item, *[""] * (self.draw - len(item))]])
        return ids.unflatten(0, (-1, self.draw)), mask.unflatten(0, (-1, self.draw))

    def targets(self, items: list[tuple[str, ...]]) -> dict[str, Any]:
        """Return negative_mask (b, F) bool: True for negative captions, False for padding."""
        return {"negative_mask": torch.tensor([[i < len(item) for i in range(self.draw)] for item in items])}


def describe_foils(field: str, survey: Callable[[], Iterator[dict[str, Any]]]) -> str:
    """Return a line on how many of the first samples have negative captions in a field of their json.

    survey: iterates over the json of this process's share of the training samples. Collective.
    """
    values = list(islice(survey(), LOOKED_AT))
    count = sum(bool(fields.get(field)) for fields in values)
    if count:
        return f"task.foils={field}: {count} of the first {format_count(len(values), 'sample')} have negative captions there"
    return (
        f"task.foils={field}: none of the first {format_count(len(values), 'sample')} has this field in its json, so negatives "
        "come from the batch alone (as with task.foils=null)"
    )
