"""How a timm model pools: its own head kept, or changed to class token, mean or attention pooling."""

from __future__ import annotations

from typing import Any

from torch import nn

from pretrain.errors import ConfigError


def repool(model: Any, pool: str, name: str) -> None:
    """Makes the model's own head pool as configured, where it can; else raises ConfigError.

    For avg and cls the final norm acts on the tokens, so that the states are normalised and their mean is the pooled
    vector; a model whose norm stands behind the pooling (timm's fc_norm) gets it moved, weights and all.
    """
    transformer = hasattr(model, "fc_norm") and hasattr(model, "blocks")
    if pool == "tower" or (pool == "avg" and not transformer):
        return
    if not transformer or (pool == "cls" and getattr(model, "cls_token", None) is None):
        kind = "has no class token" if pool == "cls" else "cannot take attention pooling"
        raise ConfigError(f"image.pool={pool}: {name} {kind}; use pool: tower or avg")
    if isinstance(model.norm, nn.Identity):
        model.norm, model.fc_norm = model.fc_norm, model.norm
    model.global_pool = {"cls": "token"}.get(pool, pool)
    if pool != "map":
        model.attn_pool = None
    elif getattr(model, "attn_pool", None) is None:
        model.attn_pool = _attention_pool(model)


def _attention_pool(model: Any) -> nn.Module:
    from timm.layers import AttentionPoolLatent
    from timm.models.vision_transformer import init_weights_vit_timm

    attention = model.blocks[0].attn
    if not hasattr(model, "attn_pool"):
        raise ConfigError(f"image.pool=map: {type(model).__name__} has no place for attention pooling")
    norm = type(model.norm) if isinstance(model.norm, nn.LayerNorm) else nn.LayerNorm
    pool = AttentionPoolLatent(model.embed_dim, num_heads=attention.num_heads, norm_layer=norm)
    for part in pool.modules():
        if isinstance(part, nn.Linear):
            init_weights_vit_timm(part)
    return pool


def head_norm(model: nn.Module) -> nn.Module | None:
    """The norm that a convolutional head (ConvNeXt) applies to the pooled map; it acts on each position alike."""
    head = getattr(model, "head", None)
    norm = getattr(head, "norm", None)
    return norm if isinstance(norm, nn.Module) and any(True for _ in norm.parameters()) else None
