"""Measure grounding: pointing game and attention lift by class of word, controls, exchanged colors.

    evaluate_grounding(tuned, shards, GroundingConfig(), device) -> {"pointing_thing": 0.93, "pointing_thing_low": 0.91, ...}

For every word that names objects (phrases.py), the map of its tokens is compared with the objects' boxes (pointing_game.py).
If all such words of a text name the same objects, the mean map of all its tokens is scored too, as the class `text`.
Controls, on the same words:

    area        a peak at a random cell: the share of cells that would be a hit (the column "chance")
    `centre`    a bell curve in the middle of every image
    untrained   the same encoders with a new fusion and head, zero-initialized projections drawn at random; not for similarity
                maps, which read no fusion
    shuffled    a word of the same class in the text of another image, paired with this image

Counterfactual: a color in a text is exchanged so that it names exactly one other object. `before` and `after` are the shares
of peaks on the object that the color names. `moved` is the share of peaks on the right object both times. `stayed` is the
share of peaks that are still on the first object and not on the second.

The classes `thing` and `colour` and the control `centre` are parts of metric names in saved results, so they stay as they
are spelled. May import probes.py and what that imports.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.table import Table

from finetune.explain.word_maps import METHOD, SIMILARITY, check_method, find_decoders
from finetune.grounding.phrases import WORD_KINDS
from finetune.grounding.pointing_game import bootstrap
from finetune.grounding.probes import SWAP, ImageSizeDecoder, Prober, Record, build_untrained
from finetune.loading import Finetuned
from pretrain.config import SEED, check_numbers
from pretrain.data import loader, vocabulary
from pretrain.data.config import resolve_sources
from pretrain.data.vocabulary import Vocabulary
from pretrain.errors import ConfigError, UserError
from pretrain.model import on_device
from pretrain.runtime import distributed
from pretrain.runtime.agree import gather_or_raise

CONTROLS = ("area", "centre", "untrained", "shuffled")
SWAP_LEVELS = {"moved": "moved_area", "after": "area", "stayed": "stayed_area"}
"""Names of the levels of chance, peaks at random cells, of the shares about exchanged colors."""


@dataclass
class GroundingConfig:
    """Settings of the measurement."""

    method: str = METHOD
    """How maps are computed: raw, rollout, gradcam, relevance or similarity."""
    layer: int | None = None
    """For raw and gradcam: one layer of the fusion, -1 the last; null averages them."""
    texts: int = 4
    """Largest number of texts per image: its captions, or its questions."""
    batch_size: int = 32
    """Images read at a time, and texts passed through the model at a time, per process."""
    workers: int = 0
    """Worker processes that read and decode, per process. 0 reads in the process itself, since maps take far longer."""
    max_samples: int = 0
    """Only the first so many images; 0 = all."""
    controls: bool = True
    """Also run the untrained fusion and shuffled texts, which takes three times as long."""
    resamples: int = 2000
    """Number of bootstrap resamples of the images."""
    seed: int = 0
    """Seed of the untrained fusion and of the bootstrap."""

    def check(self) -> None:
        """Raise ConfigError for an unknown method or a number out of range."""
        check_method(self.method, self.layer)
        for name, least in (("texts", 1), ("batch_size", 1), ("workers", 0), ("max_samples", 0), ("resamples", 100)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {least}")
        check_numbers(self, "grounding", seed=SEED)


def evaluate_grounding(tuned: Finetuned, shards: Any, config: GroundingConfig, device: torch.device) -> dict[str, float]:
    """Measure grounding on shards; every process gets the same result. Collective.

    Moves the model to `device`.

    Returns:
        For each class of words that occurs (thing, `colour`, surface, relation, text): `pointing_CLASS` and `lift_CLASS`, each
        with `_low` and `_high` (95 % interval), the controls as `pointing_CLASS_area` and so on, and the count
        `words_CLASS`. Of exchanged colors: `counterfactual_moved` (with `_low`, `_high`), `_before`, `_after`, `_stayed`,
        and what random peaks score: `_area` after the exchange, `_moved_area`, `_stayed_area`; and their count `swaps`. Also
        `samples`, `bad_samples`.

    Raises:
        ConfigError: a wrong setting.
        UserError: no word in the shards names an object with a box, or the model does not read images and texts.
    """
    config.check()
    image_decoder, text_decoder = find_decoders(tuned.decoders)
    decoders: dict[str, Any] = {"image": image_decoder, "sides": ImageSizeDecoder(image_decoder.max_pixels)}
    if not tuned.task.text_is_question:
        decoders["text"] = text_decoder
    rank, world = distributed.rank(), distributed.world_size()
    batches = loader.build_eval_loader(shards, decoders, config.batch_size, config.workers, rank, world, config.max_samples)
    tuned.model.to(device)
    has_untrained = config.controls and config.method != SIMILARITY
    untrained = build_untrained(tuned, config.seed).to(device) if has_untrained else None
    words = gather_vocabulary(shards, config)
    prober = Prober(tuned, untrained, config.controls, config.method, config.layer, config.batch_size, device, words)

    def measure_local() -> tuple[list[Record], int, int]:
        records: list[Record] = []
        count = 0
        for batch in batches:
            count += len(batch)
            records += prober.measure(batch, config.texts)
        return records, count, batches.bad.total()

    by_rank = gather_or_raise(measure_local)
    records = [record for local_records, _, _ in by_rank for record in local_records]
    count, bad = sum(n for _, n, _ in by_rank), sum(n for _, _, n in by_rank)
    if not records:
        text_field = "questions" if tuned.task.text_is_question else "captions"
        raise UserError(
            f"no word names an object with a box in {count} samples of {shards}: grounding needs {text_field}, and in the json "
            "`objects` with name, color and box"
        )
    return {**summarize_records(records, config.resamples, config.seed), "samples": count, "bad_samples": bad}


def gather_vocabulary(shards: Any, config: GroundingConfig) -> Vocabulary:
    """Load the words for objects from vocabulary.json beside the shards, else collect them.

    Without that file they are all words of the measured samples. Collective: every process gets the same result. Raises
    ConfigError or UserError for shards or files that are not valid.
    """

    def load_local() -> Vocabulary | None:
        return vocabulary.find_vocabulary(path for source in resolve_sources(shards, "data.val") for path in source.shards)

    by_rank = gather_or_raise(load_local)
    present = [words for words in by_rank if words is not None]
    if len(present) == len(by_rank):
        return vocabulary.merge_vocabularies(present)
    rank, world = distributed.rank(), distributed.world_size()
    batches = loader.build_eval_loader(shards, {}, config.batch_size, config.workers, rank, world, config.max_samples)

    def collect_local() -> Vocabulary:
        values = (json.get("objects") for batch in batches for json in batch.targets["json"])
        return vocabulary.vocabulary_from_objects(item for objects in values if isinstance(objects, list) for item in objects)

    return vocabulary.merge_vocabularies([*present, *gather_or_raise(collect_local)])


def summarize_records(records: Sequence[Record], resamples: int = 2000, seed: int = 0) -> dict[str, float]:
    """Average the records over words, with confidence intervals over images for all but the controls."""
    values_of: dict[tuple[str, str], list[tuple[str, float]]] = defaultdict(list)
    for record in records:
        values_of[record.kind, record.measure].append((record.key, record.value))
    metrics: dict[str, float] = {}
    for kind in WORD_KINDS:
        for name in ("pointing", "lift"):
            metrics |= _bootstrap_mean(f"{name}_{kind}", values_of.get((kind, name), []), resamples, seed)
            for control in CONTROLS:
                if values := values_of.get((kind, f"{name}_{control}")):
                    metrics[f"{name}_{kind}_{control}"] = _average(values)
        if words := values_of.get((kind, "pointing")):
            metrics[f"words_{kind}"] = len(words)
    metrics |= _bootstrap_mean("counterfactual_moved", values_of.get((SWAP, "moved"), []), resamples, seed)
    for measure in ("before", "after", "stayed", *SWAP_LEVELS.values()):
        if values := values_of.get((SWAP, measure)):
            metrics[f"counterfactual_{measure}"] = _average(values)
    metrics["swaps"] = len(values_of.get((SWAP, "moved"), []))
    return metrics


def _bootstrap_mean(name: str, values: list[tuple[str, float]], resamples: int, seed: int) -> dict[str, float]:
    if not values:
        return {}
    images = {key: i for i, key in enumerate(dict.fromkeys(key for key, _ in values))}
    image_index = np.array([images[key] for key, _ in values], dtype=np.int64)
    mean, low, high = bootstrap(np.array([value for _, value in values]), image_index, resamples, seed)
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


def _average(values: list[tuple[str, float]]) -> float:
    return float(np.mean([value for _, value in values]))


# ---------------------------------------------------------------------------------------------------------------------
# clipfuse evaluate --task grounding


def evaluate_checkpoint(tuned: Finetuned, shards: Any, config: GroundingConfig, device: torch.device) -> dict[str, Any]:
    """Return the metrics of a checkpoint, with its folder, step, data and method, as plain values."""
    start = time.perf_counter()
    with on_device(tuned.model, tuned.config, device):
        metrics = evaluate_grounding(tuned, shards, config, device)
    return {
        "checkpoint": str(tuned.folder),
        "step": tuned.step,
        "data": shards,
        "tasks": ["grounding"],
        "method": config.method,
        "metrics": metrics,
        "chance": chance_levels(metrics),
        "seconds": round(time.perf_counter() - start, 3),
    }


def chance_levels(metrics: dict[str, float]) -> dict[str, float]:
    """Return what peaks at random cells (pointing, exchanged colors) and a map without contrast (lift) would score."""
    levels = {f"pointing_{kind}": metrics.get(f"pointing_{kind}_area") for kind in WORD_KINDS}
    levels |= {f"lift_{kind}": 1.0 for kind in WORD_KINDS}
    levels |= {f"counterfactual_{share}": metrics.get(f"counterfactual_{level}") for share, level in SWAP_LEVELS.items()}
    return {name: level for name, level in levels.items() if name in metrics and level is not None}


def build_table(result: dict[str, Any]) -> Table:
    """Show a result of evaluate_checkpoint() as a table: percentages, 95 % intervals, chance and the other controls."""
    metrics, chance = result["metrics"], result["chance"]
    title = f"{result['checkpoint']}, step {result['step']:,}: {result['method']} maps"
    caption = f"{int(metrics['samples']):,} images, {int(metrics['swaps']):,} colors exchanged, {result['seconds']:.0f} s"
    table = Table(title=title, caption=caption, min_width=len(title))
    for name in ("measure", "words", "result", "95 %"):
        table.add_column(name, justify="left" if name == "measure" else "right")
    for name in ("chance", *CONTROLS[1:]):
        table.add_column(name, justify="right", style="dim")
    for name, format_value in (("pointing", _format_percent), ("lift", _format_factor)):
        for kind in WORD_KINDS:
            key = f"{name}_{kind}"
            if key in metrics:
                interval = f"{format_value(metrics[f'{key}_low'])} to {format_value(metrics[f'{key}_high'])}"
                levels = [chance.get(key), *(metrics.get(f"{key}_{control}") for control in CONTROLS[1:])]
                controls = ["" if level is None else format_value(level) for level in levels]
                words = "whole text" if kind == "text" else kind
                label = f"pointing, {words}" if name == "pointing" else f"attention lift, {words}"
                table.add_row(label, f"{int(metrics[f'words_{kind}']):,}", format_value(metrics[key]), interval, *controls)
    if "counterfactual_moved" in metrics:
        moved = [metrics[f"counterfactual_moved{end}"] for end in ("", "_low", "_high")]
        by_chance = {share: _format_percent(chance[f"counterfactual_{share}"]) for share in SWAP_LEVELS}
        swapped, interval = f"{int(metrics['swaps']):,}", f"{_format_percent(moved[1])} to {_format_percent(moved[2])}"
        after, stayed = (_format_percent(metrics[f"counterfactual_{share}"]) for share in ("after", "stayed"))
        table.add_row("color exchanged: peak moved", swapped, _format_percent(moved[0]), interval, by_chance["moved"])
        table.add_row("  right object after the exchange", swapped, after, "", by_chance["after"])
        table.add_row("  stayed on the first object", swapped, stayed, "", by_chance["stayed"])
    return table


def _format_percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _format_factor(value: float) -> str:
    return f"{value:.2f}x"
