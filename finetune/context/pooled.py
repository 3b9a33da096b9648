"""Pooled context: learned latents summarize the image, and queries attend to these L summaries.

This pays where attention reads an image often: in its own self-attention (N x L instead of N x N), in several layers
(`cross` summarizes once), for several questions. Summaries have no position in the image, so their own weights over the
cells are recorded. These are multiplied with the weights over summaries: the product of two distributions is again one
over the cells.
Perceiver IO, arXiv 2107.14795; the resampler of Flamingo, arXiv 2204.14198; Q-Former, arXiv 2301.12597.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from finetune.attention.multihead import Attention, Tokens, attend, broadcast_over_heads
from finetune.attention.trace import Weights
from finetune.context.dense import Dense
from pretrain.config import check_numbers
from pretrain.errors import ConfigError


@dataclass
class Config:
    """Attention to summaries costs Q x latents, and computing them latents x N once."""

    name: str = "pooled"
    """This file."""
    latents: int = 64
    """Learned latents, which is the number of summaries of an image."""
    heads: int = 8
    """Heads of the attention that computes the summaries; must divide `inner`."""
    inner: int | None = None
    """Inner width of that attention, all heads together; null: the width of the image's tokens."""

    def check(self) -> None:
        """Raise ConfigError for a number below 1."""
        if self.latents < 1 or self.heads < 1:
            raise ConfigError(f"context.latents={self.latents} and context.heads={self.heads} must be at least 1")
        check_numbers(self, "context", inner="[1, inf)")


class Pooled(Dense):
    """latents + attention(latents, image), then a feed-forward layer; dense attention to the result."""

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        # These names are keys in checkpoints: `read` is the attention to the image, `think` the feed-forward layer.
        self.latents = nn.Parameter(torch.randn(config.latents, width) * width**-0.5)
        self.norm = nn.LayerNorm(width)
        self.read = Attention(width, inner=config.inner, heads=config.heads)
        self.think = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.out_norm = nn.LayerNorm(width)

    def summarize(self, tokens: Tokens, exact: bool = False) -> tuple[Tokens, Weights | None]:
        """Turn tokens (B, N, C) into summaries (B, L, C) without mask or grid.

        With `exact` also return the Weights, whose matrix is (B, L, N).
        """
        q_BHLD = self.read.project_queries(self.norm(self.latents)[None]).expand(tokens.states.shape[0], -1, -1, -1)
        keys = self.read.build_keys(tokens)
        out, used = attend(q_BHLD, *keys.project_all(), mask=broadcast_over_heads(tokens.mask), exact=exact)
        states = self.latents + self.read.project_output(out)
        states = self.out_norm(states + self.think(states))
        return Tokens(states), None if used is None else Weights(used)


def build(config: Config, width: int) -> Pooled:
    """Build the context for image tokens of `width`.

    Raises ConfigError for heads that do not divide the inner width.
    """
    return Pooled(config, width)
