"""Levels of chance against all orders of a few candidates."""

import itertools

import numpy as np
import pytest

from pretrain.evaluation.chance import chance_levels, chance_rank, chance_recall, with_chance, without_chance


def test_chance_recall_counts_subsets() -> None:
    for candidates, right, k in itertools.product((3, 6), (1, 2), (1, 2, 5)):
        k = min(k, candidates)
        hits = [min(subset) < right for subset in itertools.combinations(range(candidates), k)]
        assert chance_recall(k, candidates, right) == pytest.approx(np.mean(hits))


def test_chance_rank_is_the_median_over_all_orders() -> None:
    for candidates, right in itertools.product((1, 2, 5, 6), (1, 2, 3)):
        right = min(right, candidates)
        ranks = [1 + min(order.index(i) for i in range(right)) for order in itertools.permutations(range(candidates))]
        assert chance_rank(candidates, right) == np.quantile(ranks, 0.5, method="inverted_cdf")


def test_each_metric_has_its_level() -> None:
    metrics = {
        "samples": 10, "captions": 50, "bad_samples": 0, "image_to_text_R@1": 0.4, "text_to_image_R@5": 0.9, "R@1": 0.3,
        "text_to_image_median_rank": 2.0, "zero_shot_top5": 0.9, "zero_shot_classes": 20, "linear_probe_top1": 0.8,
        "linear_probe_classes": 4, "rerank_k": 3, "text_to_image_ceiling": 0.7, "accuracy": 0.6, "chance_accuracy": 0.5,
    }  # fmt: skip
    levels = {
        "image_to_text_R@1": 0.1, "text_to_image_R@5": 0.5, "R@1": 0.1, "text_to_image_median_rank": 5, "zero_shot_top5": 0.25,
        "linear_probe_top1": 0.25, "text_to_image_ceiling": 0.3, "accuracy": 0.5,
    }  # fmt: skip
    assert chance_levels(metrics) == pytest.approx(levels)
    assert chance_levels(with_chance(metrics)) == pytest.approx(levels)
    assert without_chance(with_chance(metrics)) == {name: value for name, value in metrics.items() if name != "chance_accuracy"}
    assert chance_levels({"image_to_text_R@1": 0.4}) == {}  # nothing tells how many candidates there were


@pytest.mark.parametrize(
    "name", ["R@%", "R@", "R@0", "image_to_text_R@x", "zero_shot_top", "text_to_image_R@99999999999", "R@٣"]
)
def test_a_name_from_a_damaged_file_has_no_level(name: str) -> None:
    counts = {"samples": 10.0, "captions": 20.0, "zero_shot_classes": 5.0}
    assert chance_levels({**counts, name: 0.5}) == {}


@pytest.mark.parametrize("count", [float("nan"), float("inf"), -3.0, 1e300])
def test_a_count_from_a_damaged_file_gives_no_level(count: float) -> None:
    assert chance_levels({"samples": count, "captions": count, "R@1": 0.5, "text_to_image_median_rank": 2.0}) == {}


def test_levels_of_a_million_candidates() -> None:
    """Independent reference: each caption of five is equally likely at any of a million ranks."""
    assert chance_recall(10, 10**6, 5) == pytest.approx(1 - (1 - 1e-5) ** 5, rel=1e-4)
    assert chance_rank(10**6) == 500_000
