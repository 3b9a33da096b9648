"""Downstream tasks. Each task is ONE file with a Config and build(config, survey) -> Task.

    vqa.py                answers to questions about an image, from a vocabulary
    questions.py          reads the questions of a sample; vqa_accuracy.py scores answers as the VQA challenge does
    retrieval.py          ranking by embeddings, then re-ranking by cross-attention
    matching_head.py      the weights of retrieval, and the pairs they are trained on
    hard_negatives.py     negatives drawn from the batch of all processes; negative_captions.py: those that the data holds
    reranking.py          evaluation of two-stage retrieval
    late_interaction.py   similarities of single tokens, as part of a matching score
    captioning.py         sentences about an image, generated token by token
    decoding.py           greedy, beam and nucleus search; caption_metrics.py: CIDEr and BLEU
    classification.py     one or several labels of an image, of an image with a text, or of two images
    labels.py             reads labels and computes classification metrics
    with_contrastive.py   any task with the contrastive loss added

    component = registry.get_component("tasks", config.name)
    task = component.build(config, survey)
    decoders = task.build_decoders(decoders)      what the loader reads from a sample, from the towers' decoders
    model.head = task.build_head(model)           the task's own weights
    task.encode(model, batch), task.loss(...)     pretrain's Objective: fit() trains a task
    task.evaluate(model, shards, setup)           its metrics; `primary_metric` decides which checkpoint is best
    task.predict(model, inputs, masks, trace)     for maps, reports and demonstrations
    task.export_spec()                            which feature of the head is the answer, for exports

A dotted path names a task outside the project (task.name=my.module). May import finetune.model and the layers below it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from finetune.attention.trace import Trace
from finetune.model import Features, FusionModel, Head
from finetune.tasks.questions import Question
from pretrain.config import check_numbers
from pretrain.data import BadSample, loader
from pretrain.data.config import count_samples_once, list_shards_once
from pretrain.data.loader import Batch, EvalLoader
from pretrain.data.sample_json import read_json
from pretrain.data.shards.cache import ShardCache
from pretrain.data.shards.reader import ShardReader
from pretrain.embedding.split import eval_mode
from pretrain.errors import ConfigError, UserError
from pretrain.printable import get_noun
from pretrain.runtime import distributed
from pretrain.strategies import DTYPES

Survey = Callable[[], Iterator[dict[str, Any]]]
"""Iterates over the json of this process's share of the training samples; tasks build vocabularies from it."""


@dataclass
class EvalConfig:
    """Batch size, workers and number of samples of a task's evaluation."""

    batch_size: int = 64
    """Images per batch and process."""
    workers: int = 2
    """Worker processes that read and decode, per process; 0 = the process reads by itself."""
    max_samples: int = 0
    """Number of samples to evaluate, from the first; 0 = all."""

    def check(self) -> None:
        """Refuse values out of range. Raises ConfigError."""
        for name, least in (("batch_size", 1), ("workers", 0), ("max_samples", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"eval.{name}={getattr(self, name)} must be at least {least}")
        check_numbers(self, "eval")


@dataclass
class EvalSetup:
    """Decoders, device, precision and caches of an evaluation."""

    decoders: dict[str, Any]
    """The task's decoders, by modality."""
    device: torch.device
    precision: str = "fp32"
    """Precision of matrix products: fp32, bf16 or fp16."""
    config: EvalConfig = field(default_factory=EvalConfig)
    cache: ShardCache | None = None
    train: Any = None
    """The training shards, from which baselines are computed; None where they are not available."""

    def batches(self, shards: Any, decoders: dict[str, Any] | None = None) -> EvalLoader:
        """Return batches of this process's share of `shards`; each sample occurs once over all processes.

        `decoders` replaces the decoders of this setup. Raises UserError.
        """
        config = self.config
        return loader.build_eval_loader(
            shards,
            self.decoders if decoders is None else decoders,
            config.batch_size,
            workers=config.workers,
            rank=distributed.rank(),
            world=distributed.world_size(),
            max_samples=config.max_samples,
            cache=self.cache,
        )

    def survey(self) -> Iterator[dict[str, Any]]:
        """Iterate over the json of this process's share of all training samples. Raises UserError."""
        return survey(self.train, self.cache)

    @contextmanager
    def inference_mode(self, model: nn.Module) -> Iterator[None]:
        """Run `model` in eval mode without gradients, in `precision`; restore each module's mode at exit."""
        low = self.precision != "fp32"
        cast = torch.autocast(self.device.type, DTYPES[self.precision]) if low else nullcontext()
        with eval_mode(model), torch.inference_mode(), cast:
            yield


def survey(shards: Any, cache: ShardCache | None = None) -> Iterator[dict[str, Any]]:
    """Iterate over the json of this process's share of the samples in `shards`, without reading images.

    Samples whose json cannot be read are skipped: training and evaluation count them. Raises UserError.
    """
    paths = list_shards_once(shards, "data.train")
    cache = cache or ShardCache()
    counts = count_samples_once(paths, cache, "data.train")
    reader = ShardReader(paths, cache, counts, max_open=8)
    begin, end = (sum(counts) * r // distributed.world_size() for r in (distributed.rank(), distributed.rank() + 1))
    first = 0  # index of the shard's first sample among all samples
    for shard, count in enumerate(counts):
        for sample in range(max(begin - first, 0), min(end - first, count)):
            try:
                values = read_json(reader.read(shard, sample, ["json", "cls"]).members)
            except BadSample:
                continue
            if isinstance(values, dict):
                yield values
        first += count


@dataclass
class Prediction:
    """The predictions for a batch, and the scores that maps explain."""

    best: list[list[tuple[str, float]]]
    """For each row the predictions with their probability or score, best first."""
    score: Tensor
    """(rows,), with its graph where gradients are on: the score of the best prediction, or of the given text."""
    has_probabilities: bool = True
    """Whether the numbers in `best` are probabilities; scores have no bounds, and only their order has a meaning."""


@dataclass(frozen=True)
class ExportSpec:
    """Describes the exported output of a head, for programs that use it without this project."""

    feature: str
    """Name of the head's feature that is exported."""
    probabilities: Literal["softmax", "sigmoid"]
    """Function that turns the feature into probabilities; of retrieval with score=sum, among pairs of equal similarity."""
    names: list[str]
    """Name of each column; [] for a single number."""
    more: dict[str, Any] = field(default_factory=dict)
    """Further entries of task.json that are needed to use the output."""


class Task:
    """Base class of all tasks; an Objective, so that pretrain's fit() trains it."""

    primary_metric: ClassVar[str]
    """Metric of evaluate() that decides which checkpoint is `best`; higher is better."""
    chance: ClassVar[str] = ""
    """What evaluate() gives as chance_NAME beside a metric, in a few words; empty where it gives none."""
    text_is_question: ClassVar[bool] = False
    """Whether the texts are questions about the image."""
    subject: str = "image"
    """The modality that the texts are about, for example image or audio: that of the model's `subject`."""
    can_split: bool = True
    """Whether encode() of a batch is the concatenation of encode() of its chunks, as train.chunks > 1 requires."""

    def describe_chance(self) -> str:
        """Return `chance` with the name of what the texts are about: the sound where the task is written for images."""
        return self.chance.replace("image", get_noun(self.subject))

    def build_decoders(self, towers: dict[str, Any]) -> dict[str, Any]:
        """Build the decoders that turn a sample into inputs and targets of a batch, from the towers' decoders.

        A decoder draws items with train=True and returns all of them with train=False. See pretrain/data/batch.py.
        Raises ConfigError where the model lacks a tower.
        """
        return towers

    def build_head(self, model: FusionModel) -> Head:
        """Build a head with new weights, drawn from torch's global generator. Raises ConfigError."""
        raise NotImplementedError(f"{type(self).__name__}.head")

    def learned_settings(self) -> dict[str, Any]:
        """Return the Config fields learned from data, with which a checkpoint builds the task without data."""
        return {}

    def encode(self, model: nn.Module, batch: Batch) -> Features:
        """Compute the head's features for a batch on the model's device; see Head."""
        features: Features = model(batch.inputs, batch.masks, batch.targets)
        return features

    def loss(self, features: Features, targets: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss () of this process, see `global_weighted_mean`, and scalars to report."""
        raise NotImplementedError(f"{type(self).__name__}.loss")

    def evaluate(self, model: FusionModel, shards: Any, setup: EvalSetup) -> dict[str, float]:
        """Compute the task's metrics on `shards`, the same on every process. Collective. Raises UserError.

        Beside NAME, blind_NAME is the metric of a baseline without the image, and chance_NAME what answers that ignore the
        input would score.
        """
        raise NotImplementedError(f"{type(self).__name__}.evaluate")

    def predict(
        self, model: FusionModel, inputs: dict[str, Tensor], masks: dict[str, Tensor], trace: Trace | None = None, top: int = 5
    ) -> Prediction:
        """Predict from image (b, 3, H, W) and text (b, T), one text per image.

        Args:
            model: the model with this task's head.
            inputs: encoded as the decoders' `encode` and `decode_eval` do.
            masks: {"text": (b, T) bool}.
            trace: where given, the fusion records its attention in it.
            top: number of predictions per row, where a task has several.

        Raises:
            UserError: the task makes no prediction from one image and one text.
        """
        raise UserError(f"{type(self).__module__.rsplit('.', 1)[-1]} makes no prediction from an image and a text")

    def questions(self, values: dict[str, Any]) -> list[Question]:
        """Return the questions in a sample's json, for a task with `text_is_question`."""
        return []

    def export_spec(self) -> ExportSpec:
        """Describe the exported output. Raises UserError where one pass over image and text is not enough."""
        raise UserError(f"{type(self).__module__.rsplit('.', 1)[-1]} does not answer in one pass over an image and a text")


def require_towers(task: str, towers: Collection[str], *needed: str) -> None:
    """Raise ConfigError where a model lacks a tower that a task needs.

    task: its name. towers: the modalities that the model has.
    """
    for name in needed:
        if name not in towers:
            others = [other for other in towers if other != "text"] if name != "text" else []
            hint = f"; fusion.context={others[0]} lets texts attend to {others[0]}" if others else ""
            raise ConfigError(f"task.name={task} needs an {name} tower; the model has {', '.join(towers)}{hint}")


def global_weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """Return this process's term of the weighted mean over the items of ALL processes. Collective.

    It is the weighted sum of the losses (n,) divided by the mean over processes of their total weight. Its mean over
    processes is the global weighted mean. A strategy that averages gradients over processes is therefore exact, even if
    processes hold unequal numbers of items. The result is 0 where no process has any.
    """
    total = distributed.mean(weights.detach().sum())
    return (losses * weights).sum() / total.clamp(min=torch.finfo(losses.dtype).tiny)
