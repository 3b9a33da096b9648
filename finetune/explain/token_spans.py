"""Token spans: which tokens belong to which characters and words of a text, and the maps of words.

Tokenizers split words into several tokens, and fast tokenizers report the characters of each. Special tokens and padding
have no characters. Shapes: T tokens of a text, H, W = cells of a map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import regex
import torch
from torch import Tensor

from pretrain.data.captions import normalize_whitespace
from pretrain.data.text import TextDecoder
from pretrain.errors import ConfigError

# Letters, digits and the marks on them (vowel signs, accents), with the joiners that some scripts write inside a word.
_WORD = regex.compile(r"[\p{L}\p{N}\p{M}\u200c\u200d]+(?:['’-][\p{L}\p{N}\p{M}\u200c\u200d]+)*")


@dataclass(frozen=True)
class Word:
    """A word of a text, and the tokens that hold its characters."""

    text: str
    start: int
    """Its characters in the text are [start, end)."""
    end: int
    tokens: tuple[int, ...]
    """Positions in the encoded text; empty where the text was truncated before the word."""


class TokenSpans:
    """The characters of each token of one text."""

    def __init__(self, decoder: TextDecoder, text: str) -> None:
        """Tokenize `text`.

        Raises ConfigError for a tokenizer that does not report the characters of its tokens.
        """
        tokenizer = decoder.tokenizer
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(
                f"{type(tokenizer).__name__} does not say which characters a token came from, so words cannot have maps; "
                "use a fast tokenizer (a tokenizer.json)"
            )
        self.text = normalize_whitespace(text)
        max_length = decoder.length - (decoder.appended_id is not None)
        encoding: Any = tokenizer(self.text, truncation=True, max_length=max_length, return_offsets_mapping=True)
        self.spans: list[tuple[int, int]] = [(int(start), int(end)) for start, end in encoding["offset_mapping"]]

    def find_tokens(self, start: int, end: int) -> tuple[int, ...]:
        """Return the positions of the tokens that hold any of the characters [start, end)."""
        return tuple(i for i, (a, b) in enumerate(self.spans) if max(a, start) < min(b, end))

    def find_words(self) -> list[Word]:
        """Return the words of the text in order, without punctuation and without truncated words.

        In scripts without spaces between words, such as Thai, all that stands between two spaces is one word.
        """
        words = [Word(m.group(), m.start(), m.end(), self.find_tokens(*m.span())) for m in _WORD.finditer(self.text)]
        return [word for word in words if word.tokens]


def average_tokens(maps: Tensor, tokens: tuple[int, ...]) -> Tensor:
    """Average the maps (T, H, W) of one text over a word's tokens: returns (H, W)."""
    return maps[list(tokens)].mean(dim=0)


def average_words(maps: Tensor, words: list[Word]) -> Tensor:
    """Average the maps (T, H, W) of one text over the tokens of each word: returns (words, H, W)."""
    return torch.stack([average_tokens(maps, word.tokens) for word in words]) if words else maps.new_zeros(0, *maps.shape[1:])
