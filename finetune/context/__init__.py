"""Contexts: how queries attend to an image.

A context is ONE file with a Config and build(config, width) -> Context.

    dense.py             every query attends to every token
    local.py             an image's tokens attend to their own window (and to any text appended to the image)
    coarse_to_fine.py    every region as one token, the best regions at full detail
    pooled.py            learned latents summarize the image, and queries attend to the summaries
    tiling.py            grids divided into square tiles, for local.py and coarse_to_fine.py

An image may be attended to by words, by another image or by its own tokens. Its Context decides which tokens attention
reaches and what it costs. Modalities without a grid are always attended to densely. May import finetune.attention and
pretrain. Shapes: as in attention/multihead.py; R regions or windows, P cells of one, L summaries.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor, nn

from finetune.attention.multihead import Keys, Tokens
from finetune.attention.trace import Weights
from pretrain import registry
from pretrain.errors import ConfigError


class Queries(NamedTuple):
    """Projected queries, and where they come from."""

    q: Tensor
    """(B, H, Q, D)."""
    mask: Tensor | None = None
    """(B, Q) bool, True for real queries; None for all."""
    is_self: bool = False
    """Whether this is self-attention of an image: the queries are its own tokens, in its order."""
    rows: int = 1
    """Q holds this many sequences of Q / rows tokens, all about the same context (several texts about one image)."""
    layer: int = 0
    """Counted from 0."""


class Context(nn.Module):
    """Base of all contexts."""

    needs: ClassVar[Literal["image", "self-attention"]] = "image"
    """What a fusion must have for this context to change anything: an image as context, or self-attention of an image."""

    has_hard_selection: ClassVar[bool] = False
    """Whether it selects keys by comparing numbers: a rounding error may then change the selection, so that other libraries
    do not reproduce its results."""

    def has_shared_selection(self) -> bool:
        """Return whether one query influences which keys another one gets.

        A causal decoder cannot use such a context, because later tokens would influence earlier ones.
        """
        return False

    def summarize(self, tokens: Tokens, exact: bool = False) -> tuple[Tokens, Weights | None]:
        """Return the tokens to attend to instead of the image's, and with `exact` how they were computed.

        The second value is the Weights of the summaries on the tokens. The base class returns the tokens and None.
        """
        return tokens, None

    def forward(self, queries: Queries, keys: Keys, exact: bool = False) -> tuple[Tensor, Weights | None]:
        """Attend: returns (B, H, Q, D), and with `exact` the Weights, whose matrix is (B, Q, K)."""
        raise NotImplementedError(f"{type(self).__name__}.forward")


def build_contexts(
    config: Any, widths: dict[str, int], image_modalities: Collection[str], self_attending: Collection[str], fusion: str
) -> nn.ModuleDict:
    """Build the Context of each modality: images as `config` says (None: dense), all others dense.

    Args:
        config: the Config of a context, or None.
        widths: modality -> width of its tokens.
        image_modalities: modalities whose tokens have a grid.
        self_attending: modalities whose tokens attend to themselves.
        fusion: the fusion's name, for messages.

    Raises:
        ConfigError: `config` would change nothing, because no modality is an image, or because no image attends to itself
            and the context is made of windows.
    """
    dense = registry.get_component("context", "dense")
    config = config if config is not None else dense.Config()
    contexts: dict[str, Context] = {}
    for name, width in widths.items():
        modality_config = config if name in image_modalities else dense.Config()
        contexts[name] = registry.get_component("context", modality_config.name).build(modality_config, width)
    images = [name for name in widths if name in image_modalities]
    if config.name != "dense" and not images:
        raise ConfigError(f"context.name={config.name} needs an image; {' and '.join(widths)} have no grid, use dense")
    if images and contexts[images[0]].needs == "self-attention" and not set(images) & set(self_attending):
        raise ConfigError(
            f"context.name={config.name} has no meaning with fusion.name={fusion}: only {' and '.join(self_attending)} "
            f"attends to itself, and its tokens have no position in the image; use dense, coarse_to_fine or pooled, or "
            f"fusion.name=co"
        )
    return nn.ModuleDict(contexts)
