"""Retrieval between two modalities: recall at k and the median rank, in both directions.

    retrieval_metrics(image (n,D), text (m,D), image_index (m,))
        -> {"image_to_text_R@1": 0.62, ..., "text_to_image_median_rank": 2.0}
    retrieval_metrics(audio, text, index, names=("audio", "text")) -> {"audio_to_text_R@1": ...}

An image may have several captions: it counts as found when any of them is among the first k, so its best caption ranks. Each
caption must find its one image. Two images with the same caption stay two: only the caption's own image is right, as in
open_clip.

Ties are resolved by expectation. Where t wrong answers score exactly what the right one scores, each order of the t + 1 is
equally likely. The metrics are the mean over those orders. So a model that gives every image the same embedding gets
R@k = k / n, which is chance. No order of the data can raise it.

Shapes: n = images, m = captions, D = embedding width, q = queries of one direction. The n x m scores exist only tile by tile.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

import torch
from torch import Tensor

from pretrain.errors import UserError

TIE = 1e-9
"""Scores this close are equal: above the noise of float64 sums, far below the resolution of float32 features."""


def list_pairs(modalities: Iterable[str]) -> list[tuple[str, str]]:
    """Return all pairs of modalities; texts, of which a sample may have several, are second."""
    return [(b, a) if a == "text" else (a, b) for a, b in combinations(modalities, 2)]


def retrieval_metrics(
    image: Tensor,
    text: Tensor,
    image_index: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    tile: int = 2048,
    names: tuple[str, str] = ("image", "text"),
) -> dict[str, float]:
    """Return recall at each of `ks` (fractions in [0, 1]) and median ranks (from 1), in both directions.

    Args:
        image: (n, D) L2-normalised embeddings, on the device that computes.
        text: (m, D) L2-normalised embeddings.
        image_index: (m,) int64, the row of `image` that each caption describes; every row must have a caption.
        ks: cut-offs; where k is not below the number of candidates, recall is 1.
        tile: rows and columns of the scores computed at a time (tile x tile float64).
        names: of the two modalities.

    Raises:
        UserError: an embedding is not finite, or there is nothing to rank.
    """
    for name, embeddings in zip(names, (image, text), strict=True):
        check_finite(name, embeddings)
    if len(image) == 0 or len(text) == 0:
        raise UserError(f"nothing to rank: {len(image)} {names[0]} and {len(text)} {names[1]} embeddings")
    image_index = image_index.to(image.device)
    if len(image_index) != len(text) or not torch.equal(
        image_index.unique(), torch.arange(len(image), device=image_index.device)
    ):
        raise AssertionError("image_index must hold a row of image for each caption, and every row of image at least once")
    counts = RankCounts(image, text, image_index, tile)
    metrics: dict[str, float] = {}
    for direction, better, tied_right, tied_wrong in (
        (f"{names[0]}_to_{names[1]}", counts.image_better, counts.image_tied_right, counts.image_tied_wrong),
        (f"{names[1]}_to_{names[0]}", counts.text_better, torch.ones_like(counts.text_better), counts.text_tied_wrong),
    ):
        for k in ks:
            metrics[f"{direction}_R@{k}"] = float(hit_probability(better, tied_right, tied_wrong, k).mean())
        metrics[f"{direction}_median_rank"] = float(expected_rank(better, tied_right, tied_wrong).quantile(0.5))
    return metrics


def answer_ranks(image: Tensor, text: Tensor, image_index: Tensor, tile: int = 2048) -> tuple[Tensor, Tensor]:
    """Return the rank, from 1, of each query's right answer: (n,) for images, (m,) for captions.

    Arguments as for retrieval_metrics(). A tie gives the mean of the ranks it covers, so a rank may be fractional.
    """
    counts = RankCounts(image, text, image_index.to(image.device), tile)
    return (
        expected_rank(counts.image_better, counts.image_tied_right, counts.image_tied_wrong),
        expected_rank(counts.text_better, torch.ones_like(counts.text_better), counts.text_tied_wrong),
    )


def check_finite(name: str, features: Tensor) -> None:
    """Refuse NaN and infinity, whose place in a ranking is arbitrary. Raises UserError."""
    bad = (~features.isfinite().all(dim=-1)).nonzero().flatten()
    if len(bad):
        raise UserError(
            f"{len(bad)} of {len(features)} {name} embeddings are not finite (first: number {int(bad[0])}): "
            "the model has diverged, or its precision overflows; try fp32"
        )


class RankCounts:
    """For each query, how many answers score above the right one and how many tie with it; all float64.

    Images as queries, whose best right caption counts:
        image_better: (n,) captions that score above it.
        image_tied_right: (n,) right captions that tie with it, itself included, so at least 1.
        image_tied_wrong: (n,) wrong captions that tie with it.

    Captions as queries, which have one right image:
        text_better: (m,) images that score above it.
        text_tied_wrong: (m,) wrong images that tie with it.
    """

    def __init__(self, image: Tensor, text: Tensor, image_index: Tensor, tile: int) -> None:
        n, m = len(image), len(text)
        self.image_better, self.image_tied_right, self.image_tied_wrong = torch.zeros(
            3, n, dtype=torch.float64, device=image.device
        )
        self.text_better, self.text_tied_wrong = torch.zeros(2, m, dtype=torch.float64, device=image.device)
        right_score_m = torch.cat(
            [
                (image[index].double() * t.double()).sum(1)
                for t, index in zip(text.split(tile), image_index.split(tile), strict=True)
            ]
        )
        best_score_n = right_score_m.new_full((n,), -torch.inf).scatter_reduce_(0, image_index, right_score_m, "amax")
        self.image_tied_right.scatter_add_(0, image_index, (right_score_m >= best_score_n[image_index] - TIE).double())
        for i in range(0, n, tile):
            rows = image[i : i + tile].double()
            for j in range(0, m, tile):
                scores_nm = rows @ text[j : j + tile].double().T
                above = scores_nm - best_score_n[i : i + tile, None]
                self.image_better[i : i + tile] += (above > TIE).sum(1)
                self.image_tied_wrong[i : i + tile] += (above.abs() <= TIE).sum(1)
                above = scores_nm - right_score_m[j : j + tile]
                self.text_better[j : j + tile] += (above > TIE).sum(0)
                self.text_tied_wrong[j : j + tile] += (above.abs() <= TIE).sum(0)
        # The loop counted the right answers among those that tie.
        self.image_tied_wrong = (self.image_tied_wrong - self.image_tied_right).clamp_(min=0)
        self.text_tied_wrong = (self.text_tied_wrong - 1).clamp_(min=0)


def hit_probability(better: Tensor, right: Tensor, wrong: Tensor, k: int) -> Tensor:
    """Return the probability (q,) that a right answer is among the first k.

    `better` answers (q,) stand above a tie of `right` right ones and `wrong` wrong ones. The probability is one minus the
    chance that all places left for the tie go to wrong ones (hypergeometric distribution).
    """
    places_left = (k - better).clamp(min=0)
    missed = torch.ones_like(better)
    for place in range(k):
        factor = ((wrong - place) / (right + wrong - place).clamp(min=1)).clamp(min=0)
        missed = torch.where(place < places_left, missed * factor, missed)
    return 1 - missed


def expected_rank(better: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
    """Return the expected rank (q,), from 1, of a tie's first right answer; see hit_probability()."""
    return better + 1 + wrong / (right + 1)
