"""Captions for pretraining with what the json says of them: weights (data.weight) and negatives (data.negatives).

    {"captions": ["a red car", "a car"], "relevance": [1.0, 0.3], "wrong": ["a blue car"]}

Legend: b = samples, k = captions drawn per sample, F = negatives drawn per sample, T = tokens of a text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pretrain.data import BadSample
from pretrain.data.captions import caption_id, normalize_whitespace, number_captions, read_caption_groups
from pretrain.data.sample_json import read_fields
from pretrain.data.shards.paths import RawSample
from pretrain.data.text import TextDecoder

MAX_WEIGHT = 1e9
"""Largest weight of a caption."""


class DrawnCaptions(NamedTuple):
    """What one position of the run reads of a sample's texts."""

    captions: tuple[str, ...]
    """k texts."""
    weights: tuple[float, ...]
    """Of each caption; () without data.weight."""
    negatives: tuple[str, ...]
    """At most F texts that are wrong about the image."""


class TrainingCaptions(TextDecoder):
    """A decoder for training whose texts are k captions and then F negatives of each sample.

    Args:
        text: the decoder whose tokenizer and settings it takes.
        weight: field of the json with weights; None = no weights.
        negatives: field of the json with negatives; None = none.
        draw_negatives: F.
    """

    def __init__(self, text: TextDecoder, weight: str | None, negatives: str | None, draw_negatives: int) -> None:
        super().__init__(text.tokenizer, text.length, text.caption, text.trim, text.multiple, text.draw, text.sentences)
        self.weight, self.negatives = weight, negatives
        self.num_negatives = draw_negatives if negatives is not None else 0

    @property
    def texts_per_sample(self) -> int:
        """The number of texts of a sample in training: k + F."""
        return self.draw + self.num_negatives

    def __call__(self, sample: RawSample, rng: np.random.Generator, train: bool) -> DrawnCaptions:  # type: ignore[override]
        """Return the captions that TextDecoder draws with the same `rng`, their weights, and negatives drawn after them.

        Negatives are different ones; those that equal a caption of the sample are left out.

        Raises:
            BadSample: there is no usable caption, or weights or negatives are not what they must be.
        """
        groups = read_caption_groups(sample.members, self.caption)
        captions = number_captions(groups)
        places = list(captions)
        drawn = [places[i] for i in self.draw_from_sources([*map(len, groups)], rng)]
        fields = read_fields(sample.members)
        weights = read_weights(fields, self.weight, places) if self.weight is not None else {}
        negatives: list[str] = []
        if self.negatives is not None:
            true_ids = set(map(caption_id, captions.values()))
            texts = [text for text in read_negative_captions(sample, self.negatives) if caption_id(text) not in true_ids]
            negatives = [texts[int(i)] for i in rng.permutation(len(texts))[: self.num_negatives]]
        texts_drawn = self.draw_sentences([captions[p] for p in drawn], rng)
        return DrawnCaptions(tuple(texts_drawn), tuple(weights[p] for p in drawn if weights), tuple(negatives))

    def collate(self, items: list[DrawnCaptions]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Tokenize to ids and mask: (b, k + F, T), or (b, T) where that is one text.

        A sample with fewer than F negatives is filled up with its first caption; `negative_mask` says where.
        """
        ids, mask = self.encode([text for item in items for text in (*item.captions, *self._fill_up(item))])
        texts = self.texts_per_sample
        return (ids, mask) if texts == 1 else (ids.unflatten(0, (-1, texts)), mask.unflatten(0, (-1, texts)))

    def targets(self, items: list[DrawnCaptions]) -> dict[str, Any]:
        """Return caption_id and weight (float64), (b,) or (b, k), and negative_mask (bool) and negative_id, (b, F).

        weight and the last two only where the settings ask for them.
        """
        values: dict[str, Tensor] = {
            "caption_id": torch.tensor([[caption_id(text) for text in item.captions] for item in items], dtype=torch.int64)
        }
        if self.weight is not None:
            values["weight"] = torch.tensor([item.weights for item in items], dtype=torch.float64)
        if self.draw == 1:
            values = {name: value[:, 0] for name, value in values.items()}
        if self.num_negatives:
            mask = [[i < len(item.negatives) for i in range(self.num_negatives)] for item in items]
            ids = [[caption_id(text) for text in self._fill_up(item)] for item in items]
            values |= {"negative_mask": torch.tensor(mask), "negative_id": torch.tensor(ids, dtype=torch.int64)}
        return values

    def _fill_up(self, item: DrawnCaptions) -> tuple[str, ...]:
        """Return F texts: the negatives of a sample, then its first caption."""
        return (*item.negatives, *item.captions[:1] * (self.num_negatives - len(item.negatives)))


def read_weights(fields: Mapping[str, Any], field: str, places: Sequence[int]) -> dict[int, float]:
    """Return the weights of the captions at these places; 1 where the json has none.

    The field holds a number for all captions of the sample, or a list with one for each. Raises BadSample.
    """
    value = fields.get(field)
    if not isinstance(value, list):
        return dict.fromkeys(places, _check_weight(value, field))
    if len(value) <= max(places):
        raise BadSample("weight missing", f"{field} holds {len(value)} weights for {max(places) + 1} captions")
    return {place: _check_weight(value[place], field) for place in places}


def _check_weight(value: Any, field: str) -> float:
    """Return a weight of the json as a number; 1 for null. Raises BadSample."""
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadSample("weight not a number", f"{field} holds {value!r}"[:200])
    if not 0 <= value <= MAX_WEIGHT:  # neither is a NaN
        raise BadSample("weight out of range", f"{field} holds {value!r:.100}, not a number from 0 to {MAX_WEIGHT:.0e}")
    return float(value)


def read_negative_captions(sample: RawSample, field: str) -> list[str]:
    """Return the negative captions of a sample, possibly []: a list of texts or of {caption: text}.

    Raises BadSample for a field of another kind.
    """
    entries = read_fields(sample.members).get(field) or []
    if not isinstance(entries, list):
        raise BadSample("negative captions unreadable", f"{field} is not a list: {entries!r}"[:200])
    texts = [entry.get("caption") if isinstance(entry, dict) else entry for entry in entries]
    return [normalize_whitespace(text) for text in texts if isinstance(text, str) and normalize_whitespace(text)]
