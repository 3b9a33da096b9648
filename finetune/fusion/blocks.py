"""What fusions are made of: gated branches, and the base class that checks, unpacks, checkpoints and packs.

Shapes: as in attention.py.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finetune.attention.multihead import Attention, Tokens, ZeroInitLinear
from finetune.attention.positions import channels
from finetune.attention.trace import AttentionRecord, Step, Trace, Weights
from finetune.context import Asking, Context, build_contexts
from pretrain.errors import ConfigError
from pretrain.towers import TokenSequence, masked_mean


@dataclass
class FusionConfig:
    """What all fusions have in common."""

    name: str = "cross"
    """The file in this folder."""
    query: str = "text"
    """The modality that asks; a name in the batch."""
    context: str = "image"
    """The modality that is asked."""
    layers: int = 4
    """Blocks, each self -> cross -> feed-forward."""
    inner: int | None = None
    """Inner width of the attentions, all heads together; null: the width of what asks. Smaller is cheaper."""
    heads: int = 8
    """Attention heads; must divide `inner`."""
    feedforward: float = 4.0
    """Hidden width of the feed-forward branch, in widths of its tokens."""
    places: int = 4
    """Frequencies of the sines and cosines that tell who asks where each region or word stands (places.py); 0: nothing but
    what the tower left in them."""
    dropout: float = 0.0
    """On what each branch adds, 0 to below 1."""
    checkpointing: bool = False
    """Recompute the blocks in the backward pass: less memory, a third more time."""

    def check(self) -> None:
        """Raises ConfigError."""
        if self.query == self.context:
            raise ConfigError(f"fusion.query and fusion.context are both {self.query!r}; they must be two modalities")
        if self.layers < 1 or self.heads < 1 or self.feedforward <= 0 or self.places < 0 or not 0 <= self.dropout < 1:
            raise ConfigError(
                f"fusion.layers={self.layers} (from 1), fusion.heads={self.heads} (from 1), fusion.feedforward="
                f"{self.feedforward} (above 0), fusion.places={self.places} (from 0) and fusion.dropout={self.dropout} "
                "(0 to below 1) do not fit together"
            )


# ---------------------------------------------------------------------------------------------------------------------
# Branches


CROSS = "cross_look"
"""What a block calls the branch in which one modality asks another."""


class FeedForward(nn.Module):
    """x + W2 gelu(W1 norm(x)), with W2 a ZeroInitLinear."""

    def __init__(self, width: int, config: FusionConfig) -> None:
        super().__init__()
        hidden = round(width * config.feedforward)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = ZeroInitLinear(hidden, width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, Q, C) -> (B, Q, C)."""
        out: Tensor = x + self.dropout(self.down(nn.functional.gelu(self.up(self.norm(x)))))
        return out


Sighting: TypeAlias = tuple[str, tuple[str, ...], Weights | None]
"""Who asked, whom, and the weights if they were asked for."""


class KeyValueSource(NamedTuple):
    """A modality as it is asked."""

    how: Context
    tokens: Tokens
    """Normalised: its own, or its summaries."""
    read: Weights | None = None
    """How the summaries were read."""

    @property
    def run(self) -> tuple[int, Weights | None]:
        """Its keys in Weights.within."""
        return self.tokens.states.shape[1], self.read


def prepare_keys(how: nn.Module, tokens: Tokens, exact: bool) -> KeyValueSource:
    """Summarises where the context does."""
    context = cast(Context, how)
    return KeyValueSource(context, *context.summarize(tokens, exact))


class AttentionBlock(nn.Module):
    """One attention branch: x + out(attention(q(n), k(seen), v(seen))), with out a ZeroInitLinear."""

    def __init__(self, width: int, context_width: int, config: FusionConfig) -> None:
        super().__init__()
        self.attention = Attention(width, context_width, config.inner, config.heads, gated=True)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, n: Tokens, seen: KeyValueSource, *, layer: int, home: bool = False, rows: int = 1, exact: bool = False
    ) -> tuple[Tensor, Weights | None]:
        """x (B, Q, C) and n, x normalised -> (B, Q, C). `home`, `rows`: see Asking; seen has B / rows samples."""
        B, Q, C = x.shape
        states, mask = n.states, n.mask
        if rows > 1:  # queries do not see each other here, so the texts about one picture make one long text
            states = states.reshape(B // rows, rows * Q, C)
            mask = None if mask is None else mask.reshape(B // rows, rows * Q)
        asking = Asking(self.attention.queries(states), mask, home, rows, layer)
        out, weights = seen.how(asking, self.attention.keys(seen.tokens), exact)
        weights = weights and replace(weights, within=(seen.run,))
        return x + self.dropout(self.attention.merge(out).reshape(B, Q, C)), weights


def note(trace: Trace | None, kind: Literal["self", "cross", "joint"], layer: int, *records: Sighting) -> None:
    """Adds what happened at once to the trace, where there is one."""
    if trace is not None:
        found = tuple(AttentionRecord(query, asked, weights) for query, asked, weights in records if weights is not None)
        trace.steps.append(Step(kind, layer, found))


# ---------------------------------------------------------------------------------------------------------------------
# The base


class Fusion(nn.Module):
    """Base of all fusions: a subclass says who asks itself, has its blocks in `layers`, and defines fuse()."""

    shares: ClassVar[bool] = False
    """Whether one picture can answer several texts without being repeated."""

    def __init__(
        self,
        config: FusionConfig,
        asked: dict[str, int],
        self_attending: Collection[str],
        context: Any,
        pictures: Collection[str],
    ) -> None:
        """`asked`: the width in which each of the two modalities is asked, places included."""
        super().__init__()
        self.config = config
        self.contexts = build_contexts(context, asked, pictures, self_attending, config.name)
        self.layers = nn.ModuleList()

    def forward(self, tokens: dict[str, TokenSequence], trace: Trace | None = None) -> dict[str, TokenSequence]:
        """The same sequences, fused: states of the same widths, `pooled` their masked mean. Fills `trace`.

        A mask may be None: every token is real.
        """
        config, given = self.config, dict(tokens)
        asking, asked = (given[name].states.shape[0] for name in (config.query, config.context))
        rows, rest = (1, 0) if asking == asked else divmod(asking, max(1, asked))
        if rest or not rows:
            counts = ", ".join(f"{len(given[name].states)} of {name}" for name in (config.query, config.context))
            raise ValueError(f"{config.query} rows must be a multiple of {config.context} rows, not {counts}")
        if rows > 1 and (trace is not None or not self.shares):
            given[config.context] = repeat(given[config.context], rows)
            rows = 1
        if trace is not None:
            trace.begin({name: (given[name].states.shape[1], given[name].grid) for name in (config.query, config.context)})
        fused = self.fuse({name: _unpack(name, given[name]) for name in (config.query, config.context)}, rows, trace)
        return given | {name: _pack(states, given[name]) for name, states in fused.items()}

    def tie_query_key_(self) -> None:
        """For tokens that lie in one space: whoever asks another modality looks first at what resembles it."""
        for name, module in self.named_modules():
            if name.endswith(CROSS) and isinstance(module, AttentionBlock):
                module.attention.tie_query_key_()

    def fuse(self, tokens: dict[str, Tokens], rows: int, trace: Trace | None) -> dict[str, Tensor]:
        """The states (B, N, C) of every modality that changes. `rows`: query rows a context row."""
        raise NotImplementedError(f"{type(self).__name__}.fuse")

    def run(self, layer: nn.Module, *inputs: Any) -> Any:
        """layer(*inputs), recomputed in the backward pass where configured."""
        if self.config.checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)


def check_names(config: FusionConfig, widths: dict[str, int]) -> None:
    """Raises ConfigError for a modality that the model does not have."""
    config.check()
    for key, name in (("query", config.query), ("context", config.context)):
        if name not in widths:
            raise ConfigError(f"fusion.{key}={name!r} is no modality of this model; it has {', '.join(widths)}")


def fused_by_layer(config: FusionConfig, fused: str) -> list[tuple[str, ...]]:
    """Who is changed by each block: both, but in the last one only the query where nobody reads the rest."""
    both = (config.query, config.context)
    return [both] * (config.layers - 1) + [both if fused == "both" else both[:1]]


def asked_widths(widths: dict[str, int], config: FusionConfig) -> dict[str, int]:
    """Widths with the channels of the places."""
    return {name: width + channels(config.places) for name, width in widths.items()}


def repeat(tokens: TokenSequence, times: int) -> TokenSequence:
    """Every row `times` times in a row, so that each text has a picture of its own."""
    states, mask, grid, pooled = tokens
    mask = mask if mask is None else mask.repeat_interleave(times, dim=0)
    return TokenSequence(states.repeat_interleave(times, dim=0), mask, grid, pooled.repeat_interleave(times, dim=0))


def _unpack(name: str, tokens: TokenSequence) -> Tokens:
    if tokens.grid is not None and tokens.grid[0] * tokens.grid[1] != tokens.states.shape[1]:
        raise ValueError(f"{name}: a grid of {tokens.grid} cannot have {tokens.states.shape[1]} tokens")
    return Tokens(tokens.states, tokens.mask, tokens.grid)


def _pack(states: Tensor, tokens: TokenSequence) -> TokenSequence:
    pooled = states.mean(dim=1) if tokens.mask is None else masked_mean(states, tokens.mask)
    return tokens._replace(states=states, pooled=pooled)
