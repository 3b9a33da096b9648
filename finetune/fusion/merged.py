"""One stream: every token attends to the tokens of both modalities, with one set of weights.

ViLT, arXiv 2102.03334. The narrower modality is padded with channels of zeros, so that no projection stands between input
and output tokens. Each block adds an embedding of the token's modality inside its branch.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.attention.multihead import Attention, Tokens
from finetune.attention.positions import append_positions, count_position_channels
from finetune.attention.trace import Trace
from finetune.context import Queries
from finetune.fusion.blocks import (
    FeedForward,
    Fusion,
    FusionConfig,
    check_modalities,
    list_fused_modalities,
    prepare_keys,
    record_step,
)


@dataclass
class Config(FusionConfig):
    """`query` and `context` in one stream; which is which matters only with fused=query."""

    name: str = "merged"
    """This file."""
    fused: Literal["both", "query"] = "both"
    """The modalities whose tokens change. query: the last block does not compute the context, which returns as it came."""


class Block(nn.Module):
    """Joint self-attention -> feed-forward over both modalities; only the tokens of `fused` are queries."""

    def __init__(self, config: Config, width: int, image_modalities: Collection[str], fused: tuple[str, ...]) -> None:
        super().__init__()
        self.names, self.fused = (config.query, config.context), fused
        self.image_modalities = [name for name in self.names if name in image_modalities]
        self.frequencies = config.places
        self.norm = nn.LayerNorm(width)
        self.modality = nn.ParameterDict({name: nn.Parameter(0.02 * torch.randn(width)) for name in self.names})
        key_width = width + count_position_channels(self.frequencies)
        self.attention = Attention(width, key_width, config.inner, config.heads, gated=True)
        self.dropout = nn.Dropout(config.dropout)
        self.feedforward = FeedForward(width, config)

    def forward(
        self, x: dict[str, Tensor], tokens: dict[str, Tokens], contexts: nn.ModuleDict, layer: int, trace: Trace | None
    ) -> dict[str, Tensor]:
        """Return modality -> states (B, N, C), all of one width, of those fused.

        `tokens` hold masks and grids; `contexts` say how to attend to each modality.
        """
        exact = trace is not None
        normed = {name: tokens[name]._replace(states=self.norm(x[name]) + self.modality[name]) for name in self.names}
        sources = {
            name: prepare_keys(contexts[name], append_positions(n, self.frequencies), exact) for name, n in normed.items()
        }

        new, records, keys = {}, [], {}
        for name in self.fused:
            n, order = normed[name], self._order_keys(name)
            first, second = (sources[other] for other in order)
            if order not in keys:
                keys[order] = self.attention.build_keys(_concatenate(first.tokens, second.tokens))
            q = self.attention.project_queries(n.states)
            queries = Queries(q, n.mask, is_self=order[0] == name, layer=layer)
            out, weights = first.context(queries, keys[order], exact)
            new[name] = x[name] + self.dropout(self.attention.project_output(out))
            weights = weights and replace(weights, key_runs=(first.key_run, second.key_run))
            records.append((name, order, weights))
        record_step(trace, "joint", layer, *records)
        return {name: self.feedforward(states) for name, states in new.items()}

    def _order_keys(self, query: str) -> tuple[str, str]:
        """Return the modalities in the order in which contexts expect keys: an image first.

        If the query is an image, its own tokens come first.
        """
        first = query if query in self.image_modalities else next(iter(self.image_modalities), self.names[0])
        return first, next(name for name in self.names if name != first)


def _concatenate(image: Tokens, rest: Tokens) -> Tokens:
    """Join both sequences into one that has the grid of the first."""
    mask = None
    if image.mask is not None or rest.mask is not None:
        masks = [t.states.new_ones(t.states.shape[:2], dtype=torch.bool) if t.mask is None else t.mask for t in (image, rest)]
        mask = torch.cat(masks, dim=1)
    return Tokens(torch.cat([image.states, rest.states], dim=1), mask, image.grid)


class Merged(Fusion):
    """One stream, as wide as the wider modality."""

    def __init__(self, config: Config, widths: dict[str, int], context: Any, image_modalities: Collection[str]) -> None:
        width = max(widths.values())
        key_widths = dict.fromkeys(widths, width + count_position_channels(config.places))
        super().__init__(config, key_widths, list(widths), context, image_modalities)
        self.width = width
        self.layers.extend(
            Block(config, width, image_modalities, fused) for fused in list_fused_modalities(config, config.fused)
        )

    def fuse(self, tokens: dict[str, Tokens], rows: int, trace: Trace | None) -> dict[str, Tensor]:
        """See Fusion. Both modalities change, but with fused=query only the query is returned."""
        x = {name: F.pad(t.states, (0, self.width - t.states.shape[2])) for name, t in tokens.items()}
        for i, block in enumerate(self.layers):
            x = self.run_block(block, x, tokens, self.contexts, i, trace)
        return {name: states[..., : tokens[name].states.shape[2]] for name, states in x.items()}


def build(
    config: Config, widths: dict[str, int], context: Any = None, image_modalities: Collection[str] = ("image",)
) -> Merged:
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
    return Merged(config, {name: widths[name] for name in (config.query, config.context)}, context, image_modalities)
