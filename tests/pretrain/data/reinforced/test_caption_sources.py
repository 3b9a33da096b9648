"""data.caption: fields of other json members, and several sources joined by +."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pretrain.data import BadSample
from pretrain.data.captions import caption_members, read_captions, split_sources
from pretrain.data.check import check_shards
from pretrain.data.filter import filter_shards
from pretrain.data.filter.options import FilterOptions
from pretrain.data.shards.paths import RawSample, expand_shards
from pretrain.data.text import TextDecoder, load_tokenizer
from pretrain.data.train_tokenizer import train_tokenizer, train_tokenizer_on
from tests.support import reinforced

MEMBERS = {
    "txt": b" One \n two ",
    "json": b'{"captions": ["three", null, "four"], "txt+x": "six"}',
    "syn.json": b'{"syn_text": ["five", "", "six  seven"]}',
}


@pytest.mark.parametrize(
    ("source", "captions"),
    [
        ("syn.json:syn_text", ["five", "six seven"]),
        ("txt+syn.json:syn_text", ["One two", "five", "six seven"]),
        ("syn.json:syn_text+txt:lines", ["five", "six seven", "One", "two"]),
        ("captions+syn.json:syn_text", ["three", "four", "five", "six seven"]),
        ("txt+x", ["six"]),  # the name of a field
        ("none.json:a+txt:whole", ["One two"]),  # one that the sample lacks
        ("syn.json:none+txt", ["One two"]),
    ],
)
def test_captions_of_each_source_in_order(source: str, captions: list[str]) -> None:
    assert read_captions(MEMBERS, source) == captions


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none.json:a", "no caption: no none.json member, only bad.json, "),
        ("syn.json:none", "no caption: json has no none, but fields syn_text"),
        ("none.json:a+other.json:b", "no caption: no none.json member"),
        ("txt+bad.json:a", "json unreadable"),
        ("txt+list.json:a", "caption not text"),
        ("txt+blank.json:a", "empty caption"),
    ],
)
def test_a_sample_without_captions_is_bad(source: str, message: str) -> None:
    members = {**MEMBERS, "bad.json": b"{", "list.json": b'{"a": [[1]]}', "blank.json": b'{"a": [" "]}'}
    with pytest.raises(BadSample) as caught:
        read_captions(members, source)
    assert message in str(caught.value)


def test_the_members_of_a_source() -> None:
    assert caption_members("txt:lines+syn.json:a+b+syn.json:c") == ("txt", "syn.json", "json")
    assert split_sources("a+b") == ("a+b",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sources")
    train_tokenizer_on(["one two"] * 3, path / "tokenizer", 300)
    return path


@pytest.mark.parametrize("draw", [1, 2, 3, 4])
def test_sources_take_turns(folder: Path, draw: int) -> None:
    text = TextDecoder(load_tokenizer(folder / "tokenizer"), 16, "txt+syn.json:syn_text", draw=draw)
    members = {"txt": b"a", "syn.json": b'{"syn_text": ["b", "c", "d"]}'}
    drawn = [text(RawSample("s/a", members), np.random.default_rng(i), True) for i in range(400)]
    counts = Counter("".join(texts) for texts in drawn)
    if draw == 1:
        assert set(counts) == set("abcd")
        assert 160 < counts["a"] < 240
    elif draw == 2:
        assert set(counts) == {"ab", "ac", "ad"}
    elif draw == 3:  # of one source twice: KEY.txt again, or another synthetic caption
        assert {key for key in counts if key[0] == "a"} == {"aba", "aca", "ada"}
        assert {key for key in counts if key[0] != "a"} == {x + "a" + y for x in "bcd" for y in "bcd" if x != y}
        assert 160 < sum(count for key, count in counts.items() if key[0] == "a") < 240
    else:
        assert set(counts) == {f"a{x}a{y}" for x in "bcd" for y in "bcd" if x != y}
    del members["txt"]
    assert set("".join(text(RawSample("s/a", members), np.random.default_rng(0), True))) <= set("bcd")
    assert text(RawSample("s/a", members), np.random.default_rng(0), False) == ["b", "c", "d"]


def test_a_single_source_is_drawn_as_before(folder: Path) -> None:
    """The random numbers of runs that exist already do not change."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    members = {"json": b'{"captions": ["a", "b", "c", "d", "e"]}'}
    for seed in range(20):
        one = TextDecoder(tokenizer, 16, "captions")(RawSample("s/a", members), np.random.default_rng(seed), True)
        assert one == "abcde"[np.random.default_rng(seed).integers(5)]
        two = TextDecoder(tokenizer, 16, "captions", draw=2)(RawSample("s/a", members), np.random.default_rng(seed), True)
        assert two == tuple("abcde"[i] for i in np.random.default_rng(seed).permutation(5)[:2])


def test_commands_read_them_too(folder: Path, tmp_path: Path) -> None:
    def change(i: int, content: dict[str, bytes]) -> None:
        if i == 3:
            del content["syn.json"]

    reinforced.write_shards(tmp_path, 6, change=change)
    shards = expand_shards(str(tmp_path))
    for decode in (False, True):
        assert check_shards(shards, caption="syn.json:syn_text", decode=decode, workers=0).bad == {"no caption": 1}
        assert not check_shards(shards, caption="txt+syn.json:syn_text", decode=decode, workers=0).bad
    for caption, count in (("syn.json:syn_text", 5), ("txt+syn.json:syn_text", 6)):
        options = FilterOptions(letters=True, caption=caption)
        assert filter_shards(shards, tmp_path / f"filtered-{count}", options, workers=1).kept == count
    train_tokenizer(str(tmp_path), tmp_path / "tokenizer", vocab=300, caption="txt+syn.json:syn_text")
    assert (tmp_path / "tokenizer/tokenizer.json").is_file()
