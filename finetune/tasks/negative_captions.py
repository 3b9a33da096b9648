"""Captions that are wrong about their picture, in one word or more: negatives that the data brings.

Shapes: b = samples, F = foils a sample, T = tokens of the longest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.data import BadSample
from pretrain.data.sample_json import read_fields
from pretrain.data.shards.paths import RawSample
from pretrain.data.text import TextDecoder, normalize_whitespace


class NegativeCaptions(TextDecoder):
    """A text decoder whose items are captions that are wrong about their picture."""

    def __init__(self, text: TextDecoder, field: str, draw: int) -> None:
        super().__init__(text.tokenizer, text.length, text.caption, text.trim, text.multiple)
        self.field, self.draw = field, draw

    def __call__(self, sample: RawSample, rng: np.random.Generator, train: bool) -> tuple[str, ...]:
        """Up to `draw` of them, in evaluation the first ones. Raises BadSample where the field holds something else."""
        found = negative_captions_of(sample, self.field)
        order = rng.permutation(len(found)) if train else range(len(found))
        return tuple(found[int(i)] for i in order)[: self.draw]

    def collate(self, items: list[tuple[str, ...]]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """(b, F, T) int64, (b, F, T) bool; where there are too few, an empty text that is not counted."""
        ids, mask = self.encode([text for item in items for text in [*item, *[""] * (self.draw - len(item))]])
        return ids.unflatten(0, (-1, self.draw)), mask.unflatten(0, (-1, self.draw))

    def targets(self, items: list[tuple[str, ...]]) -> dict[str, Any]:
        """foiled (b, F) bool: which texts are foils and not there to fill up."""
        return {"foiled": torch.tensor([[i < len(item) for i in range(self.draw)] for item in items])}


def negative_captions_of(sample: RawSample, field: str) -> list[str]:
    """The wrong captions of a sample; [] where it has none. Raises BadSample for a field of another kind."""
    given = read_fields(sample.members).get(field) or []
    if not isinstance(given, list):
        raise BadSample("foils unreadable", f"{field} is no list: {given!r}"[:200])
    texts = [item.get("caption") if isinstance(item, dict) else item for item in given]
    return [normalize_whitespace(text) for text in texts if isinstance(text, str) and normalize_whitespace(text)]
