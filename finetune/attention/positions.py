"""Position encodings appended to attention keys: of a region in its image, of a word in its text.

Contrastive training has little use for positions, so encoders hardly keep them. The encodings are Fourier features (NeRF,
arXiv 2003.08934), appended to the channels of the keys as in Perceiver (arXiv 2103.03206). An image's coordinates span it
whatever its grid, so another image size has the same positions. A word's number is encoded as in "Attention Is All You Need"
(arXiv 1706.03762). An encoding is as long as the token it is appended to: shorter ones are learned too late.

Measured:
- Encoders trained on drawn scenes: a linear probe on the aligned token of a region gave its row with R^2 0.66, but its
  column with only 0.22. Questions about "left of" stayed at chance.
- Which of two captions that differ by an exchange of positions belongs to the image, after 390 steps (1,000 pairs, chance
  50 %): 56 % with encodings a quarter as long, 86 % with these for images, 90 % with these for words too.

May import multihead.py. Shapes: (H, W) grid, N = H W tokens, T tokens of a text, C width of a token, F frequencies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from finetune.attention.multihead import Tokens


def count_position_channels(frequencies: int) -> int:
    """Return the number of channels that append_positions() adds to each token."""
    return 4 * frequencies


def append_positions(tokens: Tokens, frequencies: int) -> Tokens:
    """Append position encodings to normalized tokens: (B, N, C) -> (B, N, C + 4 F).

    Tokens with a grid get the positions of image regions, others their number in the sequence. With 0 frequencies the
    tokens are returned as they are.
    """
    if not frequencies:
        return tokens
    states, grid = tokens.states, tokens.grid
    if grid is None:
        positions = encode_sequence_positions(states.shape[1], frequencies, states.device)
    else:
        positions = encode_grid_positions(grid, frequencies, states.device)
    positions = positions * math.sqrt(states.shape[2] / (2 * frequencies))  # a sine with its cosine has norm 1, a token sqrt(C)
    # .expand(len(states), ...) would fix the batch size in exported graphs.
    positions = positions.to(states.dtype).expand(states.shape[0], -1, -1)
    return tokens._replace(states=torch.cat([states, positions], dim=2))


def encode_grid_positions(grid: tuple[int, int], frequencies: int, device: torch.device | None = None) -> Tensor:
    """Return (N, 4 F) float32: sines, then cosines, of pi/2 y and pi/2 x times 1, 2, 4, ...

    The coordinates y and x of the cells' centers run from -1 to 1.
    """
    y, x = ((2 * torch.arange(n, device=device) + 1) / n - 1 for n in grid)
    centers = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).reshape(-1, 2)
    return _stack_waves((centers[:, :, None] * (0.5 * math.pi * 2.0 ** torch.arange(frequencies, device=device))).flatten(1))


def encode_sequence_positions(length: int, frequencies: int, device: torch.device | None = None) -> Tensor:
    """Return (T, 4 F) float32: sines, then cosines, of 0, 1, ... T - 1 divided by 1, 2, 4, ...

    There are 2 F divisors.
    """
    return _stack_waves(torch.arange(length, device=device)[:, None] * 0.5 ** torch.arange(2 * frequencies, device=device))


def _stack_waves(angles: Tensor) -> Tensor:
    return torch.cat([angles.sin(), angles.cos()], dim=1)
