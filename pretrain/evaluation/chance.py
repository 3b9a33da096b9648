"""What answers that ignore the input would score: the level beside each metric.

    with_chance(metrics)       the same metrics, and chance_NAME beside each NAME that has such a level
    chance_levels(metrics)     {NAME: level}
    without_chance(metrics)    the metrics alone

Metrics of retrieval and of classification by embeddings have the level of random answers, which follows from the counts in the
metrics (samples, captions, classes). Tasks of fine-tuning measure theirs on the samples and return them as chance_NAME.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

CHANCE = "chance_"
"""Prefix of a level's name in metrics."""


def chance_recall(k: int, candidates: int, right: int = 1) -> float:
    """Return the recall at k of random answers, `right` of the candidates being right.

    It is 1 - C(candidates - right, k) / C(candidates, k), whose quotient is a product of min(k, right) factors.
    """
    if k > candidates - right:
        return 1.0
    few, many = sorted((k, right))
    miss = 1.0
    for i in range(few):
        miss *= (candidates - many - i) / (candidates - i)
        if miss < 1e-20:
            break
    return 1.0 - miss


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
    """Return the level that random answers have by the counts in the metrics; None where they do not tell.

    The metrics may come from a damaged file: a name or a count that makes no sense has no level.
    """
    n, m = _read_count(metrics, "samples"), _read_count(metrics, "captions")
    parts = re.fullmatch(r"(.*?)(?:_top|_?R@)([1-9][0-9]{0,8})(?:_dim\d+)?", name)
    kind, k = (parts[1], int(parts[2])) if parts else (name, 0)
    if kind in ("zero_shot", "linear_probe") and "_top" in name:
        classes = _read_count(metrics, f"{kind}_classes")
        return chance_recall(k, classes) if classes else None
    if not n:
        return None
    captions_of_sample = max(1, round(m / n))
    if parts and "R@" in name and not kind:  # the mean of both directions
        return (chance_recall(k, m, captions_of_sample) + chance_recall(k, n)) / 2 if m else None
    direction = re.fullmatch(r"([a-z0-9]+)_to_([a-z0-9]+?)(_median_rank|_ceiling)?", kind)
    if direction is None or (not m and "text" in direction.groups()):
        return None
    candidates, right = (m, captions_of_sample) if direction[2] == "text" else (n, 1)
    if parts and "R@" in name and not direction[3]:
        return chance_recall(k, candidates, right)
    if direction[3] == "_median_rank":
        return chance_rank(candidates, right)
    if direction[3] == "_ceiling" and (reranked := _read_count(metrics, "rerank_k")):
        return chance_recall(reranked, candidates, right)
    return None


def _read_count(metrics: Mapping[str, float], name: str) -> int:
    """Return a count of the metrics, 0 where there is none."""
    value = metrics.get(name)
    return int(value) if isinstance(value, int | float) and 0 < value < 1e12 else 0
