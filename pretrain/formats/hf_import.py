"""Import CLIP, SigLIP, CLAP and vision-text dual encoders from transformers.

Every error names the model as the user gave it, in `source`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pretrain import config as configuration
from pretrain.data.text import explain_unreachable_hub, load_tokenizer
from pretrain.errors import ConfigError, UserError
from pretrain.formats import ImportedModel, clap_import, text_weights, vit_weights
from pretrain.formats.hf import quiet_transformers
from pretrain.formats.vit_weights import ViTSpec
from pretrain.model import ModelSchema
from pretrain.ops import CLIP_MEAN, CLIP_STD
from pretrain.runtime.console import log_info
from pretrain.towers import hf_models
from pretrain.towers.hf_models import one_line


def read(source: str) -> ImportedModel:
    """Read a CLIP, SigLIP, CLAP or vision-text dual encoder from a folder or from the hub.

    Args:
        source: a folder, or a name on the hub.

    Raises:
        UserError: it cannot be fetched or read, its weights are incomplete, or it is another kind of model.
    """
    with quiet_transformers():
        config = _load_config(source)
    readers = {"clip": _read_clip, "siglip": _read_siglip, "vision-text-dual-encoder": _read_dual, "clap": _read_clap}
    if config.model_type not in readers:
        raise UserError(f"{source} is a {config.model_type}; {', '.join(readers)} can be read")
    try:
        _refuse_oversized(config, source)
        return _read_model(source, config, readers[config.model_type])
    except UserError:
        raise
    except Exception as error:  # a configuration may hold anything: values of other types, sizes that do not fit
        raise UserError(f"{source}: its configuration and weights cannot be read: {one_line(error)}") from error


MAX_LAYERS = 1000
"""More blocks than any published tower has; building them, even without memory, would not end."""


def _refuse_oversized(config: Any, source: str) -> None:
    """Raise UserError where the configuration describes towers far larger than the weights in the folder."""
    folder = Path(source)
    stored = sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) if folder.is_dir() else 1 << 40
    for name in ("vision_config", "audio_config", "text_config"):
        section = getattr(config, name, None)
        if section is None:
            continue
        layers, width = (getattr(section, key, None) or 0 for key in ("num_hidden_layers", "hidden_size"))
        inner, vocabulary = (getattr(section, key, None) or 0 for key in ("intermediate_size", "vocab_size"))
        positions, size = (getattr(section, key, None) or 0 for key in ("max_position_embeddings", "image_size"))
        patch = getattr(section, "patch_size", None) or 1
        blocks = getattr(section, "num_hidden_groups", layers)  # of ALBERT, whose layers share their weights
        parameters = blocks * width * (4 * width + 2 * inner) + width * (vocabulary + positions + (size // patch) ** 2)
        if name == "audio_config":  # stages of blocks, whose width doubles from one to the next
            layers, width = sum(section.depths), section.patch_embeds_hidden_size
            parameters = sum(12 * depth * (width * 2**stage) ** 2 for stage, depth in enumerate(section.depths))
        if not 0 <= layers <= MAX_LAYERS or parameters > stored:  # a parameter takes a byte at least
            raise UserError(
                f"{source}: {name} describes a tower of {parameters:,} parameters in {layers:,} layers; the folder has only "
                f"{stored:,} bytes: are its weights missing?"
            )


def _read_model(source: str, config: Any, read_towers: Callable[..., Read]) -> ImportedModel:
    """Read towers, tokenizer and preprocessing of a model whose configuration is loaded."""
    weights, positions = _load_weights(source)
    other, text, model, named = read_towers(config, weights, source)
    if "logit_scale" not in named:
        named["logit_scale"] = weights["logit_scale"].reshape(1)
    tokenizer = load_tokenizer(source)
    # Exports name the longest text of training here; tokenizers without a limit have a very large number.
    text["length"] = min(positions or text["length"], max(2, tokenizer.model_max_length))
    if text["pool"] == "eot":
        text["pool"] = _choose_pooling(config.text_config, tokenizer, source)
    values = {"image": None, "text": {"tokenizer": source, "pretrained": False, **text}, "model": model}
    if config.model_type == "clap":
        values["audio"] = other
    else:
        preprocess, size = _read_preprocess(source)
        values["image"] = {"size": size, **other, **preprocess}
    return ImportedModel(configuration.build(ModelSchema, values, source), named, tokenizer)


def _load_config(source: str) -> Any:
    """Return the configuration of a model, from a folder, the local cache or the hub. Raises UserError."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            source, local_files_only=True, trust_remote_code=False
        )  # a folder, or a model in the local cache
    except Exception as error:
        if Path(source).is_dir():
            raise UserError(f"{source}: transformers cannot read its configuration: {one_line(error)}") from error
        if reason := explain_unreachable_hub():
            raise UserError(f"{source}: no run or folder here, not fetched before, and {reason}") from error
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # the hub and transformers raise many types of exceptions
        raise ConfigError(f"{source}: no run or folder here, and the hub has no such model ({one_line(error)})") from error


Read = tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Tensor]]
"""The configuration sections image (of CLAP: audio), text and model, and the weights under the names of DualEncoder."""


def _choose_pooling(config: Any, tokenizer: Any, source: str) -> str:
    """Return text.pool for a CLIP text model, which pools at the first token with the id that its configuration names.

    With a tokenizer that never gives this id, transformers pools at the first position: "cls".

    Raises UserError where it pools at the highest id, and that is not the end token.
    """
    ids: list[int] = tokenizer(["a"])["input_ids"][0]
    end = config.eos_token_id
    if end == 2:  # transformers then takes the highest id, as OpenAI does
        if ids[-1] != max(tokenizer.get_vocab().values()):
            raise UserError(
                f"{source}: its text tower pools at the token with the highest id (eos_token_id=2), but this tokenizer ends "
                f"texts with the id {ids[-1]}; set text_config.eos_token_id in config.json to the id that training pooled at"
            )
        return "eot"
    if end in ids and ids.index(end) == len(ids) - 1:
        return "eot"
    if end in ids[1:]:
        raise UserError(f"{source}: its text tower pools at the id {end}, in the middle of the texts of this tokenizer")
    log_info(
        f"{source}: text_config.eos_token_id={end} is not the end token of its tokenizer (id {ids[-1]}): as in transformers, "
        "texts are pooled at their first token"
    )
    return "cls"


def _load_weights(source: str) -> tuple[dict[str, Tensor], int | None]:
    """Return the weights as transformers loads them, and the number of tokens that the text tower's positions allow.

    Raises UserError where weights are missing or left over.
    """
    from transformers import AutoModel

    try:
        with quiet_transformers():
            model, info = AutoModel.from_pretrained(
                source, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
            )
    except Exception as error:  # transformers raises many types of exceptions for files that do not fit
        raise UserError(f"{source}: transformers cannot load its weights: {one_line(error)}") from error
    errors = []
    for key, state in (("missing_keys", "missing"), ("unexpected_keys", "not in the model")):
        names = sorted(name for name in info.get(key, ()) if not name.endswith("position_ids"))
        if names:
            errors.append(f"{len(names)} weights are {state} (first {names[0]})")
    if errors:
        raise UserError(f"{source} does not hold a complete {type(model).__name__}: {'; '.join(errors)}")
    return dict(model.state_dict()), hf_models.count_positions(model.text_model)


def _select_prefix(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the weights whose names have a prefix, without the prefix."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _name_towers(image: dict[str, Tensor], text: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of both towers under the names of DualEncoder."""
    return {f"towers.image.model.{n}": v for n, v in image.items()} | {f"towers.text.model.{n}": v for n, v in text.items()}


def _read_projections(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the projections under the names of DualEncoder."""
    return {
        "projections.image.weight": weights["visual_projection.weight"],
        "projections.text.weight": weights["text_projection.weight"],
    }


def _read_vit_spec(config: Any, source: str, pre_norm: bool, pool: str) -> ViTSpec:
    """Return the architecture of a vision configuration of CLIP or SigLIP.

    Raises UserError for an unknown activation.
    """
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


def _read_clip_vision(config: Any, weights: dict[str, Tensor], source: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the section `image` and the image tower's weights of a CLIPVisionModel."""
    spec = _read_vit_spec(config, source, pre_norm=True, pool="token")
    return vit_weights.to_image_config(spec), vit_weights.from_open_clip(vit_weights.from_clip(weights), spec)


def _build_text_section(config: Any) -> dict[str, Any]:
    """Return the section `text` for a text model of transformers, with its whole configuration inline."""
    return {
        "tower": "transformers",
        "args": hf_models.inline_args(SimpleNamespace(config=config)),
        "length": config.max_position_embeddings,
    }


def _read_clip(config: Any, weights: dict[str, Tensor], source: str) -> Read:
    image, vision_weights = _read_clip_vision(config.vision_config, _select_prefix(weights, "vision_model."), source)
    text = _build_text_section(config.text_config) | {"pool": "eot"}
    named = _name_towers(vision_weights, _select_prefix(weights, "text_model.")) | _read_projections(weights)
    return image, text, {"dim": config.projection_dim}, named


def _read_siglip(config: Any, weights: dict[str, Tensor], source: str) -> Read:
    spec = _read_vit_spec(config.vision_config, source, pre_norm=False, pool="map")
    text = _build_text_section(config.text_config) | {"pool": "tower"}
    vision_weights = vit_weights.from_siglip(_select_prefix(weights, "vision_model."))
    named = _name_towers(vision_weights, _select_prefix(weights, "text_model."))
    named["logit_bias"] = weights["logit_bias"].reshape(1)
    model = {"dim": spec.width, "projection": "none", "logit_bias": float(weights["logit_bias"])}
    return vit_weights.to_siglip_image_config(spec), text, model, named


def _read_dual(config: Any, weights: dict[str, Tensor], source: str) -> Read:
    vision_config, text_config = config.vision_config, config.text_config
    if vision_config.model_type == "timm_wrapper":
        args = dict(vision_config.model_args or {})
        size = args.pop("img_size", None)
        image = {"tower": "timm", "name": vision_config.architecture, "args": args, "pretrained": False}
        if size is not None:
            image["size"] = size
        vision_weights = _select_prefix(weights, "vision_model.timm_model.")
    elif vision_config.model_type == "clip_vision_model":
        image, vision_weights = _read_clip_vision(vision_config, _select_prefix(weights, "vision_model."), source)
    else:
        kind = vision_config.model_type
        raise UserError(f"{source}: its image tower is a {kind}; timm_wrapper and clip_vision_model can be read")
    text = _build_text_section(text_config) | {"pool": "eot" if text_config.model_type == "clip_text_model" else "tower"}
    named = _name_towers(vision_weights, _select_prefix(weights, "text_model.")) | _read_projections(weights)
    return image, text, {"dim": config.projection_dim}, named


def _read_clap(config: Any, weights: dict[str, Tensor], source: str) -> Read:
    projection, named = clap_import.read_projections(config, weights, source)
    named |= {f"towers.audio.model.model.{n}": v for n, v in _select_prefix(weights, "audio_model.").items()}
    named |= {f"towers.text.model.{n}": v for n, v in _select_prefix(weights, "text_model.").items()}
    named["logit_scale"] = clap_import.read_logit_scale(weights, source)
    text = _build_text_section(config.text_config) | {"pool": "tower"}
    text["args"]["pad_token_id"] = config.text_config.pad_token_id  # positions begin behind it, whatever the tokenizer's is
    return clap_import.read_audio_section(config, source), text, {"dim": config.projection_dim, "projection": projection}, named


def _read_preprocess(source: str) -> tuple[dict[str, Any], int]:
    """Read how a model's image processor prepares images.

    Returns:
        image.mean, std, resize and interpolation, and the side of the images in pixels.
    """
    from transformers.models.auto.image_processing_auto import get_image_processor_config

    processor = get_image_processor_config(source)
    timm_cfg = processor.get("pretrained_cfg")
    if timm_cfg:
        resize = {"squash": "squash", "border": "pad"}.get(timm_cfg.get("crop_mode"), "crop")
        size = timm_cfg["input_size"][-1]
        mean, std, filter_ = timm_cfg["mean"], timm_cfg["std"], timm_cfg.get("interpolation", "bicubic")
    else:
        side = processor.get("crop_size" if processor.get("do_center_crop") else "size") or 224
        size = side if isinstance(side, int) else side.get("height") or side.get("shortest_edge")
        resize = "crop" if processor.get("do_center_crop", True) else "squash"
        mean, std = processor.get("image_mean", CLIP_MEAN), processor.get("image_std", CLIP_STD)
        filter_ = {2: "bilinear", 3: "bicubic"}.get(processor.get("resample", 3), "bicubic")
    recipe = {"mean": list(mean), "std": list(std), "interpolation": filter_, "resize": resize}
    return recipe | ({"pad_color": "mean"} if resize == "pad" else {}), size
