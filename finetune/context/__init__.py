"""Contexts: how a picture is attended to. A context is ONE file with a Config and build(config, width) -> Context.

    dense.py             every query sees every token
    local.py             a picture's tokens see their window (and any text beside them)
    coarse_to_fine.py    every region at one token, the best ones at full detail
    pooled.py            learned queries read the picture, and are asked in its stead
    tiling.py            grids cut into squares, for the two in the middle

Wherever a picture is asked (by words, by another picture, by itself) its context decides what that costs and what is
seen. Modalities without a grid are always asked densely. May import attention.py, trace.py and pretrain's floors.
Shapes: as in attention.py; R regions or windows, P cells of one, L summaries.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor, nn

from finetune.attention.multihead import Keys, Tokens
from finetune.attention.trace import Weights
from pretrain import registry
from pretrain.errors import ConfigError


class Asking(NamedTuple):
    """The queries, and who they are."""

    q: Tensor
    """(B, H, Q, D)."""
    mask: Tensor | None = None
    """(B, Q) bool, True for real queries; None for all."""
    home: bool = False
    """Whether the queries are the asked picture's own tokens, in its order."""
    rows: int = 1
    """Q holds this many texts of Q / rows tokens, all about the same picture."""
    layer: int = 0
    """Counted from 0."""


class Context(nn.Module):
    """Base of all contexts."""

    needs: ClassVar[Literal["picture", "self-attention"]] = "picture"
    """What must be there for it to mean anything: a picture that is asked, or a picture that asks itself."""

    chooses: ClassVar[bool] = False
    """Whether it picks what is seen by comparing numbers: a rounding error may then pick otherwise, so no other library
    gives the same."""

    def shares_a_choice(self) -> bool:
        """Whether one query changes what another sees: then a decoder would look into the future."""
        return False

    def summarize(self, tokens: Tokens, exact: bool = False) -> tuple[Tokens, Weights | None]:
        """The tokens to be asked in place of a picture's, and with `exact` how they were read; here: its own."""
        return tokens, None

    def forward(self, asking: Asking, keys: Keys, exact: bool = False) -> tuple[Tensor, Weights | None]:
        """-> (B, H, Q, D), and with `exact` the Weights, whose matrix is (B, Q, K)."""
        raise NotImplementedError(f"{type(self).__name__}.forward")


def build_contexts(
    config: Any, widths: dict[str, int], pictures: Collection[str], self_attending: Collection[str], fusion: str
) -> nn.ModuleDict:
    """How each modality (name -> width) is asked: pictures as `config` says (None: densely), the others densely.

    Raises ConfigError where `config` would change nothing: no picture among them, or none among those that ask
    themselves for a context made of windows.
    """
    dense = registry.get_component("context", "dense")
    config = config if config is not None else dense.Config()
    made: dict[str, Context] = {}
    for name, width in widths.items():
        own = config if name in pictures else dense.Config()
        made[name] = registry.get_component("context", own.name).build(own, width)
    asked = [name for name in widths if name in pictures]
    if config.name != "dense" and not asked:
        raise ConfigError(f"context.name={config.name} needs a picture; {' and '.join(widths)} have no grid, use dense")
    if asked and made[asked[0]].needs == "self-attention" and not set(asked) & set(self_attending):
        raise ConfigError(
            f"context.name={config.name} has no meaning with fusion.name={fusion}: only {' and '.join(self_attending)} "
            f"attends to itself, and has no place in the picture; use dense, coarse_to_fine or pooled, or fusion.name=co"
        )
    return nn.ModuleDict(made)
