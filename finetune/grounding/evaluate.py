"""Do maps find what the words speak of? The pointing game and attention lift by class of word, with controls; and what
happens when a colour in the text is exchanged.

    grounding(tuned, shards, GroundingConfig(), device) -> {"pointing_thing": 0.93, "pointing_thing_low": 0.91, ...}

For every word that speaks of objects (phrases.py) the map of its tokens is held against their boxes (pointing.py); of a text
that speaks of the same objects throughout also the mean map of all its tokens (`text`): what the answer came from.
Controls, on the same words:

    area        a peak anywhere at random: the part of the cells that would be a hit
    centre      a bell in the middle of every picture
    untrained   the same encoders with a new fusion and head, gates opened at random
    shuffled    a word of the same class in the text of another picture, put to this picture

Counterfactual: a colour in a text is exchanged so that it speaks of exactly one other object. `before` and `after` count
peaks of that word's map on the object it speaks of, `moved` those that were right before and after, `stayed` those that
are still on the first object and not on the second. May import probes.py and all before it.
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

from finetune.explain.attribution import METHODS
from finetune.explain.word_maps import METHOD, readers
from finetune.grounding.phrases import KINDS_OF_WORDS
from finetune.grounding.pointing_game import bootstrap
from finetune.grounding.probes import SWAP, Prober, Record, Sides, untrained
from finetune.loading import Finetuned
from pretrain.data import loader, vocabulary
from pretrain.data.config import resolve_sources
from pretrain.data.vocabulary import Vocabulary
from pretrain.errors import ConfigError, UserError, closest
from pretrain.runtime import distributed
from pretrain.runtime.agree import gather_or_raise

CONTROLS = ("area", "centre", "untrained", "shuffled")


@dataclass
class GroundingConfig:
    """What is measured, on how much."""

    method: str = METHOD
    """Of the maps: raw, rollout, gradcam, relevance."""
    layer: int | None = None
    """For raw and gradcam: one layer of the fusion, -1 the last; null averages them."""
    texts: int = 4
    """Texts of a picture at most: its captions, or its questions."""
    batch_size: int = 32
    """Pictures read at a time, and texts run at a time, per process."""
    workers: int = 0
    """Processes that read and decode, per process; 0 reads in the process itself: the maps take far longer."""
    max_samples: int = 0
    """Only the first so many pictures; 0 = all."""
    controls: bool = True
    """Also run the untrained fusion and shuffled texts: three times the work."""
    resamples: int = 2000
    """Bootstrap samples of the pictures."""
    seed: int = 0
    """Of the untrained fusion and of the bootstrap."""

    def check(self) -> None:
        """Raises ConfigError."""
        if self.method not in METHODS:
            near = closest(self.method, list(METHODS))
            raise ConfigError(f"no map method {self.method!r}{near}; the choices are {', '.join(METHODS)}")
        for name, least in (("texts", 1), ("batch_size", 1), ("workers", 0), ("max_samples", 0), ("resamples", 100)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {least}")


def grounding(tuned: Finetuned, shards: Any, config: GroundingConfig, device: torch.device) -> dict[str, float]:
    """The figures, the same on every process; they move the model to `device`. Collective.

    For each class of words that occurs (thing, colour, surface, relation; text: all words of one): `pointing_CLASS` and
    `lift_CLASS`, each with `_low` and `_high` (95 %), the controls as `pointing_CLASS_area` and so on, and `words_CLASS`.
    `counterfactual_moved` (with `_low`, `_high`), `_before`, `_after`, `_stayed`, `_area` (a blind peak after the swap), and
    `swaps`. `samples`, `bad_samples`.

    Raises:
        ConfigError: a wrong setting.
        UserError: no word to point at in the shards, or a model that reads no pictures with words.
    """
    config.check()
    image, text = readers(tuned)
    decoders: dict[str, Any] = {"image": image, "sides": Sides(image.max_pixels)}
    if not tuned.task.text_is_question:
        decoders["text"] = text
    rank, world = distributed.rank(), distributed.world_size()
    batches = loader.build_eval_loader(shards, decoders, config.batch_size, config.workers, rank, world, config.max_samples)
    tuned.model.to(device)
    fresh = untrained(tuned, config.seed).to(device) if config.controls else None
    prober = Prober(tuned, fresh, config.method, config.layer, config.batch_size, device, vocabulary_of(shards, config))

    def share() -> tuple[list[Record], int, int]:
        records: list[Record] = []
        count = 0
        for batch in batches:
            count += len(batch)
            records += prober.records(batch, config.texts)
        return records, count, batches.bad.total()

    shares = gather_or_raise(share)
    records = [record for found, _, _ in shares for record in found]
    count, bad = sum(n for _, n, _ in shares), sum(n for _, _, n in shares)
    if not records:
        reads = "questions" if tuned.task.text_is_question else "captions"
        raise UserError(
            f"no word to point at in {count} samples of {shards}: grounding needs {reads}, and in the json `objects` with "
            "name, color and box"
        )
    return {**figures(records, config.resamples, config.seed), "samples": count, "bad_samples": bad}


def vocabulary_of(shards: Any, config: GroundingConfig) -> Vocabulary:
    """The words for objects: of vocabulary.json beside the shards, else all that the measured samples' objects have.

    The same on every process. Collective. Raises ConfigError, UserError.
    """

    def find() -> Vocabulary | None:
        return vocabulary.find_vocabulary(path for source in resolve_sources(shards, "data.val") for path in source.shards)

    beside = gather_or_raise(find)
    present = [words for words in beside if words is not None]
    if len(present) == len(beside):
        return vocabulary.merge_vocabularies(present)
    rank, world = distributed.rank(), distributed.world_size()
    batches = loader.build_eval_loader(shards, {}, config.batch_size, config.workers, rank, world, config.max_samples)

    def collect() -> Vocabulary:
        values = (json.get("objects") for batch in batches for json in batch.targets["json"])
        return vocabulary.vocabulary_from_objects(item for objects in values if isinstance(objects, list) for item in objects)

    return vocabulary.merge_vocabularies([*present, *gather_or_raise(collect)])


def figures(records: Sequence[Record], resamples: int = 2000, seed: int = 0) -> dict[str, float]:
    """Means over words, with intervals over pictures for what is not a control."""
    found: dict[tuple[str, str], list[tuple[str, float]]] = defaultdict(list)
    for record in records:
        found[record.kind, record.measure].append((record.key, record.value))
    out: dict[str, float] = {}
    for kind in KINDS_OF_WORDS:
        for name in ("pointing", "lift"):
            out |= _interval(f"{name}_{kind}", found.get((kind, name), []), resamples, seed)
            for control in CONTROLS:
                if values := found.get((kind, f"{name}_{control}")):
                    out[f"{name}_{kind}_{control}"] = _mean(values)
        if words := found.get((kind, "pointing")):
            out[f"words_{kind}"] = len(words)
    out |= _interval("counterfactual_moved", found.get((SWAP, "moved"), []), resamples, seed)
    for measure in ("before", "after", "stayed", "area"):
        if values := found.get((SWAP, measure)):
            out[f"counterfactual_{measure}"] = _mean(values)
    out["swaps"] = len(found.get((SWAP, "moved"), []))
    return out


def _interval(name: str, values: list[tuple[str, float]], resamples: int, seed: int) -> dict[str, float]:
    if not values:
        return {}
    pictures = {key: i for i, key in enumerate(dict.fromkeys(key for key, _ in values))}
    image_index = np.array([pictures[key] for key, _ in values], dtype=np.int64)
    mean, low, high = bootstrap(np.array([value for _, value in values]), image_index, resamples, seed)
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


def _mean(values: list[tuple[str, float]]) -> float:
    return float(np.mean([value for _, value in values]))


# ---------------------------------------------------------------------------------------------------------------------
# clipfuse evaluate --task grounding


def run(tuned: Finetuned, shards: Any, config: GroundingConfig, device: torch.device) -> dict[str, Any]:
    """`grounding` of a checkpoint, with what was measured on what: plain values, for --json and `summary`."""
    begin = time.perf_counter()
    metrics = grounding(tuned, shards, config, device)
    return {
        "checkpoint": str(tuned.folder),
        "step": tuned.step,
        "data": shards,
        "tasks": ["grounding"],
        "method": config.method,
        "metrics": metrics,
        "seconds": round(time.perf_counter() - begin, 3),
    }


def summary(result: dict[str, Any]) -> Table:
    """The result of `run` as a table for people: shares in percent, intervals of 95 %, controls beside them."""
    metrics = result["metrics"]
    title = f"{result['checkpoint']}, step {result['step']:,}: {result['method']} maps"
    said = f"{int(metrics['samples']):,} pictures, {int(metrics['swaps']):,} colours exchanged, {result['seconds']:.0f} s"
    table = Table(title=title, caption=said, min_width=len(title))
    for name in ("measure", "words", "result", "95 %"):
        table.add_column(name, justify="left" if name == "measure" else "right")
    for name in CONTROLS:
        table.add_column(name, justify="right", style="dim")
    for name, shown in (("pointing", _percent), ("lift", _times)):
        for kind in KINDS_OF_WORDS:
            key = f"{name}_{kind}"
            if key in metrics:
                interval = f"{shown(metrics[f'{key}_low'])} to {shown(metrics[f'{key}_high'])}"
                controls = [shown(metrics[f"{key}_{c}"]) if f"{key}_{c}" in metrics else "" for c in CONTROLS]
                of = "whole text" if kind == "text" else kind
                label = f"pointing, {of}" if name == "pointing" else f"attention lift, {of}"
                table.add_row(label, f"{int(metrics[f'words_{kind}']):,}", shown(metrics[key]), interval, *controls)
    if "counterfactual_moved" in metrics:
        moved = [metrics[f"counterfactual_moved{end}"] for end in ("", "_low", "_high")]
        area = _percent(metrics["counterfactual_area"])
        swapped, interval = f"{int(metrics['swaps']):,}", f"{_percent(moved[1])} to {_percent(moved[2])}"
        table.add_row("colour exchanged: peak moved", swapped, _percent(moved[0]), interval)
        table.add_row("  right after the exchange", swapped, _percent(metrics["counterfactual_after"]), "", area)
        table.add_row("  stayed on the first", swapped, _percent(metrics["counterfactual_stayed"]), "")
    return table


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _times(value: float) -> str:
    return f"{value:.2f}x"
