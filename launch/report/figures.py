"""The texts and numbers of the page: description, facts, recalls with chance levels, and tables."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from launch.report.charts import format_number
from launch.report.run_history import Line, RunHistory
from pretrain.evaluation.chance import chance_levels, without_chance
from pretrain.evaluation.evaluate import name_samples
from pretrain.printable import format_count, get_noun

KS = (1, 5, 10)
_ORDER = ("image_to_text", "text_to_image", "image_to_audio", "audio_to_image", "audio_to_text", "text_to_audio")
"""Directions in the order of the page; those of other towers come last."""


def list_directions(lines: Iterable[Line]) -> list[tuple[str, str]]:
    """Return the directions of which evaluations have recalls: prefixes of metrics, and titles such as "Image → caption"."""
    names = dict.fromkeys(name for line in lines for name in without_chance(read_metrics(line)))
    matches = (re.fullmatch(r"(\w+)_to_(\w+)_R@1", name) for name in names)
    titles = {
        f"{match[1]}_to_{match[2]}": f"{get_noun(match[1]).capitalize()} → {get_noun(match[2])}"
        for match in matches
        if match is not None
    }
    known = [name for name in _ORDER if name in titles]
    return [(name, titles[name]) for name in (*known, *(name for name in titles if name not in known))]


def describe_run(history: RunHistory) -> str:
    """Describe the run in one sentence: the towers, where their weights came from, the loss and the data."""
    image, text = history.get("image.name"), history.get("text.name") or history.get("text.args.model_type")
    audio = history.get("audio.name") or history.get("audio.args.model_type")
    if not image and audio:
        shards = ", ".join(list_shards(history.get("data.train"))) or "unknown data"
        loss = history.get("loss.name", "contrastive")
        return f"{audio} and {text or 'a text tower'} learn to match sounds and captions, with the {loss} loss, on {shards}."
    if not image:
        return "A run whose configuration is missing."
    size = f"{history.get('image.size')} px" if history.get("image.size") else ""
    image_args, text_args = history.get_dict("image.args"), history.get_dict("text.args")
    start = "from existing weights" if history.get("init") else "from scratch"
    has_tag = history.get("image.pretrained") is None and any(mark in image for mark in ".:")  # such names mean weights
    if history.get("image.pretrained") or history.get("image.weights") or has_tag or history.get("text.name"):
        start = "from published weights"
    image_details, text_details = _describe_architecture(image_args, size), _describe_architecture(text_args)
    return (
        f"{image}{image_details} and {text or 'a text tower'}{text_details} learn to match images and captions"
        f"{f', with {audio} sounds as well' if audio else ''}, {start}, "
        f"with the {history.get('loss.name', 'contrastive')} loss, "
        f"on {', '.join(list_shards(history.get('data.train'))) or 'unknown data'}."
    )


def _describe_architecture(args: dict[str, Any], size: str = "") -> str:
    """Describe the architecture that the configuration sets: " (96 px, patch 8, width 192, 4 layers)"."""
    patch, width = args.get("patch_size"), args.get("embed_dim") or args.get("hidden_size")
    depth = args.get("depth") or args.get("num_hidden_layers")
    details = [size, f"patch {patch}" if patch else "", f"width {width}" if width else "", f"{depth} layers" if depth else ""]
    return f" ({', '.join(filter(None, details))})" if any(details) else ""


def build_facts(history: RunHistory, weights: dict[str, int]) -> list[tuple[str, str, str]]:
    """Build the row below the headline: (name, value, note) of each fact."""
    out = [("steps", f"{history.step:,}", f"of {goal:,}" if (goal := _planned_steps(history)) > history.step else "")]
    if history.samples_seen:
        stages = history.get("train.stages")
        note = f"in {len(stages) + 1} stages" if stages else f"{history.get('data.batch_size', '?')} a step"
        out.append(("samples seen", format_number(history.samples_seen), note))
    if history.training_seconds:
        rate = history.samples_seen / history.training_seconds
        out.append(("time on steps", format_duration(history.training_seconds), f"{format_number(rate)} samples/s"))
    if weights:
        towers = ", ".join(f"{name} {format_number(count)}" for name, count in weights.items())
        out.append(("parameters", format_number(sum(weights.values())), towers))
    memory = [line["memory_gib"] for line in history.steps if line.get("memory_gib")]
    if memory:
        out.append(("peak memory", f"{max(memory):.1f} GiB", "of one process"))
    mfu = [line["mfu"] for line in history.steps if line.get("mfu")]
    if mfu:
        out.append(
            ("MFU", f"{100 * sorted(mfu)[len(mfu) // 2]:.0f} %", "median; operations that training needs, over the peak")
        )
    return out


def build_recalls(line: Line) -> list[dict[str, Any]]:
    """Build, for each direction, the recalls with the level of chance, and the median rank."""
    metrics = read_metrics(line)
    levels = chance_levels(metrics)
    out = []
    for direction, title in list_directions([line]):
        rows = []
        for k in KS:
            value, chance = metrics.get(f"{direction}_R@{k}"), levels.get(f"{direction}_R@{k}")
            if value is not None:
                rows.append({"k": k, "value": value, "chance": chance, "times": compare_with_chance(value, chance)})
        rank = f"{direction}_median_rank"
        candidates = int(metrics.get("captions" if direction.endswith("_to_text") else "samples") or 0)
        if rows:
            out.append(
                {"title": title, "rows": rows, "rank": metrics.get(rank), "rank_chance": levels.get(rank), "of": candidates}
            )
    return out


def count_samples(history: RunHistory, line: Line) -> str:
    """Return how many samples an evaluation had, and what they are: "500 images"."""
    modalities = dict.fromkeys(name for direction, _ in list_directions([line]) for name in direction.split("_to_"))
    if modalities:
        noun = name_samples(list(modalities), ["retrieval"])
    else:
        noun = name_samples([name for name in ("image", "audio") if history.get_dict(name)] or ["image"], [])
    return format_count(int(line["val/samples"]), noun) if line.get("val/samples") else ""


def build_width_table(line: Line) -> dict[str, Any] | None:
    """Build the table of recalls by the first dimensions of embeddings, one row a width; None without loss.matryoshka."""
    metrics, directions = read_metrics(line), list_directions([line])
    names = [f"{direction}_R@{k}" for direction, _ in directions for k in KS]
    parts = [name.partition("_dim") for name in metrics]
    widths = sorted({int(width) for name, _, width in parts if name in names and width.isdecimal()})
    if not widths:
        return None
    names = [name for name in names if any(f"{name}_dim{width}" in metrics for width in widths)]
    rows = []
    for width in (*widths, None):
        suffix = "" if width is None else f"_dim{width}"
        values = [metrics.get(f"{name}{suffix}") for name in names]
        head = "all" if width is None else str(width)
        rows.append([head, *("" if value is None else f"{100 * value:.1f}" for value in values)])
    heads = [_shorten(name, directions) for name in names]
    return {"heads": ["dimensions", *heads], "rows": rows}


def _shorten(name: str, directions: list[tuple[str, str]]) -> str:
    """Return the head of a column: I→C R@1 for image_to_text_R@1, with S for sounds."""
    for direction, title in directions:
        first, second = title.split(" → ")
        name = name.replace(direction, f"{first[0]}→{second[0].upper()}")
    return name.replace("_", " ")


def read_metrics(line: Line) -> dict[str, float]:
    """Return the metrics of an evaluation by name, levels of chance included; an empty dict for a training line."""
    return {name.removeprefix("val/"): value for name, value in line.items() if name.startswith("val/") and value is not None}


def build_classification(line: Line) -> list[dict[str, Any]]:
    """Build the zero-shot and linear-probe accuracies, where the run measured them."""
    metrics = read_metrics(line)
    levels = chance_levels(metrics)
    out = []
    for kind, title in (("zero_shot", "Zero-shot classification"), ("linear_probe", "Linear probe")):
        for k in (1, 5):
            value, chance = metrics.get(f"{kind}_top{k}"), levels.get(f"{kind}_top{k}")
            if value is not None:
                out.append(
                    {
                        "title": f"{title}, top {k}",
                        "value": value,
                        "chance": chance,
                        "times": compare_with_chance(value, chance),
                    }
                )
    return out


def compare_with_chance(value: float, chance: float | None) -> str:
    """Say in two digits how many times chance a value is; empty where no chance level is known."""
    return f"{format_number(value / chance, 2)}× chance" if chance and value > 0 else ""


def format_duration(seconds: float) -> str:
    """Format a duration: 75 -> 1 min 15 s; 5400 -> 1 h 30 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    if seconds < 86400:
        return f"{seconds // 3600} h {seconds % 3600 // 60} min"
    return f"{seconds // 86400} d {seconds % 86400 // 3600} h"


def build_evaluation_table(history: RunHistory) -> dict[str, Any]:
    """Build the table of all evaluations, one row a step: recalls in percent."""
    directions = list_directions(history.evaluations)
    names = [f"{direction}_R@{k}" for direction, _ in directions for k in KS] + [
        f"{direction}_median_rank" for direction, _ in directions
    ]
    names = [name for name in names if any(line.get(f"val/{name}") is not None for line in history.evaluations)]
    heads = [_shorten(name, directions) for name in names]
    rows = []
    lines = list(history.evaluations)
    if lines and (levels := chance_levels(read_metrics(lines[-1]))):
        lines.append({"step": None, **{f"val/{name}": level for name, level in levels.items()}})
    for line in lines:
        values = [line.get(f"val/{name}") for name in names]
        cells = [
            "" if value is None else f"{100 * value:.1f}" if "R@" in name else format_number(value)
            for name, value in zip(names, values, strict=True)
        ]
        head = ["chance", ""] if line["step"] is None else [f"{line['step']:,}", format_number(line.get("samples_seen") or 0)]
        rows.append([*head, *cells])
    return {"heads": ["step", "samples", *heads], "rows": rows}


def count_bad_samples(history: RunHistory) -> dict[str, Any]:
    """Return the last training line's counts of bad and filtered samples, by reason."""
    last = history.steps[-1] if history.steps else {}
    reasons = [
        (name.partition("/")[2], int(count))
        for name, count in last.items()
        if name.startswith(("bad/", "filtered/")) and isinstance(count, int | float) and count
    ]
    return {
        "filtered": int(last.get("filtered_samples") or 0),
        "total": int(last.get("bad_samples") or 0),
        "reasons": sorted(reasons, key=lambda pair: -pair[1]),
        "samples_seen": int(last.get("samples_seen") or 0),
    }


MOST_PLACES = 6
"""Places in a run that a sentence names."""


def describe_spikes(history: RunHistory) -> list[str]:
    """Return sentences about loss spikes, rollbacks and skipped steps, with where they were; none where there were none."""
    last = history.steps[-1] if history.steps else {}
    spikes, rollbacks, undone, skipped = (
        int(last.get(name) or 0) for name in ("spikes", "rollbacks", "undone_steps", "skipped")
    )
    sentences = []
    if spikes:
        verb = "was" if spikes == 1 else "were"
        sentences.append(f"{format_count(spikes, 'step')} {verb} a loss spike: {_name_places(history, 'spikes')}.")
    if rollbacks:
        steps = f"the updates of {format_count(undone, 'step')}"
        sentences.append(f"{format_count(rollbacks, 'rollback')} undid {steps}: {_name_places(history, 'rollbacks')}.")
    if skipped:
        verb = "was" if skipped == 1 else "were"
        cause = "the gradient was not finite" + (" or the loss a spike" if history.get("train.on_spike") == "skip" else "")
        where = _name_places(history, "skipped")
        sentences.append(f"{format_count(skipped, 'step')} {verb} skipped because {cause}: {where}.")
    return sentences


def _name_places(history: RunHistory, counter: str) -> str:
    """Name the steps between two log lines in which a counter of the training lines has grown."""
    places, before, count = [], 0, 0.0
    for line in history.steps:
        value = line.get(counter) or 0.0
        if value > count:
            first, last = before + 1, line["step"]
            places.append(f"step {last:,}" if first == last else f"steps {first:,} to {last:,}")
        before, count = line["step"], value
    more = f" and {len(places) - MOST_PLACES:,} places more" if len(places) > MOST_PLACES else ""
    return ", ".join(places[:MOST_PLACES]) + more


def list_environment(history: RunHistory) -> list[tuple[str, str]]:
    """List environment.json as (key, text)."""
    rows = []
    for key, value in history.environment.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {version}" for name, version in value.items())
        elif isinstance(value, list):
            value = ", ".join(str(item) for item in value) or "none"
        rows.append((key, str(value)))
    return rows


def _planned_steps(history: RunHistory) -> int:
    """Return the length of the run in steps; 0 where it depends on the size of the data (train.epochs) or on stages."""
    steps, samples, batch = (history.get_int(key) for key in ("train.steps", "train.samples", "data.batch_size"))
    return steps or (math.ceil(samples / batch) if samples and batch and not history.get("train.stages") else 0)


def format_command(history: RunHistory) -> str:
    """Return the command that started the run, as a person types it."""
    program, _, arguments = str(history.environment.get("command") or "clipfuse pretrain CONFIG").partition(" ")
    if program.endswith(("launch/cli.py", "launch/cli/__main__.py", "launch/api/__main__.py")):
        program = "clipfuse"
    elif program.endswith("/__main__.py"):
        program = f"python -m {program.split('/')[-2]}"
    return f"{program} {arguments}".strip()


def list_shards(value: Any) -> list[str]:
    """List the shards that a value of data.train or data.val names.

    The value is a string, or a list of strings or of {shards, weight}.
    """
    if isinstance(value, dict):
        return list_shards(value.get("shards"))
    if isinstance(value, list):
        return [name for item in value for name in list_shards(item)]
    return [str(value)] if value else []
