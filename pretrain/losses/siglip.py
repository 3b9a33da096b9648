"""SigLIP: every pair is a yes-or-no question of its own (Zhai et al., arXiv:2303.15343)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.errors import ConfigError
from pretrain.losses import average_over_pairs, duplicate_mask, is_tiled
from pretrain.losses.tiles import sigmoid_loss

LOGIT_SCALE: float = math.log(10)
"""Logarithm of the scale at the start."""
LOGIT_BIAS: float | None = -10.0
"""At the start nearly all pairs are negatives, and the bias says so."""


@dataclass
class Config:
    """The sigmoid loss."""

    name: str = "siglip"
    """This file."""
    same_caption: Literal["keep", "ignore"] = "keep"
    """ignore: samples with the caption of this one are not its negatives."""
    tile: int = 0
    """Rows and columns computed at once, so that memory does not grow with the square of the batch; 0 chooses by size."""

    def check(self) -> None:
        """Raises ConfigError."""
        if self.tile < 0:
            raise ConfigError(f"loss.tile={self.tile} must be 0 (automatic) or a number of rows")


class Loss(nn.Module):
    """The sum over all columns of -log sigmoid(+-logit), averaged over rows."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, features: dict[str, Tensor], scale: Tensor, bias: Tensor | None, targets: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """features {modality: (b, D)} normalised, scale (1,) exponentiated, bias (1,) -> loss (), report."""
        shift = torch.zeros_like(scale) if bias is None else bias
        tile = self.config.tile
        large = is_tiled(next(iter(features.values())).shape[0], tile)

        def one(
            rows: Tensor, columns: Tensor, all_rows: Tensor, all_columns: Tensor, offset: int, ids: Any
        ) -> tuple[Tensor, Tensor]:
            if large:
                return sigmoid_loss(rows, all_columns, scale, shift, offset, ids, tile)
            return dense_loss(rows, all_columns, scale, shift, offset, ids)

        return average_over_pairs(features, targets, self.config.same_caption, one, both=False)


def dense_loss(
    rows: Tensor,
    all_columns: Tensor,
    scale: Tensor,
    bias: Tensor,
    offset: int = 0,
    ids: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The formula as it is written. Over all ranks, local rows against all columns are all pairs, each once."""
    with torch.autocast(rows.device.type, enabled=False):
        logits = scale * rows @ all_columns.t() + bias  # (b, B)
        if ids is not None:
            logits = logits.masked_fill(duplicate_mask(ids, offset), -math.inf)
        partner = (torch.arange(len(rows), device=rows.device) + offset)[:, None]
        own = logits.gather(1, partner)
        signed = (-logits).scatter(1, partner, own)
        loss = -F.logsigmoid(signed).sum() / len(rows)
        return loss, own[:, 0] >= logits.amax(dim=1)


def build(config: Config) -> Loss:
    """The loss."""
    return Loss(config)
