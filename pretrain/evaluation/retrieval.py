"""How well pictures and captions find each other: recall at k and the median rank, in both directions.

    retrieval(image (n,D), text (m,D), image_index (m,)) -> {"image_to_text_R@1": 0.62, ..., "text_to_image_median_rank": 2.0}

A picture may have several captions: it counts as found when any of them is (the best one ranks), and each caption must
find its one picture. Two pictures that carry the same words stay two: only the caption's own picture is right, as in
open_clip.

Ties are answered by expectation. Where t wrong answers score exactly what the right one scores, each order of the t + 1
is equally likely, and the figures are the mean over those orders; so a model that gives every picture the same
embedding gets R@k = k / n, which is chance, and no order of the data can lift it.

Shapes: n = pictures, m = captions, D = embedding width. The n x m scores exist only tile by tile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.errors import UserError

TIE = 1e-9  # scores this close are equal: above the noise of float64 sums, far below the resolution of float32 features


def retrieval(
    image: Tensor, text: Tensor, image_index: Tensor, ks: Sequence[int] = (1, 5, 10), tile: int = 2048
) -> dict[str, float]:
    """Recall at each of `ks` (fractions in [0, 1]) and median ranks (from 1), both ways.

    Args:
        image: (n, D) L2-normalised embeddings, on the device that computes.
        text: (m, D) L2-normalised embeddings.
        image_index: (m,) int64, the row of `image` that each caption describes; every row must have a caption.
        ks: cut-offs; beyond the number of candidates recall is 1.
        tile: rows and columns of scores held at a time (tile x tile float64).

    Raises:
        UserError: an embedding is not finite, or there is nothing to rank.
    """
    check_finite("image", image)
    check_finite("text", text)
    if len(image) == 0 or len(text) == 0:
        raise UserError(f"nothing to rank: {len(image)} pictures and {len(text)} captions")
    image_index = image_index.to(image.device)
    if len(image_index) != len(text) or not torch.equal(
        image_index.unique(), torch.arange(len(image), device=image_index.device)
    ):
        raise AssertionError("image_index must name, for each caption, a row of image, and leave no row out")
    counts = RankCounts(image, text, image_index, tile)
    out: dict[str, float] = {}
    for name, better, own, wrong in (
        ("image_to_text", counts.image_better, counts.image_own, counts.image_tied),
        ("text_to_image", counts.text_better, torch.ones_like(counts.text_better), counts.text_tied),
    ):
        for k in ks:
            out[f"{name}_R@{k}"] = float(hit_probability(better, own, wrong, k).mean())
        out[f"{name}_median_rank"] = float(expected_rank(better, own, wrong).quantile(0.5))
    return out


def ranks(image: Tensor, text: Tensor, image_index: Tensor, tile: int = 2048) -> tuple[Tensor, Tensor]:
    """Where the right answers stand: (n,) for pictures asking captions, (m,) for captions asking pictures; from 1.

    A tie gives the mean of the counts it covers, so a rank may be fractional.
    """
    counts = RankCounts(image, text, image_index.to(image.device), tile)
    return (
        expected_rank(counts.image_better, counts.image_own, counts.image_tied),
        expected_rank(counts.text_better, torch.ones_like(counts.text_better), counts.text_tied),
    )


def chance(k: int, candidates: int, right: int = 1) -> float:
    """Recall at k of an answer drawn blindly: 1 - C(candidates - right, k) / C(candidates, k)."""
    if k > candidates - right:
        return 1.0
    return 1.0 - math.comb(candidates - right, k) / math.comb(candidates, k)


def check_finite(name: str, features: Tensor) -> None:
    """Refuses NaN and infinity, which would sort anywhere. Raises UserError."""
    bad = (~features.isfinite().all(dim=-1)).nonzero().flatten()
    if len(bad):
        raise UserError(
            f"{len(bad)} of {len(features)} {name} embeddings are not finite (first: number {int(bad[0])}): "
            "the model has diverged, or its precision overflows; try fp32"
        )


class RankCounts:
    """Counts, per query, of answers that beat the right one and of answers that tie with it; all float64.

    image_better, image_own, image_tied: (n,) captions above the best own one; own ones level with it (1 or more); wrong
    ones level with it. text_better, text_tied: (m,) pictures above the own one, wrong ones level with it.
    """

    def __init__(self, image: Tensor, text: Tensor, image_index: Tensor, tile: int) -> None:
        n, m = len(image), len(text)
        self.image_better, self.image_own, self.image_tied = torch.zeros(3, n, dtype=torch.float64, device=image.device)
        self.text_better, self.text_tied = torch.zeros(2, m, dtype=torch.float64, device=image.device)
        right_m = torch.cat(
            [(image[o].double() * t.double()).sum(1) for t, o in zip(text.split(tile), image_index.split(tile), strict=True)]
        )
        best_n = right_m.new_full((n,), -torch.inf).scatter_reduce_(0, image_index, right_m, "amax")
        self.image_own.scatter_add_(0, image_index, (right_m >= best_n[image_index] - TIE).double())
        for i in range(0, n, tile):
            rows = image[i : i + tile].double()
            for j in range(0, m, tile):
                scores_nm = rows @ text[j : j + tile].double().T
                above = scores_nm - best_n[i : i + tile, None]
                self.image_better[i : i + tile] += (above > TIE).sum(1)
                self.image_tied[i : i + tile] += (above.abs() <= TIE).sum(1)
                above = scores_nm - right_m[j : j + tile]
                self.text_better[j : j + tile] += (above > TIE).sum(0)
                self.text_tied[j : j + tile] += (above.abs() <= TIE).sum(0)
        # The own answers were counted among the level ones.
        self.image_tied = (self.image_tied - self.image_own).clamp_(min=0)
        self.text_tied = (self.text_tied - 1).clamp_(min=0)


def hit_probability(better: Tensor, own: Tensor, wrong: Tensor, k: int) -> Tensor:
    """(q,) probability that one of `own` right answers is among the first k, when `better` stand above the tie of own
    right and `wrong` wrong ones: one minus the chance that the free counts all go to wrong ones (hypergeometric)."""
    free = (k - better).clamp(min=0)
    missed = torch.ones_like(better)
    for place in range(k):
        step = ((wrong - place) / (own + wrong - place).clamp(min=1)).clamp(min=0)
        missed = torch.where(place < free, missed * step, missed)
    return 1 - missed


def expected_rank(better: Tensor, own: Tensor, wrong: Tensor) -> Tensor:
    """(q,) expected place of the first right answer of a tie, from 1."""
    return better + 1 + wrong / (own + 1)
