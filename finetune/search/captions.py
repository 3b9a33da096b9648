"""Captions searched by their words: BM25, and its fusion with the ranking by embeddings.

    CaptionIndex(["a red car", "a dog"]).score("red dog")               (n,) BM25 scores
    fuse_ranks([["a", "b"], ["b", "c"]])                                ["b", "a", "c"]

BM25 is Lucene's, as the library bm25s computes it: a caption of length l has, for each word of the query that occurs f times
in it, ln(1 + (n - d + 0.5) / (d + 0.5)) f / (f + K1 (1 - B + B l / mean length)), where d captions hold the word. Words are
what lies between spaces and punctuation, in lower case; there are no stop words, whose weight is small anyway.

Fusion is by reciprocal rank (Cormack et al. 2009): cosines and BM25 scores have no common scale, and ranks need none.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Hashable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pretrain.errors import UserError

K1, B = 1.2, 0.75
"""Saturation of repeated words, and the weight of a caption's length: Lucene's and Milvus's defaults."""
RANK_OFFSET = 60
"""The constant of reciprocal rank fusion, as in the paper."""
_WORD = re.compile(r"\w+")
Key = TypeVar("Key", bound=Hashable)


def fuse_ranks(rankings: Sequence[Sequence[Key]], offset: int = RANK_OFFSET) -> list[Key]:
    """Return all items of some rankings by the sum of 1 / (offset + rank), best first; ranks count from 1.

    Of equal ones, that comes first which an earlier ranking names first.
    """
    scores: dict[Key, float] = {}
    for ranking in rankings:
        for rank, item in enumerate(ranking, start=1):
            scores[item] = scores.get(item, 0.0) + 1 / (offset + rank)
    return sorted(scores, key=lambda item: -scores[item])


def split_words(text: str) -> list[str]:
    """Return the words of a text, in lower case."""
    return _WORD.findall(text.lower())


class CaptionIndex:
    """The BM25 scores of some captions."""

    def __init__(self, captions: Sequence[str]) -> None:
        """Raises UserError where bm25s is missing."""
        self._length = len(captions)
        self._bm25 = _import_bm25s().BM25(k1=K1, b=B, method="lucene")
        words = [split_words(caption) for caption in captions]
        self._has_words = any(words)
        if self._has_words:
            self._bm25.index(words, show_progress=False)

    def save(self, folder: Path) -> None:
        """Write into a folder, which appears as a whole. Raises OSError."""
        if not self._has_words:
            return
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as partial:
            self._bm25.save(Path(partial) / "bm25", show_progress=False)
            with suppress(FileExistsError):  # another process was as fast
                os.rename(Path(partial) / "bm25", folder)

    @classmethod
    def load(cls, folder: Path, length: int) -> CaptionIndex:
        """Map what `save` wrote into memory; length: n. Raises OSError where there is nothing, ValueError for damage."""
        index = cls.__new__(cls)
        index._length, index._has_words = length, True
        index._bm25 = _import_bm25s().BM25.load(folder, mmap=True, show_progress=False)
        if index._bm25.scores["num_docs"] != length:
            raise ValueError(f"{folder} holds {index._bm25.scores['num_docs']} captions, not {length}")
        return index

    def score(self, text: str) -> NDArray[np.float32]:
        """Return (n,) the score of each caption; 0 for those that hold no word of the text."""
        words = [word for word in split_words(text) if word in self._bm25.vocab_dict] if self._has_words else []
        return np.asarray(self._bm25.get_scores(words), np.float32) if words else np.zeros(self._length, np.float32)


def _import_bm25s() -> Any:
    try:
        import bm25s
    except ImportError as error:
        raise UserError(f"captions need {error.name}: pip install 'clipfuse[search]'") from error
    return bm25s
