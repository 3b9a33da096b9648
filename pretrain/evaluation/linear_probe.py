"""Linear probe of frozen features: multinomial logistic regression by L-BFGS.

    probe = fit(train_features, train_labels, classes)      L2 strength chosen on held-out training samples
    probe.top_k_accuracy(test_features, test_labels)        {"top1": ..., "top5": ...}

The problem is scikit-learn's: minimize  |W|^2 / (2 C) + sum_i -log softmax(W x_i + b)[y_i]  with b unpenalized, on features
standardized by the training set's mean and deviation. The gradient is computed by hand, a chunk of rows at a time, so that the
n x K logits never exist as a whole.

Shapes: n = samples, D = feature width, K = classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.errors import UserError
from pretrain.evaluation.retrieval import check_finite
from pretrain.evaluation.zero_shot import top_k_accuracy

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Inverse L2 strengths C that the sweep tries, strongest regularization first."""
LOGITS_PER_CHUNK = 1 << 22
"""Logits computed at a time."""


@dataclass
class Probe:
    """A fitted classifier of features that are standardized by `mean` and `scale`, (D,) each."""

    weights: Tensor
    """(K, D + 1); the last column is the bias."""
    mean: Tensor
    scale: Tensor
    strength: float
    """The C that the sweep chose."""

    def top_k_accuracy(self, features: Tensor, labels: Tensor, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
        """Return the top-k accuracies, as fractions, on features (n, D) with labels (n,)."""
        return top_k_accuracy(_append_ones((features.double() - self.mean) / self.scale), labels, self.weights, ks)


def index_labels(train: Sequence[Any], test: Sequence[Any]) -> tuple[Tensor, Tensor, int]:
    """Number the classes of two splits together; return the class of each sample, (n,) and (m,), and K.

    3 and "3" are one class, and so are "Cat" and "cat".

    Raises:
        UserError: a sample without a class.
    """
    missing = sum(label is None for label in [*train, *test])
    if missing:
        raise UserError(
            f'{missing} of {len(train) + len(test)} samples have no class: their json needs "label", a number or a name'
        )
    names = [[str(label).strip().lower() for label in labels] for labels in (train, test)]
    index_by_name = {name: i for i, name in enumerate(sorted({*names[0], *names[1]}))}
    ids = [torch.tensor([index_by_name[name] for name in split], dtype=torch.int64) for split in names]
    return ids[0], ids[1], len(index_by_name)


def fit(
    features: Tensor, labels: Tensor, classes: int, strengths: Sequence[float] = STRENGTHS, held_out: float = 0.2, seed: int = 0
) -> Probe:
    """Fit a probe with the strength that is most accurate on held-out samples, then on all samples.

    Args:
        features: (n, D), on the device that computes.
        labels: (n,) int64 below `classes`.
        strengths: the values of C to try; a single one needs no held-out samples.
        held_out: the fraction of the samples that is held out, drawn by `seed` from a generator other than torch's global one.

    Raises:
        UserError: labels of fewer than two classes, too few samples, or a feature that is not finite.
    """
    check_finite("training", features)
    if len(labels) < 2 or len(labels.unique()) < 2:
        raise UserError(
            f"a linear probe needs training samples of at least two classes; the {len(labels)} given ones have fewer"
        )
    features, labels = features.double(), labels.to(features.device)
    mean = features.mean(0)
    scale = features.std(0, unbiased=False)
    scale = torch.where(scale > 0, scale, 1)  # a constant feature becomes 0
    rows = _append_ones((features - mean) / scale)
    strengths = sorted(strengths)
    best, start = strengths[0], None
    if len(strengths) > 1:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).to(rows.device)
        count = max(1, round(held_out * len(rows)))
        validation, training = order[:count], order[count:]
        scores: dict[float, float] = {}
        solutions: dict[float, Tensor] = {}
        for strength in strengths:  # each starts from the solution of the stronger regularization before it
            solutions[strength] = start = solve(rows[training], labels[training], classes, strength, start, tolerance=1e-4)
            scores[strength] = top_k_accuracy(rows[validation], labels[validation], start, (1,))["top1"]
        best = max(strengths, key=lambda strength: scores[strength])  # of equal scores, the strongest regularization
        start = solutions[best]
    return Probe(solve(rows, labels, classes, best, start), mean, scale, best)


def solve(
    rows: Tensor, labels: Tensor, classes: int, strength: float, start: Tensor | None = None, tolerance: float = 1e-7
) -> Tensor:
    """Return the weights (K, D + 1) that minimize the problem, for rows (n, D + 1) that end in 1.

    It stops when no entry of the gradient is above `tolerance`, or after 1000 iterations. The objective is divided by n, which
    leaves the minimizer unchanged. The search scales each variable by the curvature along its axis (L2 plus the
    cross-entropy's at zero weights), so that one tolerance fits every strength.

    Args:
        strength: scikit-learn's C.
        start: (K, D + 1) weights to start from; None = zeros.
    """
    weights = torch.zeros(classes, rows.shape[1], dtype=rows.dtype, device=rows.device) if start is None else start
    decay = rows.new_full((rows.shape[1],), 1 / (strength * len(rows)))
    decay[-1] = 0
    scales = (decay + (classes - 1) / classes**2).rsqrt()
    scaled = weights / scales
    optimizer = torch.optim.LBFGS(
        [scaled],
        max_iter=1000,
        tolerance_grad=tolerance,
        tolerance_change=1e-16,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        weights = scaled * scales
        loss, gradient = _loss(weights, rows, labels)
        scaled.grad = (gradient + decay * weights) * scales
        return float(loss + (decay * weights**2).sum() / 2)

    optimizer.step(closure)
    return scaled.detach() * scales


def _loss(weights: Tensor, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy () and its gradient (K, D + 1), computed in chunks of rows."""
    gradient = torch.zeros_like(weights)
    loss = weights.new_zeros(())
    step = max(1, LOGITS_PER_CHUNK // weights.shape[0])
    for start in range(0, len(rows), step):
        x, y = rows[start : start + step], labels[start : start + step]
        logp = (x @ weights.T).log_softmax(dim=1)
        loss -= logp.gather(1, y[:, None]).sum()
        p = logp.exp_()
        p[torch.arange(len(y), device=p.device), y] -= 1
        gradient += p.T @ x
    return loss / len(rows), gradient / len(rows)


def _append_ones(features: Tensor) -> Tensor:
    """Append a column of ones, whose weight is the bias: (n, D) -> (n, D + 1)."""
    return torch.cat([features, features.new_ones(len(features), 1)], dim=1)
