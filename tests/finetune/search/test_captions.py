"""BM25 against its formula, and fusion against sums written by hand."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest

from finetune.search import places
from finetune.search.captions import CaptionIndex, fuse_ranks, split_words
from finetune.search.vector_index import Description, IndexedItem


def bm25(captions: list[str], text: str, k1: float = 1.2, b: float = 0.75) -> list[float]:
    """The formula as Lucene has it."""
    documents = [split_words(caption) for caption in captions]
    n, mean = len(documents), sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for word in split_words(text):
            holding, count = sum(word in other for other in documents), document.count(word)
            idf = math.log(1 + (n - holding + 0.5) / (holding + 0.5))
            score += idf * count / (count + k1 * (1 - b + b * len(document) / mean))
        scores.append(score)
    return scores


def test_scores_are_those_of_the_formula() -> None:
    rng = random.Random(0)
    words = ["red", "blue", "car", "dog", "bridge", "a", "été", "猫"]
    captions = [" ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(40)] + ["Red-car, RED!", "a"]
    index = CaptionIndex(captions)
    for text in ("red car", "Red, red dog on a bridge", "ÉTÉ 猫", "zebra", "a"):
        np.testing.assert_allclose(index.score(text), bm25(captions, text), rtol=1e-5)
    for empty in ([], ["", "..."]):
        assert CaptionIndex(empty).score("red").tolist() == [0.0] * len(empty)


def test_ranks_are_fused_by_their_reciprocals() -> None:
    first, second = ["a", "b", "c", "d"], ["d", "e", "b"]
    sums = {"a": 1 / 61, "b": 1 / 62 + 1 / 63, "c": 1 / 63, "d": 1 / 64 + 1 / 61, "e": 1 / 62}
    assert fuse_ranks([first, second]) == sorted(sums, key=lambda key: -sums[key]) == ["d", "b", "a", "e", "c"]
    assert fuse_ranks([first, []]) == first
    assert fuse_ranks([["a"], ["b"]]) == ["a", "b"]  # of equal ones, the first ranking's
    assert fuse_ranks([["a", "b", "c"], ["c", "b"]], offset=0) == ["c", "a", "b"]  # 1/3 + 1, 1, 1/2 + 1/2


def test_an_index_of_captions_is_kept_for_each_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "catalog"

    def find(text: str) -> list[str]:
        with places.open_index(str(place)) as index:
            return [hit.item.key for hit in index.search_captions(text, 9)]

    def add(key: str, caption: str) -> None:
        with places.open_index(str(place), is_writable=True) as index:
            index.upsert([IndexedItem(key, "", -1, 0, caption)], np.ones((1, 2), np.float32))

    places.create_index(str(place), Description(2, {})).close()
    add("a", "")
    assert find("red") == []
    add("b", "a red car")
    assert find("red") == find("red") == ["b"]
    add("c", "red")
    assert find("red") == find("red") == ["c", "b"]
    (folder,) = place.glob("captions-*")
    scores = folder / "data.csc.index.npy"
    assert capsys.readouterr().err == ""
    scores.write_bytes(scores.read_bytes()[:-8])
    assert find("red") == ["c", "b"]
    assert "cannot be used, and is made anew" in capsys.readouterr().err
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    folder.write_bytes(b"")  # in the way
    assert find("red") == ["c", "b"]
