"""Retrieval metrics against open_clip's, sorting, and the mean over random orders of ties."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip_train.train import get_clip_metrics

from pretrain.errors import UserError
from pretrain.evaluation.retrieval import answer_ranks, retrieval_metrics


def draw_embeddings(n: int, m: int, width: int = 16, noise: float = 2.0, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Draw images (n, width), captions near their images (m, width), and the image_index (m,).

    Every image has a caption.
    """
    generator = torch.Generator().manual_seed(seed)
    image = F.normalize(torch.randn(n, width, generator=generator), dim=-1)
    image_index = torch.cat([torch.arange(n), torch.randint(n, (m - n,), generator=generator)])
    image_index = image_index[torch.randperm(m, generator=generator)]
    text = F.normalize(image[image_index] + noise * torch.randn(m, width, generator=generator) / 4, dim=-1)
    return image, text, image_index


def rank_by_sorting(scores: np.ndarray, right: list[set[int]], ks: tuple[int, ...]) -> tuple[dict[int, float], list[int]]:
    """Return recall at each of `ks` and the best rank of each row, by sorting in plain Python."""
    ranks = []
    for row, answers in zip(scores, right, strict=True):
        order = sorted(range(len(row)), key=lambda j: -row[j])
        ranks.append(1 + min(order.index(j) for j in answers))
    return {k: float(np.mean([rank <= k for rank in ranks])) for k in ks}, ranks


def test_agrees_with_open_clip() -> None:
    image, text, _ = draw_embeddings(300, 300)
    text = F.normalize(image + torch.randn(300, 16, generator=torch.Generator().manual_seed(1)) / 3, dim=-1)
    reference = get_clip_metrics(image.double(), text.double(), 14.3)
    metrics = retrieval_metrics(image, text, torch.arange(300), tile=77)
    for direction in ("image_to_text", "text_to_image"):
        for k in (1, 5, 10):
            assert metrics[f"{direction}_R@{k}"] == pytest.approx(reference[f"{direction}_R@{k}"], abs=1e-12)
        assert math.floor(metrics[f"{direction}_median_rank"]) == reference[f"{direction}_median_rank"]
    assert 0.1 < metrics["image_to_text_R@1"] < 0.9  # neither trivial nor hopeless


@pytest.mark.parametrize("tile", [1, 7, 64, 4096])
def test_several_captions_against_brute_force(tile: int) -> None:
    image, text, image_index = draw_embeddings(60, 150)
    scores = (image.double() @ text.double().T).numpy()
    captions = [{j for j in range(150) if image_index[j] == i} for i in range(60)]
    to_text, text_ranks = rank_by_sorting(scores, captions, (1, 5, 10))
    to_image, image_ranks = rank_by_sorting(scores.T, [{int(i)} for i in image_index], (1, 5, 10))
    metrics = retrieval_metrics(image, text, image_index, tile=tile)
    for k in (1, 5, 10):
        assert metrics[f"image_to_text_R@{k}"] == pytest.approx(to_text[k], abs=1e-12)
        assert metrics[f"text_to_image_R@{k}"] == pytest.approx(to_image[k], abs=1e-12)
    assert metrics["image_to_text_median_rank"] == np.median(text_ranks)
    assert metrics["text_to_image_median_rank"] == np.median(image_ranks)
    first, second = answer_ranks(image, text, image_index, tile)
    assert first.tolist() == text_ranks
    assert second.tolist() == image_ranks


def test_constant_model_gets_chance() -> None:
    constant = F.normalize(torch.ones(40, 24), dim=-1)
    metrics = retrieval_metrics(constant, constant, torch.arange(40), tile=16)
    for direction in ("image_to_text", "text_to_image"):
        assert metrics[f"{direction}_R@1"] == pytest.approx(1 / 40)
        assert metrics[f"{direction}_R@10"] == pytest.approx(10 / 40)
        assert metrics[f"{direction}_median_rank"] == pytest.approx(20.5)


def test_ties_are_the_mean_over_orders() -> None:
    """With many equal scores, metrics are the mean, over random orders, of sorting as open_clip does."""
    generator = np.random.default_rng(3)
    text = torch.eye(3)[torch.from_numpy(generator.integers(0, 3, 30))]
    image_index = torch.arange(12).repeat(3)[:30]
    image = torch.eye(3)[torch.from_numpy(generator.integers(0, 3, 12))]
    metrics = retrieval_metrics(image, text, image_index, ks=(1, 3))
    scores = (image @ text.T).numpy()
    captions = [{j for j in range(30) if image_index[j] == i} for i in range(12)]
    totals = {1: 0.0, 3: 0.0}
    rounds = 2000
    for _ in range(rounds):
        order = generator.permutation(30)
        right = [{int(np.flatnonzero(order == j)[0]) for j in answers} for answers in captions]
        recall, _ = rank_by_sorting(scores[:, order], right, (1, 3))
        totals = {k: totals[k] + recall[k] for k in totals}
    for k in totals:
        assert metrics[f"image_to_text_R@{k}"] == pytest.approx(totals[k] / rounds, abs=0.015)


def test_equal_captions_of_two_images_stay_two_answers() -> None:
    """Two images with the same caption: each finds its own caption by luck only, whatever the order."""
    image = torch.eye(4)
    text = torch.eye(4)[[0, 0, 2, 3]]
    metrics = retrieval_metrics(image, text, torch.arange(4), ks=(1, 2))
    assert metrics["text_to_image_R@1"] == 3 / 4  # caption 1 equals caption 0 and finds image 0
    # For image 0 the equal caption ties with its own; image 1 resembles none of the four.
    assert metrics["image_to_text_R@1"] == pytest.approx((1 / 2 + 1 / 4 + 1 + 1) / 4, abs=1e-12)


def test_the_order_of_the_data_changes_nothing() -> None:
    image, text, image_index = draw_embeddings(50, 90)
    text[5:20] = text[5]  # ties
    once = retrieval_metrics(image, text, image_index)
    shuffle = torch.randperm(90, generator=torch.Generator().manual_seed(0))
    again = retrieval_metrics(image, text[shuffle], image_index[shuffle], tile=13)
    assert again == pytest.approx(once, abs=1e-12)


def test_embeddings_that_are_not_finite_are_refused() -> None:
    image, text, image_index = draw_embeddings(8, 8)
    text[3, 2] = torch.nan
    with pytest.raises(UserError, match=r"1 of 8 text embeddings are not finite \(first: number 3\)"):
        retrieval_metrics(image, text, image_index)
    with pytest.raises(UserError, match="nothing to rank: 0 image and 0 text embeddings"):
        retrieval_metrics(image[:0], text[:0], image_index[:0])


def test_recall_is_one_where_k_exceeds_the_candidates() -> None:
    image, text, image_index = draw_embeddings(4, 4)
    assert retrieval_metrics(image, text, image_index)["text_to_image_R@10"] == 1.0
