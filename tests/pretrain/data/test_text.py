"""Tests of captions and tokenizers, against transformers and open_clip's tokenizer."""

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
# Tokenizers of each kind, built here


def clip(folder: Path) -> Any:
    """Build CLIP's tokenizer from the vocabulary that ships with open_clip."""
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
    return BertTokenizer(str(folder / "vocab.txt"), padding_side="left")  # left: a setting that the decoder must override


def t5(folder: Path) -> Any:
    """Build a tokenizer of pieces with scores and a final </s>, like sentencepiece models."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -5.0) for c in sorted(set("".join(TEXTS)) | {"▁"}))]
    pieces += [("▁a", -2.0), ("▁car", -3.0), ("▁very", -3.0), ("▁long", -3.5)]
    unigram = Tokenizer(models.Unigram(pieces, unk_id=2))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=unigram, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def gpt2(folder: Path) -> Any:
    """Build a byte tokenizer without padding token, whose end token the tokenizer itself never appends."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "<|endoftext|>"])}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", truncation_side="left")


def byt5(folder: Path) -> Any:
    """Build a tokenizer that is written in Python, not with the tokenizers library."""
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
    end_id = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    appends_end = end_id in tokenizer("a")["input_ids"]
    for i, text in enumerate(TEXTS):
        expected = tokenizer(normalize_whitespace(text), truncation=True, max_length=length if appends_end else length - 1)[
            "input_ids"
        ]
        expected = expected if appends_end else [*expected, end_id]
        assert ids[i][mask[i]].tolist() == expected
        assert mask[i].tolist() == [True] * len(expected) + [False] * (length - len(expected))
        assert expected[-1] == end_id
    assert mask[4].all()  # the long text is truncated, and still ends with the end token


def test_trimming_only_drops_padding(tokenizer: Any) -> None:
    full, full_mask = TextDecoder(tokenizer, 77, trim=False).encode(TEXTS[:2])
    ids, mask = TextDecoder(tokenizer, 77).encode(TEXTS[:2])
    width = ids.shape[1]
    assert width % 8 == 0
    assert width - 8 < full_mask.sum(1).max() <= width < 77
    assert torch.equal(ids, full[:, :width])
    assert torch.equal(mask, full_mask[:, :width])
    assert not full_mask[:, width:].any()
    assert TextDecoder(tokenizer, 77).encode(TEXTS)[0].shape[1] == 77  # at most `length`
    assert TextDecoder(tokenizer, 77, multiple=1).encode(TEXTS[:2])[0].shape[1] == full_mask.sum(1).max()


def test_partial_batches_are_merged(tokenizer: Any) -> None:
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


def test_clip_ids_equal_those_of_open_clip(tmp_path: Path) -> None:
    ids, mask = TextDecoder(clip(tmp_path), 77, trim=False).encode(TEXTS)
    expected = open_clip.get_tokenizer("ViT-B-32")(TEXTS)
    assert torch.equal(ids * mask, expected * mask)
    assert not (expected * ~mask).any()  # open_clip pads with 0, transformers with the end token


def test_a_length_without_room_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="leaves no room for text"):
        TextDecoder(tokenizer, 1)


def test_a_very_long_caption_is_cut_before_tokenization(tmp_path: Path) -> None:
    ids, _ = TextDecoder(clip(tmp_path), 77).encode(["word " * 1_000_000])
    assert ids.shape == (1, 77)


# ---------------------------------------------------------------------------------------------------------------------
# Captions


def sample(**members: bytes) -> Any:
    return SimpleNamespace(key="s/1", members=members)


def test_only_white_space_of_captions_is_changed() -> None:
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
    all_captions = decoder(several, np.random.default_rng(0), False)
    assert all_captions == ["one", "two", "three"]
    assert isinstance(all_captions, list)
    assert torch.equal(decoder.collate([all_captions])[0], decoder.encode(["one"])[0])


def test_several_captions_of_each_sample_are_drawn(tmp_path: Path) -> None:
    several = sample(json=json.dumps({"caption": ["one", "two", "three", "four words are here"]}).encode())
    single = sample(json=json.dumps({"caption": "alone"}).encode())
    decoder = TextDecoder(bert(tmp_path), 16, "caption", multiple=1, draw=3)
    drawn = [decoder(several, np.random.default_rng(seed), True) for seed in range(400)]
    assert all(len(set(texts)) == 3 for texts in drawn)
    for i in range(3):  # each caption is equally frequent at each index
        assert min(Counter(texts[i] for texts in drawn).values()) > 70
    assert decoder(single, np.random.default_rng(0), True) == ("alone",) * 3
    assert decoder(several, np.random.default_rng(0), False) == ["one", "two", "three", "four words are here"]
    ids, mask = decoder.collate([drawn[0], drawn[1]])
    flat, flat_mask = decoder.encode([*drawn[0], *drawn[1]])
    assert torch.equal(ids.flatten(0, 1), flat)
    assert torch.equal(mask, flat_mask.unflatten(0, (2, 3)))
    long = [("one", "two", "three"), ("one", "two", "three " * 12)]
    merged = decoder.merge([decoder.collate(long[:1]), decoder.collate(long[1:])])
    for actual, expected in zip(merged, decoder.collate(long), strict=True):
        assert torch.equal(actual, expected)


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
    """A folder of shards with captions in txt and lists of other captions in json; some samples are bad."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    colors, objects, places = (
        ["red", "blue", "green", "black", "white"],
        ["car", "sofa", "dog", "house", "Tree"],
        ["grass", "beach", "bridge"],
    )
    for shard in range(3):
        samples: list[dict[str, bytes]] = [{"jpg": b"x", "txt": b"\xff\xfe"}, {"jpg": b"x"}]
        for _ in range(150):
            text = f"A {rng.choice(colors)} {rng.choice(objects)} on the {rng.choice(places)}"
            samples.append(
                {"txt": text.encode(), "json": json.dumps({"alt": ["une voiture rouge", "ein rotes auto"]}).encode()}
            )
        write_shard(folder / f"part-{shard}.tar", samples)
    return str(folder)


def test_a_trained_tokenizer_loads_in_transformers_and_open_clip(shards: str, tmp_path: Path) -> None:
    size = len(train_tokenizer(shards, tmp_path / "tok", vocab=400, length=32))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tok", local_files_only=True)
    assert size == len(tokenizer) <= 400
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == ("<pad>", "<bos>", "<eos>")
    assert tokenizer.eos_token_id == size - 1  # the largest id: some towers pool at the maximum of the ids
    assert tokenizer.model_max_length == 32
    ids = tokenizer("A Red  car")["input_ids"]
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert ids == tokenizer("a red car")["input_ids"]
    assert len(ids) == 5  # each word is one token
    expected = HFTokenizer(str(tmp_path / "tok"), context_length=32)(["a red car", "a dog"])
    ours, mask = TextDecoder(load_tokenizer(tmp_path / "tok"), 32, trim=False).encode(["a red car", "a dog"])
    assert torch.equal(expected * mask, ours * mask)


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_a_trained_tokenizer_encodes_any_text(shards: str, text: str) -> None:
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


def test_words_of_questions_become_tokens_with_caption_questions(small: Small, tmp_path: Path) -> None:
    """No caption contains "how many": without the questions it is split into many tokens."""
    train_tokenizer(small.train, tmp_path / "both", vocab=500, caption="txt,questions")
    both = load_tokenizer(tmp_path / "both")
    assert len(both("how many")["input_ids"]) == 4  # <bos> how many <eos>
    assert len(load_tokenizer(small.tokenizer)("how many")["input_ids"]) > 4
    assert len(both("a car")["input_ids"]) == len(load_tokenizer(small.tokenizer)("a car")["input_ids"])


def test_errors_of_training(shards: str, tmp_path: Path) -> None:
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
def test_a_missing_tokenizer_is_an_error_of_one_line(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"^text\.tokenizer") as caught:
        load_tokenizer(name)
    assert "\n" not in str(caught.value)


def test_a_folder_without_tokenizer_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("nothing here")
    with pytest.raises(ConfigError, match=r"it holds notes\.md, but no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="a file, not a folder"):
        load_tokenizer(tmp_path / "notes.md")
    for kind in ("clip", "clap", "t5"):  # transformers makes up a tokenizer that knows no word
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(ConfigError, match=r"it holds config\.json, notes\.md, but no tokenizer .* special tokens alone"):
            load_tokenizer(tmp_path)


def test_a_hub_that_cannot_be_reached_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1 cannot be reached \(Connection refused\)"):
        load_tokenizer("no-such-name")
