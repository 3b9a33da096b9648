"""What a model can do, measured: retrieval, zero-shot classification, a linear probe.

    evaluate(model, decoders, shards, config, device) -> {"image_to_text_R@1": 0.42, ..., "samples": 5000}

    embed.py                                          a split through the towers, streamed
    retrieval.py   zero_shot.py   linear_probe.py     the figures, from embeddings alone

The model is left as it was found (each module's train or eval mode), and no global random generator is drawn from. All
figures are fractions in [0, 1], except ranks and counts. Only rank 0 holds the embeddings of the whole split.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table

from pretrain.checkpoints.loading import LoadedModel
from pretrain.data import loader
from pretrain.data.shards.cache import ShardCache
from pretrain.embedding import dataset
from pretrain.embedding.split import EmbeddedSplit, build_text_encoder, embed_split
from pretrain.errors import ConfigError, UserError, closest
from pretrain.evaluation import linear_probe, zero_shot
from pretrain.evaluation.retrieval import chance, retrieval
from pretrain.model import DualEncoder
from pretrain.runtime import distributed
from pretrain.runtime.agree import on_main

__all__ = ["TASKS", "EmbeddedSplit", "EvalConfig", "embed_split", "evaluate", "retrieval", "run", "summary"]

TASKS = ("retrieval", "zero_shot", "linear_probe")


@dataclass
class EvalConfig:
    """What is measured, and how."""

    tasks: list[str] = field(default_factory=lambda: ["retrieval"])
    """What is measured: retrieval, zero_shot, linear_probe. The last two need a class for each picture."""
    batch_size: int = 256
    """Pictures encoded at a time, per process."""
    workers: int = 2
    """Processes that read and decode, per process; 0 reads in the process itself."""
    max_samples: int = 0
    """Evaluate on the first so many samples only; 0 = all."""
    classes: str = "imagenet"
    """Names of the classes: imagenet, scenes, a file with one name a line, or the names with commas between."""
    templates: list[str] = field(default_factory=lambda: list(zero_shot.TEMPLATES))
    """Sentences that name a class, {} where its name goes; their embeddings are averaged."""
    label: str = "label"
    """Field of a sample's json that holds its class: a number from 0, or a name."""
    probe_train: str | None = None
    """Shards whose pictures and classes the linear probe learns from; it is judged on the evaluated ones."""

    def check(self) -> None:
        """Refuses unknown tasks, sizes below their least, templates without a place for the name."""
        for task in self.tasks:
            if task not in TASKS:
                raise ConfigError(f"no evaluation {task!r}{closest(task, list(TASKS))}; the choices are {', '.join(TASKS)}")
        for name, least in (("batch_size", 1), ("workers", 0), ("max_samples", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"eval.{name}={getattr(self, name)} must be at least {least}")
        zero_shot.check_templates(self.templates)
        if "linear_probe" in self.tasks and not self.probe_train:
            raise ConfigError("linear_probe learns from labelled pictures: give their shards as eval.probe_train")


def evaluate(
    model: DualEncoder,
    decoders: Mapping[str, Any],
    shards: Any,
    config: EvalConfig,
    device: torch.device,
    precision: str = "fp32",
    cache: ShardCache | None = None,
    embedded: EmbeddedSplit | None = None,
) -> dict[str, float]:
    """The figures of config.tasks on `shards`; the same dict on every process. Collective.

    Args:
        decoders: by modality, for evaluation.
        shards: what data.val may say.
        precision: of the towers' matrix products: fp32, bf16, fp16.
        cache: where fetched shards and indices go.
        embedded: the samples of `shards`, where they are embedded already.

    Besides the figures: `samples` (pictures scored), `captions`, and `bad_samples` (left out because of their content).

    Raises:
        UserError: nothing to score, embeddings that are not finite, labels that do not fit the classes.
    """
    wants_text, wants_pooled = "retrieval" in config.tasks, "linear_probe" in config.tasks
    if wants_pooled and not config.probe_train:
        raise ConfigError("linear_probe learns from labelled pictures: give their shards as eval.probe_train")

    def embed(where: Any, texts: bool) -> tuple[EmbeddedSplit, int]:
        batches = loader.build_eval_loader(
            where,
            # Pictures for classification need no caption.
            {name: each for name, each in decoders.items() if name == "image" or (texts and name == "text")},
            config.batch_size,
            workers=config.workers,
            rank=distributed.rank(),
            world=distributed.world_size(),
            max_samples=config.max_samples,
            cache=cache,
        )
        embedded = embed_split(model, batches, decoders, device, precision, texts, wants_pooled, config.label)
        bad: Counter[str] = sum(distributed.gather_objects(Counter(batches.bad)), Counter())
        return embedded, sum(bad.values())

    split, bad = (embedded, 0) if embedded is not None else embed(shards, wants_text)
    train = embed(config.probe_train, False)[0] if wants_pooled and config.probe_train else None
    weights = None
    names: list[str] = []
    if "zero_shot" in config.tasks:
        names = zero_shot.class_names(config.classes)
        encode = build_text_encoder(model, decoders, device, precision, config.batch_size)
        weights = zero_shot.classifier(names, config.templates, encode)

    def figures() -> dict[str, float]:
        if len(split.image) == 0:
            raise UserError(f"no sample to evaluate in {shards}: {bad} were left out because of their content")
        out: dict[str, float] = {"samples": len(split.image), "captions": len(split.text), "bad_samples": bad}
        if wants_text:
            out |= retrieval(split.image.to(device), split.text.to(device), split.image_index)
        if weights is not None:
            labels = zero_shot.label_ids(split.labels, names)
            scores = zero_shot.top_k(split.image.to(device), labels, weights.to(device))
            out |= {f"zero_shot_{name}": value for name, value in scores.items()}
            out["zero_shot_classes"] = len(names)
        if train is not None:
            train_labels, labels, classes = linear_probe.label_ids(train.labels, split.labels)
            probe = linear_probe.fit(train.pooled.to(device), train_labels, classes)
            scores = probe.top_k(split.pooled.to(device), labels)
            out |= {f"linear_probe_{name}": value for name, value in scores.items()}
            out |= {"linear_probe_train_samples": len(train.image), "linear_probe_C": probe.strength}
        return out

    return on_main(figures)


def run(loaded: LoadedModel, shards: Any, config: EvalConfig, device: torch.device, precision: str = "fp32") -> dict[str, Any]:
    """`evaluate` of a checkpoint, with what was measured on what: plain values, for --json and `summary`.

    Args:
        loaded: what checkpoint.load_model gives: model, decoders, folder, step.
        shards: what data.val may say, or a folder that `clipfuse embed` wrote with this model.
    """
    begin = time.perf_counter()
    embedded = None
    if dataset.is_embedding_folder(shards):
        if "linear_probe" in config.tasks:
            raise ConfigError(f"linear_probe learns from the image tower's own output, which {shards} lacks: give shards")
        embedded = dataset.load(shards, loaded, config.label)
    model = loaded.model.to(device)
    metrics = evaluate(model, loaded.decoders, shards, config, device, precision, embedded=embedded)
    return {
        "checkpoint": str(loaded.folder),
        "step": loaded.step,
        "data": shards,
        "tasks": list(config.tasks),
        "metrics": metrics,
        "chance": _chances(metrics),
        "seconds": round(time.perf_counter() - begin, 3),
    }


def summary(result: dict[str, Any]) -> Table:
    """The result of `run` as a table for people: figures in percent, chance beside them."""
    metrics, blind = result["metrics"], result["chance"]
    caption = f"{int(metrics['samples']):,} pictures"
    if metrics["captions"]:
        caption += f", {int(metrics['captions']):,} captions"
    if metrics["bad_samples"]:
        caption += f", {int(metrics['bad_samples']):,} bad samples left out"
    title = f"{result['checkpoint']}, step {result['step']:,}"
    table = Table(title=title, caption=f"{caption}, {result['seconds']:.0f} s", min_width=len(title))
    table.add_column("measure")
    table.add_column("result", justify="right")
    table.add_column("chance", justify="right", style="dim")
    for name, value in metrics.items():
        if name in ("samples", "captions", "bad_samples"):
            continue
        share = "R@" in name or "_top" in name
        shown = f"{100 * value:.1f} %" if share else f"{value:g}"
        label = name.replace("_R@", " R@").replace("_top", " top-").replace("_", " ")
        table.add_row(label, shown, f"{100 * blind[name]:.1f} %" if name in blind else "")
    return table


def _chances(metrics: dict[str, float]) -> dict[str, float]:
    """What blind answers would score, for the figures that have such a level."""
    n, m, classes = int(metrics["samples"]), int(metrics["captions"]), int(metrics.get("zero_shot_classes", 0))
    out = {}
    for name in metrics:
        way, _, k = name.partition("_R@")
        if k and way == "image_to_text":
            out[name] = chance(int(k), m, max(1, round(m / n)))
        elif k:
            out[name] = chance(int(k), n)
        elif name.startswith("zero_shot_top"):
            out[name] = chance(int(name.removeprefix("zero_shot_top")), classes)
    return out
