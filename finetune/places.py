"""Where a picture's regions stand, told to whoever asks them: aligned tokens hardly know it.

Contrastive training has little use for places, and what it has no use for fades: of encoders trained on drawn scenes, a
linear map of a region's aligned token told its row (R^2 0.66) but not its column (0.22), and "left of" stayed a guess.
Fourier features as in NeRF (arXiv 2003.08934) and Perceiver (arXiv 2103.03206), of coordinates that span the picture
whatever its grid, so that another image size has the same places. May import attention.py.

Shapes: (H, W) grid, N = H W tokens, C width of a token, F frequencies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from finetune.attention import Gate


class Places(nn.Module):
    """states + gate(features of the places): nothing at first, as of every branch."""

    def __init__(self, width: int, frequencies: int) -> None:
        """`width`: C; `frequencies`: F, half a period over the picture and each twice as fine as the last."""
        super().__init__()
        self.frequencies = frequencies
        self.gate = Gate(2 + 4 * frequencies, width)

    def forward(self, states: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, N, C), row-major -> (B, N, C)."""
        out: Tensor = states + self.gate(features(grid, self.frequencies).to(states))
        return out


def features(grid: tuple[int, int], frequencies: int) -> Tensor:
    """(N, 2 + 4 F) float32: y and x from -1 to 1, and the sine and cosine of pi y / 2, pi x / 2 times 1, 2, 4, ..."""
    y, x = ((2 * torch.arange(n) + 1) / n - 1 for n in grid)
    where = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).reshape(-1, 2)
    angles = where[:, :, None] * (0.5 * math.pi * 2.0 ** torch.arange(frequencies))
    return torch.cat([where, angles.sin().flatten(1), angles.cos().flatten(1)], dim=1)
