"""The text transformers of CLIP (causal, pooled where the text ends) and SigLIP (sees all, pooled at the last position).

Ours are transformers' CLIPTextModel and SiglipTextModel. open_clip's names stand in the middle, with the projection into
the shared space: its TextTransformer holds both kinds.
Legend: V = vocabulary, T = positions, C = width, D = width of the shared space.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.formats import block_weights
from pretrain.formats.block_weights import Weights
from pretrain.formats.vit_weights import BLOCKS
from pretrain.towers.transformers import TextTower

ACTS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
"""transformers' hidden_act -> our word."""

NAMES = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
"""transformers -> open_clip, beside the blocks."""


@dataclass(frozen=True)
class TextSpec:
    """All there is to say about a text transformer of one of the two kinds."""

    vocab: int
    positions: int
    """T, the longest text it can read."""
    width: int
    depth: int
    heads: int
    hidden: int
    """Width inside the MLPs."""
    act: str
    """gelu, quick_gelu or gelu_tanh."""
    eps: float
    causal: bool
    """True: CLIP's. False: SigLIP's, whose head is part of the projection here."""
    eos: int | None = None
    """The id that ends a text, where CLIP's pools."""
    pad: int | None = None


def text_spec(tower: TextTower) -> TextSpec | str:
    """What a text tower is as one of the two kinds, or what keeps it from being one. Pooling by the mean passes here."""
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
    """The tower's weights under open_clip's names. projection (D, C) or None.

    CLIP's projection becomes `text_projection` (C, D); SigLIP's head and projection together a linear layer with bias.
    """
    weights = {name.removeprefix("text_model."): value.detach() for name, value in tower.model.state_dict().items()}
    head, bias = weights.pop("head.weight", None), weights.pop("head.bias", None)
    out = from_transformers(weights)
    if head is not None and bias is not None:
        project = projection if projection is not None else torch.eye(len(head))
        out["text_projection.weight"], out["text_projection.bias"] = project @ head, project @ bias
    elif projection is not None:
        out["text_projection"] = projection.detach().t()
    return {name: value.contiguous() for name, value in out.items()}


def from_transformers(weights: Mapping[str, Tensor]) -> Weights:
    """transformers' names -> open_clip's; those that are not known stay as they are."""
    named = block_weights.from_transformers(weights, "encoder.layers.", BLOCKS)
    return {NAMES.get(name, name): value for name, value in named.items()}


def to_transformers(weights: Mapping[str, Tensor]) -> Weights:
    """open_clip's names -> transformers'; those that are not known stay as they are."""
    back = {ours: theirs for theirs, ours in NAMES.items()}
    named = block_weights.to_transformers(weights, BLOCKS, "encoder.layers.")
    return {back.get(name, name): value for name, value in named.items()}


def to_text_args(made: TextSpec) -> dict[str, Any]:
    """text.args of a tower of ours with this architecture, but for the length of texts."""
    kind = "clip_text_model" if made.causal else "siglip_text_model"
    act = {ours: theirs for theirs, ours in reversed(ACTS.items())}[made.act]
    args = {
        "model_type": kind,
        "vocab_size": made.vocab,
        "max_position_embeddings": made.positions,
        "hidden_size": made.width,
        "num_hidden_layers": made.depth,
        "num_attention_heads": made.heads,
        "intermediate_size": made.hidden,
        "hidden_act": act,
        "layer_norm_eps": made.eps,
        "eos_token_id": made.eos,
        "pad_token_id": made.pad,
        "bos_token_id": None,
    }
    return args if made.causal else args | {"projection_size": made.width}
