"""The official accuracy and its normalisation, against the challenge's procedure written out; the vocabulary; the guesser."""

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.tasks.vqa_accuracy import Blind, accuracy, normalise, vocabulary

PUNCTUATION = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!"]
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "ten": "10"}
CONTRACTIONS = {"dont": "don't", "isnt": "isn't", "couldnt've": "couldn't've", "hes": "he's", "twas": "'twas", "yall": "y'all"}


def official(text: str) -> str:
    """The challenge's evaluation, step by step: punctuation, then digits, articles and contractions."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    out = text
    for mark in PUNCTUATION:
        if (mark + " " in text or " " + mark in text) or re.search(r"(\d)(\,)(\d)", text) is not None:
            out = out.replace(mark, "")
        else:
            out = out.replace(mark, " ")
    out = re.sub(r"(?!<=\d)(\.)(?!\d)", "", out)
    words = []
    for word in out.lower().split():
        word = NUMBERS.get(word, word)
        if word not in ("a", "an", "the"):
            words.append(word)
    return " ".join(CONTRACTIONS.get(word, word) for word in words)


def leave_one_out(said: str, answers: list[str]) -> float:
    """The challenge's accuracy: for each person, the others who said the same, three of them being enough."""
    each = []
    for i in range(len(answers)):
        others = answers[:i] + answers[i + 1 :]
        each.append(min(1, sum(other == said for other in others) / 3))
    return sum(each) / len(each)


SAMPLES = [
    ("Red.", "red"),
    ("  the  Red car!", "red car"),
    ("two", "2"),
    ("10,000", "10000"),
    ("3.5 metres", "3.5 metres"),
    ("black/white", "black white"),
    ("black / white", "black white"),
    ("t-shirt", "t shirt"),
    ("isnt", "isn't"),
    ("Dont know", "don't know"),
    ("a", ""),
    ("none", "0"),
    ("left\tof\nit", "left of it"),
]


@pytest.mark.parametrize(("given_", "wanted"), SAMPLES)
def test_normalised(given_: str, wanted: str) -> None:
    assert normalise(given_) == wanted
    assert official(given_) == wanted


WORDS = [
    "the",
    "a",
    "Two",
    "three",
    "dont",
    "isnt",
    "hes",
    "couldnt've",
    "red",
    "1,000",
    "3.5",
    "x.",
    ",",
    "-",
    "t-shirt",
    "(b)",
    "none",
]


@given(st.lists(st.sampled_from(WORDS), max_size=6), st.sampled_from([" ", "", "  "]))
def test_normalised_as_the_challenge_does(words: list[str], between: str) -> None:
    assert normalise(between.join(words)) == official(between.join(words))


@given(st.lists(st.sampled_from("abc"), min_size=4, max_size=12), st.sampled_from("abcd"))
def test_accuracy_is_the_official_one(answers: list[str], said: str) -> None:
    assert accuracy(said, answers) == pytest.approx(leave_one_out(said, answers), abs=1e-12)


@pytest.mark.parametrize(("agree", "wanted"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_accuracy_among_ten(agree: int, wanted: float) -> None:
    """The known steps of VQA v2."""
    assert accuracy("x", ["x"] * agree + ["y"] * (10 - agree)) == pytest.approx(wanted)


def test_accuracy_among_fewer_than_four_can_reach_one() -> None:
    assert accuracy("x", ["x"]) == 1
    assert accuracy("y", ["x"]) == 0
    assert accuracy("x", ["x", "x"]) == 1
    assert accuracy("x", ["x", "y"]) == 0.5
    assert accuracy("x", ["x", "x", "x"]) == 1


def test_vocabulary_is_the_most_frequent_and_the_same_whatever_the_order() -> None:
    counts = Counter({"red": 3, "yes": 5, "blue": 3, "no": 1})
    assert vocabulary(counts, 3) == ["yes", "blue", "red"]
    assert vocabulary(Counter(dict(reversed(counts.items()))), 3) == ["yes", "blue", "red"]


def test_the_guesser_trusts_a_question_it_knows_else_its_type_else_all() -> None:
    one = Counter({("colour", "what colour is the sky?", "blue"): 9, ("colour", "what colour is it?", "red"): 8})
    two = Counter(
        {
            ("colour", "what colour is the sky?", "grey"): 3,
            ("colour", "what colour is grass?", "green"): 9,
            ("n", "how many?", "2"): 30,
        }
    )
    two[("colour", "what colour is snow?", "green")] = 9
    guess = Blind([one, two])
    assert guess("colour", "what colour is the sky?") == "blue"
    assert guess("colour", "what colour is it?") == "green"  # asked 8 times only: 9 + 9 of its type are green
    assert guess("taste", "is it sweet?") == "2"
