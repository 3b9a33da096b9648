"""ViTSpec vision transformers: patches by one convolution, a class token, learned positions, pre-norm blocks, one last norm.

timm's VisionTransformer (our image tower) is one for most of its settings, and so are open_clip's VisionTransformer and
transformers' CLIPVisionModel. open_clip's names stand in the middle.
Legend: C = width, S = positions (1 + patches).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.errors import UserError
from pretrain.formats import block_weights
from pretrain.formats.block_weights import Weights

BLOCKS = "transformer.resblocks."
POOL = {
    "latent": "probe",
    "proj.weight": "attention.out_proj.weight",
    "proj.bias": "attention.out_proj.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
    "mlp.fc1.weight": "mlp.fc1.weight",
    "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.weight": "mlp.fc2.weight",
    "mlp.fc2.bias": "mlp.fc2.bias",
    "q.weight": "",
    "q.bias": "",
    "kv.weight": "",
    "kv.bias": "",
}
"""timm's attention pooling -> SigLIP's head in transformers, whose queries, keys and values are one matrix."""


@dataclass(frozen=True)
class ViTSpec:
    """All there is to say about a plain vision transformer."""

    size: int
    """Side of the picture, pixels."""
    patch: int
    """Side of a patch, pixels."""
    width: int
    depth: int
    heads: int
    hidden: int
    """Width inside the MLPs."""
    act: str
    """gelu, quick_gelu or gelu_tanh."""
    eps: float
    """Of every LayerNorm."""
    pre_norm: bool
    """A norm between positions and blocks (CLIP)."""
    pool: str
    """token (the class token) or avg (the mean of the others)."""
    norm_after: bool
    """The last norm acts on the pooled vector, not on the tokens. For the class token that is the same."""


def activation(module: Any) -> str | None:
    """gelu, quick_gelu or gelu_tanh; None for another one."""
    kind = type(module).__name__
    if kind in ("GELU", "GELUActivation"):
        return "gelu_tanh" if getattr(module, "approximate", "none") == "tanh" else "gelu"
    tanh = ("GELUTanh", "NewGELUActivation")
    return "gelu_tanh" if kind in tanh else "quick_gelu" if kind in ("QuickGELU", "QuickGELUActivation") else None


def vit_spec(model: Any) -> ViTSpec | str:
    """What a timm model is as a plain vision transformer, or the part of it that is not plain."""
    if type(model).__name__ != "VisionTransformer" or not len(getattr(model, "blocks", [])):
        return f"the image tower, a {type(model).__name__}"
    if model.cls_token is None or model.pos_embed is None:
        return "the image tower without class token" if model.cls_token is None else "the image tower without learned positions"
    if strange := _strange(model, {"cls_token"}):
        return strange
    norm = model.norm if isinstance(model.norm, nn.LayerNorm) else model.fc_norm
    prefix = model.global_pool == "avg" and getattr(model, "pool_include_prefix", False)
    if model.global_pool not in ("token", "avg") or prefix or not isinstance(norm, nn.LayerNorm):
        return f"the image tower's pooling, {model.global_pool}"
    return _described(model, norm)


def siglip_spec(model: Any) -> ViTSpec | str:
    """What a timm model is as SigLIP's vision transformer (no class token, pooled by attention), or what is not SigLIP's."""
    if type(model).__name__ != "VisionTransformer" or model.global_pool != "map" or model.cls_token is not None:
        return "the image tower, which is not SigLIP's"
    names = {f"attn_pool.{name}" for name in POOL}
    if strange := _strange(model, names):
        return strange
    if missing := sorted(names - set(model.state_dict())):
        return f"the image tower without {missing[0]}"
    made = _described(model, model.norm)
    same = model.blocks[0].attn.num_heads == model.attn_pool.num_heads
    if isinstance(made, ViTSpec) and (made.pre_norm or not same):
        return "the image tower, which is not SigLIP's"
    return made


def _strange(model: Any, more: set[str]) -> str | None:
    """A weight that these transformers do not have or lack, in words."""
    kinds = ("weight", "bias")
    within = {f"blocks.{i}.{name}{kind}" for i in range(len(model.blocks)) for name in block_weights.TIMM for kind in kinds}
    around = {f"{name}.{kind}" for name in ("norm", "fc_norm", "norm_pre", "patch_embed.proj") for kind in kinds}
    names = set(model.state_dict())
    if extra := sorted(names - within - around - more - {"pos_embed"}):
        return f"the image tower's {extra[0]}"
    if missing := sorted(within - names):
        return f"the image tower without {missing[0]}"
    return None


def _described(model: Any, norm: Any) -> ViTSpec | str:
    block = model.blocks[0]
    act = activation(block.mlp.act)
    if act is None:
        return f"the image tower's activation, {type(block.mlp.act).__name__}"
    side = model.patch_embed.patch_size
    return ViTSpec(
        size=model.patch_embed.img_size[0],
        patch=side[0] if isinstance(side, tuple) else side,
        width=model.embed_dim,
        depth=len(model.blocks),
        heads=block.attn.num_heads,
        hidden=block.mlp.fc1.out_features,
        act=act,
        eps=norm.eps,
        pre_norm=isinstance(model.norm_pre, nn.LayerNorm),
        pool=model.global_pool,
        norm_after=norm is model.fc_norm,
    )


def to_open_clip(model: Any) -> Weights:
    """A plain timm model's weights under open_clip's names. A bias of the patches moves into their positions."""
    weights = {name: value.detach() for name, value in model.state_dict().items()}
    positions = weights.pop("pos_embed")[0]  # (S, C), or (S - 1, C) where the class token has none
    if model.no_embed_class:
        positions = torch.cat([torch.zeros_like(positions[:1]), positions])
    bias = weights.pop("patch_embed.proj.bias", None)
    if bias is not None:
        positions = torch.cat([positions[:1], positions[1:] + bias])
    out: Weights = {
        "class_embedding": weights.pop("cls_token")[0, 0],
        "positional_embedding": positions,
        "conv1.weight": weights.pop("patch_embed.proj.weight"),
    }
    norms = {"norm_pre": "ln_pre", "norm": "ln_post", "fc_norm": "ln_post"}
    for name, value in block_weights.rename_blocks(weights, "blocks.", BLOCKS, block_weights.TIMM).items():
        head, _, kind = name.rpartition(".")
        out[f"{norms.get(head, head)}.{kind}"] = value
    return out


def from_open_clip(weights: Mapping[str, Tensor], made: ViTSpec) -> Weights:
    """The reverse, for the tower that `to_image_config(made)` builds. Names that are not known stay as they are."""
    out: Weights = {}
    norm = "fc_norm" if made.norm_after and made.pool == "avg" else "norm"
    names = {"conv1.weight": "patch_embed.proj.weight"}
    for kind in ("weight", "bias"):
        names |= {f"ln_pre.{kind}": f"norm_pre.{kind}", f"ln_post.{kind}": f"{norm}.{kind}"}
    for name, value in block_weights.rename_blocks(
        weights, BLOCKS, "blocks.", block_weights.invert(block_weights.TIMM)
    ).items():
        if name == "class_embedding":
            out["cls_token"] = value.reshape(1, 1, -1)
        elif name == "positional_embedding":
            out["pos_embed"] = value.unsqueeze(0)
        else:
            out[names.get(name, name)] = value
    if not made.pre_norm:
        out["patch_embed.proj.bias"] = torch.zeros(made.width)  # timm's has one there
    return out


def to_image_config(made: ViTSpec) -> dict[str, Any]:
    """image.* of a tower of ours with this architecture. Raises UserError where timm has no name for it."""
    names = {1e-5: "vit_base_patch16_clip_224", 1e-6: "vit_base_patch16_224"}
    if made.eps not in names:
        raise UserError(
            f"the image tower's norms have eps={made.eps}; timm's vision transformers know {', '.join(map(str, names))}"
        )
    args: dict[str, Any] = {
        "patch_size": made.patch,
        "embed_dim": made.width,
        "depth": made.depth,
        "num_heads": made.heads,
        "mlp_ratio": block_weights.compute_mlp_ratio(made.hidden, made.width),
        "pre_norm": made.pre_norm,
        "global_pool": made.pool,
        "fc_norm": made.norm_after and made.pool == "avg",
    }
    if made.act != "gelu":
        args["act_layer"] = made.act
    return {"tower": "timm", "name": names[made.eps], "size": made.size, "args": args, "pretrained": False}


# ---------------------------------------------------------------------------------------------------------------------
# transformers' CLIPVisionModel, from and to open_clip's names

_CLIP = {
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",  # sic
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}


def to_clip(weights: Mapping[str, Tensor]) -> Weights:
    """open_clip's names -> CLIPVisionModel's."""
    return {
        _CLIP.get(name, name): value
        for name, value in block_weights.to_transformers(weights, BLOCKS, "encoder.layers.").items()
    }


def from_clip(weights: Mapping[str, Tensor]) -> Weights:
    """CLIPVisionModel's names -> open_clip's. Names that are not known stay as they are."""
    back = {theirs: ours for ours, theirs in _CLIP.items()}
    named = block_weights.from_transformers(weights, "encoder.layers.", BLOCKS)
    return {back.get(name, name): value for name, value in named.items()}


def to_siglip(model: Any) -> Weights:
    """A timm model that is SigLIP's -> the names of transformers' SiglipVisionModel."""
    weights = {name: value.detach() for name, value in model.state_dict().items()}
    out: Weights = {"embeddings.position_embedding.weight": weights.pop("pos_embed")[0]}
    for kind in ("weight", "bias"):
        out[f"embeddings.patch_embedding.{kind}"] = weights.pop(f"patch_embed.proj.{kind}")
        out[f"post_layernorm.{kind}"] = weights.pop(f"norm.{kind}")
        rows = [weights.pop(f"attn_pool.{name}.{kind}") for name in ("q", "kv")]
        out[f"head.attention.in_proj_{kind}"] = torch.cat(rows)
    for name in [name for name in weights if name.startswith("attn_pool.")]:
        out[f"head.{POOL[name.removeprefix('attn_pool.')]}"] = weights.pop(name)
    middle = block_weights.rename_blocks(weights, "blocks.", BLOCKS, block_weights.TIMM)
    return out | block_weights.to_transformers(middle, BLOCKS, "encoder.layers.")


def from_siglip(weights: Mapping[str, Tensor]) -> Weights:
    """The reverse of `to_siglip`. Names that are not known stay as they are."""
    names = {f"head.{theirs}": f"attn_pool.{ours}" for ours, theirs in POOL.items() if theirs}
    for kind in ("weight", "bias"):
        names |= {f"embeddings.patch_embedding.{kind}": f"patch_embed.proj.{kind}", f"post_layernorm.{kind}": f"norm.{kind}"}
    out: Weights = {}
    middle = block_weights.from_transformers(weights, "encoder.layers.", BLOCKS)
    for name, value in block_weights.rename_blocks(middle, BLOCKS, "blocks.", block_weights.invert(block_weights.TIMM)).items():
        if name == "embeddings.position_embedding.weight":
            out["pos_embed"] = value.unsqueeze(0)
        elif name.startswith("head.attention.in_proj_"):
            kind, third = name.rpartition("_")[2], len(value) // 3
            out[f"attn_pool.q.{kind}"], out[f"attn_pool.kv.{kind}"] = value[:third].clone(), value[third:].clone()
        else:
            out[names.get(name, name)] = value
    return out


def to_siglip_image_config(made: ViTSpec) -> dict[str, Any]:
    """image.* of a tower of ours that is SigLIP's. Raises UserError where timm has no name for it."""
    settings = to_image_config(made)
    del settings["args"]["pre_norm"]
    del settings["args"]["fc_norm"]
    return settings | {"name": "vit_base_patch16_siglip_224"}


def to_vision_config(made: ViTSpec) -> dict[str, Any]:
    """The vision_config of a transformers CLIPModel or SiglipModel."""
    return {
        "hidden_size": made.width,
        "intermediate_size": made.hidden,
        "num_hidden_layers": made.depth,
        "num_attention_heads": made.heads,
        "image_size": made.size,
        "patch_size": made.patch,
        "hidden_act": {"gelu_tanh": "gelu_pytorch_tanh"}.get(made.act, made.act),
        "layer_norm_eps": made.eps,
    }
