"""Both modalities ask, at every layer, each in its own width: ViLBERT (arXiv 1908.02265), METER (arXiv 2111.02387).

The picture asks itself too, so its context decides most of the cost: `local` puts windows there.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from finetune.attention.multihead import Tokens
from finetune.attention.positions import placed
from finetune.attention.trace import Trace
from finetune.fusion.blocks import (
    AttentionBlock,
    FeedForward,
    Fusion,
    FusionConfig,
    asked_widths,
    check_names,
    fused_by_layer,
    note,
    prepare_keys,
)


@dataclass
class Config(FusionConfig):
    """`query` and `context` both ask; which is which does not matter."""

    name: str = "co"
    """This file."""
    fused: Literal["both", "query"] = "both"
    """What leaves fused. query: the last block leaves out what only the context would gain, which then returns as it came."""


class Stream(nn.Module):
    """One modality's half of a block; `answers`: it is only asked, by the other one."""

    def __init__(self, config: Config, width: int, asked: int, other: int, answers: bool = False) -> None:
        """`asked`, `other`: the widths in which this modality and the other one are asked."""
        super().__init__()
        self.self_norm = nn.LayerNorm(width)
        self.self_look = AttentionBlock(width, asked, config)
        self.cross_norm = nn.LayerNorm(width)
        if not answers:
            self.cross_look = AttentionBlock(width, other, config)
            self.feedforward = FeedForward(width, config)


class Block(nn.Module):
    """Both ask themselves; both ask each other, reading the same states; both think. `fused`: those who do all that."""

    def __init__(self, config: Config, widths: dict[str, int], fused: tuple[str, ...]) -> None:
        super().__init__()
        a, b = config.query, config.context
        asked = asked_widths(widths, config)
        self.first = Stream(config, widths[a], asked[a], asked[b])
        self.second = Stream(config, widths[b], asked[b], asked[a], answers=b not in fused)
        self.names, self.fused, self.places = (a, b), fused, config.places

    def forward(
        self, x: dict[str, Tensor], tokens: dict[str, Tokens], hows: nn.ModuleDict, layer: int, trace: Trace | None
    ) -> dict[str, Tensor]:
        """name -> states (B, N, C), of those fused. `tokens` have masks and grids, `hows` says how each is asked."""
        exact = trace is not None
        streams = dict(zip(self.names, (self.first, self.second), strict=True))
        others = dict(zip(self.names, reversed(self.names), strict=True))

        records = []
        for name, stream in streams.items():
            n = tokens[name]._replace(states=stream.self_norm(x[name]))
            seen = prepare_keys(hows[name], placed(n, self.places), exact)
            new, weights = stream.self_look(x[name], n, seen, layer=layer, home=True, exact=exact)
            x = x | {name: new}
            records.append((name, (name,), weights))
        note(trace, "self", layer, *records)

        normed = {name: tokens[name]._replace(states=s.cross_norm(x[name])) for name, s in streams.items()}
        answers = {name: prepare_keys(hows[name], placed(n, self.places), exact) for name, n in normed.items()}
        records = []
        for name in self.fused:
            other = others[name]
            new, weights = streams[name].cross_look(x[name], normed[name], answers[other], layer=layer, exact=exact)
            x = x | {name: new}
            records.append((name, (other,), weights))
        note(trace, "cross", layer, *records)

        return {name: streams[name].feedforward(x[name]) for name in self.fused}


class Co(Fusion):
    """Two streams that never leave their widths."""

    def __init__(self, config: Config, widths: dict[str, int], context: Any, pictures: Collection[str]) -> None:
        super().__init__(config, asked_widths(widths, config), list(widths), context, pictures)
        self.layers.extend(Block(config, widths, fused) for fused in fused_by_layer(config, config.fused))

    def fuse(self, tokens: dict[str, Tokens], rows: int, trace: Trace | None) -> dict[str, Tensor]:
        """Both change, or, at the end, the query alone."""
        x = {name: t.states for name, t in tokens.items()}
        for i, block in enumerate(self.layers):
            x = self.run(block, x, tokens, self.contexts, i, trace)
        return x


def build(config: Config, widths: dict[str, int], context: Any = None, pictures: Collection[str] = ("image",)) -> Co:
    """`widths` of the modalities, `context`: a Config of the context room (None: dense), `pictures`: those with a grid.

    Raises ConfigError.
    """
    check_names(config, widths)
    return Co(config, {name: widths[name] for name in (config.query, config.context)}, context, pictures)
