"""Reads the questions of a sample. Training draws some of them, evaluation takes all.

Shapes: b = images, m = questions per image, T = tokens of the longest question, K = answers per question.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.tasks.vqa_accuracy import normalize_answer, official_accuracy
from pretrain.data import BadSample
from pretrain.data.sample_json import read_json
from pretrain.data.shards.paths import RawSample
from pretrain.data.text import TextDecoder, normalize_whitespace

MAX_ANSWERS = 10
"""K, answers of one question that become targets, those of highest accuracy; VQA v2 has the answers of 10 people."""


@dataclass(slots=True)
class Question:
    """One question and the answers that people gave."""

    text: str
    answers: list[str]
    """Normalized, one per person."""
    kind: str
    """Its type; "other" where the data gives none."""


@dataclass(slots=True)
class QuestionSet:
    """The questions taken from one sample; those from `real_count` on are padding and do not count."""

    questions: list[Question]
    real_count: int
    train: bool


def read_questions(values: Any, field: str, types: Collection[str] = ()) -> list[Question]:
    """Return the questions in a sample's json that have a text and at least one answer.

    Args:
        values: the json of the sample.
        field: the field that holds a list of {question, answers, type}; `answers` is one text, a list of texts or a list of
            {answer: text}. An entry without it may have `answer` instead, as GQA's questions do.
        types: keep only questions of these types, possibly none; () keeps all.

    Raises:
        BadSample: no question of any type can be used.
    """
    entries = values.get(field) if isinstance(values, dict) else None
    if not isinstance(entries, list):
        fields = ", ".join(sorted(map(str, values)))[:150] if isinstance(values, dict) else ""
        raise BadSample("no questions", f"its json has no list {field!r}, only the fields {fields or 'none'}")
    questions = []
    for item in entries:
        text = item.get("question") if isinstance(item, dict) else None
        if not isinstance(text, str) or not normalize_whitespace(text):
            continue
        answers = _read_answers(item.get("answers")) or _read_answers(item.get("answer"))
        if answers:
            questions.append(Question(normalize_whitespace(text), answers, str(item.get("type") or "other")))
    if not questions:
        raise BadSample("no questions", _explain_unusable(entries, field))
    return [question for question in questions if not types or question.kind in types]


def majority_answers(questions: Iterable[Question]) -> dict[str, str]:
    """Return for each type of question the one answer with the highest official accuracy over all of its questions."""
    totals: dict[str, Counter[str]] = {}
    for question in questions:
        total = totals.setdefault(question.kind, Counter())
        for answer in set(question.answers):
            total[answer] += official_accuracy(answer, question.answers)  # type: ignore[assignment]  # a Counter of fractions
    return {kind: max(sorted(total), key=lambda answer: total[answer]) for kind, total in totals.items()}


def _read_answers(value: Any) -> list[str]:
    """Return the normalized answers in the value of `answers` or `answer`; [] where there is none."""
    values = value if isinstance(value, list) else [value]
    texts = [item.get("answer") if isinstance(item, dict) else item for item in values]
    answers = [normalize_answer(str(text)) for text in texts if isinstance(text, str | int | float)]
    return [answer for answer in answers if answer]


def _explain_unusable(entries: list[Any], field: str) -> str:
    """Return why no entry of a list of questions can be used, with the fields of the first."""
    first = entries[0] if entries else None
    fields = (
        f"; the first has the fields {', '.join(sorted(map(str, first)))[:100] or 'none'}" if isinstance(first, dict) else ""
    )
    return f"none of the {len(entries)} entries of {field!r} has both a question and answers (or one answer){fields}"


class Questions(TextDecoder):
    """A text decoder whose items are the questions about one image."""

    def __init__(self, text: TextDecoder, field: str, draw: int, answers: list[str], types: Collection[str] = ()) -> None:
        """Build the decoder.

        Args:
            text: the text tower's decoder.
            field: see read_questions.
            draw: m in training.
            answers: the vocabulary.
            types: see read_questions.
        """
        super().__init__(text.tokenizer, text.length, text.caption, text.trim, text.multiple)
        self.field, self.draw, self.types = field, draw, types
        self.ids = {answer: i for i, answer in enumerate(answers)}

    def __call__(self, sample: RawSample, rng: np.random.Generator, train: bool) -> QuestionSet:  # type: ignore[override]
        """Draw `draw` questions in training, padded by repetition; return all in evaluation. Raises BadSample."""
        values = read_json(sample.members)
        questions = read_questions(values, self.field, self.types)
        if not questions:  # none of the configured types: one of another type serves as padding
            return QuestionSet(read_questions(values, self.field)[:1] * (self.draw if train else 1), 0, train)
        if not train:
            return QuestionSet(questions, len(questions), train)
        drawn = [questions[int(i)] for i in rng.permutation(len(questions))[: self.draw]]
        return QuestionSet([drawn[i % len(drawn)] for i in range(self.draw)], len(drawn), train)

    def collate(self, items: list[QuestionSet]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return ids (b, m, T) int64 and mask (b, m, T) bool; m is the most questions of any sample."""
        m = max(len(item.questions) for item in items)
        ids, mask = self.encode([item.questions[j if j < len(item.questions) else 0].text for item in items for j in range(m)])
        return ids.unflatten(0, (len(items), m)), mask.unflatten(0, (len(items), m))

    def targets(self, items: list[QuestionSet]) -> dict[str, Any]:
        """Collate the targets.

        Returns:
            answers: (b, m, K) int64, indices in the vocabulary.
            scores: (b, m, K) float32, the official accuracy of each answer; 0 for padding.
            question_mask: (b, m) float32, 1 for questions, 0 for padding.
            questions: in evaluation only, a list of Question per sample.
        """
        m = max(len(item.questions) for item in items)
        ids = torch.zeros(len(items), m, MAX_ANSWERS, dtype=torch.int64)
        scores = torch.zeros(len(items), m, MAX_ANSWERS)
        question_mask = torch.zeros(len(items), m)
        for i, item in enumerate(items):
            question_mask[i, : item.real_count] = 1
            for j, question in enumerate(item.questions[: item.real_count]):
                distinct = dict.fromkeys(question.answers)
                accuracies = {a: official_accuracy(a, question.answers) for a in distinct if a in self.ids}
                best = sorted(accuracies.items(), key=lambda pair: -pair[1])[:MAX_ANSWERS]
                for k, (answer, score) in enumerate(best):
                    ids[i, j, k], scores[i, j, k] = self.ids[answer], score
        targets: dict[str, Any] = {"answers": ids, "scores": scores, "question_mask": question_mask}
        if items[0].train:
            return targets
        return {**targets, "questions": [item.questions[: item.real_count] for item in items]}
