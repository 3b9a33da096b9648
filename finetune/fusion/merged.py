"""One stream: every token asks the tokens of both modalities, with one set of weights. ViLT, arXiv 2102.03334.

The narrower modality gets channels of zeros, so that no projection stands between the tokens that come in and those
that go out; what a token is, is told to each block inside its branch, by an embedding of its modality.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.attention.multihead import Attention, Tokens
from finetune.attention.positions import channels, placed
from finetune.attention.trace import Trace
from finetune.context import Asking
from finetune.fusion.blocks import FeedForward, Fusion, FusionConfig, check_names, fused_by_layer, note, prepare_keys


@dataclass
class Config(FusionConfig):
    """`query` and `context` in one stream; which is which does not matter."""

    name: str = "merged"
    """This file."""
    fused: Literal["both", "query"] = "both"
    """What leaves fused. query: the last block leaves out what only the context would gain, which then returns as it came."""


class Block(nn.Module):
    """Joint self-attention -> feed-forward, on the tokens of both. `fused`: those who ask."""

    def __init__(self, config: Config, width: int, pictures: Collection[str], fused: tuple[str, ...]) -> None:
        super().__init__()
        self.names, self.fused = (config.query, config.context), fused
        self.pictures = [name for name in self.names if name in pictures]
        self.places = config.places
        self.norm = nn.LayerNorm(width)
        self.modality = nn.ParameterDict({name: nn.Parameter(0.02 * torch.randn(width)) for name in self.names})
        self.attention = Attention(width, width + channels(self.places), config.inner, config.heads, gated=True)
        self.dropout = nn.Dropout(config.dropout)
        self.feedforward = FeedForward(width, config)

    def forward(
        self, x: dict[str, Tensor], tokens: dict[str, Tokens], hows: nn.ModuleDict, layer: int, trace: Trace | None
    ) -> dict[str, Tensor]:
        """name -> states (B, N, C), all of one width, of those fused. `hows` says how each modality is asked."""
        exact = trace is not None
        normed = {name: tokens[name]._replace(states=self.norm(x[name]) + self.modality[name]) for name in self.names}
        seen = {name: prepare_keys(hows[name], placed(n, self.places), exact) for name, n in normed.items()}

        new, records, keys = {}, [], {}
        for name in self.fused:
            n, order = normed[name], self._order(name)
            first, second = (seen[other] for other in order)
            if order not in keys:
                keys[order] = self.attention.keys(_joined(first.tokens, second.tokens))
            asking = Asking(self.attention.queries(n.states), n.mask, home=order[0] == name, layer=layer)
            out, weights = first.how(asking, keys[order], exact)
            new[name] = x[name] + self.dropout(self.attention.merge(out))
            records.append((name, order, weights and replace(weights, within=(first.run, second.run))))
        note(trace, "joint", layer, *records)
        return {name: self.feedforward(states) for name, states in new.items()}

    def _order(self, query: str) -> tuple[str, str]:
        """Keys in the order of contexts: a picture first, the query's own where it is one, then what stands beside it."""
        first = query if query in self.pictures else next(iter(self.pictures), self.names[0])
        return first, next(name for name in self.names if name != first)


def _joined(picture: Tokens, beside: Tokens) -> Tokens:
    """Both sequences as one, on the picture's grid."""
    mask = None
    if picture.mask is not None or beside.mask is not None:
        parts = [
            t.states.new_ones(t.states.shape[:2], dtype=torch.bool) if t.mask is None else t.mask for t in (picture, beside)
        ]
        mask = torch.cat(parts, dim=1)
    return Tokens(torch.cat([picture.states, beside.states], dim=1), mask, picture.grid)


class Merged(Fusion):
    """One stream as wide as the wider modality."""

    def __init__(self, config: Config, widths: dict[str, int], context: Any, pictures: Collection[str]) -> None:
        width = max(widths.values())
        super().__init__(config, dict.fromkeys(widths, width + channels(config.places)), list(widths), context, pictures)
        self.width = width
        self.layers.extend(Block(config, width, pictures, fused) for fused in fused_by_layer(config, config.fused))

    def fuse(self, tokens: dict[str, Tokens], rows: int, trace: Trace | None) -> dict[str, Tensor]:
        """Both change, or, at the end, the query alone."""
        x = {name: F.pad(t.states, (0, self.width - t.states.shape[2])) for name, t in tokens.items()}
        for i, block in enumerate(self.layers):
            x = self.run(block, x, tokens, self.contexts, i, trace)
        return {name: states[..., : tokens[name].states.shape[2]] for name, states in x.items()}


def build(config: Config, widths: dict[str, int], context: Any = None, pictures: Collection[str] = ("image",)) -> Merged:
    """`widths` of the modalities, `context`: a Config of the context room (None: dense), `pictures`: those with a grid.

    Raises ConfigError.
    """
    check_names(config, widths)
    return Merged(config, {name: widths[name] for name in (config.query, config.context)}, context, pictures)
