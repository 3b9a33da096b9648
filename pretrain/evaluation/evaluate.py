"""Evaluate a model on shards: retrieval, zero-shot classification, a linear probe.

    evaluate(model, decoders, shards, config, device) -> {"image_to_text_R@1": 0.42, ..., "samples": 5000}

Samples are embedded by embedding/split.py; retrieval.py, zero_shot.py and linear_probe.py compute metrics from embeddings.

Every module of the model keeps its train or eval mode, and no global random generator is used. All metrics are fractions in
[0, 1], except ranks and counts. Only rank 0 holds the embeddings of the whole split.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from pretrain import model as models
from pretrain.checkpoints.loading import LoadedModel
from pretrain.config import check_numbers
from pretrain.data import loader
from pretrain.data.batch import allow_missing
from pretrain.data.shards.cache import ShardCache
from pretrain.embedding import dataset
from pretrain.embedding.split import EmbeddedSplit, build_text_encoder, choose_classified, embed_split
from pretrain.errors import ConfigError, UserError, closest
from pretrain.evaluation import linear_probe, zero_shot
from pretrain.evaluation.chance import chance_levels, with_chance, without_chance
from pretrain.evaluation.languages import metrics_by_language
from pretrain.evaluation.retrieval import list_pairs, retrieval_metrics
from pretrain.losses import cut_to_width
from pretrain.model import DualEncoder
from pretrain.printable import format_count, get_noun
from pretrain.runtime import distributed
from pretrain.runtime.agree import on_main

__all__ = [
    "TASKS",
    "EmbeddedSplit",
    "EvalConfig",
    "build_result",
    "build_table",
    "embed_split",
    "evaluate",
    "evaluate_checkpoint",
    "name_samples",
    "retrieval_metrics",
]

TASKS = ("retrieval", "zero_shot", "linear_probe")


@dataclass
class EvalConfig:
    """Which metrics are computed on data.val, and how."""

    tasks: list[str] = field(default_factory=lambda: ["retrieval"])
    """Any of retrieval, zero_shot, linear_probe. The last two need a class for each image (or sound)."""
    batch_size: int = 256
    """Samples encoded at a time, per process."""
    workers: int = 2
    """Worker processes that read and decode, per process; 0 = the process reads and decodes itself."""
    max_samples: int = 0
    """Evaluate on this many samples, the first ones; 0 = all."""
    classes: str = "imagenet"
    """Names of the classes: imagenet, scenes, a file with one name a line, or the names separated by commas."""
    templates: list[str] = field(default_factory=lambda: list(zero_shot.TEMPLATES))
    """Sentences that name a class, with {} in place of its name; their embeddings are averaged."""
    label: str = "label"
    """Field of a sample's json that holds its class: a number from 0, or a name."""
    language: str | None = None
    """Field of a sample's json with the language of its captions, a code such as de or pt-BR, or a list of one for each:
    retrieval is measured within each language, too. null = off."""
    probe_train: str | None = None
    """Shards whose samples and classes the linear probe is trained on; its accuracy is measured on the evaluated shards."""

    def check(self) -> None:
        """Refuse unknown tasks, sizes below their minimum, and templates without {}. Raises ConfigError."""
        for task in self.tasks:
            if task not in TASKS:
                raise ConfigError(f"no evaluation {task!r}{closest(task, list(TASKS))}; the choices are {', '.join(TASKS)}")
        for name, minimum in (("batch_size", 1), ("workers", 0), ("max_samples", 0)):
            if getattr(self, name) < minimum:
                raise ConfigError(f"eval.{name}={getattr(self, name)} must be at least {minimum}")
        zero_shot.check_templates(self.templates)
        if "linear_probe" in self.tasks and not self.probe_train:
            raise ConfigError("linear_probe is trained on labeled samples: set eval.probe_train to their shards")
        check_numbers(self, "eval")


def evaluate(
    model: DualEncoder,
    decoders: Mapping[str, Any],
    shards: Any,
    config: EvalConfig,
    device: torch.device,
    precision: str = "fp32",
    cache: ShardCache | None = None,
    embedded: EmbeddedSplit | None = None,
    widths: Sequence[int] = (),
) -> dict[str, float]:
    """Return the metrics of config.tasks on `shards`: the same dict on every process. Collective.

    Args:
        decoders: by modality, for evaluation.
        shards: any value that data.val accepts.
        precision: of the towers' matrix products: fp32, bf16, fp16.
        cache: where fetched shards and indices are stored.
        embedded: the samples of `shards`, if they are embedded already.
        widths: of loss.matryoshka: recall by the first dimensions alone, too, as NAME_dimWIDTH.

    Retrieval is measured between any two of the model's modalities, with three or more on the samples that have both, where
    some lack one. Classified are images, or sounds where there are no images.

    The dict also holds `samples` (samples scored), `captions`, `bad_samples` (left out because of their content), and the level
    of chance of each metric that has one, as chance_NAME.

    Raises:
        UserError: nothing to score, embeddings that are not finite, labels that do not fit the classes.
    """
    needs_text, needs_pooled = "retrieval" in config.tasks, "linear_probe" in config.tasks
    if needs_pooled and not config.probe_train:
        raise ConfigError("linear_probe is trained on labeled samples: set eval.probe_train to their shards")

    if "zero_shot" in config.tasks and "text" not in decoders:
        raise ConfigError("zero_shot names the classes by texts, and the model has no text tower")
    classified = choose_classified(model.towers) if {"zero_shot", "linear_probe"} & set(config.tasks) else ""

    def embed(source: Any, texts: bool) -> tuple[EmbeddedSplit, Counter[str]]:
        # Images for classification need no caption.
        read = {name: decoder for name, decoder in decoders.items() if name == classified or (texts and name in model.towers)}
        if len(read) > 2 and not classified and all(hasattr(decoder, "blank") for decoder in read.values()):
            # Retrieval alone, by decoders that have an item for what is missing: samples may lack modalities.
            read = allow_missing(read, train=False)
        batches = loader.build_eval_loader(
            source,
            read,
            config.batch_size,
            workers=config.workers,
            rank=distributed.rank(),
            world=distributed.world_size(),
            max_samples=config.max_samples,
            cache=cache,
        )
        embedded = embed_split(model, batches, decoders, device, precision, texts, needs_pooled, config.label, config.language)
        return embedded, sum(distributed.gather_objects(Counter(batches.bad)), Counter())

    split, bad = (embedded, Counter[str]()) if embedded is not None else embed(shards, needs_text)
    train = embed(config.probe_train, False)[0] if needs_pooled and config.probe_train else None
    class_weights = None
    names: list[str] = []
    if "zero_shot" in config.tasks:
        names = zero_shot.load_class_names(config.classes)
        encode = build_text_encoder(model, decoders, device, precision, config.batch_size)
        class_weights = zero_shot.build_classifier(names, config.templates, encode)

    def compute_metrics() -> dict[str, float]:
        if len(split) == 0:
            reasons = ", ".join(f"{reason} {n:,}" for reason, n in bad.most_common(5))
            raise UserError(
                f"no sample to evaluate in {shards}: {bad.total()} were left out because of their content ({reasons or 'none'})"
            )
        metrics: dict[str, float] = {"samples": len(split), "captions": split.num_captions, "bad_samples": bad.total()}
        if needs_text:
            for pair in list_pairs(model.towers):
                first, second, index = split.pair(*pair)
                first, second = first.to(device), second.to(device)
                if split.has_gaps:
                    metrics |= _measure_present(pair, first, second, index)
                    if not len(first):
                        continue
                else:
                    metrics |= retrieval_metrics(first, second, index, names=pair)
                for width in widths:
                    cut = retrieval_metrics(cut_to_width(first, width), cut_to_width(second, width), index, names=pair)
                    metrics |= {f"{name}_dim{width}": value for name, value in cut.items() if "_R@" in name}
                if config.language is not None and pair[1] == "text":
                    metrics |= metrics_by_language(first, second, index, split.pair_languages(pair[0]), config.language, pair)
        if class_weights is not None:
            rows, classes_of_rows = split.classified(classified)
            labels = zero_shot.index_labels(classes_of_rows, names)
            scores = zero_shot.top_k_accuracy(rows.to(device), labels, class_weights.to(device))
            metrics |= {f"zero_shot_{name}": value for name, value in scores.items()}
            metrics["zero_shot_classes"] = len(names)
        if train is not None:
            train_labels, labels, classes = linear_probe.index_labels(train.labels, split.labels)
            probe = linear_probe.fit(train.pooled.to(device), train_labels, classes)
            scores = probe.top_k_accuracy(split.pooled.to(device), labels)
            metrics |= {f"linear_probe_{name}": value for name, value in scores.items()}
            metrics |= {"linear_probe_train_samples": len(train), "linear_probe_C": probe.strength}
            metrics["linear_probe_classes"] = classes
        return with_chance(metrics)

    return on_main(compute_metrics)


def _measure_present(pair: tuple[str, str], first: Tensor, second: Tensor, index: Tensor) -> dict[str, float]:
    """Return the metrics of two modalities that not all samples have, with their own levels of chance, and `samples_A_B`."""
    if not len(first):
        return {f"samples_{pair[0]}_{pair[1]}": 0}
    counts = {"samples": len(first), "captions": len(second)}
    metrics = with_chance({**counts, **retrieval_metrics(first, second, index, names=pair)})
    return {f"samples_{pair[0]}_{pair[1]}": len(first), **{name: metrics[name] for name in metrics if name not in counts}}


def evaluate_checkpoint(
    loaded: LoadedModel, shards: Any, config: EvalConfig, device: torch.device, precision: str = "fp32"
) -> dict[str, Any]:
    """Evaluate a loaded checkpoint; return metrics, chance levels, and what was evaluated on what.

    Collective. The result holds plain values only, for --json and build_table().

    Args:
        loaded: the result of checkpoints.loading.load_model(): model, decoders, folder, step.
        shards: any value that data.val accepts, or a folder that `clipfuse embed` wrote with this model.
    """
    begin = time.perf_counter()
    embedded = None
    if dataset.is_embedding_folder(shards):
        if "linear_probe" in config.tasks:
            raise ConfigError(f"linear_probe is trained on a tower's own output, which {shards} does not hold: give shards")
        embedded = dataset.load(shards, loaded, config.label, config.language)
    with models.on_device(loaded.model, loaded.config, device) as model:
        metrics = evaluate(model, loaded.decoders, shards, config, device, precision, embedded=embedded, widths=loaded.widths)
    seconds = round(time.perf_counter() - begin, 3)
    return build_result(loaded.folder, loaded.step, loaded.model.towers, shards, config.tasks, metrics, seconds)


def build_result(
    folder: Path,
    step: int,
    modalities: Iterable[str],
    shards: Any,
    tasks: list[str],
    metrics: dict[str, float],
    seconds: float | None,
) -> dict[str, Any]:
    """Build evaluate_checkpoint()'s result from the metrics of a checkpoint.

    modalities: of the model. seconds: of the evaluation; None = not known.
    """
    return {
        "checkpoint": str(folder),
        "step": step,
        "modalities": list(modalities),
        "data": shards,
        "tasks": list(tasks),
        "metrics": without_chance(metrics),
        "chance": chance_levels(metrics),
        "seconds": seconds,
    }


def name_samples(modalities: Sequence[str], tasks: Sequence[str]) -> str:
    """Return what messages call the evaluated samples: image, sound, or sample where they have several such modalities."""
    others = [name for name in modalities if name != "text"]
    if "retrieval" not in tasks:
        return get_noun(choose_classified(others))
    return get_noun(others[0]) if len(others) == 1 else "sample"


def build_table(result: dict[str, Any]) -> Table:
    """Build a table of evaluate_checkpoint()'s result: metrics in percent, next to the chance levels."""
    metrics, chance = result["metrics"], result["chance"]
    caption = format_count(int(metrics["samples"]), name_samples(result["modalities"], result["tasks"]))
    if metrics["captions"]:
        caption += f", {format_count(int(metrics['captions']), 'caption')}"
    if metrics["bad_samples"]:
        caption += f", {int(metrics['bad_samples']):,} bad samples left out"
    title = f"{result['checkpoint']}, step {result['step']:,}"
    caption += "" if result["seconds"] is None else f", {result['seconds']:.0f} s"
    caption += "; chance: random answers"
    table = Table(title=title, caption=caption, min_width=len(title))
    table.add_column("measure")
    table.add_column("result", justify="right")
    table.add_column("chance", justify="right", style="dim")
    for name, value in metrics.items():
        if name in ("samples", "captions", "bad_samples") or _is_in_detail(name):
            continue
        is_fraction = "R@" in name or "_top" in name
        cells = [f"{100 * x:.1f} %" if is_fraction else f"{x:g}" for x in (value, chance.get(name)) if x is not None]
        label = name.replace("_R@", " R@").replace("_top", " top-").replace("_", " ")
        table.add_row(label, *cells)
    return table


def _is_in_detail(name: str) -> bool:
    """Return whether a metric is one of a language that the table leaves out: it shows recall at 1."""
    is_of_language = re.fullmatch(r"(samples|captions|.*_R@(?!1_)\d+|.*_median_rank)_[A-Za-z0-9-]+", name)
    return is_of_language is not None and "_dim" not in name
