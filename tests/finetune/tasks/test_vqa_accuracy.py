"""VQA accuracy and normalization against the challenge's procedure; vocabulary; baseline."""

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.tasks.vqa_accuracy import QuestionOnlyBaseline, build_vocabulary, normalize_answer, official_accuracy

PUNCTUATION = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!"]
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "ten": "10"}
CONTRACTIONS = {"dont": "don't", "isnt": "isn't", "couldnt've": "couldn't've", "hes": "he's", "twas": "'twas", "yall": "y'all"}


def normalize_officially(text: str) -> str:
    """Normalize as the challenge's evaluation does: punctuation, then digits, articles and contractions."""
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


def leave_one_out(predicted: str, answers: list[str]) -> float:
    """Compute the challenge's accuracy: without each person in turn, three equal answers count as 1."""
    accuracies = []
    for i in range(len(answers)):
        others = answers[:i] + answers[i + 1 :]
        accuracies.append(min(1, sum(other == predicted for other in others) / 3))
    return sum(accuracies) / len(accuracies)


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


@pytest.mark.parametrize(("answer", "expected"), SAMPLES)
def test_normalization(answer: str, expected: str) -> None:
    assert normalize_answer(answer) == expected
    assert normalize_officially(answer) == expected


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
def test_normalization_equals_the_challenges(words: list[str], between: str) -> None:
    assert normalize_answer(between.join(words)) == normalize_officially(between.join(words))


@given(st.lists(st.sampled_from("abc"), min_size=4, max_size=12), st.sampled_from("abcd"))
def test_accuracy_is_the_official_one(answers: list[str], predicted: str) -> None:
    assert official_accuracy(predicted, answers) == pytest.approx(leave_one_out(predicted, answers), abs=1e-12)


@pytest.mark.parametrize(("agree", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_accuracy_among_ten(agree: int, expected: float) -> None:
    """With the answers of ten people the accuracy takes these values."""
    assert official_accuracy("x", ["x"] * agree + ["y"] * (10 - agree)) == pytest.approx(expected)


def test_accuracy_among_fewer_than_four_can_reach_one() -> None:
    assert official_accuracy("x", ["x"]) == 1
    assert official_accuracy("y", ["x"]) == 0
    assert official_accuracy("x", ["x", "x"]) == 1
    assert official_accuracy("x", ["x", "y"]) == 0.5
    assert official_accuracy("x", ["x", "x", "x"]) == 1


def test_vocabulary_holds_the_most_frequent_answers_in_any_order_of_counts() -> None:
    counts = Counter({"red": 3, "yes": 5, "blue": 3, "no": 1})
    assert build_vocabulary(counts, 3) == ["yes", "blue", "red"]
    assert build_vocabulary(Counter(dict(reversed(counts.items()))), 3) == ["yes", "blue", "red"]


def test_baseline_uses_the_same_question_else_its_type_else_all_questions() -> None:
    one = Counter({("color", "what color is the sky?", "blue"): 9, ("color", "what color is it?", "red"): 8})
    two = Counter(
        {
            ("color", "what color is the sky?", "grey"): 3,
            ("color", "what color is grass?", "green"): 9,
            ("n", "how many?", "2"): 30,
        }
    )
    two[("color", "what color is snow?", "green")] = 9
    baseline = QuestionOnlyBaseline([one, two])
    assert baseline("color", "what color is the sky?") == "blue"
    assert baseline("color", "what color is it?") == "green"  # asked 8 times only: 9 + 9 of its type are green
    assert baseline("taste", "is it sweet?") == "2"
