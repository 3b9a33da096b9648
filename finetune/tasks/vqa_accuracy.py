"""Answers to questions: normalization, official accuracy, vocabulary, and a question-only baseline.

Sources: Antol et al. 2015 (arXiv 1505.00468) for the accuracy, the challenge's evaluation code for normalization.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {**{word: str(n) for n, word in enumerate(_NUMBERS)}, "none": "0"}
_ARTICLES = frozenset(("a", "an", "the"))
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd
how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't
shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll
who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've"""


def _without_apostrophe(word: str) -> list[str]:
    """Return the contraction with each one of its apostrophes left out."""
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


_CONTRACTED = {wrong: word for word in _CONTRACTIONS.split() for wrong in _without_apostrophe(word)}


def normalize_answer(answer: str) -> str:
    """Normalize an answer as the VQA challenge does.

    The result is in lower case, without articles and punctuation (decimal points stay), with numbers up to ten as digits
    and with the apostrophes of contractions. A punctuation mark next to a space is removed, elsewhere it becomes a space.
    In an answer that contains a number such as 1,000 every mark is removed.
    """
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    has_thousands = re.search(r"\d,\d", text) is not None
    out = text
    for mark in _PUNCTUATION:
        is_next_to_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if is_next_to_space or has_thousands else " ")
    out = re.sub(r"\.(?!\d)", "", out)
    words = [_DIGITS.get(word, word) for word in out.lower().split()]
    return " ".join(_CONTRACTED.get(word, word) for word in words if word not in _ARTICLES)


def official_accuracy(predicted: str, answers: Sequence[str]) -> float:
    """Return the accuracy, 0 to 1, of a predicted answer given people's answers; all are normalized.

    It leaves out each person in turn and averages min(1, n / 3), where n of the others gave the predicted answer. Where
    fewer than three others remain, their number replaces the 3. The answer of a single person is right or wrong.
    """
    if len(answers) == 1:
        return float(predicted == answers[0])
    agree = sum(predicted == answer for answer in answers)
    needed = min(3, len(answers) - 1)
    accuracies = (min(1.0, (agree - (predicted == answer)) / needed) for answer in answers)
    return sum(accuracies) / len(answers)


def build_vocabulary(counts: Counter[str], size: int) -> list[str]:
    """Return the `size` most frequent answers, in descending order, then alphabetically."""
    return [answer for answer, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:size]]


class QuestionOnlyBaseline:
    """Answers a question without the image. A model that uses the image must exceed its accuracy.

    It gives the most frequent training answer to the same question, else to questions of its type, else to all questions.
    """

    MIN_ANSWERS = 10
    """Answers that a question must have in training for them to be used instead of those of its type."""

    def __init__(self, counts: Iterable[Counter[tuple[str, str, str]]]) -> None:
        """`counts` holds the counts of (type, question, answer) of each process."""
        answers_by_key: dict[tuple[str, ...], Counter[str]] = {}
        for process_counts in counts:
            for (kind, question, answer), n in process_counts.items():
                for key in ((kind, question), (kind,), ()):
                    answers_by_key.setdefault(key, Counter())[answer] += n
        self._best = {
            key: build_vocabulary(answers, 1)[0]
            for key, answers in answers_by_key.items()
            if key[1:] == () or answers.total() >= self.MIN_ANSWERS
        }

    def __call__(self, kind: str, question: str) -> str:
        """Return the normalized answer; "" where training had none."""
        answer = self._best.get((kind, question)) or self._best.get((kind,)) or self._best.get(())
        return answer or ""
