"""A small convolutional network on spectrograms, for small data and tests.

It normalizes within a sound (GroupNorm), so that a gradient depends on no other sound of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import gcd

import torch
from torch import Tensor, nn


class SpectrogramConv(nn.Module):
    """For each width a 3 x 3 convolution of stride 2 and a residual one.

    Convolutions followed by a mean would hear a melody at any pitch alike: a learned vector for each band tells them apart.

    Shapes: b = sounds, T = frames, F = mel bands; the map has H = F / 2^n bands and W = T / 2^n times, for n widths.
    """

    def __init__(self, widths: Sequence[int], mels: int) -> None:
        super().__init__()
        self.bands = nn.Parameter(torch.zeros(widths[0], (mels + 1) // 2, 1))
        nn.init.normal_(self.bands, std=0.5)
        self.stages = nn.ModuleList(_Stage(before, width) for before, width in pairwise([1, *widths]))
        self.norm = nn.LayerNorm(widths[-1])

    @property
    def block_names(self) -> list[str]:
        """Prefixes of the parameters of each block, in order."""
        return [f"stages.{i}." for i in range(len(self.stages))]

    def forward(self, spectrograms: Tensor) -> tuple[Tensor, Tensor]:
        """Return a map (b, C, H, W) of spectrograms (b, T, F), and its mean (b, C)."""
        x = spectrograms.transpose(1, 2)[:, None]
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i == 0:
                x = x + self.bands
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x, x.mean(dim=(2, 3))


class _Stage(nn.Module):
    """(b, before, H, W) -> (b, width, H / 2, W / 2)."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        groups = gcd(width, max(1, width // 16))
        self.down = nn.Sequential(nn.Conv2d(before, width, 3, 2, padding=1, bias=False), nn.GroupNorm(groups, width), nn.GELU())
        self.mix = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(groups, width), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        out: Tensor = x + self.mix(x)
        return out
