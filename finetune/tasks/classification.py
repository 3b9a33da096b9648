"""Classification of pictures, of a picture with a text (entailment), of two pictures with a text; one label or several.

    task: {name: classification}                                                    a picture, by its json field `label`
    task: {name: classification, text: hypothesis}                                  picture and json field `hypothesis`
    task: {name: classification, text: sentence, pictures: [left.jpg, right.jpg]}   KEY.left.jpg, KEY.right.jpg and a text

Classes are found in the training data, or given. On embeddings it is quick and needs no fusion; on fused tokens the text
has looked at the picture (of two pictures, at each).

Shapes: b = samples, p = pictures a sample (1 or 2), T = tokens of a text, K = classes, C = widths of tokens, D = width of the
shared space.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.attention.trace import Trace
from finetune.fusion.blocks import repeat
from finetune.model import Features, FusionModel, Head
from finetune.tasks import ExportSpec, Prediction, Setting, Survey, Task, per_item
from finetune.tasks.labels import Labels, balance, check_measures, count, in_order, multi, single
from pretrain.data import BadSample
from pretrain.data.images import ImageDecoder
from pretrain.data.shards.paths import RawSample
from pretrain.data.text import TextDecoder
from pretrain.errors import ConfigError, UserError
from pretrain.runtime import distributed
from pretrain.runtime.agree import gather_or_raise


@dataclass
class Config:
    """Telling classes."""

    name: str = "classification"
    """This file."""
    field: str = "label"
    """Field of a sample's json: a name or a whole number; with labels=multi a list of them, which may be empty."""
    labels: Literal["single", "multi"] = "single"
    """single: one class a sample (softmax). multi: any number of them (a sigmoid each)."""
    text: str | None = None
    """Where the text of a pair is: txt, or a json field; null = the pictures alone."""
    pictures: list[str] = dataclasses.field(default_factory=list)
    """Members of the two pictures of a sample, for example [left.jpg, right.jpg]; [] = its one picture."""
    features: Literal["auto", "fused", "embedding"] = "auto"
    """What is classified: fused tokens, which needs a text and a fusion, or embeddings; auto = fused where both are there."""
    classes: list[str] = dataclasses.field(default_factory=list)
    """The classes; [] = all that the training data has. A checkpoint keeps them."""
    balanced: bool = False
    """Weigh classes so that rare ones count as much as frequent ones."""
    class_weights: dict[str, float] = dataclasses.field(default_factory=dict)
    """Weight in the loss of single classes; 1 for those not named. With `balanced`, on top of that."""
    top: list[int] = dataclasses.field(default_factory=lambda: [1, 5])
    """k of the top-k accuracies of labels=single."""
    hidden: float = 1.0
    """Hidden width of the classifier, in widths of what it reads; 0 = one linear layer."""
    dropout: float = 0.0
    """Before the classifier's last layer, 0 to below 1."""

    def check(self) -> None:
        """Raises ConfigError."""
        if self.hidden < 0 or not 0 <= self.dropout < 1:
            raise ConfigError(f"task.hidden={self.hidden} (from 0) and task.dropout={self.dropout} (0 to below 1) do not fit")
        if not self.top or min(self.top) < 1:
            raise ConfigError(f"task.top={self.top} must name at least one number of guesses, from 1")
        if len(self.pictures) not in (0, 2):
            raise ConfigError(f"task.pictures={self.pictures} must name two members of a sample, or none")
        if self.features == "fused" and self.text is None:
            raise ConfigError("task.features=fused: nothing reads the picture without a text; set task.text, or =embedding")
        if any(weight <= 0 for weight in self.class_weights.values()):
            raise ConfigError(f"task.class_weights={self.class_weights} must be above 0")


class Classifier(Head):
    """Fused or pooled features -> a logit for each class."""

    def __init__(self, width: int, config: Config, fused: bool) -> None:
        super().__init__()
        hidden = round(width * config.hidden)
        self.config, self.fused = config, fused
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden) if hidden else None
        self.dropout = nn.Dropout(config.dropout)
        self.out = nn.Linear(hidden or width, len(config.classes))

    def forward(
        self,
        model: FusionModel,
        inputs: dict[str, Tensor],
        masks: dict[str, Tensor],
        targets: dict[str, Any],
        trace: Trace | None = None,
    ) -> Features:
        """image (b, 3, H, W) or (b, p, 3, H, W), text (b, T) -> logits (b, K)."""
        image = inputs["image"]
        p = image.shape[1] if image.dim() == 5 else 1
        image = image.flatten(0, 1) if image.dim() == 5 else image
        x = self._fused(model, image, inputs, masks, p, trace) if self.fused else self._pooled(model, image, inputs, masks, p)
        x = self.norm(x)
        if self.up is not None:
            x = F.gelu(self.up(x))
        return {"logits": self.out(self.dropout(x))}

    def _fused(
        self,
        model: FusionModel,
        image: Tensor,
        inputs: dict[str, Tensor],
        masks: dict[str, Tensor],
        p: int,
        trace: Trace | None,
    ) -> Tensor:
        """The mean of both modalities' tokens after they have read each other; of two pictures side by side."""
        text = model.tokens("text", inputs["text"], masks["text"])
        text = repeat(text, p) if p > 1 else text
        fused = model.fuse({"text": text, "image": model.tokens("image", image)}, trace)
        pooled = torch.cat([fused["text"].pooled, fused["image"].states.mean(dim=1)], dim=1)
        return pooled.reshape(pooled.shape[0] // p, -1)

    def _pooled(self, model: FusionModel, image: Tensor, inputs: dict[str, Tensor], masks: dict[str, Tensor], p: int) -> Tensor:
        """Embeddings; with a text or a second picture also their products and distances."""
        rows = list(model.embed("image", image).unflatten(0, (-1, p)).unbind(dim=1))
        if self.config.text is not None:
            rows.append(model.embed("text", inputs["text"], masks["text"]))
        pairs = [(rows[i], rows[j]) for j in range(len(rows)) for i in range(j)]
        return torch.cat([*rows, *(a * b for a, b in pairs), *((a - b).abs() for a, b in pairs)], dim=1)


def _width(model: FusionModel, config: Config, fused: bool) -> int:
    """Of what a Classifier reads."""
    p = max(1, len(config.pictures))
    if fused:
        return p * (model.widths["text"] + model.widths["image"])
    rows = p + (config.text is not None)
    return (rows + rows * (rows - 1)) * model.encoder.projection("image").out_features


class Pictures(ImageDecoder):
    """Several pictures a sample, by the names of their members."""

    def __init__(self, image: ImageDecoder, names: list[str]) -> None:
        vars(self).update(vars(image))
        self.names = names

    def __call__(self, sample: RawSample, rng: np.random.Generator, train: bool) -> Tensor:
        """(p, 3, size, size) uint8. Raises BadSample."""
        missing = [name for name in self.names if name not in sample.members]
        if missing:
            raise BadSample("no image", f"no member {missing[0]}, only {', '.join(sorted(sample.members)) or 'nothing'}")
        found = [sample.members[name] for name in self.names]
        return torch.stack([self.decode_train(data, rng) if train else self.decode_eval(data) for data in found])


class Classification(Task):
    """See the file."""

    primary_metric = "macro_f1"

    def __init__(self, config: Config) -> None:
        self.config = config
        weights = [config.class_weights.get(name, 1.0) for name in config.classes]
        self.weights = None if all(weight == 1 for weight in weights) else torch.tensor(weights)

    def decoders(self, towers: dict[str, Any]) -> dict[str, Any]:
        config = self.config
        if "image" not in towers:
            raise ConfigError(f"task.name=classification needs an image tower; the model has {', '.join(towers)}")
        image, text = towers["image"], towers.get("text")
        found: dict[str, Any] = {"image": Pictures(image, config.pictures) if config.pictures else image}
        if config.text is not None:
            if text is None:
                raise ConfigError(f"task.text={config.text} needs a text tower; the model has {', '.join(towers)}")
            found["text"] = TextDecoder(text.tokenizer, text.length, config.text, text.trim, text.multiple)
        return {**found, "labels": Labels(config.field, config.classes, config.labels == "multi")}

    def head(self, model: FusionModel) -> Classifier:
        config = self.config
        reads = model.fusion is not None and {model.fusion.config.query, model.fusion.config.context} == {"text", "image"}
        if config.features == "fused" and not reads:
            raise ConfigError("task.features=fused needs a fusion of text and image; name one, or set task.features=embedding")
        fused = config.features != "embedding" and reads and config.text is not None
        if not fused and model.fusion is not None:
            why = "reads embeddings" if config.features == "embedding" else "has no text (task.text) to look at pictures with"
            raise ConfigError(f"this classification {why}, so no fusion takes part: set fusion=null")
        return Classifier(_width(model, config, fused), config, fused)

    def settings(self) -> dict[str, Any]:
        return {"classes": self.config.classes, "class_weights": self.config.class_weights, "balanced": False}

    def export_spec(self) -> ExportSpec:
        if self.config.pictures:
            raise UserError(f"this classification compares two pictures ({', '.join(self.config.pictures)})")
        return ExportSpec("logits", "softmax" if self.config.labels == "single" else "sigmoid", self.config.classes)

    def loss(self, features: Features, targets: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy, its mean weighted by the classes over the samples of all processes; with several labels the binary
        cross-entropy of each class, what is there weighted, their mean."""
        logits = features["logits"]
        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        weights = None if self.weights is None else self.weights.to(logits)
        if "label" in targets:
            label = targets["label"]
            losses = F.cross_entropy(logits, label, reduction="none")
            each = torch.ones_like(losses) if weights is None else weights[label]
            return per_item(losses, each), {"accuracy": (logits.argmax(dim=1) == label).float().mean()}
        there = targets["labels"].to(logits.dtype)
        losses = F.binary_cross_entropy_with_logits(logits, there, reduction="none", pos_weight=weights).mean(dim=1)
        return per_item(losses, torch.ones_like(losses)), {"accuracy": ((logits > 0) == (there > 0.5)).float().mean()}

    def evaluate(self, model: FusionModel, shards: Any, setting: Setting) -> dict[str, float]:
        """single: `top1`, ..., `macro_f1`, `auc`, `majority` (top1 of who always says the most frequent class); multi:
        `macro_f1`, `micro_f1`, `exact`, `auc`; `unknown_labels`, samples whose label is none of the classes (always wrong, and
        left out of the figures), `samples`, `bad_samples`. Collective."""
        batches = setting.batches(shards)
        parts = [part for each in gather_or_raise(lambda: list(self._told(model, batches, setting))) for part in each]
        bad = sum(distributed.gather_objects(batches.bad.total()))
        if not parts:
            raise UserError(f"nothing to classify in {shards}: {bad} samples were left out because of their content")
        logits, labels = (torch.cat([part[i] for part in parts]) for i in (0, 1))
        counts = {"samples": len(logits), "bad_samples": bad}
        if self.config.labels == "multi":
            return {**multi(logits, labels), **counts}
        known = labels >= 0
        if not known.any():
            raise UserError(
                f"no sample of {shards} has a label among the {len(self.config.classes)} classes: {self._named()} (field "
                f"{self.config.field!r})"
            )
        logits, labels = logits[known], labels[known]
        blind = float(labels.bincount().max()) / len(labels)
        figures = single(logits, labels, self.config.top)
        return {**figures, "majority": blind, "unknown_labels": int((~known).sum()), **counts}

    def _told(self, model: FusionModel, batches: Any, setting: Setting) -> Iterator[tuple[Tensor, Tensor]]:
        """(logits, labels) of this process's share, on the host."""
        with setting.measuring(model):
            for batch in batches:
                batch = batch.to(setting.device, non_blocking=True)
                logits = self.encode(model, batch)["logits"].float().cpu()
                yield logits, batch.targets["labels" if self.config.labels == "multi" else "label"].cpu()

    def _named(self) -> str:
        names = self.config.classes
        return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")

    def predict(
        self, model: FusionModel, inputs: dict[str, Tensor], masks: dict[str, Tensor], trace: Trace | None = None, top: int = 5
    ) -> Prediction:
        """The `top` likeliest classes with their probabilities; `score` is the logit of the first. Raises UserError for one
        picture where the task compares two: image (b, 2, 3, H, W)."""
        if self.config.pictures and inputs["image"].dim() != 5:
            raise UserError(f"this classification compares two pictures ({', '.join(self.config.pictures)}), not one")
        logits = model(inputs, masks, {}, trace)["logits"].float()
        likely = logits.softmax(dim=1) if self.config.labels == "single" else logits.sigmoid()
        values, order = likely.detach().topk(min(top, likely.shape[1]), dim=1)
        names = [[self.config.classes[i] for i in row] for row in order.tolist()]
        best = [list(zip(row, value, strict=True)) for row, value in zip(names, values.tolist(), strict=True)]
        return Prediction(best, logits.amax(dim=1))


def build(config: Config, survey: Survey | None) -> Classification:
    """`survey`: the json of the training samples, for classes and weights. Collective. Raises ConfigError, UserError."""
    check_measures()
    if survey is None:
        if not config.classes:
            raise UserError("this checkpoint of task classification holds no task.classes: it is not whole")
        return Classification(config)
    if not config.classes or config.balanced:
        several = config.labels == "multi"
        counts: Counter[str] = Counter()
        samples = 0
        for counted, usable in gather_or_raise(lambda: count(survey(), config.field, several)):
            counts.update(counted)
            samples += usable
        if not counts:
            raise UserError(
                f"no labels in the training data: task.field={config.field} must name a field of the samples' json that holds "
                + ("a list of names or whole numbers" if several else "a name or a whole number (a list: task.labels=multi)")
            )
        config.classes = config.classes or in_order(list(counts))
        if absent := [name for name in config.classes if name not in counts]:
            raise ConfigError(f"task.classes: no training sample has the label {absent[0]!r}")
        if config.balanced:
            weights = balance(Counter({name: counts[name] for name in config.classes}), samples, several)
            config.class_weights = {name: weights[name] * config.class_weights.get(name, 1.0) for name in config.classes}
            config.balanced = False
    if config.labels == "single" and len(config.classes) == 1:
        raise ConfigError(f"every training sample has the same label, {config.classes[0]!r}: nothing to learn")
    if unknown := [name for name in config.class_weights if name not in config.classes]:
        raise ConfigError(f"task.class_weights: {unknown[0]!r} is none of the classes ({', '.join(config.classes[:10])})")
    return Classification(config)
