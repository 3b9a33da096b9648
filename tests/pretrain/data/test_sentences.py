"""data.sentences: captions of several sentences, divided by rules written down here, and drawn as several texts of an image."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from pretrain.data.captions import split_sentences
from pretrain.data.text import TextDecoder
from pretrain.data.train_tokenizer import train_tokenizer_on
from pretrain.data.training_captions import TrainingCaptions

LONG = "A red car. It is parked on a bridge! Is the sky blue?"
SENTENCES = ["A red car.", "It is parked on a bridge!", "Is the sky blue?"]


@pytest.mark.parametrize(
    ("caption", "sentences"),
    [
        (LONG, SENTENCES),
        ("a red car", ["a red car"]),
        ("", [""]),
        ("Dr. Smith holds a dog. U.S. Army tank.", ["Dr. Smith holds a dog.", "U.S. Army tank."]),
        ("approx. 3 m wide. No. 5 of the set, e.g. a ruler", ["approx. 3 m wide.", "No. 5 of the set, e.g. a ruler"]),
        ('He said "Stop." Then he left.', ['He said "Stop."', "Then he left."]),
        ("Two dogs... Élan of a cat. Über all", ["Two dogs...", "Élan of a cat.", "Über all"]),
        ("一只猫。它在睡觉。", ["一只猫。", "它在睡觉。"]),
        ("Кошка. Собака спит.", ["Кошка. Собака спит."]),  # a single word with a period may be an abbreviation
    ],
)
def test_sentences(caption: str, sentences: list[str]) -> None:
    assert split_sentences(caption) == sentences


def make_sample(*captions: str) -> Any:
    return SimpleNamespace(members={"json": str({"captions": list(captions), "w": 2.0}).replace("'", '"').encode()}, key="a/b")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train_tokenizer_on([LONG], tmp_path_factory.mktemp("tokenizer"), 300)


def test_each_text_of_a_caption_is_drawn_as_often(tokenizer: Any) -> None:
    text, rng = TextDecoder(tokenizer, 32, "captions", sentences=True), np.random.default_rng(0)
    drawn = Counter(cast(str, text(make_sample(LONG), rng, True)) for _ in range(2000))
    assert set(drawn) == {LONG, *SENTENCES}
    assert all(abs(n - 500) < 6 * 20 for n in drawn.values())  # six standard deviations


def test_several_texts_of_one_caption_differ(tokenizer: Any) -> None:
    rng = np.random.default_rng(0)
    for draw in (4, 6):
        text = TextDecoder(tokenizer, 32, "captions", draw=draw, sentences=True)
        assert set(text(make_sample(LONG), rng, True)) == {LONG, *SENTENCES}
    both = TextDecoder(tokenizer, 32, "captions", draw=2, sentences=True)(make_sample(LONG, "One dog. Two cats."), rng, True)
    assert sum(t in {LONG, *SENTENCES} for t in both) == 1  # one text of each caption


def test_captions_of_one_sentence_are_drawn_as_without_it(tokenizer: Any) -> None:
    captions = ["a red car", "a blue boat", "Dr. Who"]
    plain, divided = (TextDecoder(tokenizer, 32, "captions", draw=2, sentences=on) for on in (False, True))
    for seed in range(20):
        first, second = (text(make_sample(*captions), np.random.default_rng(seed), True) for text in (plain, divided))
        assert first == second
    assert divided(make_sample(LONG), np.random.default_rng(0), False) == [LONG]  # evaluation


def test_a_sentence_has_the_weight_of_its_caption(tokenizer: Any) -> None:
    text = TrainingCaptions(TextDecoder(tokenizer, 32, "captions", draw=4, sentences=True), "w", None, 1)
    item = text(make_sample(LONG), np.random.default_rng(0), True)
    assert set(item.captions) == {LONG, *SENTENCES}
    assert item.weights == (2.0,) * 4
