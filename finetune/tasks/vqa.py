"""Visual question answering: one answer of a vocabulary that is built from the training data.

    task: {name: vqa, questions: 8}

All questions about a picture share one image encoding. Targets are soft: each answer is worth its official accuracy. The
accuracy of evaluation is the official one, overall and by question type, beside that of a guesser who saw the questions only.
`blind: true` trains a model that never sees the picture. Open-ended generation of answers is not part of this task: an answer
outside the vocabulary cannot be given; the share that can is reported as `ceiling`.

Shapes: b = pictures, m = questions a picture, A = answers in the vocabulary, K = answers kept of a question, C = width.
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
from finetune.tasks import ExportSpec, Prediction, Setting, Survey, Task, per_item
from finetune.tasks.questions import Question, Questions, questions_of
from finetune.tasks.vqa_accuracy import Blind, accuracy, vocabulary
from pretrain.data import BadSample
from pretrain.errors import ConfigError, UserError
from pretrain.runtime import distributed
from pretrain.runtime.agree import gather_or_raise
from pretrain.towers import TokenSequence


@dataclass
class Config:
    """Answering questions about pictures."""

    name: str = "vqa"
    """This file."""
    field: str = "questions"
    """Field of a sample's json: a list of {question, answers, type}."""
    questions: int = 4
    """m, questions drawn a picture and step; fewer where a picture has fewer. More of them cost less than more pictures."""
    types: list[str] = dataclasses.field(default_factory=list)
    """Types of question to learn and to be measured on; [] = all."""
    vocabulary: int = 3129
    """Answers that can be given: the most frequent in training. 3,129 is usual for VQA v2."""
    answers: list[str] = dataclasses.field(default_factory=list)
    """The vocabulary itself; [] = built from the training data. A checkpoint keeps it."""
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """softmax: cross-entropy weighted by what each answer is worth. sigmoid: each answer for itself, towards what it is
    worth (BCE, for vocabularies in which several answers are right)."""
    hidden: float = 2.0
    """Hidden width of the classifier, in widths of a token."""
    dropout: float = 0.0
    """Before the classifier's last layer, 0 to below 1."""
    blind: bool = False
    """Train without the picture: how far the questions alone lead."""

    def check(self) -> None:
        """Raises ConfigError."""
        if self.questions < 1 or self.vocabulary < 1 or self.hidden <= 0 or not 0 <= self.dropout < 1:
            raise ConfigError(
                f"task.questions={self.questions} (from 1), task.vocabulary={self.vocabulary} (from 1), task.hidden="
                f"{self.hidden} (above 0) and task.dropout={self.dropout} (0 to below 1) do not fit together"
            )


class Answerer(Head):
    """Fused words -> their mean -> a logit for each answer."""

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
        """text (b, m, T) or (b, T) -> logits (b, m, A); (b, T) has m = 1."""
        text, image = model.tokens("text", inputs["text"], masks["text"]), self._look(model, inputs, text=inputs["text"])
        fused = model.fuse({"text": text, "image": image}, trace)["text"].pooled
        logits: Tensor = self.out(self.dropout(F.gelu(self.up(self.norm(fused)))))
        return {"logits": logits.unflatten(0, (inputs["image"].shape[0], -1))}

    def _look(self, model: FusionModel, inputs: dict[str, Tensor], text: Tensor) -> TokenSequence:
        """The picture's tokens; one token of zeros for the blind."""
        if not self.blind:
            return model.tokens("image", inputs["image"])
        nothing = self.norm.weight.new_zeros(inputs["image"].shape[0], 1, model.widths["image"])
        return TokenSequence(nothing, nothing.new_ones(nothing.shape[:2], dtype=torch.bool), (1, 1), nothing[:, 0])


class VQA(Task):
    """See the file."""

    primary_metric = "accuracy"
    text_is_question = True

    def __init__(self, config: Config) -> None:
        self.config = config
        self._known = frozenset(config.answers)
        self._guessers: dict[str, Blind] = {}

    def decoders(self, towers: dict[str, Any]) -> dict[str, Any]:
        config = self.config
        for name in ("image", "text"):
            if name not in towers:
                raise ConfigError(f"task.name=vqa needs an {name} tower; the model has {', '.join(towers)}")
        return {
            "image": towers["image"],
            "text": Questions(towers["text"], config.field, config.questions, config.answers, config.types),
        }

    def head(self, model: FusionModel) -> Answerer:
        if model.fusion is None or "text" not in (model.fusion.config.query, model.fusion.config.context):
            raise ConfigError("task.name=vqa reads words that looked at the picture: it needs a fusion of text and image")
        if model.fusion.config.query != "text":
            raise ConfigError(
                f"fusion.query={model.fusion.config.query}: in task.name=vqa the question asks; set fusion.query=text and "
                "fusion.context=image"
            )
        return Answerer(model.widths["text"], self.config)

    def settings(self) -> dict[str, Any]:
        return {"answers": self.config.answers}

    def questions(self, values: dict[str, Any]) -> list[Question]:
        """None where there are none."""
        return _asked(values, self.config)

    def export_spec(self) -> ExportSpec:
        return ExportSpec("logits", self.config.loss, self.config.answers)

    def loss(self, features: Features, targets: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over the questions of all processes."""
        logits = features["logits"]
        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        answers, scores, asked = targets["answers"], targets["scores"].to(logits.dtype), targets["asked"].to(logits.dtype)
        if self.config.loss == "softmax":
            losses = -(logits.log_softmax(dim=-1).gather(-1, answers) * scores).sum(dim=-1)
        else:
            worth = torch.zeros_like(logits).scatter_add(-1, answers, scores)
            losses = F.binary_cross_entropy_with_logits(logits, worth, reduction="none").sum(dim=-1)
        with torch.no_grad():
            best = logits.argmax(dim=-1, keepdim=True)
            right = (scores * (answers == best)).sum(dim=-1)
            share = (right * asked).sum() / asked.sum().clamp(min=1)
        return per_item(losses.flatten(), asked.flatten()), {"accuracy": share}

    # -----------------------------------------------------------------------------------------------------------------
    # Figures

    def evaluate(self, model: FusionModel, shards: Any, setting: Setting) -> dict[str, float]:
        """`accuracy` (official, 0 to 1) over all questions, and by type; `ceiling`, what the best answers of the vocabulary
        would reach; `blind_accuracy` likewise, of who knows the questions and answers of the training data only, where they
        are at hand; `questions`, `samples`, `bad_samples`. Collective."""
        batches = setting.batches(shards)
        scored = gather_or_raise(lambda: list(self._scored(model, batches, setting)))
        rows = [row for part in scored for row in part]
        bad = sum(distributed.gather_objects(batches.bad.total()))
        if not rows:
            raise UserError(f"no question to evaluate in {shards}: {bad} samples were left out because of their content")
        guesser = self._guesser(setting)
        figures: dict[str, list[float]] = {}
        for question, said in rows:
            values = {"accuracy": said, "ceiling": self._ceiling(question)}
            if guesser is not None:
                values["blind_accuracy"] = accuracy(guesser(question.kind, question.text), question.answers)
            for name, value in values.items():
                figures.setdefault(name, []).append(value)
                if name != "ceiling":
                    figures.setdefault(f"{name}_{question.kind}", []).append(value)
        out = {name: sum(values) / len(values) for name, values in sorted(figures.items())}
        return {**out, "questions": len(rows), "samples": batches.total - bad, "bad_samples": bad}

    def _scored(self, model: FusionModel, batches: Any, setting: Setting) -> Iterator[tuple[Question, float]]:
        """Each question of this process's share with the official accuracy of the model's answer."""
        with setting.measuring(model):
            for batch in batches:
                batch = batch.to(setting.device, non_blocking=True)
                said = self.encode(model, batch)["logits"].argmax(dim=-1).tolist()
                for asked, answered in zip(batch.targets["questions"], said, strict=True):
                    for question, answer in zip(asked, answered, strict=False):  # those behind only fill up
                        yield question, accuracy(self.config.answers[answer], question.answers)

    def _ceiling(self, question: Question) -> float:
        """What the best answer of the vocabulary is worth."""
        known = (answer for answer in set(question.answers) if answer in self._known)
        return max((accuracy(answer, question.answers) for answer in known), default=0.0)

    def _guesser(self, setting: Setting) -> Blind | None:
        if setting.train is None:
            return None
        key = repr(setting.train)
        if key not in self._guessers:
            self._guessers[key] = Blind(gather_or_raise(lambda: _counted(setting.survey(), self.config)))
        return self._guessers[key]

    # -----------------------------------------------------------------------------------------------------------------
    # One answer

    def predict(
        self, model: FusionModel, inputs: dict[str, Tensor], masks: dict[str, Tensor], trace: Trace | None = None, top: int = 5
    ) -> Prediction:
        """The `top` likeliest answers with their probabilities; `score` is the logarithm of the first one's odds against all
        others: its logit alone also rises with whatever raises all of them, and maps of that look past the thing."""
        if not bool(masks["text"].any(dim=-1).all()):
            raise UserError('an empty question has no answer: write one, for example "what colour is the car?"')
        logits = model(inputs, masks, {}, trace)["logits"][:, 0].float()
        likely = logits.softmax(dim=-1) if self.config.loss == "softmax" else logits.sigmoid()
        values, order = likely.detach().topk(min(top, likely.shape[-1]), dim=-1)
        names = [[self.config.answers[i] for i in row] for row in order.tolist()]
        best = [list(zip(row, value, strict=True)) for row, value in zip(names, values.tolist(), strict=True)]
        if self.config.loss == "sigmoid" or logits.shape[-1] == 1:
            return Prediction(best, logits.amax(dim=-1))
        others = logits.scatter(-1, order[:, :1], float("-inf")).logsumexp(dim=-1)
        return Prediction(best, logits.amax(dim=-1) - others)


def _asked(values: dict[str, Any], config: Config) -> list[Question]:
    """The questions in a sample's json; a bad one has none here, and is counted where it is read to be learned from."""
    try:
        return questions_of(values, config.field, config.types)
    except BadSample:
        return []


def _counted(samples: Iterator[dict[str, Any]], config: Config) -> Counter[tuple[str, str, str]]:
    """(type, question, answer) of a share of the training data."""
    found: Counter[tuple[str, str, str]] = Counter()
    for values in samples:
        found.update((q.kind, q.text, answer) for q in _asked(values, config) for answer in q.answers)
    return found


def build(config: Config, survey: Survey | None) -> VQA:
    """`survey`: the json of the training samples, for the vocabulary. Collective. Raises ConfigError, UserError."""
    if not config.answers:
        if survey is None:
            raise UserError("this checkpoint of task vqa holds no task.answers: it is not whole")
        counts: Counter[str] = Counter()
        for counted in gather_or_raise(lambda: _counted(survey(), config)):
            for (_, _, answer), n in counted.items():
                counts[answer] += n
        if not counts:
            raise UserError(
                f"no questions in the training data: task.field={config.field} must name a field of the samples' json that "
                f"holds a list of {{question, answers, type}}{f', of task.types {config.types}' if config.types else ''}"
            )
        config = dataclasses.replace(config, answers=vocabulary(counts, config.vocabulary))
        if len(counts) == 1:
            raise UserError(f"every question of the training data has the same answer, {config.answers[0]!r}: nothing to learn")
    return VQA(config)
