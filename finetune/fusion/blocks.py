"""The branches of fusion blocks, and the base class of fusions.

The base class checks, unpacks and packs token sequences, and applies activation checkpointing.
Shapes: as in attention/multihead.py.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finetune.attention.multihead import Attention, Tokens, ZeroInitLinear
from finetune.attention.positions import count_position_channels
from finetune.attention.trace import AttentionRecord, Step, Trace, Weights
from finetune.context import Context, Queries, build_contexts
from pretrain.config import check_numbers
from pretrain.errors import ConfigError
from pretrain.towers import TokenSequence, masked_mean


@dataclass
class FusionConfig:
    """The settings that all fusions have."""

    name: str = "cross"
    """The file in this package."""
    query: str = "text"
    """The modality whose tokens are the cross-attention queries; a name in the batch."""
    context: str = "image"
    """The modality whose tokens are the cross-attention keys and values."""
    layers: int = 4
    """Blocks, each self -> cross -> feed-forward."""
    inner: int | None = None
    """Inner width of the attentions, all heads together; null: the width of the query tokens. Smaller is cheaper."""
    heads: int = 8
    """Attention heads; must divide `inner`."""
    feedforward: float = 4.0
    """Hidden width of the feed-forward branch, as a multiple of the width of its tokens."""
    places: int = 4
    """Frequencies of the position encodings (sines and cosines) appended to the keys, see attention/positions.py; 0: no
    encodings, only the positions that the tower left in its tokens."""
    dropout: float = 0.0
    """Dropout rate on the output of each branch, 0 to below 1."""
    checkpointing: bool = False
    """Recompute the blocks in the backward pass: less memory, a third more time."""

    def check(self) -> None:
        """Raise ConfigError for a value out of range, or where query and context are the same."""
        if self.query == self.context:
            raise ConfigError(f"fusion.query and fusion.context are both {self.query!r}; they must be two modalities")
        if self.layers < 1 or self.heads < 1 or self.feedforward <= 0 or self.places < 0 or not 0 <= self.dropout < 1:
            raise ConfigError(
                f"fusion.layers={self.layers} (from 1), fusion.heads={self.heads} (from 1), fusion.feedforward="
                f"{self.feedforward} (above 0), fusion.places={self.places} (from 0) and fusion.dropout={self.dropout} "
                "(0 to below 1) do not fit together"
            )
        check_numbers(self, "fusion", feedforward="(0, inf)", inner="[1, inf)")


# ---------------------------------------------------------------------------------------------------------------------
# Branches


CROSS = "cross_look"
"""Name of a block's cross-attention branch. This name and `self_look`, of self-attention, are keys in checkpoints."""


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


RecordFields: TypeAlias = tuple[str, tuple[str, ...], Weights | None]
"""The query modality, its context modalities, and the weights; None on the fast path."""


class KeyValueSource(NamedTuple):
    """One modality as the source of cross-attention keys and values."""

    context: Context
    tokens: Tokens
    """Normalized: the modality's own tokens, or their summaries."""
    summary_weights: Weights | None = None
    """The weights with which the summaries attended to the tokens; None without summaries or on the fast path."""

    @property
    def key_run(self) -> tuple[int, Weights | None]:
        """The entry for these keys in Weights.key_runs."""
        return self.tokens.states.shape[1], self.summary_weights


def prepare_keys(context: nn.Module, tokens: Tokens, exact: bool) -> KeyValueSource:
    """Build the source of keys and values from normalized tokens, summarized where `context` does that."""
    context = cast(Context, context)
    return KeyValueSource(context, *context.summarize(tokens, exact))


class AttentionBlock(nn.Module):
    """One attention branch: x + out(attention(q(n), k(source), v(source))), with out a ZeroInitLinear."""

    def __init__(self, width: int, context_width: int, config: FusionConfig) -> None:
        super().__init__()
        self.attention = Attention(width, context_width, config.inner, config.heads, gated=True)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        n: Tokens,
        source: KeyValueSource,
        *,
        layer: int,
        is_self: bool = False,
        rows: int = 1,
        exact: bool = False,
    ) -> tuple[Tensor, Weights | None]:
        """Add the branch to x (B, Q, C); n is x normalized. Returns (B, Q, C), and with `exact` the weights.

        `is_self`, `rows`, `layer`: see Queries; `source` has B / rows samples.
        """
        B, Q, C = x.shape
        states, mask = n.states, n.mask
        if rows > 1:  # queries do not attend to each other here, so the texts about one image can be one long text
            states = states.reshape(B // rows, rows * Q, C)
            mask = None if mask is None else mask.reshape(B // rows, rows * Q)
        queries = Queries(self.attention.project_queries(states), mask, is_self, rows, layer)
        out, weights = source.context(queries, self.attention.build_keys(source.tokens), exact)
        weights = weights and replace(weights, key_runs=(source.key_run,))
        return x + self.dropout(self.attention.project_output(out).reshape(B, Q, C)), weights


def record_step(trace: Trace | None, kind: Literal["self", "cross", "joint"], layer: int, *fields: RecordFields) -> None:
    """Append the attentions of one step to the trace, if there is one."""
    if trace is not None:
        records = tuple(AttentionRecord(query, contexts, weights) for query, contexts, weights in fields if weights is not None)
        trace.steps.append(Step(kind, layer, records))


# ---------------------------------------------------------------------------------------------------------------------
# The base


class Fusion(nn.Module):
    """Base of all fusions: a subclass fills `layers` with its blocks and defines fuse()."""

    can_share_context: ClassVar[bool] = False
    """Whether several query rows (texts) can attend to one context row (image) without repeating it."""

    def __init__(
        self,
        config: FusionConfig,
        key_widths: dict[str, int],
        self_attending: Collection[str],
        context: Any,
        image_modalities: Collection[str],
    ) -> None:
        """Build the contexts.

        Args:
            config: the fusion's own settings.
            key_widths: modality -> width of its tokens as keys, position channels included.
            self_attending: modalities whose tokens attend to themselves.
            context: Config of a context, or None for dense.
            image_modalities: modalities whose tokens have a grid.
        """
        super().__init__()
        self.config = config
        self.contexts = build_contexts(context, key_widths, image_modalities, self_attending, config.name)
        self.layers = nn.ModuleList()

    def forward(self, tokens: dict[str, TokenSequence], trace: Trace | None = None) -> dict[str, TokenSequence]:
        """Return the same sequences, fused: states of the same widths, `pooled` their masked mean.

        Fills `trace`. A mask may be None: every token is real. Raises ValueError where the rows of query and context do not
        fit.
        """
        config, sequences = self.config, dict(tokens)
        query_rows, context_rows = (sequences[name].states.shape[0] for name in (config.query, config.context))
        rows, rest = (1, 0) if query_rows == context_rows else divmod(query_rows, max(1, context_rows))
        if rest or not rows:
            counts = ", ".join(f"{len(sequences[name].states)} of {name}" for name in (config.query, config.context))
            raise ValueError(f"{config.query} rows must be a multiple of {config.context} rows, not {counts}")
        if rows > 1 and (trace is not None or not self.can_share_context):
            sequences[config.context] = repeat_rows(sequences[config.context], rows)
            rows = 1
        if trace is not None:
            trace.begin(
                {name: (sequences[name].states.shape[1], sequences[name].grid) for name in (config.query, config.context)}
            )
        fused = self.fuse({name: _unpack(name, sequences[name]) for name in (config.query, config.context)}, rows, trace)
        return sequences | {name: _pack(states, sequences[name]) for name, states in fused.items()}

    def tie_query_key_(self) -> None:
        """Start cross-attention at tokens that resemble the query, for tokens of one space; see Attention."""
        for name, module in self.named_modules():
            if name.endswith(CROSS) and isinstance(module, AttentionBlock):
                module.attention.tie_query_key_()

    def fuse(self, tokens: dict[str, Tokens], rows: int, trace: Trace | None) -> dict[str, Tensor]:
        """Return modality -> states (B, N, C) of those that change; `rows`: query rows per context row."""
        raise NotImplementedError(f"{type(self).__name__}.fuse")

    def run_block(self, block: nn.Module, *inputs: Any) -> Any:
        """Return block(*inputs), with checkpointing where it is configured."""
        if self.config.checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


def check_modalities(config: FusionConfig, modalities: Collection[str]) -> None:
    """Raise ConfigError for settings out of range, or for a modality that the model does not have."""
    config.check()
    for key, name in (("query", config.query), ("context", config.context)):
        if name not in modalities:
            others = [other for other in modalities if other not in (config.query, config.context)]
            hint = f": fusion.{key}={others[0]}" if len(others) == 1 else ""
            raise ConfigError(f"fusion.{key}={name!r} is no modality of this model; it has {', '.join(modalities)}{hint}")


def list_fused_modalities(config: FusionConfig, fused: str) -> list[tuple[str, ...]]:
    """Return for each block the modalities that it changes.

    These are both, but with fused="query" only the query in the last block.
    """
    both = (config.query, config.context)
    return [both] * (config.layers - 1) + [both if fused == "both" else both[:1]]


def compute_key_widths(widths: dict[str, int], config: FusionConfig) -> dict[str, int]:
    """Return modality -> width of its tokens as keys, with the channels of the position encodings."""
    return {name: width + count_position_channels(config.places) for name, width in widths.items()}


def repeat_rows(tokens: TokenSequence, times: int) -> TokenSequence:
    """Repeat each row `times` times, next to each other, so that every text has its own copy of the image."""
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
