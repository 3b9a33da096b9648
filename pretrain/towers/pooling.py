"""How a timm model pools its tokens into one vector.

It pools by its own head, which can be changed to class token, mean or attention pooling.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pretrain.errors import ConfigError


def set_pooling(model: Any, pool: str, name: str) -> None:
    """Change the model's own head to pool as image.pool says. Raises ConfigError where it cannot.

    For avg and cls the final norm acts on the tokens, so that the states are normalized and their mean is the pooled
    vector. Where the model has its norm after the pooling (timm's fc_norm), the norm is moved, with its weights.

    name: the model's name, for the error message.
    """
    is_transformer = hasattr(model, "fc_norm") and hasattr(model, "blocks")
    if pool == "tower" or (pool == "avg" and not is_transformer):
        return
    if not is_transformer or (pool == "cls" and getattr(model, "cls_token", None) is None):
        reason = "has no class token" if pool == "cls" else "cannot use attention pooling"
        raise ConfigError(f"image.pool={pool}: {name} {reason}; use pool: tower or avg")
    if isinstance(model.norm, nn.Identity):
        model.norm, model.fc_norm = model.fc_norm, model.norm
    model.global_pool = {"cls": "token"}.get(pool, pool)
    if pool != "map":
        model.attn_pool = None
    elif getattr(model, "attn_pool", None) is None:
        model.attn_pool = _build_attention_pool(model)


def _build_attention_pool(model: Any) -> nn.Module:
    """Build a new attention pooling layer for a vision transformer.

    Raises ConfigError for a model that does not support one.
    """
    from timm.layers import AttentionPoolLatent
    from timm.models.vision_transformer import init_weights_vit_timm

    attention = model.blocks[0].attn
    if not hasattr(model, "attn_pool"):
        raise ConfigError(
            f"image.pool=map: timm's {type(model).__name__} does not support attention pooling; use pool: tower, avg or cls"
        )
    norm = type(model.norm) if isinstance(model.norm, nn.LayerNorm) else nn.LayerNorm
    pool = AttentionPoolLatent(model.embed_dim, num_heads=attention.num_heads, norm_layer=norm)
    for module in pool.modules():
        if isinstance(module, nn.Linear):
            init_weights_vit_timm(module)
    return pool


def get_head_norm(model: nn.Module) -> nn.Module | None:
    """Return the norm that a convolutional head (ConvNeXt's) applies to the pooled map, if any.

    It can act on each position of the map just as well.
    """
    head = getattr(model, "head", None)
    norm = getattr(head, "norm", None)
    return norm if isinstance(norm, nn.Module) and any(True for _ in norm.parameters()) else None


@torch.no_grad()
def detect_head_pooling(head: nn.Module, shape: torch.Size) -> tuple[bool, bool]:
    """Return whether a model's head only takes the mean, or only the maximum, of its grid tokens.

    Tested by running the head on numbers.

    Args:
        head: from the model's features to the pooled vector (b, P) and the grid tokens (b, N, C).
        shape: of the features.
    """
    features = torch.linspace(-2, 3, shape.numel(), device="cpu").sin().reshape(shape)
    # A head with weights does more than pool, whatever they are; a model on the meta device has none.
    anything = torch.tensor(0.5, device="cpu")
    weights = {name: anything.expand(p.shape) for name, p in head.named_parameters() if p.is_meta}
    pooled, tokens = torch.func.functional_call(head, weights, (features,))
    candidates = (tokens.mean(dim=1), tokens.amax(dim=1))
    is_mean, is_max = (
        pooled.shape == candidate.shape and torch.allclose(pooled, candidate, atol=1e-5) for candidate in candidates
    )
    return is_mean, is_max
