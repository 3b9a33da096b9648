"""CLIP's loss: softmax cross-entropy over the batch in both directions.

Source: Radford et al., arXiv:2103.00020.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.errors import ConfigError
from pretrain.losses import PairConfig, average_over_pairs, choose_settings, left_out_mask
from pretrain.losses.softmax_tiles import softmax_loss
from pretrain.losses.tiles import PairLabels

LOGIT_SCALE: float = math.log(1 / 0.07)
"""Initial value: the logarithm of the scale that is a temperature of 0.07."""
LOGIT_BIAS: float | None = None
"""None, because a bias would cancel in the softmax."""
TAKES = ("weight", "negatives", "incomplete")
"""Settings of `data` that change this loss."""


@dataclass
class Config(PairConfig):
    """Settings of the softmax loss."""

    name: str = "clip"
    """Name of this file."""


class Loss(nn.Module):
    """The cross-entropies of image to text and text to image, averaged over directions and rows."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.max_logit: float | None = None

    def forward(
        self, features: dict[str, Tensor], scale: Tensor, bias: Tensor | None, targets: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss () and a report. Raises ConfigError where the model has a logit bias.

        features: {modality: (b, D)}, L2-normalized, and perhaps negatives (b, F, D), which are columns of the images only
        (Yuksekgonul et al., arXiv:2210.01936). scale: (1,), already exponentiated.
        """
        if bias is not None:
            raise ConfigError("model.logit_bias: the clip loss takes no bias, it would cancel in the softmax; leave it out")
        settings = choose_settings(self.config, features, self.max_logit, targets)

        def pair_loss(
            rows: Tensor, columns: Tensor, all_rows: Tensor, all_columns: Tensor, offset: int, labels: PairLabels
        ) -> tuple[Tensor, Tensor]:
            if settings is not None:
                return softmax_loss(rows, all_columns, scale, offset, labels, settings)
            return dense_loss(rows, columns, all_rows, all_columns, scale, offset, labels)

        return average_over_pairs(
            features,
            targets,
            self.config.same_caption,
            pair_loss,
            needs_all_rows=settings is None,
            is_ring=settings is not None and settings.is_ring,
            widths=self.config.matryoshka,
        )


def dense_loss(
    rows: Tensor,
    columns: Tensor,
    all_rows: Tensor,
    all_columns: Tensor,
    scale: Tensor,
    offset: int = 0,
    labels: PairLabels = PairLabels(),  # noqa: B008
) -> tuple[Tensor, Tensor]:
    """Compute the loss by its formula: local rows against all columns, local columns against all rows.

    The logits (b, B) of both directions are held in memory.

    rows, columns: (b, D). all_rows, all_columns: (B, D), gathered with gradient; after the columns come the negatives of
    `labels`. scale: (1,). Returns the loss () and whether each row's partner scores best (b,) bool.
    """
    if not len(rows):  # samples that lack a modality; every process takes part in the backward pass of the gathered features
        return (all_rows.sum() + all_columns.sum()) * 0 * scale.sum(), rows.new_ones(0, dtype=torch.bool)
    with torch.autocast(rows.device.type, enabled=False):
        row_logits, column_logits = scale * rows @ all_columns.t(), scale * columns @ all_rows.t()  # (b, B) each
        mask = left_out_mask(labels, offset)
        if mask is not None:
            row_logits = row_logits.masked_fill(mask, -math.inf)
            column_logits = column_logits.masked_fill(mask[:, : len(all_rows)], -math.inf)
        partner = torch.arange(len(rows), device=rows.device) + offset
        if labels.weights is None:
            loss = (F.cross_entropy(row_logits, partner) + F.cross_entropy(column_logits, partner)) / 2
        else:
            losses = [F.cross_entropy(logits, partner, reduction="none") for logits in (row_logits, column_logits)]
            loss = (labels.weights[0] * (losses[0] + losses[1])).mean() / 2
        is_best = row_logits.gather(1, partner[:, None])[:, 0] >= row_logits.amax(dim=1)
        return loss, is_best


def build(config: Config) -> Loss:
    """Build the loss."""
    return Loss(config)
