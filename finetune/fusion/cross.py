"""Cross-attention in one direction: text tokens attend to image regions, which stay as they are.

ALBEF (arXiv 2107.07651) and BLIP (arXiv 2201.12086). The cost is linear in the pixels, and the image's keys and values are
computed once for all texts about it. With `causal` each token attends only to itself and earlier ones: a captioning decoder.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from finetune.attention.multihead import Tokens
from finetune.attention.positions import append_positions
from finetune.attention.trace import Trace
from finetune.context import Context
from finetune.fusion.blocks import (
    AttentionBlock,
    FeedForward,
    Fusion,
    FusionConfig,
    KeyValueSource,
    check_modalities,
    compute_key_widths,
    prepare_keys,
    record_step,
)
from pretrain.errors import ConfigError


@dataclass
class Config(FusionConfig):
    """Tokens of `query` attend to tokens of `context`."""

    name: str = "cross"
    """This file."""
    causal: bool = False
    """Mask later tokens in self-attention, as a decoder needs."""


class Block(nn.Module):
    """Self-attention -> cross-attention -> feed-forward, on the query tokens."""

    def __init__(self, config: Config, width: int, key_widths: dict[str, int]) -> None:
        """`width` of the query tokens; `key_widths`: of query and context tokens as keys."""
        super().__init__()
        self.config = config
        self.self_norm = nn.LayerNorm(width)
        self.self_look = AttentionBlock(width, key_widths[config.query], config)
        self.cross_norm = nn.LayerNorm(width)
        self.cross_look = AttentionBlock(width, key_widths[config.context], config)
        self.feedforward = FeedForward(width, config)

    def forward(
        self,
        x: Tensor,
        query: Tokens,
        self_query: Tokens,
        self_context: nn.Module,
        source: KeyValueSource,
        layer: int,
        rows: int,
        trace: Trace | None,
    ) -> Tensor:
        """x (B, Q, C) -> (B, Q, C).

        Args:
            x: the states of the query.
            query: its mask and grid in cross-attention.
            self_query: its mask and grid in self-attention.
            self_context: the Context of its self-attention.
            source: the keys and values of cross-attention.
            layer: number of the block, from 0.
            rows: query rows per context row.
            trace: filled with the weights, if there is one.
        """
        query_name, context_name, exact = self.config.query, self.config.context, trace is not None

        n = self_query._replace(states=self.self_norm(x))
        self_source = prepare_keys(self_context, append_positions(n, self.config.places), exact)
        x, weights = self.self_look(x, n, self_source, layer=layer, is_self=True, exact=exact)
        record_step(trace, "self", layer, (query_name, (query_name,), weights))

        n = query._replace(states=self.cross_norm(x))
        x, weights = self.cross_look(x, n, source, layer=layer, rows=rows, exact=exact)
        record_step(trace, "cross", layer, (query_name, (context_name,), weights))

        out: Tensor = self.feedforward(x)
        return out


class Cross(Fusion):
    """The context is normalized, and where `pooled` summarized, once for all layers."""

    can_share_context: ClassVar[bool] = True

    def __init__(self, config: Config, widths: dict[str, int], context: Any, image_modalities: Collection[str]) -> None:
        key_widths = compute_key_widths(widths, config)
        super().__init__(config, key_widths, [config.query], context, image_modalities)
        if config.causal and cast(Context, self.contexts[config.context]).has_shared_selection():
            raise ConfigError(
                "fusion.causal=true: later words would take part in selecting the regions of earlier ones; set "
                "context.choose=word"
            )
        self.causal = config.causal
        self.context_norm = nn.LayerNorm(widths[config.context])
        self.layers.extend(Block(config, widths[config.query], key_widths) for _ in range(config.layers))

    def fuse(self, tokens: dict[str, Tokens], rows: int, trace: Trace | None) -> dict[str, Tensor]:
        """See Fusion. Only the query changes."""
        query, context = tokens[self.config.query], tokens[self.config.context]
        context = append_positions(context._replace(states=self.context_norm(context.states)), self.config.places)
        source = prepare_keys(self.contexts[self.config.context], context, trace is not None)
        self_query = query._replace(mask=_build_causal_mask(query)) if self.causal else query
        x, self_context = query.states, self.contexts[self.config.query]
        for i, block in enumerate(self.layers):
            x = self.run_block(block, x, query, self_query, self_context, source, i, rows, trace)
        return {self.config.query: x}


def _build_causal_mask(tokens: Tokens) -> Tensor:
    """Return (B or 1, Q, Q) bool: for each token True for itself and the real tokens before it."""
    Q = tokens.states.shape[1]
    earlier = torch.ones(Q, Q, dtype=torch.bool, device=tokens.states.device).tril()
    return earlier[None] if tokens.mask is None else earlier & tokens.mask[:, None]


def build(config: Config, widths: dict[str, int], context: Any = None, image_modalities: Collection[str] = ("image",)) -> Cross:
    """Build the fusion.

    Args:
        config: the settings above.
        widths: modality -> width of its tokens.
        context: Config of a context (finetune.context); None: dense.
        image_modalities: the modalities whose tokens have a grid.

    Raises:
        ConfigError: a setting that is out of range, or does not fit the modalities.
    """
    check_modalities(config, widths)
    if config.causal and config.query in image_modalities:
        raise ConfigError(f"fusion.causal=true needs a query that is a sequence; fusion.query={config.query} has a grid")
    return Cross(config, {name: widths[name] for name in (config.query, config.context)}, context, image_modalities)
