"""data.weight and data.negatives: what a loader gives of them, and what it refuses."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.data import BadSample
from pretrain.data.captions import caption_id
from pretrain.data.length_groups import LengthGroups, count_lengths
from pretrain.data.loader import Batch, DataConfig, Loader, build_loader
from pretrain.data.text import TextDecoder, load_tokenizer
from pretrain.data.train_tokenizer import train_tokenizer_on
from pretrain.data.training_captions import TrainingCaptions, read_weights
from pretrain.errors import ConfigError
from tests.pretrain.data.test_captions import write_tar

SAMPLES = 36


def fields(i: int) -> dict[str, Any]:
    """Sample i has 1 to 3 captions, each with a weight of its own, and 0 to 3 negatives."""
    captions: list[Any] = [f"photo {i} taken {k}" for k in range(1 + i % 3)]
    weights: list[Any] = [i + k / 8 for k in range(1 + i % 3)]
    if i % 3 == 2:  # what is no caption takes its weight with it
        captions, weights = [captions[0], None, captions[1], " "], [weights[0], 99, weights[1], "none"]
    negatives: list[Any] = [f"not {i} at {k}" for k in range(i % 4)]
    if i % 5 == 0:
        negatives = [{"caption": text} for text in negatives] + [f"Photo {i}  taken 0"]  # the last one is not wrong
    return {"captions": captions, "weight": weights, "wrong": negatives, "one": i}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of samples without images, and a tokenizer."""
    path = tmp_path_factory.mktemp("labels")
    for s in range(3):
        members = [(f"{i:03}.json", json.dumps(fields(i)).encode()) for i in range(12 * s, 12 * s + 12)]
        write_tar(path / f"t-{s}.tar", members)
    texts = [text for i in range(SAMPLES) for text in fields(i)["captions"] if text]
    train_tokenizer_on(texts, path / "tokenizer", 300)
    return path


def decoder(folder: Path, draw: int = 1, **settings: Any) -> TrainingCaptions:
    text = TextDecoder(load_tokenizer(folder / "tokenizer"), 32, "captions", draw=draw)
    return TrainingCaptions(text, **{"weight": "weight", "negatives": "wrong", "draw_negatives": 2, **settings})


def loader(folder: Path, text: TextDecoder, **changes: Any) -> Loader:
    settings = {"train": str(folder), "batch_size": 12, "workers": 0, "window": 2, "caption": "captions", **changes}
    config = DataConfig(**settings)
    config.check()
    return build_loader(config, {"text": text}, seed=3)


def take(batches: Loader, count: int = 4) -> list[Batch]:
    iterator = iter(batches)
    try:
        return list(itertools.islice(iterator, count))
    finally:
        iterator.close()


def number(key: str) -> int:
    return int(key.split("/")[1])


@pytest.mark.parametrize("draw", [1, 3])
def test_each_caption_brings_its_own_weight(folder: Path, draw: int) -> None:
    drawn_places = set()
    for batch in take(loader(folder, decoder(folder, draw)), 6):
        ids, weights = (batch.targets[name].view(12, draw).tolist() for name in ("caption_id", "weight"))
        assert batch.targets["weight"].dtype == torch.float64
        for key, sample_ids, sample_weights in zip(batch.keys, ids, weights, strict=True):
            i = number(key)
            expected = {caption_id(f"photo {i} taken {k}"): i + k / 8 for k in range(min(1 + i % 3, 2 if i % 3 == 2 else 3))}
            assert sample_weights == [expected[caption] for caption in sample_ids]
            drawn_places |= {weight % 1 for weight in sample_weights}
    assert len(drawn_places) > 1


def test_captions_are_those_drawn_without_weights(folder: Path) -> None:
    plain = TextDecoder(load_tokenizer(folder / "tokenizer"), 32, "captions")
    labeled = take(loader(folder, decoder(folder)))
    for batch, expected in zip(labeled, take(loader(folder, plain)), strict=True):
        assert batch.keys == expected.keys
        assert torch.equal(batch.targets["caption_id"], expected.targets["caption_id"])
        width = expected.inputs["text"].shape[1]
        assert torch.equal(batch.inputs["text"][:, 0, :width], expected.inputs["text"])
    alone = take(loader(folder, decoder(folder, negatives=None)))
    for batch, expected in zip(alone, labeled, strict=True):
        assert batch.inputs["text"].dim() == 2
        assert set(batch.targets) == {"caption_id", "weight"}
        assert torch.equal(batch.targets["weight"], expected.targets["weight"])


def test_negatives_are_the_samples_own_and_wrong(folder: Path) -> None:
    tokenizer, combinations = load_tokenizer(folder / "tokenizer"), set()
    for batch in take(loader(folder, decoder(folder)), 9):
        assert batch.inputs["text"].shape[:2] == (12, 3)
        for i, key in enumerate(batch.keys):
            n = number(key)
            allowed = {caption_id(f"not {n} at {k}") for k in range(n % 4)}
            mask, ids = batch.targets["negative_mask"][i], batch.targets["negative_id"][i]
            assert mask.tolist() == [len(allowed) > 0, len(allowed) > 1]
            assert len(set(ids[mask].tolist())) == int(mask.sum())
            assert set(ids[mask].tolist()) <= allowed
            for text, text_id in zip(batch.inputs["text"][i, 1:][mask], ids[mask].tolist(), strict=True):
                assert caption_id(tokenizer.decode(text, skip_special_tokens=True)) == text_id
            combinations.add((n, *ids[mask].tolist()))
    assert len(combinations) > SAMPLES  # they are drawn anew


def test_any_division_of_the_work_gives_the_same(folder: Path) -> None:
    whole = take(loader(folder, decoder(folder, draw=2)))
    split = loader(folder, decoder(folder, draw=2))
    split.partial_size = -(-split.batch_size // 3)
    for other in (take(split), take(loader(folder, decoder(folder, draw=2), workers=2))):
        for batch, expected in zip(other, whole, strict=True):
            assert batch.keys == expected.keys
            assert torch.equal(batch.inputs["text"], expected.inputs["text"])
            assert batch.targets.keys() == expected.targets.keys()
            assert all(torch.equal(batch.targets[name], value) for name, value in expected.targets.items())


def test_negatives_are_grouped_by_length_with_the_captions(folder: Path) -> None:
    """Groups of fixed shapes (text.group_shapes=static) hold every text of a sample once."""
    text = decoder(folder)
    one = loader(folder, text)
    text.length_groups = LengthGroups(count_lengths(one.first_samples(SAMPLES, ["text"]).masks["text"], 32), 2)
    for batch in take(one, 2):
        groups = batch.groups["text"]
        assert len(groups.row_lengths) == 12 * text.texts_per_sample == 36
        assert groups.slice(3, 9).row_lengths.tolist() == batch.masks["text"].sum(dim=2)[1:3].flatten().tolist()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("high", "weight not a number"),
        (True, "weight not a number"),
        ({"a": 1}, "weight not a number"),
        ([1.0, "x"], "weight not a number"),
        (-0.1, "weight out of range"),
        (float("nan"), "weight out of range"),
        ([1.0, float("inf")], "weight out of range"),
        (10**400, "weight out of range"),
        ([1.0], "weight missing"),
    ],
)
def test_a_wrong_weight_is_a_bad_sample(value: Any, reason: str) -> None:
    with pytest.raises(BadSample) as caught:
        read_weights({"w": value}, "w", [0, 1])
    assert caught.value.reason == reason


def test_weights_that_count() -> None:
    assert read_weights({}, "w", [0, 2]) == {0: 1.0, 2: 1.0}
    assert read_weights({"w": None}, "w", [0]) == {0: 1.0}
    assert read_weights({"w": 0}, "w", [0, 1]) == {0: 0.0, 1: 0.0}
    assert read_weights({"w": [2, None, 0.5]}, "w", [0, 1, 2]) == {0: 2.0, 1: 1.0, 2: 0.5}


def test_bad_samples_are_replaced_and_counted(folder: Path, tmp_path: Path) -> None:
    changes = {0: {"weight": "x"}, 3: {"weight": -1}, 7: {"wrong": "not a list"}}
    members = [(f"{i:03}.json", json.dumps({**fields(i), **changes.get(i, {})}).encode()) for i in range(12)]
    write_tar(tmp_path / "t.tar", members)
    one = loader(tmp_path, decoder(folder), max_bad_rate=1.0)
    numbers = [number(key) for batch in take(one, 2) for key in batch.keys]
    assert not set(numbers) & set(changes)
    assert {"weight not a number", "weight out of range", "negative captions unreadable"} <= set(one.bad)


def test_settings_that_cannot_be(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.draw_negatives=0"):
        DataConfig(train=str(folder), draw_negatives=0).check()
    with pytest.raises(ConfigError, match=r"data\.weight='w' needs shards"):
        DataConfig(weight="w").check()
    with pytest.raises(ConfigError, match=r"data\.teachers=\['a', 'a'\] names a folder twice"):
        DataConfig(train=str(folder), teachers=["a", "a"]).check()
    with pytest.raises(ConfigError, match=r"data\.negatives='n' needs shards"):
        DataConfig(negatives="n").check()
