"""Windowed attention: an image's tokens attend to their window, and to text appended to the image.

This makes the image's self-attention linear in the pixels. Windows need queries that have a position in the image. Where
words or another image are the queries, attention is dense, which is linear in the pixels anyway. A fusion without
self-attention of an image refuses this context. Liu et al., Swin, arXiv 2103.14030.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from finetune.attention.multihead import Keys, attend
from finetune.attention.trace import Weights
from finetune.context import Queries
from finetune.context.dense import Dense
from finetune.context.tiling import Tiling
from pretrain.config import check_numbers
from pretrain.errors import ConfigError


@dataclass
class Config:
    """Windowed attention: time and memory grow with N x window^2."""

    name: str = "local"
    """This file."""
    window: int = 8
    """Side of a window, tokens; a window as large as the grid is dense attention."""
    shift: bool = True
    """Move the windows by half a side in every second layer, so that information crosses their borders."""

    def check(self) -> None:
        """Raise ConfigError for a window without tokens."""
        if self.window < 1:
            raise ConfigError(f"context.window={self.window} must be at least 1 token")
        check_numbers(self, "context")


class Local(Dense):
    """Windows for self-attention of an image, dense attention for all other queries."""

    needs: ClassVar[Literal["image", "self-attention"]] = "self-attention"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def forward(self, queries: Queries, keys: Keys, exact: bool = False) -> tuple[Tensor, Weights | None]:
        """See Context. Raises ConfigError for an image whose tokens have no grid."""
        grid, N = keys.tokens.grid, keys.grid_size
        if not queries.is_self:
            return super().forward(queries, keys, exact)
        if grid is None:
            raise ConfigError("context.name=local needs the image's grid; patch dropout breaks it: use context.name=dense")
        tiling = Tiling(grid, self.config.window, self.config.shift and queries.layer % 2 == 1)

        q_BRHPD = tiling.split(queries.q)
        k, v = (_append_rest(tiling.split(t[:, :, :N]), t[:, None, :, N:]) for t in keys.project_all())
        out_BRHPD, used = attend(q_BRHPD, k, v, _build_mask(tiling, keys), exact)
        out = tiling.join(out_BRHPD)
        return out, None if used is None else Weights(used, lambda w: _expand_weights(w, tiling))


def _append_rest(window_BRHPD: Tensor, rest_B1HTD: Tensor) -> Tensor:
    """Append the T tokens that follow the image to every window."""
    if not rest_B1HTD.shape[3]:
        return window_BRHPD
    return torch.cat([window_BRHPD, rest_B1HTD.expand(-1, window_BRHPD.shape[1], -1, -1, -1)], dim=3)


def _build_mask(tiling: Tiling, keys: Keys) -> Tensor | None:
    """Return (B or 1, R, 1, P or 1, P + T) bool, or None where nothing in a window is masked."""
    mask, N = keys.tokens.mask, keys.grid_size
    if mask is None and tiling.padded_grid == tiling.grid and not any(tiling.shifts):
        return None
    device, T = keys.tokens.states.device, keys.tokens.states.shape[1] - N
    visible = tiling.build_valid_mask(None if mask is None else mask[:, :N], device)[:, :, None, None, :]
    neighbors = tiling.build_neighbor_mask(device)
    if neighbors is not None:
        visible = visible & neighbors[:, None]
    if not T:
        return visible
    rest = torch.ones(1, T, dtype=torch.bool, device=device) if mask is None else mask[:, N:]
    return torch.cat([visible, rest[:, None, None, None].expand(*visible.shape[:4], T)], dim=4)


def _expand_weights(w_BRHPK: Tensor, tiling: Tiling) -> Tensor:
    """(B, R, H, P, P + T) -> (B, H, N, N + T), zero outside the window."""
    B, R, H, P, _ = w_BRHPK.shape
    image_BRHPRP = w_BRHPK.new_zeros(B, R, H, P, R, P)
    windows = torch.arange(R, device=w_BRHPK.device)
    image_BRHPRP[:, windows, :, :, windows] = w_BRHPK[..., :P].transpose(0, 1)
    cells = image_BRHPRP.flatten(4)[..., tiling.index_cells(w_BRHPK.device)]
    return tiling.join(torch.cat([cells, w_BRHPK[..., P:]], dim=4))


def build(config: Config, width: int) -> Local:
    """Build the context; `width` is unused, because windows have no parameters of their own."""
    return Local(config)
