"""A picture's tokens see their own window, and any text beside the picture: self-attention linear in the pixels.

Windows need queries that have a place in the picture. Where words ask, or another picture, attention is dense (it is
linear in the pixels anyway); a fusion in which no picture asks itself refuses this context.
Liu et al., Swin, arXiv 2103.14030.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from finetune.attention.multihead import Keys, attend
from finetune.attention.trace import Weights
from finetune.context import Asking
from finetune.context.dense import Dense
from finetune.context.tiling import Tiling
from pretrain.errors import ConfigError


@dataclass
class Config:
    """Windowed attention: time and memory grow with N x window^2."""

    name: str = "local"
    """This file."""
    window: int = 8
    """Side of a window, tokens; as large as the grid it is dense attention."""
    shift: bool = True
    """Every second layer moves the windows by half a side, so that what is seen crosses their borders."""

    def check(self) -> None:
        """Raises ConfigError."""
        if self.window < 1:
            raise ConfigError(f"context.window={self.window} must be at least 1 token")


class Local(Dense):
    """Windows for the picture's own tokens, dense for everybody else."""

    needs: ClassVar[Literal["picture", "self-attention"]] = "self-attention"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def forward(self, asking: Asking, keys: Keys, exact: bool = False) -> tuple[Tensor, Weights | None]:
        """See Context. Raises ConfigError for a picture that has lost its grid."""
        grid, N = keys.tokens.grid, keys.picture
        if not asking.home:
            return super().forward(asking, keys, exact)
        if grid is None:
            raise ConfigError("context.name=local needs the picture's grid; patch dropout breaks it: use context.name=dense")
        tiling = Tiling(grid, self.config.window, self.config.shift and asking.layer % 2 == 1)

        q_BRHPD = tiling.split(asking.q)
        k, v = (_beside(tiling.split(t[:, :, :N]), t[:, None, :, N:]) for t in keys.projected())
        out_BRHPD, used = attend(q_BRHPD, k, v, _visible(tiling, keys), exact)
        out = tiling.join(out_BRHPD)
        return out, None if used is None else Weights(used, lambda w: _spread(w, tiling))


def _beside(window_BRHPD: Tensor, rest_B1HTD: Tensor) -> Tensor:
    """Puts the tokens beside the picture into every window."""
    if not rest_B1HTD.shape[3]:
        return window_BRHPD
    return torch.cat([window_BRHPD, rest_B1HTD.expand(-1, window_BRHPD.shape[1], -1, -1, -1)], dim=3)


def _visible(tiling: Tiling, keys: Keys) -> Tensor | None:
    """(B or 1, R, 1, P or 1, P + T) bool, or None where everything in a window may be seen."""
    mask, N = keys.tokens.mask, keys.picture
    if mask is None and tiling.padded == tiling.grid and not any(tiling.shifts):
        return None
    device, T = keys.tokens.states.device, keys.tokens.states.shape[1] - N
    visible = tiling.valid(None if mask is None else mask[:, :N], device)[:, :, None, None, :]
    together = tiling.together(device)
    if together is not None:
        visible = visible & together[:, None]
    if not T:
        return visible
    beside = torch.ones(1, T, dtype=torch.bool, device=device) if mask is None else mask[:, N:]
    return torch.cat([visible, beside[:, None, None, None].expand(*visible.shape[:4], T)], dim=4)


def _spread(w_BRHPK: Tensor, tiling: Tiling) -> Tensor:
    """(B, R, H, P, P + T) -> (B, H, N, N + T), zero outside the window."""
    B, R, H, P, _ = w_BRHPK.shape
    picture_BRHPRP = w_BRHPK.new_zeros(B, R, H, P, R, P)
    each = torch.arange(R, device=w_BRHPK.device)
    picture_BRHPRP[:, each, :, :, each] = w_BRHPK[..., :P].transpose(0, 1)
    cells = picture_BRHPRP.flatten(4)[..., tiling.places(w_BRHPK.device)]
    return tiling.join(torch.cat([cells, w_BRHPK[..., P:]], dim=4))


def build(config: Config, width: int) -> Local:
    """`width` is not needed: windows have no parameters of their own."""
    return Local(config)
