"""Captions and tokenizers, against transformers' own padding and truncation, open_clip's tokenizer, and tarfile."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import HFTokenizer, bytes_to_unicode, default_bpe
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, BertTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from pretrain.data import BadSample
from pretrain.data.text import TextDecoder, caption_id, load_tokenizer, normalize_whitespace, read_captions, train_tokenizer
from pretrain.errors import ConfigError, UserError
from tests.support import ROOT, Small

TEXTS = [
    "a red car on a bridge",
    "Black leather sofa",
    "café crème, 3 cups & a dog's bowl!",
    "a",
    "very " * 120 + "long",
    "a house left of a tree " * 3,
]


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers of each kind, made here


def clip(folder: Path) -> Any:
    """CLIP's own, from the vocabulary that open_clip ships."""
    with gzip.open(default_bpe(), "rt", encoding="utf-8") as file:
        merges = file.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    symbols = list(bytes_to_unicode().values())
    symbols += [f"{s}</w>" for s in symbols] + ["".join(m.split()) for m in merges] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({symbol: i for i, symbol in enumerate(symbols)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    end = "<|endoftext|>"
    special = {"bos_token": "<|startoftext|>", "eos_token": end, "unk_token": end, "pad_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", **special}))
    return load_tokenizer(folder)


def bert(folder: Path) -> Any:
    words = {normalize_whitespace(w.strip(",!&'").lower()) for text in TEXTS for w in text.split()}
    letters = sorted({c for text in TEXTS for c in unicodedata.normalize("NFD", text.lower())} - {" "})
    tokens = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *sorted(words - set(letters)),
        *letters,
        *(f"##{c}" for c in letters),
    ]
    (folder / "vocab.txt").write_text("\n".join(tokens))
    return BertTokenizer(str(folder / "vocab.txt"), padding_side="left")  # left: a habit we must overrule


def t5(folder: Path) -> Any:
    """Pieces with scores and a final </s>, like sentencepiece models."""
    local_shards = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -5.0) for c in sorted(set("".join(TEXTS)) | {"▁"}))]
    local_shards += [("▁a", -2.0), ("▁car", -3.0), ("▁very", -3.0), ("▁long", -3.5)]
    made = Tokenizer(models.Unigram(local_shards, unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def gpt2(folder: Path) -> Any:
    """Bytes, nothing added, no padding: an end token that the tokenizer itself never writes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "<|endoftext|>"])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>", truncation_side="left")


def byt5(folder: Path) -> Any:
    """Written in Python, not one of the tokenizers library."""
    return ByT5Tokenizer()


KINDS: dict[str, Callable[[Path], Any]] = {"clip": clip, "bert": bert, "t5": t5, "gpt2": gpt2, "byt5": byt5}


@pytest.fixture(scope="module", params=sorted(KINDS))
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return KINDS[request.param](tmp_path_factory.mktemp(request.param))


# ---------------------------------------------------------------------------------------------------------------------
# Encoding


@pytest.mark.parametrize("length", [8, 20, 77])
def test_ids_are_those_of_transformers(tokenizer: Any, length: int) -> None:
    ids, mask = TextDecoder(tokenizer, length, trim=False).encode(TEXTS)
    assert ids.shape == mask.shape == (len(TEXTS), length)
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)
    ends = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    adds = ends in tokenizer("a")["input_ids"]
    for i, text in enumerate(TEXTS):
        expected = tokenizer(normalize_whitespace(text), truncation=True, max_length=length if adds else length - 1)[
            "input_ids"
        ]
        expected = expected if adds else [*expected, ends]
        assert ids[i][mask[i]].tolist() == expected
        assert mask[i].tolist() == [True] * len(expected) + [False] * (length - len(expected))
        assert expected[-1] == ends
    assert mask[4].all()  # the long one is cut, and still ends as a text ends


def test_trimming_only_drops_padding(tokenizer: Any) -> None:
    full, full_mask = TextDecoder(tokenizer, 77, trim=False).encode(TEXTS[:2])
    ids, mask = TextDecoder(tokenizer, 77).encode(TEXTS[:2])
    width = ids.shape[1]
    assert width % 8 == 0
    assert width - 8 < full_mask.sum(1).max() <= width < 77
    assert torch.equal(ids, full[:, :width])
    assert torch.equal(mask, full_mask[:, :width])
    assert not full_mask[:, width:].any()
    assert TextDecoder(tokenizer, 77).encode(TEXTS)[0].shape[1] == 77  # to `length`, not beyond
    assert TextDecoder(tokenizer, 77, multiple=1).encode(TEXTS[:2])[0].shape[1] == full_mask.sum(1).max()


def test_pieces_of_a_batch_merge(tokenizer: Any) -> None:
    decoder = TextDecoder(tokenizer, 77)
    parts = [decoder.encode(TEXTS[:2]), decoder.encode(TEXTS[3:4]), decoder.encode(TEXTS[5:])]
    ids, mask = decoder.encode([*TEXTS[:2], *TEXTS[3:4], *TEXTS[5:]])
    merged = decoder.merge(parts)
    assert torch.equal(merged[0], ids)
    assert torch.equal(merged[1], mask)


def test_no_texts_give_no_rows(tokenizer: Any) -> None:
    ids, mask = TextDecoder(tokenizer, 77).encode([])
    assert ids.shape == mask.shape
    assert len(ids) == 0


def test_a_decoder_survives_pickling(tokenizer: Any) -> None:
    decoder = TextDecoder(tokenizer, 77)
    again = pickle.loads(pickle.dumps(decoder))
    assert torch.equal(again.encode(TEXTS)[0], decoder.encode(TEXTS)[0])


def test_clip_ids_equal_open_clips(tmp_path: Path) -> None:
    ids, mask = TextDecoder(clip(tmp_path), 77, trim=False).encode(TEXTS)
    expected = open_clip.get_tokenizer("ViT-B-32")(TEXTS)
    assert torch.equal(ids * mask, expected * mask)
    assert not (expected * ~mask).any()  # open_clip pads with 0, transformers with the end token


def test_a_length_without_room_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="leaves no room for text"):
        TextDecoder(tokenizer, 1)


def test_a_giant_caption_costs_little(tmp_path: Path) -> None:
    ids, _ = TextDecoder(clip(tmp_path), 77).encode(["word " * 1_000_000])
    assert ids.shape == (1, 77)


# ---------------------------------------------------------------------------------------------------------------------
# Captions


def sample(**members: bytes) -> Any:
    return SimpleNamespace(key="s/1", members=members)


def test_captions_are_cleaned_only_of_white_space() -> None:
    assert read_captions({"txt": "\ufeff  A  Red\tcar,\r\non a\u00a0bridge \n".encode()}) == ["A Red car, on a bridge"]
    assert read_captions({"json": b'{"title": "x", "alt": ["  one ", "", "two"]}'}, "alt") == ["one", "two"]


@pytest.mark.parametrize(
    ("members", "source", "reason"),
    [
        ({}, "txt", "no caption"),
        ({"json": b"{}"}, "txt", "no caption"),
        ({"txt": b"x"}, "title", "no caption"),
        ({"json": b'{"title": null, "other": 1}'}, "title", "no caption"),
        ({"json": b'{"title": []}'}, "title", "no caption"),
        ({"json": b"[1]"}, "title", "no caption"),
        ({"txt": b""}, "txt", "empty caption"),
        ({"txt": b" \n\t "}, "txt", "empty caption"),
        ({"json": b'{"title": ["", " "]}'}, "title", "empty caption"),
        ({"txt": b"caf\xe9"}, "txt", "caption not UTF-8"),
        ({"json": b'{"title": 7}'}, "title", "caption not text"),
        ({"json": b'{"title": '}, "title", "json unreadable"),
        ({"json": b"[" * 100_000}, "title", "json unreadable"),
    ],
)
def test_bad_captions_are_named(members: dict[str, bytes], source: str, reason: str) -> None:
    with pytest.raises(BadSample) as caught:
        read_captions(members, source)
    assert caught.value.reason == reason
    assert 0 < len(caught.value.detail) < 300


def test_one_of_several_captions_is_drawn_in_training(tmp_path: Path) -> None:
    decoder = TextDecoder(bert(tmp_path), 20, caption="alt")
    several = sample(json=json.dumps({"alt": ["one", "two", "three"]}).encode())
    drawn = [decoder(several, np.random.default_rng(seed), True) for seed in range(300)]
    assert all(70 < drawn.count(text) < 130 for text in ("one", "two", "three"))
    assert drawn[:20] == [decoder(several, np.random.default_rng(seed), True) for seed in range(20)]
    found = decoder(several, np.random.default_rng(0), False)
    assert found == ["one", "two", "three"]
    assert isinstance(found, list)
    assert torch.equal(decoder.collate([found])[0], decoder.encode(["one"])[0])


def test_several_captions_of_each_sample_are_drawn(tmp_path: Path) -> None:
    several = sample(json=json.dumps({"caption": ["one", "two", "three", "four words are here"]}).encode())
    single = sample(json=json.dumps({"caption": "alone"}).encode())
    decoder = TextDecoder(bert(tmp_path), 16, "caption", multiple=1, draw=3)
    drawn = [decoder(several, np.random.default_rng(seed), True) for seed in range(400)]
    assert all(len(set(texts)) == 3 for texts in drawn)
    for place in range(3):  # each caption as often in each place
        assert min(Counter(texts[place] for texts in drawn).values()) > 70
    assert decoder(single, np.random.default_rng(0), True) == ("alone",) * 3
    assert decoder(several, np.random.default_rng(0), False) == ["one", "two", "three", "four words are here"]
    ids, mask = decoder.collate([drawn[0], drawn[1]])
    flat, flat_mask = decoder.encode([*drawn[0], *drawn[1]])
    assert torch.equal(ids.flatten(0, 1), flat)
    assert torch.equal(mask, flat_mask.unflatten(0, (2, 3)))
    long = [("one", "two", "three"), ("one", "two", "three " * 12)]
    merged = decoder.merge([decoder.collate(long[:1]), decoder.collate(long[1:])])
    for got, expected in zip(merged, decoder.collate(long), strict=True):
        assert torch.equal(got, expected)


def test_the_caption_hash_is_stable_and_signed() -> None:
    expected = int.from_bytes(hashlib.blake2b(b"a red car", digest_size=8).digest(), "big", signed=True)
    assert caption_id(" A  red\nCar ") == expected == -2039805188729279384
    assert caption_id("caf\u00e9") == caption_id("cafe\u0301")
    ids = {caption_id(f"caption {i}") for i in range(2000)}
    assert len(ids) == 2000
    assert min(ids) < 0 < max(ids)
    torch.tensor(sorted(ids), dtype=torch.int64)


@given(st.text())
def test_any_text_can_be_hashed_and_cleaned(text: str) -> None:
    assert -(2**63) <= caption_id(text) < 2**63
    assert normalize_whitespace(normalize_whitespace(text)) == normalize_whitespace(text)


# ---------------------------------------------------------------------------------------------------------------------
# Training a tokenizer


def write_shard(path: Path, samples: list[dict[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for i, members in enumerate(samples):
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{i:04}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Captions in txt, and others, in lists, in json; some samples are bad."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    colours, things, places = (
        ["red", "blue", "green", "black", "white"],
        ["car", "sofa", "dog", "house", "Tree"],
        ["grass", "beach", "bridge"],
    )
    for shard in range(3):
        made: list[dict[str, bytes]] = [{"jpg": b"x", "txt": b"\xff\xfe"}, {"jpg": b"x"}]
        for _ in range(150):
            text = f"A {rng.choice(colours)} {rng.choice(things)} on the {rng.choice(places)}"
            made.append({"txt": text.encode(), "json": json.dumps({"alt": ["une voiture rouge", "ein rotes auto"]}).encode()})
        write_shard(folder / f"part-{shard}.tar", made)
    return str(folder)


def test_a_trained_tokenizer_loads_anywhere(shards: str, tmp_path: Path) -> None:
    size = len(train_tokenizer(shards, tmp_path / "tok", vocab=400, length=32))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tok", local_files_only=True)
    assert size == len(tokenizer) <= 400
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == ("<pad>", "<bos>", "<eos>")
    assert tokenizer.eos_token_id == size - 1  # the largest: towers that pool at the maximum of the ids find it
    assert tokenizer.model_max_length == 32
    ids = tokenizer("A Red  car")["input_ids"]
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert ids == tokenizer("a red car")["input_ids"]
    assert len(ids) == 5  # each word was learnt as one token
    theirs = HFTokenizer(str(tmp_path / "tok"), context_length=32)(["a red car", "a dog"])
    ours, mask = TextDecoder(load_tokenizer(tmp_path / "tok"), 32, trim=False).encode(["a red car", "a dog"])
    assert torch.equal(theirs * mask, ours * mask)


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_nothing_is_unknown_to_a_trained_tokenizer(shards: str, text: str) -> None:
    cached = Path(shards) / "any"
    if not cached.exists():
        train_tokenizer(shards, cached, vocab=300, lowercase=False)
    tokenizer = load_tokenizer(cached)
    decoded = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert (
        normalize_whitespace(str(decoded)) == normalize_whitespace(unicodedata.normalize("NFC", text.replace("\ufeff", "")))
        or "\ufeff" in text
    )


def test_training_is_deterministic(shards: str, tmp_path: Path) -> None:
    train_tokenizer(shards, tmp_path / "a", vocab=380)
    code = f"from pretrain.data.text import train_tokenizer; train_tokenizer({shards!r}, {str(tmp_path / 'b')!r}, vocab=380)"
    other = {**os.environ, "RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=other)
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_captions_of_a_json_field(shards: str, tmp_path: Path) -> None:
    train_tokenizer(shards, tmp_path, vocab=330, caption="alt")
    assert len(load_tokenizer(tmp_path)("rotes")["input_ids"]) == 3


def test_words_of_questions_become_tokens_where_they_are_asked_for(small: Small, tmp_path: Path) -> None:
    """No caption says "how many": without the questions it falls apart."""
    train_tokenizer(small.train, tmp_path / "both", vocab=500, caption="txt,questions")
    both = load_tokenizer(tmp_path / "both")
    assert len(both("how many")["input_ids"]) == 4  # <bos> how many <eos>
    assert len(load_tokenizer(small.tokenizer)("how many")["input_ids"]) > 4
    assert len(both("a car")["input_ids"]) == len(load_tokenizer(small.tokenizer)("a car")["input_ids"])


def test_what_cannot_be_trained_is_said_in_a_line(shards: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 259"):
        train_tokenizer(shards, tmp_path, vocab=100)
    with pytest.raises(UserError, match="no captions in"):
        train_tokenizer(shards, tmp_path, vocab=300, caption="nothing")
    with pytest.raises(UserError, match="nowhere"):
        train_tokenizer(str(tmp_path / "nowhere-*.tar"), tmp_path, vocab=300)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write a tokenizer to"):
        train_tokenizer(shards, tmp_path / "file", vocab=300)


@pytest.mark.parametrize("name", [None, "", "./missing", "/missing/folder", "runs/a/missing", "no-such-name"])
def test_a_missing_tokenizer_is_said_in_a_line(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"^text\.tokenizer") as caught:
        load_tokenizer(name)
    assert "\n" not in str(caught.value)


def test_a_folder_without_tokenizer_is_said_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("nothing here")
    with pytest.raises(ConfigError, match=r"it holds notes\.md, but no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="a file, not a folder"):
        load_tokenizer(tmp_path / "notes.md")


def test_a_hub_that_cannot_be_reached_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1 cannot be reached \(Connection refused\)"):
        load_tokenizer("no-such-name")
