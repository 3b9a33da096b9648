"""What answers that ignore the input would score: the level beside each metric.

    with_chance(metrics)       the same metrics, and chance_NAME beside each NAME that has such a level
    chance_levels(metrics)     {NAME: level}
    without_chance(metrics)    the metrics alone

Metrics of retrieval and of classification by embeddings have the level of random answers, which follows from the counts in the
metrics (samples, captions, classes). Tasks of fine-tuning measure theirs on the samples and return them as chance_NAME.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

CHANCE = "chance_"
"""Prefix of a level's name in metrics."""


def chance_recall(k: int, candidates: int, right: int = 1) -> float:
    """Return the recall at k of random answers, `right` of the candidates being right.

    It is 1 - C(candidates - right, k) / C(candidates, k).
    """
    if k > candidates - right:
        return 1.0
    return 1.0 - math.comb(candidates - right, k) / math.comb(candidates, k)


def chance_rank(candidates: int, right: int = 1) -> int:
    """Return the median rank, from 1, of the best right answer in a random order: the first k with recall of at least 0.5."""
    low, high = 1, candidates
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if chance_recall(middle, candidates, right) >= 0.5 else (middle + 1, high)
    return low


def chance_levels(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the level of each metric that has one: measured levels, named chance_NAME, and those that follow from counts."""
    levels = {}
    for name in metrics:
        level = metrics.get(CHANCE + name, _derive(name, metrics))
        if level is not None and not name.startswith(CHANCE):
            levels[name] = level
    return levels


def with_chance(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics, and after them chance_NAME for each that has a level."""
    return {**metrics, **{CHANCE + name: level for name, level in chance_levels(metrics).items()}}


def without_chance(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics alone."""
    return {name: value for name, value in metrics.items() if not name.startswith(CHANCE)}


def _derive(name: str, metrics: Mapping[str, float]) -> float | None:
    """Return the level that random answers have by the counts in the metrics; None where they do not tell."""
    n, m = int(metrics.get("samples") or 0), int(metrics.get("captions") or 0)
    for kind in ("zero_shot", "linear_probe"):
        classes = int(metrics.get(f"{kind}_classes") or 0)
        if classes and name.startswith(f"{kind}_top"):
            return chance_recall(int(name.removeprefix(f"{kind}_top")), classes)
    if not n or not m:
        return None
    captions_of_image = max(1, round(m / n))
    if name.startswith("R@"):  # the mean of both directions
        k = int(name.removeprefix("R@"))
        return (chance_recall(k, m, captions_of_image) + chance_recall(k, n)) / 2
    for direction, candidates, right in (("image_to_text", m, captions_of_image), ("text_to_image", n, 1)):
        if name.startswith(f"{direction}_R@"):
            return chance_recall(int(name.removeprefix(f"{direction}_R@")), candidates, right)
        if name == f"{direction}_median_rank":
            return chance_rank(candidates, right)
        if name == f"{direction}_ceiling" and metrics.get("rerank_k"):
            return chance_recall(int(metrics["rerank_k"]), candidates, right)
    return None
