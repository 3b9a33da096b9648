"""One modality asks, the other answers and stays as it is: text tokens read image regions.

ALBEF (arXiv 2107.07651) and BLIP (arXiv 2201.12086). Linear in the pixels; what one picture answers is computed once
for all texts about it. With `causal` each token sees only those before it: a captioning decoder.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from finetune.attention.multihead import Tokens
from finetune.attention.positions import placed
from finetune.attention.trace import Trace
from finetune.context import Context
from finetune.fusion.blocks import (
    AttentionBlock,
    FeedForward,
    Fusion,
    FusionConfig,
    KeyValueSource,
    asked_widths,
    check_names,
    note,
    prepare_keys,
)
from pretrain.errors import ConfigError


@dataclass
class Config(FusionConfig):
    """`query` asks `context`."""

    name: str = "cross"
    """This file."""
    causal: bool = False
    """Self-attention sees only earlier tokens, as a decoder needs."""


class Block(nn.Module):
    """self -> cross -> feed-forward on the tokens that ask."""

    def __init__(self, config: Config, width: int, asked: dict[str, int]) -> None:
        """`asked`: the widths in which query and context are asked."""
        super().__init__()
        self.config = config
        self.self_norm = nn.LayerNorm(width)
        self.self_look = AttentionBlock(width, asked[config.query], config)
        self.cross_norm = nn.LayerNorm(width)
        self.cross_look = AttentionBlock(width, asked[config.context], config)
        self.feedforward = FeedForward(width, config)

    def forward(
        self,
        x: Tensor,
        query: Tokens,
        itself: Tokens,
        how: nn.Module,
        seen: KeyValueSource,
        layer: int,
        rows: int,
        trace: Trace | None,
    ) -> Tensor:
        """x (B, Q, C) -> (B, Q, C). `query` has its mask and grid, `itself` those with which it asks itself, and `how`."""
        asks, asked, exact = self.config.query, self.config.context, trace is not None

        n = itself._replace(states=self.self_norm(x))
        x, weights = self.self_look(
            x, n, prepare_keys(how, placed(n, self.config.places), exact), layer=layer, home=True, exact=exact
        )
        note(trace, "self", layer, (asks, (asks,), weights))

        n = query._replace(states=self.cross_norm(x))
        x, weights = self.cross_look(x, n, seen, layer=layer, rows=rows, exact=exact)
        note(trace, "cross", layer, (asks, (asked,), weights))

        out: Tensor = self.feedforward(x)
        return out


class Cross(Fusion):
    """The context is normalised, and where `pooled` summarised, once for all layers."""

    shares: ClassVar[bool] = True

    def __init__(self, config: Config, widths: dict[str, int], context: Any, pictures: Collection[str]) -> None:
        asked = asked_widths(widths, config)
        super().__init__(config, asked, [config.query], context, pictures)
        if config.causal and cast(Context, self.contexts[config.context]).shares_a_choice():
            raise ConfigError("fusion.causal=true: later words would choose what earlier ones see; set context.choose=word")
        self.causal = config.causal
        self.context_norm = nn.LayerNorm(widths[config.context])
        self.layers.extend(Block(config, widths[config.query], asked) for _ in range(config.layers))

    def fuse(self, tokens: dict[str, Tokens], rows: int, trace: Trace | None) -> dict[str, Tensor]:
        """Only the query changes."""
        query, context = tokens[self.config.query], tokens[self.config.context]
        context = placed(context._replace(states=self.context_norm(context.states)), self.config.places)
        seen = prepare_keys(self.contexts[self.config.context], context, trace is not None)
        itself = query._replace(mask=_causal(query)) if self.causal else query
        x, how = query.states, self.contexts[self.config.query]
        for i, block in enumerate(self.layers):
            x = self.run(block, x, query, itself, how, seen, i, rows, trace)
        return {self.config.query: x}


def _causal(tokens: Tokens) -> Tensor:
    """(B or 1, Q, Q) bool: the token itself and those before it that are real."""
    Q = tokens.states.shape[1]
    earlier = torch.ones(Q, Q, dtype=torch.bool, device=tokens.states.device).tril()
    return earlier[None] if tokens.mask is None else earlier & tokens.mask[:, None]


def build(config: Config, widths: dict[str, int], context: Any = None, pictures: Collection[str] = ("image",)) -> Cross:
    """`widths` of the modalities, `context`: a Config of the context room (None: dense), `pictures`: those with a grid.

    Raises ConfigError.
    """
    check_names(config, widths)
    if config.causal and config.query in pictures:
        raise ConfigError(f"fusion.causal=true needs a query that is a sequence; {config.query} is a picture")
    return Cross(config, {name: widths[name] for name in (config.query, config.context)}, context, pictures)
