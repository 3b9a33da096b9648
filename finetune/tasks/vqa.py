"""Visual question answering: classification over a vocabulary of answers from the training data.

    task: {name: vqa, questions: 8}

All questions about an image share one image encoding. Targets are soft: the target of an answer is its official accuracy.
Evaluation reports the official accuracy, overall and by question type, next to that of a question-only baseline.
`blind: true` trains a model without images. Open-ended generation of answers is not part of this task: an answer outside the
vocabulary cannot be given. `ceiling` reports the accuracy that the vocabulary allows.

Shapes: b = images, m = questions per image, A = answers in the vocabulary, K = answers per question, C = width of a token.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.attention.trace import Trace
from finetune.model import Features, FusionModel, Head
from finetune.tasks import EvalSetup, ExportSpec, Prediction, Survey, Task, global_weighted_mean, require_towers
from finetune.tasks.questions import Question, Questions, majority_answers, read_questions
from finetune.tasks.vqa_accuracy import QuestionOnlyBaseline, build_vocabulary, official_accuracy
from pretrain.config import check_numbers
from pretrain.data import BadSample
from pretrain.errors import ConfigError, UserError
from pretrain.printable import get_noun
from pretrain.runtime import distributed
from pretrain.runtime.agree import gather_or_raise
from pretrain.towers import TokenSequence


@dataclass
class Config:
    """Source of the questions, vocabulary, loss and classifier."""

    name: str = "vqa"
    """Name of the task, which is the name of this file."""
    field: str = "questions"
    """Field of a sample's json that holds a list of {question, answers, type}."""
    questions: int = 4
    """m, questions drawn per image and step; fewer where an image has fewer. More questions cost less than more images."""
    types: list[str] = dataclasses.field(default_factory=list)
    """Question types to train and evaluate on; [] = all."""
    vocabulary: int = 3129
    """Size of the vocabulary: the most frequent answers of the training data. 3,129 is usual for VQA v2."""
    answers: list[str] = dataclasses.field(default_factory=list)
    """The vocabulary itself; [] = built from the training data. A checkpoint keeps it."""
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """softmax: cross-entropy weighted by the accuracy of each answer. sigmoid: binary cross-entropy of each answer with its
    accuracy as the target, for vocabularies in which several answers are right."""
    hidden: float = 2.0
    """Hidden width of the classifier as a multiple of the token width."""
    dropout: float = 0.0
    """Dropout before the classifier's last layer, from 0 to below 1."""
    blind: bool = False
    """Train without images, to measure what the questions alone allow."""

    def check(self) -> None:
        """Refuse values out of range. Raises ConfigError."""
        if self.questions < 1 or self.vocabulary < 1 or self.hidden <= 0 or not 0 <= self.dropout < 1:
            raise ConfigError(
                f"task.questions={self.questions} and task.vocabulary={self.vocabulary} must be at least 1, task.hidden="
                f"{self.hidden} above 0, task.dropout={self.dropout} from 0 to below 1"
            )
        check_numbers(self, "task", hidden="(0, inf)")


class AnswerHead(Head):
    """Turns the mean fused text token into a logit for each answer."""

    def __init__(self, width: int, config: Config) -> None:
        super().__init__()
        hidden = max(1, round(width * config.hidden))
        self.blind = config.blind
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.dropout = nn.Dropout(config.dropout)
        self.out = nn.Linear(hidden, len(config.answers))

    def forward(
        self,
        model: FusionModel,
        inputs: dict[str, Tensor],
        masks: dict[str, Tensor],
        targets: dict[str, Any],
        trace: Trace | None = None,
    ) -> Features:
        """Compute logits (b, m, A) of text (b, m, T), or of (b, T) with m = 1."""
        text, subject = model.tokens("text", inputs["text"], masks["text"]), self._subject_tokens(model, inputs[model.subject])
        fused = model.fuse({"text": text, model.subject: subject}, trace)["text"].pooled
        logits: Tensor = self.out(self.dropout(F.gelu(self.up(self.norm(fused)))))
        return {"logits": logits.unflatten(0, (inputs[model.subject].shape[0], -1))}

    def _subject_tokens(self, model: FusionModel, inputs: Tensor) -> TokenSequence:
        """Return the tokens of images or sounds; one token of zeros where the model is trained without them."""
        if not self.blind:
            return model.tokens(model.subject, inputs)
        zeros = self.norm.weight.new_zeros(len(inputs), 1, model.widths[model.subject])
        return TokenSequence(zeros, zeros.new_ones(zeros.shape[:2], dtype=torch.bool), (1, 1), zeros[:, 0])


class VQA(Task):
    """The visual question answering task; see the module."""

    primary_metric = "accuracy"
    chance = "for each question type the one answer that scores best on these samples (majority)"
    text_is_question = True

    def __init__(self, config: Config) -> None:
        self.config = config
        self._vocabulary = frozenset(config.answers)
        self._baselines: dict[str, QuestionOnlyBaseline] = {}

    def build_decoders(self, towers: dict[str, Any]) -> dict[str, Any]:
        config = self.config
        require_towers("vqa", towers, self.subject, "text")
        return {
            self.subject: towers[self.subject],
            "text": Questions(towers["text"], config.field, config.questions, config.answers, config.types),
        }

    def build_head(self, model: FusionModel) -> AnswerHead:
        noun = get_noun(self.subject)
        if model.fusion is None or "text" not in (model.fusion.config.query, model.fusion.config.context):
            raise ConfigError(
                f"task.name=vqa reads text tokens that attended to the {noun}: it needs a fusion of text and {self.subject}"
            )
        if model.fusion.config.query != "text":
            raise ConfigError(
                f"fusion.query={model.fusion.config.query}: task.name=vqa needs the question as query; set fusion.query=text "
                f"and fusion.context={self.subject}"
            )
        return AnswerHead(model.widths["text"], self.config)

    def learned_settings(self) -> dict[str, Any]:
        return {"answers": self.config.answers}

    def questions(self, values: dict[str, Any]) -> list[Question]:
        """Return the questions in a sample's json; [] where it has none."""
        return _readable_questions(values, self.config)

    def export_spec(self) -> ExportSpec:
        return ExportSpec("logits", self.config.loss, self.config.answers)

    def loss(self, features: Features, targets: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the mean loss over the questions of all processes, and this process's accuracy."""
        logits = features["logits"]
        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        answers, scores = targets["answers"], targets["scores"].to(logits.dtype)
        question_mask = targets["question_mask"].to(logits.dtype)
        if self.config.loss == "softmax":
            losses = -(logits.log_softmax(dim=-1).gather(-1, answers) * scores).sum(dim=-1)
        else:
            accuracies = torch.zeros_like(logits).scatter_add(-1, answers, scores)
            losses = F.binary_cross_entropy_with_logits(logits, accuracies, reduction="none").sum(dim=-1)
        with torch.no_grad():
            best = logits.argmax(dim=-1, keepdim=True)
            right = (scores * (answers == best)).sum(dim=-1)
            accuracy = (right * question_mask).sum() / question_mask.sum().clamp(min=1)
        return global_weighted_mean(losses.flatten(), question_mask.flatten()), {"accuracy": accuracy}

    # -----------------------------------------------------------------------------------------------------------------
    # Evaluation

    def evaluate(self, model: FusionModel, shards: Any, setup: EvalSetup) -> dict[str, float]:
        """Compute the official accuracy on `shards`. Collective. Raises UserError.

        Returns:
            accuracy, accuracy_TYPE: official accuracy, 0 to 1, over all questions and by question type.
            chance_accuracy, chance_accuracy_TYPE: the same where every question of a type gets one answer, the best for it.
            ceiling: accuracy of the best answers in the vocabulary.
            blind_accuracy, blind_accuracy_TYPE: accuracy of the question-only baseline, where training data are available.
            questions, samples, bad_samples: counts.
        """
        batches = setup.batches(shards)
        scored = gather_or_raise(lambda: list(self._score_questions(model, batches, setup)))
        rows = [row for part in scored for row in part]
        bad = sum(distributed.gather_objects(batches.bad.total()))
        if not rows:
            raise UserError(f"no question to evaluate in {shards}: {bad} samples were left out because of their content")
        baseline = self._baseline(setup)
        majority = majority_answers(question for question, _ in rows)
        values_by_name: dict[str, list[float]] = {}
        for question, accuracy in rows:
            values = {"accuracy": accuracy, "ceiling": self._ceiling(question)}
            values["chance_accuracy"] = official_accuracy(majority[question.kind], question.answers)
            if baseline is not None:
                values["blind_accuracy"] = official_accuracy(baseline(question.kind, question.text), question.answers)
            for name, value in values.items():
                values_by_name.setdefault(name, []).append(value)
                if name != "ceiling":
                    values_by_name.setdefault(f"{name}_{question.kind}", []).append(value)
        out = {name: sum(values) / len(values) for name, values in sorted(values_by_name.items())}
        return {**out, "questions": len(rows), "samples": batches.total - bad, "bad_samples": bad}

    def _score_questions(self, model: FusionModel, batches: Any, setup: EvalSetup) -> Iterator[tuple[Question, float]]:
        """Yield each question of this process's share with the official accuracy of the model's answer."""
        with setup.inference_mode(model):
            for batch in batches:
                batch = batch.to(setup.device, non_blocking=True)
                predicted = self.encode(model, batch)["logits"].argmax(dim=-1).tolist()
                for questions, answers in zip(batch.targets["questions"], predicted, strict=True):
                    for question, answer in zip(questions, answers, strict=False):  # answers to padding come last
                        yield question, official_accuracy(self.config.answers[answer], question.answers)

    def _ceiling(self, question: Question) -> float:
        """Return the accuracy of the best answer in the vocabulary; 0 if it has none of the answers."""
        known = (answer for answer in set(question.answers) if answer in self._vocabulary)
        return max((official_accuracy(answer, question.answers) for answer in known), default=0.0)

    def _baseline(self, setup: EvalSetup) -> QuestionOnlyBaseline | None:
        """Build the baseline from the training shards once; None where they are not available. Collective."""
        if setup.train is None:
            return None
        key = repr(setup.train)
        if key not in self._baselines:
            self._baselines[key] = QuestionOnlyBaseline(gather_or_raise(lambda: _count_answers(setup.survey(), self.config)))
        return self._baselines[key]

    # -----------------------------------------------------------------------------------------------------------------
    # Prediction

    def predict(
        self, model: FusionModel, inputs: dict[str, Tensor], masks: dict[str, Tensor], trace: Trace | None = None, top: int = 5
    ) -> Prediction:
        """Return the `top` most likely answers with probabilities. Raises UserError for an empty question.

        `score` is the log-odds of the first answer against all others. The logit alone also rises with anything that raises
        all logits, and maps of it point less at the object.
        """
        if not bool(masks["text"].any(dim=-1).all()):
            raise UserError('an empty question has no answer: give one, for example "how many cars are there?"')
        logits = model(inputs, masks, {}, trace)["logits"][:, 0].float()
        probabilities = logits.softmax(dim=-1) if self.config.loss == "softmax" else logits.sigmoid()
        values, order = probabilities.detach().topk(min(top, probabilities.shape[-1]), dim=-1)
        names = [[self.config.answers[i] for i in row] for row in order.tolist()]
        best = [list(zip(row, value, strict=True)) for row, value in zip(names, values.tolist(), strict=True)]
        if self.config.loss == "sigmoid" or logits.shape[-1] == 1:
            return Prediction(best, logits.amax(dim=-1))
        others = logits.scatter(-1, order[:, :1], float("-inf")).logsumexp(dim=-1)
        return Prediction(best, logits.amax(dim=-1) - others)


def _readable_questions(values: dict[str, Any], config: Config) -> list[Question]:
    """Return the questions in a sample's json; [] for a bad sample, which the loader counts."""
    try:
        return read_questions(values, config.field, config.types)
    except BadSample:
        return []


def _find_problem(samples: Iterator[dict[str, Any]], config: Config) -> str:
    """Return why the first sample has no usable question, or "" where it has one, or there is no sample."""
    try:
        for values in samples:
            read_questions(values, config.field, config.types)
            break
    except BadSample as error:
        return error.detail
    return ""


def _count_answers(samples: Iterator[dict[str, Any]], config: Config) -> Counter[tuple[str, str, str]]:
    """Count (type, question, answer) in the json of samples."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for values in samples:
        counts.update((q.kind, q.text, answer) for q in _readable_questions(values, config) for answer in q.answers)
    return counts


def build(config: Config, survey: Survey | None) -> VQA:
    """Build the task. Collective. Raises ConfigError, UserError.

    `survey` gives the json of the training samples, for the vocabulary; None for a checkpoint, which holds it.
    """
    if not config.answers:
        if survey is None:
            raise UserError("this checkpoint of task vqa holds no task.answers: it is incomplete")
        counts: Counter[str] = Counter()
        for process_counts in gather_or_raise(lambda: _count_answers(survey(), config)):
            for (_, _, answer), n in process_counts.items():
                counts[answer] += n
        if not counts:
            problems = gather_or_raise(lambda: _find_problem(survey(), config))
            problem = next((problem for problem in problems if problem), "")
            raise UserError(
                f"no questions in the training data: task.field={config.field} must name a field of the samples' json that "
                f"holds a list of {{question, answers, type}}{f', of task.types {config.types}' if config.types else ''}"
                f"{'; in the first sample, ' if problem else ''}{problem}"
            )
        config = dataclasses.replace(config, answers=build_vocabulary(counts, config.vocabulary))
        if len(counts) == 1:
            raise UserError(f"every question of the training data has the same answer, {config.answers[0]!r}: nothing to learn")
    return VQA(config)
