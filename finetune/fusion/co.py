"""Both modalities ask, at every layer, each in its own width: ViLBERT (arXiv 1908.02265), METER (arXiv 2111.02387).

The picture asks itself too, so its context decides most of the cost: `local` puts windows there.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from finetune.attention import Tokens
from finetune.fusion.blocks import FeedForward, Fusion, FusionConfig, Look, check_names, note, see
from finetune.trace import Trace


@dataclass
class Config(FusionConfig):
    """`query` and `context` both ask; which is which does not matter."""

    name: str = "co"
    """This file."""


class Stream(nn.Module):
    """One modality's half of a block."""

    def __init__(self, config: Config, width: int, other_width: int) -> None:
        super().__init__()
        self.self_norm = nn.LayerNorm(width)
        self.self_look = Look(width, width, config)
        self.cross_norm = nn.LayerNorm(width)
        self.cross_look = Look(width, other_width, config)
        self.feedforward = FeedForward(width, config)


class Block(nn.Module):
    """Both ask themselves; both ask each other, reading the same states; both think."""

    def __init__(self, config: Config, widths: dict[str, int]) -> None:
        super().__init__()
        a, b = config.query, config.context
        self.first = Stream(config, widths[a], widths[b])
        self.second = Stream(config, widths[b], widths[a])
        self.names = (a, b)

    def forward(
        self, x: dict[str, Tensor], tokens: dict[str, Tokens], hows: nn.ModuleDict, layer: int, trace: Trace | None
    ) -> dict[str, Tensor]:
        """name -> states (B, N, C). `tokens` have the masks and grids, `hows` says how each modality is asked."""
        exact = trace is not None
        streams = dict(zip(self.names, (self.first, self.second), strict=True))
        others = dict(zip(self.names, reversed(self.names), strict=True))

        sights = []
        for name, stream in streams.items():
            n = tokens[name]._replace(states=stream.self_norm(x[name]))
            new, weights = stream.self_look(x[name], n, see(hows[name], n, exact), layer=layer, home=True, exact=exact)
            x = x | {name: new}
            sights.append((name, (name,), weights))
        note(trace, "self", layer, *sights)

        normed = {name: tokens[name]._replace(states=s.cross_norm(x[name])) for name, s in streams.items()}
        seen = {name: see(hows[name], n, exact) for name, n in normed.items()}
        sights = []
        for name, stream in streams.items():
            other = others[name]
            new, weights = stream.cross_look(x[name], normed[name], seen[other], layer=layer, exact=exact)
            x = x | {name: new}
            sights.append((name, (other,), weights))
        note(trace, "cross", layer, *sights)

        return {name: stream.feedforward(x[name]) for name, stream in streams.items()}


class Co(Fusion):
    """Two streams that never leave their widths."""

    def __init__(self, config: Config, widths: dict[str, int], context: Any, pictures: Collection[str]) -> None:
        super().__init__(config, widths, list(widths), context, pictures)
        self.layers.extend(Block(config, widths) for _ in range(config.layers))

    def fuse(self, tokens: dict[str, Tokens], rows: int, trace: Trace | None) -> dict[str, Tensor]:
        """Both change."""
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
