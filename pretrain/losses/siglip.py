"""SigLIP's loss: a binary classification of every pair, match or no match.

Source: Zhai et al., arXiv:2303.15343.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.losses import PairConfig, average_over_pairs, choose_settings, left_out_mask
from pretrain.losses.sigmoid_tiles import sigmoid_loss
from pretrain.losses.tiles import PairLabels

LOGIT_SCALE: float = math.log(10)
"""Initial value: the logarithm of a scale of 10."""
LOGIT_BIAS: float | None = -10.0
"""Initial value: strongly negative, because nearly all pairs are negatives."""
TAKES = ("weight", "negatives", "incomplete")
"""Settings of `data` that change this loss."""


@dataclass
class Config(PairConfig):
    """Settings of the sigmoid loss."""

    name: str = "siglip"
    """Name of this file."""


class Loss(nn.Module):
    """The sum over all columns of -log sigmoid(+-logit), averaged over rows.

    The sign is plus for partners and minus for negatives. With weights, that of a pair is the mean of those of its two samples:
    each sample's loss is then half of its row and half of its column.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.max_logit: float | None = None

    def forward(
        self, features: dict[str, Tensor], scale: Tensor, bias: Tensor | None, targets: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss () and a report.

        features: {modality: (b, D)}, L2-normalized, and perhaps negatives (b, F, D). scale: (1,), already exponentiated. bias:
        (1,); None means 0.
        """
        logit_bias = torch.zeros_like(scale) if bias is None else bias
        settings = choose_settings(self.config, features, self.max_logit, targets)

        def pair_loss(
            rows: Tensor, columns: Tensor, all_rows: Tensor, all_columns: Tensor, offset: int, labels: PairLabels
        ) -> tuple[Tensor, Tensor]:
            if settings is not None:
                return sigmoid_loss(rows, all_columns, scale, logit_bias, offset, labels, settings)
            return dense_loss(rows, all_columns, scale, logit_bias, offset, labels)

        return average_over_pairs(
            features,
            targets,
            self.config.same_caption,
            pair_loss,
            needs_all_rows=False,
            is_ring=settings is not None and settings.is_ring,
            widths=self.config.matryoshka,
        )


def dense_loss(
    rows: Tensor,
    all_columns: Tensor,
    scale: Tensor,
    bias: Tensor,
    offset: int = 0,
    labels: PairLabels = PairLabels(),  # noqa: B008
) -> tuple[Tensor, Tensor]:
    """Compute the loss by its formula, with the whole (b, B) logits.

    Each rank takes its local rows against all columns, so that together the ranks count every pair once.

    rows: (b, D). all_columns: (B, D), gathered with gradient, then the negatives of `labels`. scale, bias: (1,).
    Returns the loss () and whether each row's partner scores best (b,) bool.
    """
    if not len(rows):  # samples that lack a modality; every process takes part in the backward pass of the gathered features
        return all_columns.sum() * 0 * (scale + bias).sum(), rows.new_ones(0, dtype=torch.bool)
    with torch.autocast(rows.device.type, enabled=False):
        logits = scale * rows @ all_columns.t() + bias  # (b, B)
        mask = left_out_mask(labels, offset)
        if mask is not None:
            logits = logits.masked_fill(mask, -math.inf)
        partner = (torch.arange(len(rows), device=rows.device) + offset)[:, None]
        partner_logits = logits.gather(1, partner)
        signed = (-logits).scatter(1, partner, partner_logits)
        log_likelihoods = F.logsigmoid(signed)
        if labels.weights is not None:
            log_likelihoods = log_likelihoods * ((labels.weights[0][:, None] + labels.weights[1]) / 2)
        loss = -log_likelihoods.sum() / len(rows)
        return loss, partner_logits[:, 0] >= logits.amax(dim=1)


def build(config: Config) -> Loss:
    """Build the loss."""
    return Loss(config)
