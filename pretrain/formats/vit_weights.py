"""The vision transformers of CLIP and SigLIP: architecture, and weight names in three libraries.

A plain vision transformer has patches by one convolution, a class token, learned positions, pre-norm blocks and one last norm.
timm's VisionTransformer (our image tower) is one with most of its settings, and so are open_clip's VisionTransformer and
transformers' CLIPVisionModel. Its weights are translated by way of open_clip's names. SigLIP's has no class token and pools by
attention; its weights are translated between timm's and transformers' names.
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
"""timm's attention pooling -> SigLIP's head in transformers, which keeps queries, keys and values in one matrix ("")."""


@dataclass(frozen=True)
class ViTSpec:
    """The complete architecture of a vision transformer of CLIP or SigLIP."""

    size: int
    """Side of the image, pixels."""
    patch: int
    """Side of a patch, pixels."""
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
    pre_norm: bool
    """A norm between positions and blocks (CLIP)."""
    pool: str
    """token (the class token), avg (the mean of the other tokens) or map (SigLIP's attention pooling)."""
    norm_after: bool
    """The last norm acts on the pooled vector, not on the tokens. For pooling by the class token, both are the same."""


def get_activation(module: Any) -> str | None:
    """Return the name of an activation module: gelu, quick_gelu or gelu_tanh; None for any other."""
    kind = type(module).__name__
    if kind in ("GELU", "GELUActivation"):
        return "gelu_tanh" if getattr(module, "approximate", "none") == "tanh" else "gelu"
    tanh = ("GELUTanh", "NewGELUActivation")
    return "gelu_tanh" if kind in tanh else "quick_gelu" if kind in ("QuickGELU", "QuickGELUActivation") else None


def vit_spec(model: Any) -> ViTSpec | str:
    """Return a timm model's architecture if it is a plain vision transformer, else what is not plain."""
    if type(model).__name__ != "VisionTransformer" or not len(getattr(model, "blocks", [])):
        return f"the image tower, a {type(model).__name__}"
    if model.cls_token is None or model.pos_embed is None:
        return "the image tower without class token" if model.cls_token is None else "the image tower without learned positions"
    if mismatch := _find_mismatch(model, {"cls_token"}):
        return mismatch
    norm = model.norm if isinstance(model.norm, nn.LayerNorm) else model.fc_norm
    prefix = model.global_pool == "avg" and getattr(model, "pool_include_prefix", False)
    if model.global_pool not in ("token", "avg") or prefix or not isinstance(norm, nn.LayerNorm):
        return f"the image tower's pooling, {model.global_pool}"
    return _build_spec(model, norm)


def siglip_spec(model: Any) -> ViTSpec | str:
    """Return a timm model's architecture if it is SigLIP's vision transformer, else which part is not."""
    if type(model).__name__ != "VisionTransformer" or model.global_pool != "map" or model.cls_token is not None:
        return "the image tower, which is not SigLIP's"
    names = {f"attn_pool.{name}" for name in POOL}
    if mismatch := _find_mismatch(model, names):
        return mismatch
    if missing := sorted(names - set(model.state_dict())):
        return f"the image tower without {missing[0]}"
    spec = _build_spec(model, model.norm)
    has_equal_heads = model.blocks[0].attn.num_heads == model.attn_pool.num_heads
    if isinstance(spec, ViTSpec) and (spec.pre_norm or not has_equal_heads):
        return "the image tower, which is not SigLIP's"
    return spec


def _find_mismatch(model: Any, more: set[str]) -> str | None:
    """Return, in words, the first weight that the model has in addition or lacks, or None.

    It is compared with a plain vision transformer that has the weights `more` too.
    """
    kinds = ("weight", "bias")
    in_blocks = {f"blocks.{i}.{name}{kind}" for i in range(len(model.blocks)) for name in block_weights.TIMM for kind in kinds}
    outside = {f"{name}.{kind}" for name in ("norm", "fc_norm", "norm_pre", "patch_embed.proj") for kind in kinds}
    names = set(model.state_dict())
    if extra := sorted(names - in_blocks - outside - more - {"pos_embed"}):
        return f"the image tower's {extra[0]}"
    if missing := sorted(in_blocks - names):
        return f"the image tower without {missing[0]}"
    return None


def _build_spec(model: Any, norm: Any) -> ViTSpec | str:
    block = model.blocks[0]
    act = get_activation(block.mlp.act)
    if act is None:
        return f"the image tower's activation, {type(block.mlp.act).__name__}"
    patch = model.patch_embed.patch_size
    return ViTSpec(
        size=model.patch_embed.img_size[0],
        patch=patch[0] if isinstance(patch, tuple) else patch,
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
    """Return a plain timm model's weights under open_clip's names.

    A bias of the patches moves into their positions.
    """
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


def from_open_clip(weights: Mapping[str, Tensor], spec: ViTSpec) -> Weights:
    """Rename weights from open_clip's names to those of the tower that `to_image_config(spec)` builds.

    Unknown names stay as they are.
    """
    out: Weights = {}
    norm = "fc_norm" if spec.norm_after and spec.pool == "avg" else "norm"
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
    if not spec.pre_norm:
        out["patch_embed.proj.bias"] = torch.zeros(spec.width)  # timm's model has a bias there, open_clip's has none
    return out


def to_image_config(spec: ViTSpec) -> dict[str, Any]:
    """Return the configuration section `image` that builds this architecture.

    Raises UserError where timm has no such model.
    """
    names = {1e-5: "vit_base_patch16_clip_224", 1e-6: "vit_base_patch16_224"}
    if spec.eps not in names:
        raise UserError(
            f"the image tower's norms have eps={spec.eps}; timm's vision transformers know {', '.join(map(str, names))}"
        )
    args: dict[str, Any] = {
        "patch_size": spec.patch,
        "embed_dim": spec.width,
        "depth": spec.depth,
        "num_heads": spec.heads,
        "mlp_ratio": block_weights.compute_mlp_ratio(spec.hidden, spec.width),
        "pre_norm": spec.pre_norm,
        "global_pool": spec.pool,
        "fc_norm": spec.norm_after and spec.pool == "avg",
    }
    if spec.act != "gelu":
        args["act_layer"] = spec.act
    return {"tower": "timm", "name": names[spec.eps], "size": spec.size, "args": args, "pretrained": False}


# ---------------------------------------------------------------------------------------------------------------------
# To and from the names of transformers' CLIPVisionModel and SiglipVisionModel

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
    """Rename weights from open_clip's names to CLIPVisionModel's; unknown names stay as they are."""
    return {
        _CLIP.get(name, name): value
        for name, value in block_weights.to_transformers(weights, BLOCKS, "encoder.layers.").items()
    }


def from_clip(weights: Mapping[str, Tensor]) -> Weights:
    """Rename weights from CLIPVisionModel's names to open_clip's; unknown names stay as they are."""
    names = block_weights.invert(_CLIP)
    renamed = block_weights.from_transformers(weights, "encoder.layers.", BLOCKS)
    return {names.get(name, name): value for name, value in renamed.items()}


def to_siglip(model: Any) -> Weights:
    """Return a timm model's weights under SiglipVisionModel's names.

    `siglip_spec` must return a ViTSpec for the model.
    """
    weights = {name: value.detach() for name, value in model.state_dict().items()}
    out: Weights = {"embeddings.position_embedding.weight": weights.pop("pos_embed")[0]}
    for kind in ("weight", "bias"):
        out[f"embeddings.patch_embedding.{kind}"] = weights.pop(f"patch_embed.proj.{kind}")
        out[f"post_layernorm.{kind}"] = weights.pop(f"norm.{kind}")
        rows = [weights.pop(f"attn_pool.{name}.{kind}") for name in ("q", "kv")]
        out[f"head.attention.in_proj_{kind}"] = torch.cat(rows)
    for name in [name for name in weights if name.startswith("attn_pool.")]:
        out[f"head.{POOL[name.removeprefix('attn_pool.')]}"] = weights.pop(name)
    renamed = block_weights.rename_blocks(weights, "blocks.", BLOCKS, block_weights.TIMM)
    return out | block_weights.to_transformers(renamed, BLOCKS, "encoder.layers.")


def from_siglip(weights: Mapping[str, Tensor]) -> Weights:
    """Rename weights from SiglipVisionModel's names to timm's; unknown names stay as they are."""
    names = {f"head.{siglip}": f"attn_pool.{timm}" for timm, siglip in POOL.items() if siglip}
    for kind in ("weight", "bias"):
        names |= {f"embeddings.patch_embedding.{kind}": f"patch_embed.proj.{kind}", f"post_layernorm.{kind}": f"norm.{kind}"}
    out: Weights = {}
    renamed = block_weights.from_transformers(weights, "encoder.layers.", BLOCKS)
    to_timm = block_weights.invert(block_weights.TIMM)
    for name, value in block_weights.rename_blocks(renamed, BLOCKS, "blocks.", to_timm).items():
        if name == "embeddings.position_embedding.weight":
            out["pos_embed"] = value.unsqueeze(0)
        elif name.startswith("head.attention.in_proj_"):
            kind, third = name.rpartition("_")[2], len(value) // 3
            out[f"attn_pool.q.{kind}"], out[f"attn_pool.kv.{kind}"] = value[:third].clone(), value[third:].clone()
        else:
            out[names.get(name, name)] = value
    return out


def to_siglip_image_config(spec: ViTSpec) -> dict[str, Any]:
    """Return the configuration section `image` that builds SigLIP's tower.

    Raises UserError where timm has no such model.
    """
    settings = to_image_config(spec)
    del settings["args"]["pre_norm"]
    del settings["args"]["fc_norm"]
    return settings | {"name": "vit_base_patch16_siglip_224"}


def to_vision_config(spec: ViTSpec) -> dict[str, Any]:
    """Return the vision_config of a transformers CLIPModel or SiglipModel of this architecture."""
    return {
        "hidden_size": spec.width,
        "intermediate_size": spec.hidden,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.heads,
        "image_size": spec.size,
        "patch_size": spec.patch,
        "hidden_act": {"gelu_tanh": "gelu_pytorch_tanh"}.get(spec.act, spec.act),
        "layer_norm_eps": spec.eps,
    }
