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

from pretrain.losses import PairConfig, average_over_pairs, choose_settings, duplicate_mask
from pretrain.losses.sigmoid_tiles import sigmoid_loss

LOGIT_SCALE: float = math.log(10)
"""Initial value: the logarithm of a scale of 10."""
LOGIT_BIAS: float | None = -10.0
"""Initial value: strongly negative, because nearly all pairs are negatives."""


@dataclass
class Config(PairConfig):
    """Settings of the sigmoid loss."""

    name: str = "siglip"
    """Name of this file."""


class Loss(nn.Module):
    """The sum over all columns of -log sigmoid(+-logit), averaged over rows.

    The sign is plus for partners and minus for negatives.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.max_logit: float | None = None

    def forward(
        self, features: dict[str, Tensor], scale: Tensor, bias: Tensor | None, targets: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss () and a report.

        features: {modality: (b, D)}, L2-normalized. scale: (1,), already exponentiated. bias: (1,); None means 0.
        """
        logit_bias = torch.zeros_like(scale) if bias is None else bias
        settings = choose_settings(self.config, features, self.max_logit)

        def pair_loss(
            rows: Tensor, columns: Tensor, all_rows: Tensor, all_columns: Tensor, offset: int, ids: Any
        ) -> tuple[Tensor, Tensor]:
            if settings is not None:
                return sigmoid_loss(rows, all_columns, scale, logit_bias, offset, ids, settings)
            return dense_loss(rows, all_columns, scale, logit_bias, offset, ids)

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
    ids: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the loss by its formula, with the whole (b, B) logits.

    Each rank takes its local rows against all columns, so that together the ranks count every pair once.

    rows: (b, D). all_columns: (B, D), gathered with gradient. scale, bias: (1,). ids: caption hashes (b,) and (B,).
    Returns the loss () and whether each row's partner scores best (b,) bool.
    """
    with torch.autocast(rows.device.type, enabled=False):
        logits = scale * rows @ all_columns.t() + bias  # (b, B)
        if ids is not None:
            logits = logits.masked_fill(duplicate_mask(ids, offset), -math.inf)
        partner = (torch.arange(len(rows), device=rows.device) + offset)[:, None]
        partner_logits = logits.gather(1, partner)
        signed = (-logits).scatter(1, partner, partner_logits)
        loss = -F.logsigmoid(signed).sum() / len(rows)
        return loss, partner_logits[:, 0] >= logits.amax(dim=1)


def build(config: Config) -> Loss:
    """Build the loss."""
    return Loss(config)
