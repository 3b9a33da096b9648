"""CLIP's loss: softmax cross-entropy over the batch in both directions.

Source: Radford et al., arXiv:2103.00020.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.config import check_numbers
from pretrain.errors import ConfigError
from pretrain.losses import average_over_pairs, check_settings, choose_settings, duplicate_mask
from pretrain.losses.softmax_tiles import softmax_loss

LOGIT_SCALE: float = math.log(1 / 0.07)
"""Initial value: the logarithm of the scale that is a temperature of 0.07."""
LOGIT_BIAS: float | None = None
"""None, because a bias would cancel in the softmax."""


@dataclass
class Config:
    """Settings of the softmax loss."""

    name: str = "clip"
    """Name of this file."""
    same_caption: Literal["keep", "ignore"] = "keep"
    """Whether samples with the same caption are negatives of each other: keep, they are; ignore, they are left out."""
    tile: int = 0
    """Rows and columns computed at once, so that memory does not grow with the square of the batch; 0 chooses by size."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Precision of the loss's matrix products; sums are float32. fp32 is exact, and also used where train.precision is bf16 or
    TF32 is allowed. tf32 and bf16 are several times faster on a GPU and NOT exact: gradients differ by about 1e-3 and 1e-2."""
    kernel: Literal["auto", "plain", "fused"] = "auto"
    """plain: torch operations on tiles. fused: Triton kernels, on GPUs only. auto: fused on a GPU that has Triton and for tf32
    and bf16, else plain."""
    exchange: Literal["gather", "ring"] = "gather"
    """How processes see each other's features. gather: each holds all. ring: each holds those of one process at a time, for
    global batches whose features do not fit; the result is the same to rounding."""

    def check(self) -> None:
        """Raise ConfigError for an impossible value."""
        check_settings(self)
        check_numbers(self, "loss")


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

        features: {modality: (b, D)}, L2-normalized. scale: (1,), already exponentiated.
        """
        if bias is not None:
            raise ConfigError("model.logit_bias: the clip loss takes no bias, it would cancel in the softmax; leave it out")
        settings = choose_settings(self.config, features, self.max_logit)

        def pair_loss(
            rows: Tensor, columns: Tensor, all_rows: Tensor, all_columns: Tensor, offset: int, ids: Any
        ) -> tuple[Tensor, Tensor]:
            if settings is not None:
                return softmax_loss(rows, all_columns, scale, offset, ids, settings)
            return dense_loss(rows, columns, all_rows, all_columns, scale, offset, ids)

        return average_over_pairs(
            features,
            targets,
            self.config.same_caption,
            pair_loss,
            needs_all_rows=settings is None,
            is_ring=settings is not None and settings.is_ring,
        )


def dense_loss(
    rows: Tensor,
    columns: Tensor,
    all_rows: Tensor,
    all_columns: Tensor,
    scale: Tensor,
    offset: int = 0,
    ids: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the loss by its formula: local rows against all columns, local columns against all rows.

    The logits (b, B) of both directions are held in memory.

    rows, columns: (b, D). all_rows, all_columns: (B, D), gathered with gradient. scale: (1,). ids: caption hashes (b,)
    and (B,). Returns the loss () and whether each row's partner scores best (b,) bool.
    """
    with torch.autocast(rows.device.type, enabled=False):
        row_logits, column_logits = scale * rows @ all_columns.t(), scale * columns @ all_rows.t()  # (b, B) each
        if ids is not None:
            mask = duplicate_mask(ids, offset)
            row_logits, column_logits = row_logits.masked_fill(mask, -math.inf), column_logits.masked_fill(mask, -math.inf)
        partner = torch.arange(len(rows), device=rows.device) + offset
        loss = (F.cross_entropy(row_logits, partner) + F.cross_entropy(column_logits, partner)) / 2
        is_best = row_logits.gather(1, partner[:, None])[:, 0] >= row_logits.amax(dim=1)
        return loss, is_best


def build(config: Config) -> Loss:
    """Build the loss."""
    return Loss(config)
