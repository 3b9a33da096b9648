"""Tokens of a text -> words a person reads: which tokens belong to which characters, and the maps of words.

Tokenizers cut words into pieces; each piece knows the characters it came from (fast tokenizers do). Special tokens and
padding belong to none. Shapes: B texts, T tokens, W words of one text, H and W' the cells of a map.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.data.captions import normalize_whitespace
from pretrain.data.text import TextDecoder
from pretrain.errors import ConfigError

_READABLE = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


@dataclass(frozen=True)
class Word:
    """A run of characters, and the tokens it was cut into."""

    text: str
    start: int
    """Its characters in the text: [start, end)."""
    end: int
    tokens: tuple[int, ...]
    """Positions in the encoded text; none where the text was cut before it."""


class TokenSpans:
    """One text as the tokenizer cut it."""

    def __init__(self, decoder: TextDecoder, text: str) -> None:
        """Raises ConfigError for a tokenizer that does not know where its tokens came from."""
        tokenizer = decoder.tokenizer
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(
                f"{type(tokenizer).__name__} does not say which characters a token came from, so maps cannot be put to words; "
                "use a fast tokenizer (a tokenizer.json)"
            )
        self.text = normalize_whitespace(text)
        room = decoder.length - (decoder.appended_id is not None)
        given: Any = tokenizer(self.text, truncation=True, max_length=room, return_offsets_mapping=True)
        self.spans: list[tuple[int, int]] = [(int(start), int(end)) for start, end in given["offset_mapping"]]

    def tokens(self, start: int, end: int) -> tuple[int, ...]:
        """The tokens that hold any of the characters [start, end)."""
        return tuple(i for i, (a, b) in enumerate(self.spans) if max(a, start) < min(b, end))

    def words(self) -> list[Word]:
        """Words in the order of the text, without punctuation; those cut off with the text are left out."""
        found = [Word(m.group(), m.start(), m.end(), self.tokens(*m.span())) for m in _READABLE.finditer(self.text)]
        return [word for word in found if word.tokens]


def word_map(maps: Tensor, tokens: tuple[int, ...]) -> Tensor:
    """(T, H, W) of one text -> (H, W): the mean over a word's tokens."""
    return maps[list(tokens)].mean(dim=0)


def word_maps(maps: Tensor, words: list[Word]) -> Tensor:
    """(T, H, W) of one text -> (words, H, W)."""
    return torch.stack([word_map(maps, word.tokens) for word in words]) if words else maps.new_zeros(0, *maps.shape[1:])
