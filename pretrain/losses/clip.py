"""CLIP: softmax over the batch in both directions (Radford et al., arXiv:2103.00020)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.errors import ConfigError
from pretrain.losses import average_over_pairs, duplicate_mask, is_tiled
from pretrain.losses.tiles import softmax_loss

LOGIT_SCALE: float = math.log(1 / 0.07)
"""Logarithm of the scale at the start, a temperature of 0.07."""
LOGIT_BIAS: float | None = None
"""A bias would cancel in the softmax."""


@dataclass
class Config:
    """The softmax loss."""

    name: str = "clip"
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
    """Mean over rows of the cross-entropy of image to text and text to image, halved."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, features: dict[str, Tensor], scale: Tensor, bias: Tensor | None, targets: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """features {modality: (b, D)} normalised, scale (1,) exponentiated -> loss (), report. Raises ConfigError."""
        if bias is not None:
            raise ConfigError("model.logit_bias: the clip loss has none, it would cancel in the softmax; leave it out")
        tile = self.config.tile
        large = is_tiled(next(iter(features.values())).shape[0], tile)

        def one(
            rows: Tensor, columns: Tensor, all_rows: Tensor, all_columns: Tensor, offset: int, ids: Any
        ) -> tuple[Tensor, Tensor]:
            if large:
                return softmax_loss(rows, all_columns, scale, offset, ids, tile)
            return dense_loss(rows, columns, all_rows, all_columns, scale, offset, ids)

        return average_over_pairs(features, targets, self.config.same_caption, one, both=not large)


def dense_loss(
    rows: Tensor,
    columns: Tensor,
    all_rows: Tensor,
    all_columns: Tensor,
    scale: Tensor,
    offset: int = 0,
    ids: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The formula as it is written: local rows against all columns, local columns against all rows."""
    with torch.autocast(rows.device.type, enabled=False):
        forth, back = scale * rows @ all_columns.t(), scale * columns @ all_rows.t()  # (b, B) each
        if ids is not None:
            same = duplicate_mask(ids, offset)
            forth, back = forth.masked_fill(same, -math.inf), back.masked_fill(same, -math.inf)
        partner = torch.arange(len(rows), device=rows.device) + offset
        loss = (F.cross_entropy(forth, partner) + F.cross_entropy(back, partner)) / 2
        best = forth.gather(1, partner[:, None])[:, 0] >= forth.amax(dim=1)
        return loss, best


def build(config: Config) -> Loss:
    """The loss."""
    return Loss(config)
