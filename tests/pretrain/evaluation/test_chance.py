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
