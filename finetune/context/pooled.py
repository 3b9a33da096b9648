"""Learned queries read the picture once; everybody then asks these L summaries in its stead.

Pays where the picture is asked often: by itself (N x L instead of N x N), by several layers (`cross` reads it once), by
several questions. Summaries have no place in the picture, so their own map over the cells is kept and composed with
the map over summaries: the product of two distributions is again one over the cells.
Perceiver IO, arXiv 2107.14795; the resampler of Flamingo, arXiv 2204.14198; Q-Former, arXiv 2301.12597.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from finetune.attention.multihead import Attention, Tokens, attend, over_heads
from finetune.attention.trace import Weights
from finetune.context.dense import Dense
from pretrain.errors import ConfigError


@dataclass
class Config:
    """Asking costs Q x latents, reading latents x N once."""

    name: str = "pooled"
    """This file."""
    latents: int = 64
    """Learned queries, that is summaries of a picture."""
    heads: int = 8
    """Heads with which they read; must divide `inner`."""
    inner: int | None = None
    """Inner width of reading, all heads together; null: the picture's width."""

    def check(self) -> None:
        """Raises ConfigError."""
        if self.latents < 1 or self.heads < 1:
            raise ConfigError(f"context.latents={self.latents} and context.heads={self.heads} must be at least 1")


class Pooled(Dense):
    """latents + read(latents, picture), then one feed-forward layer; asked densely."""

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(config.latents, width) * width**-0.5)
        self.norm = nn.LayerNorm(width)
        self.read = Attention(width, inner=config.inner, heads=config.heads)
        self.think = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.out_norm = nn.LayerNorm(width)

    def summarize(self, tokens: Tokens, exact: bool = False) -> tuple[Tokens, Weights | None]:
        """Tokens (B, N, C) -> summaries (B, L, C) without mask or grid, and with `exact` the Weights (B, L, N)."""
        q_BHLD = self.read.queries(self.norm(self.latents)[None]).expand(tokens.states.shape[0], -1, -1, -1)
        out, used = attend(q_BHLD, *self.read.keys(tokens).projected(), mask=over_heads(tokens.mask), exact=exact)
        states = self.latents + self.read.merge(out)
        states = self.out_norm(states + self.think(states))
        return Tokens(states), None if used is None else Weights(used)


def build(config: Config, width: int) -> Pooled:
    """`width` of the picture's tokens. Raises ConfigError for heads that do not divide the inner width."""
    return Pooled(config, width)
