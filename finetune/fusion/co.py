"""Co-attention: both modalities attend to each other in every layer, each in its own width.

ViLBERT (arXiv 1908.02265), METER (arXiv 2111.02387). The image attends to itself too, so its context decides most of the
cost: context.name=local restricts that self-attention to windows.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from finetune.attention.multihead import Tokens
from finetune.attention.positions import append_positions
from finetune.attention.trace import Trace
from finetune.fusion.blocks import (
    AttentionBlock,
    FeedForward,
    Fusion,
    FusionConfig,
    check_modalities,
    compute_key_widths,
    list_fused_modalities,
    prepare_keys,
    record_step,
)


@dataclass
class Config(FusionConfig):
    """`query` and `context` attend to each other; which is which matters only with fused=query."""

    name: str = "co"
    """This file."""
    fused: Literal["both", "query"] = "both"
    """The modalities whose tokens change. query: the last block does not compute the context, which returns as it came."""


class Stream(nn.Module):
    """One modality's half of a block; with `is_source_only` it only provides keys and values."""

    def __init__(self, config: Config, width: int, key_width: int, other_key_width: int, is_source_only: bool = False) -> None:
        """`key_width`, `other_key_width`: widths of this modality's and of the other one's tokens as keys."""
        super().__init__()
        self.self_norm = nn.LayerNorm(width)
        self.self_look = AttentionBlock(width, key_width, config)
        self.cross_norm = nn.LayerNorm(width)
        if not is_source_only:
            self.cross_look = AttentionBlock(width, other_key_width, config)
            self.feedforward = FeedForward(width, config)


class Block(nn.Module):
    """Self-attention of both, cross-attention of both on the same states, feed-forward of both.

    Only the modalities in `fused` go through cross-attention and feed-forward.
    """

    def __init__(self, config: Config, widths: dict[str, int], fused: tuple[str, ...]) -> None:
        super().__init__()
        a, b = config.query, config.context
        key_widths = compute_key_widths(widths, config)
        self.first = Stream(config, widths[a], key_widths[a], key_widths[b])
        self.second = Stream(config, widths[b], key_widths[b], key_widths[a], is_source_only=b not in fused)
        self.names, self.fused, self.frequencies = (a, b), fused, config.places

    def forward(
        self, x: dict[str, Tensor], tokens: dict[str, Tokens], contexts: nn.ModuleDict, layer: int, trace: Trace | None
    ) -> dict[str, Tensor]:
        """Return modality -> states (B, N, C), of those fused.

        `tokens` hold masks and grids; `contexts` say how to attend to each modality.
        """
        exact = trace is not None
        streams = dict(zip(self.names, (self.first, self.second), strict=True))
        others = dict(zip(self.names, reversed(self.names), strict=True))

        records = []
        for name, stream in streams.items():
            n = tokens[name]._replace(states=stream.self_norm(x[name]))
            source = prepare_keys(contexts[name], append_positions(n, self.frequencies), exact)
            new, weights = stream.self_look(x[name], n, source, layer=layer, is_self=True, exact=exact)
            x = x | {name: new}
            records.append((name, (name,), weights))
        record_step(trace, "self", layer, *records)

        normed = {name: tokens[name]._replace(states=s.cross_norm(x[name])) for name, s in streams.items()}
        sources = {
            name: prepare_keys(contexts[name], append_positions(n, self.frequencies), exact) for name, n in normed.items()
        }
        records = []
        for name in self.fused:
            other = others[name]
            new, weights = streams[name].cross_look(x[name], normed[name], sources[other], layer=layer, exact=exact)
            x = x | {name: new}
            records.append((name, (other,), weights))
        record_step(trace, "cross", layer, *records)

        return {name: streams[name].feedforward(x[name]) for name in self.fused}


class Co(Fusion):
    """Two streams, each as wide as its modality."""

    def __init__(self, config: Config, widths: dict[str, int], context: Any, image_modalities: Collection[str]) -> None:
        super().__init__(config, compute_key_widths(widths, config), list(widths), context, image_modalities)
        self.layers.extend(Block(config, widths, fused) for fused in list_fused_modalities(config, config.fused))

    def fuse(self, tokens: dict[str, Tokens], rows: int, trace: Trace | None) -> dict[str, Tensor]:
        """See Fusion. Both modalities change, but with fused=query only the query is returned."""
        x = {name: t.states for name, t in tokens.items()}
        for i, block in enumerate(self.layers):
            x = self.run_block(block, x, tokens, self.contexts, i, trace)
        return x


def build(config: Config, widths: dict[str, int], context: Any = None, image_modalities: Collection[str] = ("image",)) -> Co:
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
    return Co(config, {name: widths[name] for name in (config.query, config.context)}, context, image_modalities)
