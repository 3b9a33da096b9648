"""Reads transformers' CLIP, SigLIP and vision-text dual encoders. Each is named as it was given in every error."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pretrain import config as configuration
from pretrain.data.text import explain_unreachable_hub, load_tokenizer
from pretrain.errors import UserError
from pretrain.formats import ImportedModel, text_weights, vit_weights
from pretrain.formats.hf import quiet
from pretrain.formats.vit_weights import ViTSpec
from pretrain.model import ModelSchema
from pretrain.ops import CLIP_MEAN, CLIP_STD
from pretrain.towers import hf_models
from pretrain.towers.hf_models import one_line


def read(source: str) -> ImportedModel:
    """A CLIP, SigLIP or vision-text dual encoder, from a folder or by its hub name. Raises UserError."""
    with quiet():
        config = _config(source)
    readers = {"clip": _read_clip, "siglip": _read_siglip, "vision-text-dual-encoder": _read_dual}
    if config.model_type not in readers:
        raise UserError(f"{source} is a {config.model_type}; {', '.join(readers)} can be read")
    weights = _weights(source)
    image, text, model, named = readers[config.model_type](config, weights, source)
    named["logit_scale"] = weights["logit_scale"].reshape(1)
    tokenizer = load_tokenizer(source)
    preprocess, size = _preprocess(source)
    image = {"size": size, **image, **preprocess}
    values = {"image": image, "text": {"tokenizer": source, "pretrained": False, **text}, "model": model}
    return ImportedModel(configuration.build(ModelSchema, values, source), named, tokenizer)


def _config(source: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, local_files_only=True)  # a folder, or fetched before
    except Exception as error:
        if Path(source).is_dir():
            raise UserError(f"{source}: transformers cannot read its configuration: {one_line(error)}") from error
        if problem := explain_unreachable_hub():
            raise UserError(f"{source}: no run or folder here, not fetched before, and {problem}") from error
    try:
        return AutoConfig.from_pretrained(source)
    except Exception as error:  # the hub and transformers raise what they like
        raise UserError(f"{source}: no run or folder here, and the hub has no such model ({one_line(error)})") from error


Read = tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Tensor]]
"""image.*, text.*, model.*, weights under our names."""


def _weights(source: str) -> dict[str, Tensor]:
    """The weights as transformers loads them, nothing missing and nothing left over."""
    from transformers import AutoModel

    try:
        with quiet():
            model, said = AutoModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # the library raises what it likes for files that do not fit
        raise UserError(f"{source}: transformers cannot load its weights: {one_line(error)}") from error
    wrong = []
    for key, word in (("missing_keys", "missing"), ("unexpected_keys", "not in the model")):
        names = sorted(name for name in said.get(key, ()) if not name.endswith("position_ids"))
        if names:
            wrong.append(f"{len(names)} weights are {word} (first {names[0]})")
    if wrong:
        raise UserError(f"{source} does not hold a whole {type(model).__name__}: {'; '.join(wrong)}")
    return dict(model.state_dict())


def _below(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _ours(image: dict[str, Tensor], text: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"towers.image.model.{n}": v for n, v in image.items()} | {f"towers.text.model.{n}": v for n, v in text.items()}


def _projections(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "projections.image.weight": weights["visual_projection.weight"],
        "projections.text.weight": weights["text_projection.weight"],
    }


def _plain(config: Any, source: str, pre_norm: bool, pool: str) -> ViTSpec:
    """A vision configuration of CLIP or SigLIP. Raises UserError."""
    act = text_weights.ACTS.get(config.hidden_act)
    if act is None:
        raise UserError(f"{source}: the image tower's activation {config.hidden_act} is none of {', '.join(text_weights.ACTS)}")
    return ViTSpec(
        size=config.image_size,
        patch=config.patch_size,
        width=config.hidden_size,
        depth=config.num_hidden_layers,
        heads=config.num_attention_heads,
        hidden=config.intermediate_size,
        act=act,
        eps=config.layer_norm_eps,
        pre_norm=pre_norm,
        pool=pool,
        norm_after=False,
    )


def _clip_picture(config: Any, weights: dict[str, Tensor], source: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    made = _plain(config, source, pre_norm=True, pool="token")
    return vit_weights.to_image_config(made), vit_weights.from_open_clip(vit_weights.from_clip(weights), made)


def _text_section(config: Any) -> dict[str, Any]:
    """text.* of a text model of transformers, its whole configuration inline."""
    return {
        "tower": "transformers",
        "args": hf_models.inline_args(SimpleNamespace(config=config)),
        "length": config.max_position_embeddings,
    }


def _read_clip(config: Any, weights: dict[str, Tensor], source: str) -> Read:
    image, pictures = _clip_picture(config.vision_config, _below(weights, "vision_model."), source)
    text = _text_section(config.text_config) | {"pool": "eot"}
    named = _ours(pictures, _below(weights, "text_model.")) | _projections(weights)
    return image, text, {"dim": config.projection_dim}, named


def _read_siglip(config: Any, weights: dict[str, Tensor], source: str) -> Read:
    made = _plain(config.vision_config, source, pre_norm=False, pool="map")
    text = _text_section(config.text_config) | {"pool": "tower"}
    named = _ours(vit_weights.from_siglip(_below(weights, "vision_model.")), _below(weights, "text_model."))
    named["logit_bias"] = weights["logit_bias"].reshape(1)
    model = {"dim": made.width, "projection": "none", "logit_bias": float(weights["logit_bias"])}
    return vit_weights.to_siglip_image_config(made), text, model, named


def _read_dual(config: Any, weights: dict[str, Tensor], source: str) -> Read:
    picture, text_config = config.vision_config, config.text_config
    if picture.model_type == "timm_wrapper":
        args = dict(picture.model_args or {})
        size = args.pop("img_size", None)
        image = {"tower": "timm", "name": picture.architecture, "args": args, "pretrained": False}
        if size is not None:
            image["size"] = size
        pictures = _below(weights, "vision_model.timm_model.")
    elif picture.model_type == "clip_vision_model":
        image, pictures = _clip_picture(picture, _below(weights, "vision_model."), source)
    else:
        raise UserError(f"{source}: its image tower is a {picture.model_type}; timm_wrapper and clip_vision_model can be read")
    text = _text_section(text_config) | {"pool": "eot" if text_config.model_type == "clip_text_model" else "tower"}
    named = _ours(pictures, _below(weights, "text_model.")) | _projections(weights)
    return image, text, {"dim": config.projection_dim}, named


def _preprocess(source: str) -> tuple[dict[str, Any], int]:
    """image.mean, std, resize, interpolation, and the side of the picture, of its image processor."""
    from transformers.models.auto.image_processing_auto import get_image_processor_config

    found = get_image_processor_config(source)
    timm_cfg = found.get("pretrained_cfg")
    if timm_cfg:
        squash, size = timm_cfg.get("crop_mode") == "squash", timm_cfg["input_size"][-1]
        mean, std, filter_ = timm_cfg["mean"], timm_cfg["std"], timm_cfg.get("interpolation", "bicubic")
    else:
        side = found.get("crop_size" if found.get("do_center_crop") else "size") or 224
        size = side if isinstance(side, int) else side.get("height") or side.get("shortest_edge")
        squash = not found.get("do_center_crop", True)
        mean, std = found.get("image_mean", CLIP_MEAN), found.get("image_std", CLIP_STD)
        filter_ = {2: "bilinear", 3: "bicubic"}.get(found.get("resample", 3), "bicubic")
    recipe = {"mean": list(mean), "std": list(std), "interpolation": filter_, "resize": "squash" if squash else "crop"}
    return recipe, size
