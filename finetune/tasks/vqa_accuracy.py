"""Answers to questions: made comparable, scored as the VQA challenge does, counted into a vocabulary, guessed blindly.

Sources: Antol et al. 2015 (arXiv 1505.00468) for the accuracy, the challenge's evaluation code for normalisation.
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


def _misspelt(word: str) -> list[str]:
    """A contraction with one of its apostrophes left out."""
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


_CONTRACTED = {wrong: word for word in _CONTRACTIONS.split() for wrong in _misspelt(word)}


def normalise(answer: str) -> str:
    """Lower case, no punctuation but decimal points, no articles, numbers to ten as digits, contractions with apostrophes.

    A punctuation mark beside a space goes (and any, in an answer with 1,000 in it), elsewhere it becomes a space.
    """
    said = answer.replace("\n", " ").replace("\t", " ").strip()
    thousands = re.search(r"\d,\d", said) is not None
    out = said
    for mark in _PUNCTUATION:
        beside = f"{mark} " in said or f" {mark}" in said
        out = out.replace(mark, "" if beside or thousands else " ")
    out = re.sub(r"\.(?!\d)", "", out)
    words = [_DIGITS.get(word, word) for word in out.lower().split()]
    return " ".join(_CONTRACTED.get(word, word) for word in words if word not in _ARTICLES)


def accuracy(said: str, answers: Sequence[str]) -> float:
    """The official accuracy of an answer among those that people gave (all normalised), 0 to 1.

    The mean, over leaving out each person in turn, of min(1, n / 3), n of the others having said the same. Where fewer than
    three others are left, as many as there are stand for the three; a single person's answer is right or wrong.
    """
    if len(answers) == 1:
        return float(said == answers[0])
    agree = sum(said == answer for answer in answers)
    needed = min(3, len(answers) - 1)
    each = (min(1.0, (agree - (said == answer)) / needed) for answer in answers)
    return sum(each) / len(answers)


def vocabulary(counts: Counter[str], size: int) -> list[str]:
    """The `size` most frequent answers, the most frequent first; of equally frequent ones the alphabet decides."""
    return [answer for answer, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:size]]


class Blind:
    """Answers from the question alone: the most frequent answer in training to the same question, else to its type, else
    of all. What a model must beat to have looked at the picture."""

    SEEN = 10
    """Times a question must have been asked for its own answers to be trusted more than its type's."""

    def __init__(self, counts: Iterable[Counter[tuple[str, str, str]]]) -> None:
        """`counts`: of (type, question, answer), one a process."""
        by: dict[tuple[str, ...], Counter[str]] = {}
        for counted in counts:
            for (kind, question, answer), n in counted.items():
                for key in ((kind, question), (kind,), ()):
                    by.setdefault(key, Counter())[answer] += n
        self._best = {
            key: vocabulary(answers, 1)[0] for key, answers in by.items() if key[1:] == () or answers.total() >= self.SEEN
        }

    def __call__(self, kind: str, question: str) -> str:
        """The guess, normalised."""
        found = self._best.get((kind, question)) or self._best.get((kind,)) or self._best.get(())
        return found or ""
