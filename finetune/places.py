"""Where a picture's regions stand, told to whoever asks them: aligned tokens hardly know it.

Contrastive training has little use for places, and what it has no use for fades: of encoders trained on drawn scenes, a
linear map of a region's aligned token told its row (R^2 0.66) but not its column (0.22), and "left of" stayed a guess.
Fourier features (NeRF, arXiv 2003.08934) beside the channels of what is asked, as in Perceiver (arXiv 2103.03206), of
coordinates that span the picture whatever its grid, so that another image size has the same places. May import attention.py.

Shapes: (H, W) grid, N = H W tokens, C width of a token, F frequencies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.attention import Tokens


def channels(frequencies: int) -> int:
    """That many stand beside each token."""
    return 4 * frequencies


def placed(tokens: Tokens, frequencies: int) -> Tokens:
    """(B, N, C) -> (B, N, C + 4 F); zeros for tokens without a grid, which stand nowhere."""
    if not frequencies:
        return tokens
    states = tokens.states
    if tokens.grid is None:
        return tokens._replace(states=F.pad(states, (0, channels(frequencies))))
    where = features(tokens.grid, frequencies, states.device).to(states.dtype)
    where = where.expand(states.shape[0], -1, -1)  # len(states) would fix the batch size in exported graphs
    return tokens._replace(states=torch.cat([states, where], dim=2))


def features(grid: tuple[int, int], frequencies: int, device: torch.device | None = None) -> Tensor:
    """(N, 4 F) float32: sines, then cosines, of pi/2 y and pi/2 x, which run from -1 to 1, times 1, 2, 4, ..."""
    y, x = ((2 * torch.arange(n, device=device) + 1) / n - 1 for n in grid)
    where = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).reshape(-1, 2)
    angles = (where[:, :, None] * (0.5 * math.pi * 2.0 ** torch.arange(frequencies, device=device))).flatten(1)
    return torch.cat([angles.sin(), angles.cos()], dim=1)
