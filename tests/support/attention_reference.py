"""Slow and obvious references for attention: loops over queries, masks of the contexts, random tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from finetune.attention.multihead import ZeroInitLinear
from pretrain.towers import TokenSequence

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]
WIDTHS = {"text": 24, "image": 32}


def tokens(
    batch: int = 2,
    text: int = 5,
    grid: tuple[int, int] = (5, 7),
    widths: dict[str, int] = WIDTHS,
    ragged: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    requires_grad: bool = False,
) -> dict[str, TokenSequence]:
    """Return random tokens of a batch of texts, of different lengths if `ragged`, and of images."""
    generator = torch.Generator().manual_seed(seed)

    def sequence(n: int, width: int, mask: Tensor, grid: tuple[int, int] | None) -> TokenSequence:
        states = torch.randn(batch, n, width, generator=generator, dtype=torch.float64).to(dtype)
        return TokenSequence(states.requires_grad_(requires_grad), mask, grid, states.detach().mean(dim=1))

    lengths = torch.tensor([text - (i % 3 if ragged else 0) for i in range(batch)])
    n = grid[0] * grid[1]
    return {
        "text": sequence(text, widths["text"], torch.arange(text) < lengths[:, None], None),
        "image": sequence(n, widths["image"], torch.ones(batch, n, dtype=torch.bool), grid),
    }


def randomize_zero_init(module: nn.Module, std: float = 0.2, seed: int = 1) -> None:
    """Fill every ZeroInitLinear with random weights, as if trained, so that every branch contributes."""
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, ZeroInitLinear):
            nn.init.normal_(layer.weight, std=std, generator=generator)
            nn.init.normal_(layer.bias, std=std, generator=generator)


def naive_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Compute attention one query at a time: q (B, H, Q, D); k, v (B, H, K, D); visible (B, H, Q, K) bool.

    Returns the output (B, H, Q, D) and the weights (B, H, Q, K); both are zero for a query that sees no key.
    """
    B, H, Q, D = q.shape
    out, weights = q.new_zeros(B, H, Q, v.shape[-1]), q.new_zeros(B, H, Q, k.shape[2])
    for b, h, i in _indices(B, H, Q):
        visible_keys = visible[b, h, i].nonzero().flatten()
        if len(visible_keys) == 0:
            continue
        scores = k[b, h, visible_keys] @ q[b, h, i] / math.sqrt(D)
        probabilities = (scores - scores.max()).exp()
        probabilities = probabilities / probabilities.sum()
        weights[b, h, i, visible_keys] = probabilities
        out[b, h, i] = probabilities @ v[b, h, visible_keys]
    return out, weights


def windows(grid: tuple[int, int], side: int, shift: int) -> Tensor:
    """Return (N, N) bool: whether two cells, moved by `shift`, fall into the same window."""
    sides = [min(side, cells) for cells in grid]
    shifts = [shift if sides[i] < grid[i] else 0 for i in (0, 1)]
    window_of_cell = [
        (math.floor((row - shifts[0]) / sides[0]), math.floor((col - shifts[1]) / sides[1]))
        for row in range(grid[0])
        for col in range(grid[1])
    ]
    return torch.tensor([[a == b for b in window_of_cell] for a in window_of_cell])


def regions(grid: tuple[int, int], side: int) -> Tensor:
    """Return (N,): the index of each cell's region, in regions of `side` x `side` cells."""
    across = math.ceil(grid[1] / min(side, grid[1]))
    sides = [min(side, cells) for cells in grid]
    return torch.tensor([(r // sides[0]) * across + c // sides[1] for r in range(grid[0]) for c in range(grid[1])])


def _indices(*sizes: int) -> Iterator[tuple[int, ...]]:
    return iter(torch.cartesian_prod(*(torch.arange(size) for size in sizes)).tolist())
