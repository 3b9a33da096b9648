"""How much a linear classifier reads from frozen features: multinomial logistic regression by L-BFGS.

    probe = fit(train_features, train_labels, classes)      L2 strength chosen on a held-out part of train
    probe.top_k(test_features, test_labels)                 {"top1": ..., "top5": ...}

The problem solved is scikit-learn's: minimise  |W|^2 / (2 C) + sum_i -log softmax(W x_i + b)[y_i]  with b unpenalised, on
features standardised by the training set's mean and deviation. The gradient is written out, so that rows go through in
pieces and the n x classes table never exists whole.

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
from pretrain.evaluation.zero_shot import top_k

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # inverse L2 strengths C that the sweep tries, strongest first
ROWS = 1 << 22  # numbers in the table of logits held at a time


@dataclass
class Probe:
    """A fitted classifier: `weights` (K, D + 1), the last column the bias, for features standardised by `mean`, `scale`."""

    weights: Tensor
    mean: Tensor
    scale: Tensor
    strength: float
    """The C that the sweep chose."""

    def top_k(self, features: Tensor, labels: Tensor, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
        """Accuracy of the first k answers on (n, D) features with (n,) labels, as fractions."""
        return top_k(_with_one((features.double() - self.mean) / self.scale), labels, self.weights, ks)


def label_ids(train: Sequence[Any], test: Sequence[Any]) -> tuple[Tensor, Tensor, int]:
    """((n,), (m,), K): the classes of both splits numbered together; 3 and "3", "Cat" and "cat" are one class.

    Raises:
        UserError: a sample without a class.
    """
    missing = sum(label is None for label in [*train, *test])
    if missing:
        raise UserError(
            f'{missing} of {len(train) + len(test)} samples have no class: their json needs "label", a number or a name'
        )
    words = [[str(label).strip().lower() for label in labels] for labels in (train, test)]
    known = {word: i for i, word in enumerate(sorted({*words[0], *words[1]}))}
    ids = [torch.tensor([known[word] for word in some], dtype=torch.int64) for some in words]
    return ids[0], ids[1], len(known)


def fit(
    features: Tensor, labels: Tensor, classes: int, strengths: Sequence[float] = STRENGTHS, held_out: float = 0.2, seed: int = 0
) -> Probe:
    """The probe with the strength that answers the held-out part best, fitted again on everything.

    Args:
        features: (n, D), on the device that computes; labels: (n,) int64 below `classes`.
        strengths: the Cs to try; one of them alone skips the sweep.
        held_out: the fraction of the samples that judges them, drawn by `seed` without touching torch's generator.

    Raises:
        UserError: fewer than two classes seen, too few samples, or a feature that is not finite.
    """
    check_finite("training", features)
    if len(labels) < 2 or len(labels.unique()) < 2:
        raise UserError(
            f"a linear probe needs samples of two classes at least; {len(labels)} training samples do not have them"
        )
    features, labels = features.double(), labels.to(features.device)
    mean = features.mean(0)
    scale = features.std(0, unbiased=False)
    scale = torch.where(scale > 0, scale, 1)  # a feature that never changes stays at 0
    rows = _with_one((features - mean) / scale)
    strengths = sorted(strengths)
    best, start = strengths[0], None
    if len(strengths) > 1:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).to(rows.device)
        held = max(1, round(held_out * len(rows)))
        judge, learn = order[:held], order[held:]
        scores: dict[float, float] = {}
        found: dict[float, Tensor] = {}
        for strength in strengths:  # each starts where the stronger one ended
            found[strength] = start = solve(rows[learn], labels[learn], classes, strength, start, tolerance=1e-4)
            scores[strength] = top_k(rows[judge], labels[judge], start, (1,))["top1"]
        best = max(strengths, key=lambda strength: scores[strength])  # of equals, the strongest
        start = found[best]
    return Probe(solve(rows, labels, classes, best, start), mean, scale, best)


def solve(
    rows: Tensor, labels: Tensor, classes: int, strength: float, start: Tensor | None = None, tolerance: float = 1e-7
) -> Tensor:
    """(K, D + 1) minimiser for rows (n, D + 1) that end in 1; `strength` is scikit-learn's C.

    It stops where no entry of the gradient is above `tolerance`, or after 1000 iterations. The objective is divided by n,
    which leaves the minimiser. The search runs in variables divided by the curvature of their own axis (L2 plus the
    cross-entropy's at the start), so that one tolerance fits every strength.
    """
    weights = torch.zeros(classes, rows.shape[1], dtype=rows.dtype, device=rows.device) if start is None else start
    decay = rows.new_full((rows.shape[1],), 1 / (strength * len(rows)))
    decay[-1] = 0
    axes = (decay + (classes - 1) / classes**2).rsqrt()
    scaled = weights / axes
    optimizer = torch.optim.LBFGS(
        [scaled],
        max_iter=1000,
        tolerance_grad=tolerance,
        tolerance_change=1e-16,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        weights = scaled * axes
        loss, gradient = _loss(weights, rows, labels)
        scaled.grad = (gradient + decay * weights) * axes
        return float(loss + (decay * weights**2).sum() / 2)

    optimizer.step(closure)
    return scaled.detach() * axes


def _loss(weights: Tensor, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy and its gradient (K, D + 1), a piece of the rows at a time."""
    gradient = torch.zeros_like(weights)
    loss = weights.new_zeros(())
    step = max(1, ROWS // weights.shape[0])
    for start in range(0, len(rows), step):
        x, y = rows[start : start + step], labels[start : start + step]
        logp = (x @ weights.T).log_softmax(dim=1)
        loss -= logp.gather(1, y[:, None]).sum()
        p = logp.exp_()
        p[torch.arange(len(y), device=p.device), y] -= 1
        gradient += p.T @ x
    return loss / len(rows), gradient / len(rows)


def _with_one(features: Tensor) -> Tensor:
    return torch.cat([features, features.new_ones(len(features), 1)], dim=1)
