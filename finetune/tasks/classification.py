"""Classification of an image, an image with a text, or two images with a text; one or several labels.

    task: {name: classification}                                                    an image, by its json field `label`
    task: {name: classification, text: hypothesis}                                  entailment: image, json field `hypothesis`
    task: {name: classification, text: sentence, pictures: [left.jpg, right.jpg]}   KEY.left.jpg, KEY.right.jpg and a text

Classes come from the training data or from the configuration. The classifier reads embeddings, which is fast and needs no
fusion, or tokens after cross-attention between the text and each image.

Shapes: b = samples, p = images per sample (1 or 2), T = tokens of a text, K = classes, C = widths of tokens, D = width of the
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
from finetune.fusion.blocks import repeat_rows
from finetune.model import Features, FusionModel, Head
from finetune.tasks import EvalSetup, ExportSpec, Prediction, Survey, Task, global_weighted_mean, require_towers
from finetune.tasks.labels import (
    Labels,
    balanced_weights,
    check_torchmetrics,
    count_labels,
    multi_label_metrics,
    prior_logits,
    single_label_metrics,
    sort_labels,
)
from pretrain.config import check_numbers
from pretrain.data import BadSample
from pretrain.data.images import ImageDecoder
from pretrain.data.shards.paths import RawSample
from pretrain.data.text import TextDecoder
from pretrain.errors import ConfigError, UserError
from pretrain.evaluation.chance import CHANCE
from pretrain.runtime import distributed
from pretrain.runtime.agree import gather_or_raise
from pretrain.runtime.device_copy import copy_async


@dataclass
class Config:
    """Source of labels and texts, features to classify, class weights, and the classifier."""

    name: str = "classification"
    """Name of the task, which is the name of this file."""
    field: str = "label"
    """Field of a sample's json that holds a name or a whole number; with labels=multi a list of them, which may be empty."""
    labels: Literal["single", "multi"] = "single"
    """single: one class per sample (softmax). multi: any number of classes (a sigmoid for each)."""
    text: str | None = None
    """Source of the text of a pair: txt, or a json field; null = images alone."""
    pictures: list[str] = dataclasses.field(default_factory=list)
    """File extensions of a sample's two images, for example [left.jpg, right.jpg]; [] = its one image."""
    features: Literal["auto", "fused", "embedding"] = "auto"
    """What is classified: fused tokens (needs a text and a fusion) or embeddings; auto = fused where both are configured."""
    classes: list[str] = dataclasses.field(default_factory=list)
    """The classes; [] = all labels of the training data. A checkpoint keeps them."""
    balanced: bool = False
    """Weight classes so that rare ones contribute as much to the loss as frequent ones."""
    class_weights: dict[str, float] = dataclasses.field(default_factory=dict)
    """Weight of individual classes in the loss; 1 for those not named. Multiplied with the weights of `balanced`."""
    top: list[int] = dataclasses.field(default_factory=lambda: [1, 5])
    """Values of k of the top-k accuracies, for labels=single."""
    hidden: float = 1.0
    """Hidden width of the classifier as a multiple of its input width; 0 = one linear layer."""
    dropout: float = 0.0
    """Dropout before the classifier's last layer, from 0 to below 1."""

    def check(self) -> None:
        """Refuse values that do not fit together. Raises ConfigError."""
        if self.hidden < 0 or not 0 <= self.dropout < 1:
            raise ConfigError(f"task.hidden={self.hidden} must be at least 0, task.dropout={self.dropout} from 0 to below 1")
        if not self.top or min(self.top) < 1:
            raise ConfigError(f"task.top={self.top} must hold at least one k, each at least 1")
        if len(self.pictures) not in (0, 2):
            raise ConfigError(f"task.pictures={self.pictures} must name the extensions of two images, or be empty")
        if self.features == "fused" and self.text is None:
            raise ConfigError("task.features=fused needs a text to read the image: set task.text, or task.features=embedding")
        if any(weight <= 0 for weight in self.class_weights.values()):
            raise ConfigError(f"task.class_weights={self.class_weights}: every weight must be above 0")
        check_numbers(self, "task", hidden="[0, inf)", class_weights="(0, inf)")


class Classifier(Head):
    """Turns fused or pooled features into a logit for each class."""

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
        """Compute logits (b, K) from image (b, 3, H, W) or (b, p, 3, H, W) and text (b, T)."""
        image = inputs[model.subject]
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
        """Return the mean fused token of text and image, concatenated; with two images, those of both."""
        text = model.tokens("text", inputs["text"], masks["text"])
        text = repeat_rows(text, p) if p > 1 else text
        fused = model.fuse({"text": text, model.subject: model.tokens(model.subject, image)}, trace)
        pooled = torch.cat([fused["text"].pooled, fused[model.subject].states.mean(dim=1)], dim=1)
        return pooled.reshape(pooled.shape[0] // p, -1)

    def _pooled(self, model: FusionModel, image: Tensor, inputs: dict[str, Tensor], masks: dict[str, Tensor], p: int) -> Tensor:
        """Return the embeddings, and for each pair of them their product and absolute difference."""
        rows = list(model.embed(model.subject, image).unflatten(0, (-1, p)).unbind(dim=1))
        if self.config.text is not None:
            rows.append(model.embed("text", inputs["text"], masks["text"]))
        pairs = [(rows[i], rows[j]) for j in range(len(rows)) for i in range(j)]
        return torch.cat([*rows, *(a * b for a, b in pairs), *((a - b).abs() for a, b in pairs)], dim=1)


def _input_width(model: FusionModel, config: Config, fused: bool) -> int:
    """Return the width of a Classifier's input."""
    p = max(1, len(config.pictures))
    if fused:
        return p * (model.widths["text"] + model.widths[model.subject])
    rows = p + (config.text is not None)
    return (rows + rows * (rows - 1)) * model.encoder.projection(model.subject).out_features


class ImagesDecoder(ImageDecoder):
    """Decodes several images of a sample, by the names of their members."""

    def __init__(self, image: ImageDecoder, names: list[str]) -> None:
        vars(self).update(vars(image))
        self.names = names

    def __call__(self, sample: RawSample, rng: np.random.Generator, train: bool) -> Tensor:
        """Return images (p, 3, size, size) uint8. Raises BadSample."""
        missing = [name for name in self.names if name not in sample.members]
        if missing:
            raise BadSample("no image", f"no member {missing[0]}, only {', '.join(sorted(sample.members)) or 'none'}")
        encoded = [sample.members[name] for name in self.names]
        return torch.stack([self.decode_train(data, rng) if train else self.decode_eval(data) for data in encoded])


class Classification(Task):
    """The classification task; see the module."""

    primary_metric = "macro_f1"
    chance = "the most frequent classes of these samples, whatever the image (majority)"

    def __init__(self, config: Config) -> None:
        self.config = config
        weights = [config.class_weights.get(name, 1.0) for name in config.classes]
        self.weights = None if all(weight == 1 for weight in weights) else torch.tensor(weights)

    def build_decoders(self, towers: dict[str, Any]) -> dict[str, Any]:
        config = self.config
        require_towers("classification", towers, self.subject)
        image, text = towers[self.subject], towers.get("text")
        if config.pictures and self.subject != "image":
            raise ConfigError(f"task.pictures={config.pictures} are images; this model classifies {self.subject}")
        decoders: dict[str, Any] = {self.subject: ImagesDecoder(image, config.pictures) if config.pictures else image}
        if config.text is not None:
            if text is None:
                raise ConfigError(f"task.text={config.text} needs a text tower; the model has {', '.join(towers)}")
            decoders["text"] = TextDecoder(text.tokenizer, text.length, config.text, text.trim, text.multiple)
        return {**decoders, "labels": Labels(config.field, config.classes, config.labels == "multi")}

    def build_head(self, model: FusionModel) -> Classifier:
        config = self.config
        can_fuse = model.fusion is not None and {model.fusion.config.query, model.fusion.config.context} == {
            "text",
            self.subject,
        }
        if config.features == "fused" and not can_fuse:
            raise ConfigError("task.features=fused needs a fusion of text and image; name one, or set task.features=embedding")
        fused = config.features != "embedding" and can_fuse and config.text is not None
        if not fused and model.fusion is not None:
            why = "reads embeddings" if config.features == "embedding" else "has no text (task.text) to fuse with images"
            raise ConfigError(f"this classification {why}, so the fusion would not be used: set fusion=null")
        return Classifier(_input_width(model, config, fused), config, fused)

    def learned_settings(self) -> dict[str, Any]:
        return {"classes": self.config.classes, "class_weights": self.config.class_weights, "balanced": False}

    def export_spec(self) -> ExportSpec:
        if self.config.pictures:
            raise UserError(f"this classification compares two images ({', '.join(self.config.pictures)})")
        return ExportSpec("logits", "softmax" if self.config.labels == "single" else "sigmoid", self.config.classes)

    def loss(self, features: Features, targets: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the mean loss over the samples of all processes, and the accuracy.

        Single labels: cross-entropy, averaged with the class weights. Several labels: the mean over classes of the binary
        cross-entropy, where the class weights apply to the labels that are present.
        """
        logits = features["logits"]
        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        weights = None if self.weights is None else copy_async(self.weights, logits.device).to(logits.dtype)
        if "label" in targets:
            label = targets["label"]
            losses = F.cross_entropy(logits, label, reduction="none")
            sample_weights = torch.ones_like(losses) if weights is None else weights[label]
            return global_weighted_mean(losses, sample_weights), {"accuracy": (logits.argmax(dim=1) == label).float().mean()}
        labels = targets["labels"].to(logits.dtype)
        losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none", pos_weight=weights).mean(dim=1)
        accuracy = ((logits > 0) == (labels > 0.5)).float().mean()
        return global_weighted_mean(losses, torch.ones_like(losses)), {"accuracy": accuracy}

    def evaluate(self, model: FusionModel, shards: Any, setup: EvalSetup) -> dict[str, float]:
        """Compute the classification metrics on `shards`. Collective. Raises UserError.

        Returns:
            labels=single: top1, ..., macro_f1, auc (see labels.py); majority, the top1 accuracy of always predicting the most
            frequent class; unknown_labels, the number of samples whose label is not among the classes (the other metrics
            leave them out). labels=multi: macro_f1, micro_f1, exact, auc. Both: samples, bad_samples. chance_NAME is the
            metric of a classifier that gives every sample the frequencies of the classes.
        """
        batches = setup.batches(shards)
        pairs = [pair for part in gather_or_raise(lambda: list(self._predictions(model, batches, setup))) for pair in part]
        bad = sum(distributed.gather_objects(batches.bad.total()))
        if not pairs:
            raise UserError(f"nothing to classify in {shards}: {bad} samples were left out because of their content")
        logits, labels = (torch.cat([pair[i] for pair in pairs]) for i in (0, 1))
        counts = {"samples": len(logits), "bad_samples": bad}
        if self.config.labels == "multi":
            chance = multi_label_metrics(prior_logits(labels, several=True), labels)
            return {**multi_label_metrics(logits, labels), **_named_chance(chance), **counts}
        known = labels >= 0
        if not known.any():
            raise UserError(
                f"no sample of {shards} has a label among the {len(self.config.classes)} classes: {self._class_list()} (field "
                f"{self.config.field!r})"
            )
        logits, labels = logits[known], labels[known]
        majority = float(labels.bincount().max()) / len(labels)
        metrics = single_label_metrics(logits, labels, self.config.top)
        prior = prior_logits(F.one_hot(labels, logits.shape[1]), several=False)
        chance = single_label_metrics(prior, labels, self.config.top)
        unknown = {"majority": majority, "unknown_labels": int((~known).sum())}
        return {**metrics, **_named_chance(chance), **unknown, **counts}

    def _predictions(self, model: FusionModel, batches: Any, setup: EvalSetup) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (logits, labels) of this process's batches, on the CPU."""
        with setup.inference_mode(model):
            for batch in batches:
                batch = batch.to(setup.device, non_blocking=True)
                logits = self.encode(model, batch)["logits"].float().cpu()
                yield logits, batch.targets["labels" if self.config.labels == "multi" else "label"].cpu()

    def _class_list(self) -> str:
        names = self.config.classes
        return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")

    def predict(
        self, model: FusionModel, inputs: dict[str, Tensor], masks: dict[str, Tensor], trace: Trace | None = None, top: int = 5
    ) -> Prediction:
        """Return the `top` most likely classes with their probabilities; `score` is the logit of the first.

        Raises UserError for one image where the task compares two, image (b, 2, 3, H, W).
        """
        if self.config.pictures and inputs["image"].dim() != 5:
            raise UserError(f"this classification compares two images ({', '.join(self.config.pictures)}), not one")
        logits = model(inputs, masks, {}, trace)["logits"].float()
        probabilities = logits.softmax(dim=1) if self.config.labels == "single" else logits.sigmoid()
        values, order = probabilities.detach().topk(min(top, probabilities.shape[1]), dim=1)
        names = [[self.config.classes[i] for i in row] for row in order.tolist()]
        best = [list(zip(row, value, strict=True)) for row, value in zip(names, values.tolist(), strict=True)]
        return Prediction(best, logits.amax(dim=1))


def _named_chance(metrics: dict[str, float]) -> dict[str, float]:
    return {f"{CHANCE}{name}": value for name, value in metrics.items()}


def build(config: Config, survey: Survey | None) -> Classification:
    """Build the task. Collective. Raises ConfigError, UserError.

    `survey` gives the json of the training samples, for classes and weights; None for a checkpoint, which holds both.
    """
    check_torchmetrics()
    if survey is None:
        if not config.classes:
            raise UserError("this checkpoint of task classification holds no task.classes: it is incomplete")
        return Classification(config)
    if not config.classes or config.balanced:
        several = config.labels == "multi"
        counts: Counter[str] = Counter()
        samples = 0
        for label_counts, usable in gather_or_raise(lambda: count_labels(survey(), config.field, several)):
            counts.update(label_counts)
            samples += usable
        if not counts:
            raise UserError(
                f"no labels in the training data: task.field={config.field} must name a field of the samples' json that holds "
                + ("a list of names or whole numbers" if several else "a name or a whole number (a list: task.labels=multi)")
            )
        config.classes = config.classes or sort_labels(list(counts))
        if absent := [name for name in config.classes if name not in counts]:
            raise ConfigError(f"task.classes: no training sample has the label {absent[0]!r}")
        if config.balanced:
            weights = balanced_weights(Counter({name: counts[name] for name in config.classes}), samples, several)
            config.class_weights = {name: weights[name] * config.class_weights.get(name, 1.0) for name in config.classes}
            config.balanced = False
    if config.labels == "single" and len(config.classes) == 1:
        raise ConfigError(f"every training sample has the same label, {config.classes[0]!r}: nothing to learn")
    if unknown := [name for name in config.class_weights if name not in config.classes]:
        raise ConfigError(f"task.class_weights: {unknown[0]!r} is not one of the classes ({', '.join(config.classes[:10])})")
    return Classification(config)
