"""Tasks: what aligned encoders learn to do. A task is ONE file with a Config and build(config, survey) -> Task.

    vqa.py     answers to questions about a picture, from a vocabulary (questions.py reads them, answers.py scores them)
    retrieval.py        embeddings rank, cross-attention looks again (reranking.py); negatives from the batch and foils.py
    captioning.py       sentences about a picture, word after word (generate.py searches, wording.py scores)
    classification.py   one label or several, of a picture, a pair, two pictures with a text (labels.py reads and scores)

    part = registry.get_component("tasks", config.name)
    task = part.build(config, survey)
    decoders = task.decoders(towers' decoders)        what the loader makes of a sample
    model.head = task.head(model)                     the task's own weights
    task.encode(model, batch), task.loss(...)         pretrain's Objective: fit() trains a task
    task.evaluate(model, shards, setting)             its figures; `primary_metric` decides which checkpoint is best
    task.predict(model, inputs, masks, trace)         for maps, reports and demonstrations
    task.export_spec()                                       which feature of the head is its answer, for exports

A dotted path names a task outside the project (task.name=my.module). May import model.py and all before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from finetune.attention.trace import Trace
from finetune.model import Features, FusionModel, Head
from finetune.tasks.questions import Question
from pretrain.data import BadSample, loader
from pretrain.data.config import count_samples_once, resolve_sources
from pretrain.data.loader import Batch, EvalLoader
from pretrain.data.sample_json import read_json
from pretrain.data.shards.cache import ShardCache
from pretrain.data.shards.reader import ShardReader
from pretrain.embedding.split import eval_mode
from pretrain.errors import ConfigError, UserError
from pretrain.runtime import distributed
from pretrain.strategies import DTYPES

Survey = Callable[[], Iterator[dict[str, Any]]]
"""The json of this process's share of the training samples: what a task learns its vocabulary from."""


@dataclass
class EvalConfig:
    """How a task is evaluated."""

    batch_size: int = 64
    """Pictures at a time, per process."""
    workers: int = 2
    """Processes that read and decode, per process; 0 reads in the process itself."""
    max_samples: int = 0
    """Evaluate on the first so many samples only; 0 = all."""

    def check(self) -> None:
        """Raises ConfigError."""
        for name, least in (("batch_size", 1), ("workers", 0), ("max_samples", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"eval.{name}={getattr(self, name)} must be at least {least}")


@dataclass
class Setting:
    """What an evaluation works with."""

    decoders: dict[str, Any]
    """The task's, by modality."""
    device: torch.device
    precision: str = "fp32"
    """Of matrix products: fp32, bf16, fp16."""
    config: EvalConfig = field(default_factory=EvalConfig)
    cache: ShardCache | None = None
    train: Any = None
    """The training shards, for baselines that are learnt from them; None where they are not at hand."""

    def batches(self, shards: Any, decoders: dict[str, Any] | None = None) -> EvalLoader:
        """This process's share of `shards`, each sample once over all processes. Raises UserError."""
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
        """The json of this process's share of the training samples, all of them."""
        return survey(self.train, self.cache)

    @contextmanager
    def measuring(self, model: nn.Module) -> Iterator[None]:
        """Inside, `model` is in eval mode, no graph is kept, and products have `precision`; then each module is as it was."""
        low = self.precision != "fp32"
        cast = torch.autocast(self.device.type, DTYPES[self.precision]) if low else nullcontext()
        with eval_mode(model), torch.inference_mode(), cast:
            yield


def survey(shards: Any, cache: ShardCache | None = None) -> Iterator[dict[str, Any]]:
    """The json of this process's share of the samples in `shards`; pictures are not read. Samples whose json cannot be read
    are passed over: training and evaluation count them. Raises UserError."""
    paths = [path for source in resolve_sources(shards, "data.train") for path in source.shards]
    cache = cache or ShardCache()
    numbers = count_samples_once(paths, cache, "data.train")
    reader = ShardReader(paths, cache, numbers, keep=8)
    begin, end = (sum(numbers) * r // distributed.world_size() for r in (distributed.rank(), distributed.rank() + 1))
    at = 0
    for shard, number in enumerate(numbers):
        for sample in range(max(begin - at, 0), min(end - at, number)):
            try:
                values = read_json(reader.read(shard, sample, ["json"]).members)
            except BadSample:
                continue
            if isinstance(values, dict):
                yield values
        at += number


@dataclass
class Prediction:
    """What a model says about a batch, and the value a map explains."""

    best: list[list[tuple[str, float]]]
    """A row: what is predicted with its probability or score, best first."""
    score: Tensor
    """(rows,) with its graph where gradients are on: of the best of each row, or of what was asked about."""


@dataclass(frozen=True)
class ExportSpec:
    """What a head says of one picture and one text, for those who read its numbers without the task."""

    feature: str
    """Which of the head's features it is."""
    probabilities: Literal["softmax", "sigmoid"]
    """What makes probabilities of it."""
    names: list[str]
    """What each column stands for; [] for a single number."""
    more: dict[str, Any] = field(default_factory=dict)
    """Anything else that is needed to use it."""


class Task:
    """Base of all tasks; an Objective, so that pretrain's fit() trains it."""

    primary_metric: ClassVar[str]
    """The figure of evaluate(), higher is better, that decides `best`."""
    text_is_question: ClassVar[bool] = False
    """Whether its texts are questions about the picture."""
    splits: bool = True
    """Whether encode() of a batch is the concatenation of encode() of its chunks: what train.chunks > 1 needs."""

    def decoders(self, towers: dict[str, Any]) -> dict[str, Any]:
        """What turns a sample into the batch's inputs (and, by their `targets`, targets), from the towers' own decoders.

        A decoder is called with train=True to draw, with train=False to give all there is. See pretrain/data/batch.py.
        """
        return towers

    def head(self, model: FusionModel) -> Head:
        """New weights for this model. Random numbers from torch's global generator."""
        raise NotImplementedError(f"{type(self).__name__}.head")

    def settings(self) -> dict[str, Any]:
        """Fields of the Config to change so that it builds this task without data: what a checkpoint keeps."""
        return {}

    def encode(self, model: nn.Module, batch: Batch) -> Features:
        """The head's features for a batch on the model's device: see Head."""
        features: Features = model(batch.inputs, batch.masks, batch.targets)
        return features

    def loss(self, features: Features, targets: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss () of this process's share, and numbers to report. `per_item` makes a mean of it."""
        raise NotImplementedError(f"{type(self).__name__}.loss")

    def evaluate(self, model: FusionModel, shards: Any, setting: Setting) -> dict[str, float]:
        """The task's figures on `shards`, the same on every process. Collective: `gather_or_raise`."""
        raise NotImplementedError(f"{type(self).__name__}.evaluate")

    def predict(
        self, model: FusionModel, inputs: dict[str, Tensor], masks: dict[str, Tensor], trace: Trace | None = None, top: int = 5
    ) -> Prediction:
        """One text a picture: inputs image (b, 3, H, W) and text (b, T), as the decoders' `encode` and `evaluation` make
        them. Raises UserError for a task that has nothing to say about a picture and a text."""
        raise UserError(f"{type(self).__module__.rsplit('.', 1)[-1]} has no predictions for a picture and a text")

    def questions(self, values: dict[str, Any]) -> list[Question]:
        """What a sample's json asks about its picture, for a task with `text_is_question`."""
        return []

    def export_spec(self) -> ExportSpec:
        """For exports. Raises UserError for a task whose answer does not come from one pass over a picture and a text."""
        raise UserError(f"{type(self).__module__.rsplit('.', 1)[-1]} does not answer in one pass over a picture and a text")


def per_item(losses: Tensor, weights: Tensor) -> Tensor:
    """(n,) losses of this process's items, (n,) weights -> (): the weighted sum over the mean weight of a process.

    The mean over processes of what it returns is the mean over the items of ALL processes: so a strategy that averages
    gradients over processes is exact, however unequal their numbers of items. Collective. 0 where nobody has any.
    """
    total = distributed.mean(weights.detach().sum())
    return (losses * weights).sum() / total.clamp(min=torch.finfo(losses.dtype).tiny)
