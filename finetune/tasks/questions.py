"""The questions of a sample -> (b, m, T) token ids, and what the answers are worth. Training draws, evaluation takes all.

Shapes: b = pictures, m = questions a picture, T = tokens of the longest, K = answers kept of one question.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.tasks.vqa_accuracy import accuracy, normalise
from pretrain.data import BadSample
from pretrain.data.sample_json import read_json
from pretrain.data.shards.paths import RawSample
from pretrain.data.text import TextDecoder, normalize_whitespace

KEPT = 10
"""Answers kept of one question, those worth most: as many people were asked in VQA v2."""


@dataclass(slots=True)
class Question:
    """One question with what people answered."""

    text: str
    answers: list[str]
    """Normalised; one a person."""
    kind: str
    """Its type; "other" where none is given."""


@dataclass(slots=True)
class Asked:
    """The questions taken from one sample; those from `real` on only fill up and are worth nothing."""

    questions: list[Question]
    real: int
    train: bool


def questions_of(values: Any, field: str, types: Collection[str] = ()) -> list[Question]:
    """What a sample's json asks, without questions that are empty or have no answer. Raises BadSample if none is left.

    Of these `types` alone where any are given: then there may be none.
    An item is {question, answers: [text, ...] or [{"answer": text}, ...], type}.
    """
    given = values.get(field) if isinstance(values, dict) else None
    if not isinstance(given, list):
        has = ", ".join(sorted(map(str, values)))[:150] if isinstance(values, dict) else "nothing"
        raise BadSample("no questions", f"its json has no list {field!r}, but {has or 'nothing'}")
    found = []
    for item in given:
        text = item.get("question") if isinstance(item, dict) else None
        if not isinstance(text, str) or not normalize_whitespace(text):
            continue
        said = item.get("answers")
        said = [said] if isinstance(said, str) else said if isinstance(said, list) else []
        words = [a.get("answer") if isinstance(a, dict) else a for a in said]
        answers = [normalise(str(word)) for word in words if isinstance(word, str | int | float)]
        answers = [answer for answer in answers if answer]
        if answers:
            found.append(Question(normalize_whitespace(text), answers, str(item.get("type") or "other")))
    if not found:
        raise BadSample("no questions", f"none of the {len(given)} in {field!r} has both a question and an answer")
    return [question for question in found if not types or question.kind in types]


class Questions(TextDecoder):
    """A text decoder whose items are questions about one picture."""

    def __init__(self, text: TextDecoder, field: str, draw: int, answers: list[str], types: Collection[str] = ()) -> None:
        """`text`: the text tower's decoder; `draw`: m in training; `answers`: the vocabulary; `types`: as questions_of."""
        super().__init__(text.tokenizer, text.length, text.caption, text.trim, text.multiple)
        self.field, self.draw, self.types = field, draw, types
        self.ids = {answer: i for i, answer in enumerate(answers)}

    def __call__(self, sample: RawSample, rng: np.random.Generator, train: bool) -> Asked:  # type: ignore[override]
        """Raises BadSample."""
        values = read_json(sample.members)
        found = questions_of(values, self.field, self.types)
        if not found:  # of none of the wanted types: one of another type holds its place
            return Asked(questions_of(values, self.field)[:1] * (self.draw if train else 1), 0, train)
        if not train:
            return Asked(found, len(found), train)
        drawn = [found[int(i)] for i in rng.permutation(len(found))[: self.draw]]
        return Asked([drawn[i % len(drawn)] for i in range(self.draw)], len(drawn), train)

    def collate(self, items: list[Asked]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """(b, m, T) int64, (b, m, T) bool; m is that of the sample with most questions."""
        m = max(len(item.questions) for item in items)
        ids, mask = self.encode([item.questions[j if j < len(item.questions) else 0].text for item in items for j in range(m)])
        return ids.unflatten(0, (len(items), m)), mask.unflatten(0, (len(items), m))

    def targets(self, items: list[Asked]) -> dict[str, Any]:
        """answers (b, m, K) int64, positions in the vocabulary; scores (b, m, K) float32, their official accuracy, 0 where
        there is none; asked (b, m) float32, 1 for real questions. In evaluation `questions` too, a list a sample."""
        m = max(len(item.questions) for item in items)
        ids = torch.zeros(len(items), m, KEPT, dtype=torch.int64)
        scores = torch.zeros(len(items), m, KEPT)
        asked = torch.zeros(len(items), m)
        for i, item in enumerate(items):
            asked[i, : item.real] = 1
            for j, question in enumerate(item.questions[: item.real]):
                worth = {a: accuracy(a, question.answers) for a in dict.fromkeys(question.answers) if a in self.ids}
                best = sorted(worth.items(), key=lambda pair: -pair[1])[:KEPT]
                for k, (answer, score) in enumerate(best):
                    ids[i, j, k], scores[i, j, k] = self.ids[answer], score
        found: dict[str, Any] = {"answers": ids, "scores": scores, "asked": asked}
        return found if items[0].train else {**found, "questions": [item.questions[: item.real] for item in items]}
