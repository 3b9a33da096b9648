"""The text transformers of CLIP and SigLIP: architecture, and weight names in two libraries.

CLIP's is causal and pooled at the end token; SigLIP's is not causal and pooled at the last position.

Our text towers are transformers' CLIPTextModel and SiglipTextModel. Weights are translated to and from open_clip's names,
which include the projection into the shared space: its TextTransformer can be either kind.
Legend: V = vocabulary, T = positions, C = width, D = width of the shared space.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pretrain.formats import block_weights
from pretrain.formats.block_weights import Weights
from pretrain.formats.vit_weights import BLOCKS
from pretrain.towers.transformers import TextTower

ACTS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
"""transformers' hidden_act -> the name in TextSpec.act."""

NAMES = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
"""Names of the weights outside the blocks: transformers -> open_clip."""


@dataclass(frozen=True)
class TextSpec:
    """The complete architecture of a text transformer of one of the two kinds."""

    vocab: int
    """V."""
    positions: int
    """T, the number of tokens of the longest text."""
    width: int
    """C."""
    depth: int
    heads: int
    hidden: int
    """Width inside the MLPs."""
    act: str
    """gelu, quick_gelu or gelu_tanh."""
    eps: float
    """Of every LayerNorm."""
    causal: bool
    """True for CLIP; false for SigLIP, whose head is part of the projection here."""
    eos: int | None = None
    """The id of the token that ends a text, at which CLIP pools."""
    pad: int | None = None
    """The id of the padding token."""


def text_spec(tower: TextTower) -> TextSpec | str:
    """Return a text tower's architecture if it is one of the two kinds, else which part of it is not.

    A causal tower may pool by the mean: mean_pooling.py turns it into one that pools at the end token.
    """
    config: Any = tower.model.config
    kind = config.model_type
    if kind not in ("clip_text_model", "siglip_text_model"):
        return f"the text tower, a {kind}"
    causal = kind == "clip_text_model"
    if tower.pool not in (("eot", "avg", "tower") if causal else ("tower",)):
        return f"the text tower's pooling, {tower.pool}"
    if config.hidden_act not in ACTS:
        return f"the text tower's activation, {config.hidden_act}"
    return TextSpec(
        vocab=config.vocab_size,
        positions=config.max_position_embeddings,
        width=config.hidden_size,
        depth=config.num_hidden_layers,
        heads=config.num_attention_heads,
        hidden=config.intermediate_size,
        act=ACTS[config.hidden_act],
        eps=config.layer_norm_eps,
        causal=causal,
        eos=config.eos_token_id if isinstance(config.eos_token_id, int) else None,
        pad=config.pad_token_id,
    )


def to_open_clip(tower: TextTower, projection: Tensor | None) -> Weights:
    """Return the tower's weights under open_clip's names, with its projection.

    Args:
        tower: a text tower for which `text_spec` returns a TextSpec.
        projection: (D, C), or None.

    CLIP's projection becomes `text_projection` (C, D); SigLIP's head and projection together become a linear layer with bias.
    """
    weights = {name.removeprefix("text_model."): value.detach() for name, value in tower.model.state_dict().items()}
    head, bias = weights.pop("head.weight", None), weights.pop("head.bias", None)
    out = from_transformers(weights)
    if head is not None and bias is not None:
        matrix = projection if projection is not None else torch.eye(len(head))
        out["text_projection.weight"], out["text_projection.bias"] = matrix @ head, matrix @ bias
    elif projection is not None:
        out["text_projection"] = projection.detach().t()
    return {name: value.contiguous() for name, value in out.items()}


def cut_positions(spec: TextSpec, weights: Weights, length: int) -> tuple[TextSpec, Weights]:
    """Return architecture and weights with `length` positions: those beyond were never trained, and nothing should read them.

    Args:
        spec: the architecture.
        weights: under open_clip's names.
        length: of the longest text in training, in tokens; at most the number of positions.
    """
    table = weights["positional_embedding"][:length].contiguous()
    return replace(spec, positions=len(table)), weights | {"positional_embedding": table}


def from_transformers(weights: Mapping[str, Tensor]) -> Weights:
    """Rename weights from transformers' names to open_clip's; unknown names stay as they are."""
    renamed = block_weights.from_transformers(weights, "encoder.layers.", BLOCKS)
    return {NAMES.get(name, name): value for name, value in renamed.items()}


def to_transformers(weights: Mapping[str, Tensor]) -> Weights:
    """Rename weights from open_clip's names to transformers'; unknown names stay as they are."""
    names = block_weights.invert(NAMES)
    renamed = block_weights.to_transformers(weights, BLOCKS, "encoder.layers.")
    return {names.get(name, name): value for name, value in renamed.items()}


def to_text_args(spec: TextSpec) -> dict[str, Any]:
    """Return the configuration `text.args` for this architecture; `text.length` is not part of it."""
    kind = "clip_text_model" if spec.causal else "siglip_text_model"
    act = {name: hidden_act for hidden_act, name in reversed(ACTS.items())}[spec.act]
    args = {
        "model_type": kind,
        "vocab_size": spec.vocab,
        "max_position_embeddings": spec.positions,
        "hidden_size": spec.width,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.heads,
        "intermediate_size": spec.hidden,
        "hidden_act": act,
        "layer_norm_eps": spec.eps,
        "eos_token_id": spec.eos,
        "pad_token_id": spec.pad,
        "bos_token_id": None,
    }
    return args if spec.causal else args | {"projection_size": spec.width}
