"""The words and numbers of the page: headline, recalls beside chance, tables. ViTSpec values, nothing drawn."""

from __future__ import annotations

import math
from typing import Any

from launch.report.charts import number
from launch.report.record import Line, Record
from pretrain.evaluation.retrieval import chance_recall

WAYS = (("image_to_text", "Picture → caption"), ("text_to_image", "Caption → picture"))
KS = (1, 5, 10)


def sentence(record: Record) -> str:
    """One sentence: what learned, from what, by which loss."""
    image, text = record.get("image.name"), record.get("text.name") or record.get("text.args.model_type")
    if not image:
        return "A run whose configuration is missing."
    size = f"{record.get('image.size')} px" if record.get("image.size") else ""
    image_args, text_args = record.get("image.args") or {}, record.get("text.args") or {}
    start = "from given weights" if record.get("init") else "from scratch"
    if record.get("image.pretrained") or record.get("text.name"):
        start = "from published weights"
    return (
        f"{image}{_details(image_args, size)} and {text or 'a text tower'}{_details(text_args)} learn to match pictures and "
        f"captions, {start}, with the {record.get('loss.name', 'contrastive')} loss, "
        f"on {', '.join(shards(record.get('data.train'))) or 'unknown data'}."
    )


def _details(args: dict[str, Any], size: str = "") -> str:
    """What the configuration changed of a named architecture: " (96 px, patch 8, width 192, 4 layers)"."""
    patch, width = args.get("patch_size"), args.get("embed_dim") or args.get("hidden_size")
    depth = args.get("depth") or args.get("num_hidden_layers")
    said = [size, f"patch {patch}" if patch else "", f"width {width}" if width else "", f"{depth} layers" if depth else ""]
    return f" ({', '.join(filter(None, said))})" if any(said) else ""


def facts(record: Record, weights: dict[str, int]) -> list[tuple[str, str, str]]:
    """(name, number, small print) for the row under the headline."""
    out = [("steps", f"{record.step:,}", f"of {goal:,}" if (goal := _goal(record)) > record.step else "")]
    if record.samples_seen:
        out.append(("samples seen", number(record.samples_seen), f"{record.get('data.batch_size', '?')} a step"))
    if record.training_seconds:
        rate = record.samples_seen / record.training_seconds
        out.append(("time on steps", span(record.training_seconds), f"{number(rate)} samples/s"))
    if weights:
        small = ", ".join(f"{name} {number(count)}" for name, count in weights.items())
        out.append(("parameters", number(sum(weights.values())), small))
    memory = [line["memory_gib"] for line in record.steps if line.get("memory_gib")]
    if memory:
        out.append(("peak memory", f"{max(memory):.1f} GiB", "of one process"))
    mfu = [line["mfu"] for line in record.steps if line.get("mfu")]
    if mfu:
        out.append(("MFU", f"{100 * sorted(mfu)[len(mfu) // 2]:.0f} %", "median; executed operations over the peak"))
    return out


def recalls(line: Line) -> list[dict[str, Any]]:
    """For each direction: recalls with what a blind guess scores, and the median rank."""
    n, m = int(line.get("val/samples") or 0), int(line.get("val/captions") or 0)
    out = []
    for way, title in WAYS:
        rows = []
        candidates, right = (m, max(1, round(m / n)) if n else 1) if way == "image_to_text" else (n, 1)
        for k in KS:
            value = line.get(f"val/{way}_R@{k}")
            if value is not None:
                blind = chance_recall(k, candidates, right) if candidates else None
                rows.append({"k": k, "value": value, "chance": blind, "times": times(value, blind)})
        if rows:
            out.append({"title": title, "rows": rows, "rank": line.get(f"val/{way}_median_rank"), "of": candidates})
    return out


def classification(line: Line) -> list[dict[str, Any]]:
    """Zero-shot and linear-probe accuracies, where the run measured them."""
    classes = int(line.get("val/zero_shot_classes") or 0)
    out = []
    for kind, title in (("zero_shot", "Zero-shot classification"), ("linear_probe", "Linear probe")):
        for k in (1, 5):
            value = line.get(f"val/{kind}_top{k}")
            if value is not None:
                blind = min(1.0, k / classes) if kind == "zero_shot" and classes else None
                out.append({"title": f"{title}, top {k}", "value": value, "chance": blind, "times": times(value, blind)})
    return out


def times(value: float, blind: float | None) -> str:
    """How many times chance, in two figures."""
    return f"{number(value / blind, 2)}× chance" if blind and value > 0 else ""


def span(seconds: float) -> str:
    """75 -> 1 min 15 s; 5400 -> 1 h 30 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    if seconds < 86400:
        return f"{seconds // 3600} h {seconds % 3600 // 60} min"
    return f"{seconds // 86400} d {seconds % 86400 // 3600} h"


def evaluation_table(record: Record) -> dict[str, Any]:
    """Every evaluation, one row a step: recalls in percent."""
    names = [f"{way}_R@{k}" for way, _ in WAYS for k in KS] + [f"{way}_median_rank" for way, _ in WAYS]
    names = [name for name in names if any(line.get(f"val/{name}") is not None for line in record.evaluations)]
    heads = [name.replace("image_to_text", "P→C").replace("text_to_image", "C→P").replace("_", " ") for name in names]
    rows = []
    for line in record.evaluations:
        values = [line.get(f"val/{name}") for name in names]
        shown = [
            "" if value is None else f"{100 * value:.1f}" if "R@" in name else number(value)
            for name, value in zip(names, values, strict=True)
        ]
        rows.append([f"{line['step']:,}", number(line.get("samples_seen") or 0), *shown])
    return {"heads": ["step", "samples", *heads], "rows": rows}


def bad_samples(record: Record) -> dict[str, Any]:
    """Samples whose content could not be used and steps that were skipped, as the last training line counts them."""
    last = record.steps[-1] if record.steps else {}
    reasons = [(name.removeprefix("bad/"), int(count)) for name, count in last.items() if name.startswith("bad/") and count]
    return {
        "total": int(last.get("bad_samples") or 0),
        "reasons": sorted(reasons, key=lambda pair: -pair[1]),
        "skipped": int(last.get("skipped") or 0),
        "seen": int(last.get("samples_seen") or 0),
    }


def environment_rows(record: Record) -> list[tuple[str, str]]:
    """environment.json, flattened for reading."""
    rows = []
    for key, value in record.environment.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {version}" for name, version in value.items())
        elif isinstance(value, list):
            value = ", ".join(str(item) for item in value) or "none"
        rows.append((key, str(value)))
    return rows


def _goal(record: Record) -> int:
    """The length of the run in steps, where the configuration says it without knowing the data."""
    steps, samples, batch = (int(record.get(key) or 0) for key in ("train.steps", "train.samples", "data.batch_size"))
    return steps or (math.ceil(samples / batch) if samples and batch else 0)


def command(record: Record) -> str:
    """What started the run, as a person types it."""
    program, _, words = str(record.environment.get("command") or "clipfuse pretrain CONFIG").partition(" ")
    *folders, file = program.split("/")
    names = {"cli.py": "clipfuse", "__main__.py": f"python -m {folders[-1] if folders else 'pretrain'}"}
    return f"{names.get(file, program)} {words}".strip()


def shards(value: Any) -> list[str]:
    """What data.train or data.val says, as the shards it names: a string, or a list of strings or of {shards, weight}."""
    if isinstance(value, dict):
        return shards(value.get("shards"))
    if isinstance(value, list):
        return [name for item in value for name in shards(item)]
    return [str(value)] if value else []
