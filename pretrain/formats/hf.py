"""Export to transformers: a folder for AutoModel, AutoProcessor and zero-shot pipelines.

    config.json  model.safetensors  processor_config.json  tokenizer files  README.md

The model is a CLIPModel or SiglipModel if one has exactly the same architecture. Otherwise it is a VisionTextDualEncoderModel,
which holds the timm model (as TimmWrapperModel) and the text model unchanged.

Images are prepared by timm's transforms. Of transformers' image processors, only that one resizes and crops bit for bit as
evaluation during training does; the others round differently and crop a pixel off. It requires RGB images.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.formats import Encoders, clap, mean_pooling, portable_tokenizer, text_weights, unsupported, vit_weights
from pretrain.formats.text_weights import TextSpec
from pretrain.formats.vit_weights import ViTSpec
from pretrain.runtime.files import apply_umask
from pretrain.runtime.performance import name_deepspeed_device
from pretrain.towers import hf_models

TIMM_ONLY = ("weight_init", "fix_init", "drop_path_rate", "drop_rate", "proj_drop_rate", "attn_drop_rate", "patch_drop_rate")
"""Arguments of timm that matter in training only."""

PIPELINE_LENGTH = 64
"""Tokens to which transformers' pipelines pad the texts of a SiglipModel."""


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence progress bars and warnings of transformers, and of what it imports, inside the block.

    clipfuse reports errors in one line of its own.
    """
    name_deepspeed_device()
    from transformers.utils import logging

    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()


def export_error(encoders: Encoders) -> str | None:
    """Return which part of the encoders transformers cannot hold, or None."""
    if "image" not in encoders.model.towers:
        return clap.export_error(encoders)
    if error := unsupported(encoders):
        return error
    recipe = encoders.preprocess
    if recipe.resize == "pad" and not recipe.pads_with_mean():
        color = "#{:02x}{:02x}{:02x}".format(*recipe.pad_color)
        return f"borders of {color} (image.resize=pad): its image processor pads with the mean color only, image.pad_color=mean"
    build = _choose_builder(encoders)
    return build if isinstance(build, str) else None


def write(encoders: Encoders, folder: Path, target: Path | None = None) -> None:
    """Write model, tokenizer and processor into an existing folder.

    `export_error` must be None for the encoders. target: not used; no file names the folder.
    """
    if "image" not in encoders.model.towers:
        with quiet_transformers():
            clap.write(encoders, folder)
        return
    with quiet_transformers():
        build = _choose_builder(encoders)
        assert not isinstance(build, str)
        model = build()
        model.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        apply_umask(weights)
    tokenizer = portable_tokenizer.build_portable(encoders.text)
    if model.config.model_type == "siglip":
        # Its text model attends to padding, so it gets no mask. The attribute is saved only if init_kwargs has it too.
        tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = ["input_ids"]
    tokenizer.save_pretrained(folder)
    _write_processor(encoders, folder, model.config.model_type)


def _write_processor(encoders: Encoders, folder: Path, kind: str) -> None:
    recipe = encoders.preprocess
    pretrained_cfg = {
        "input_size": [3, recipe.size, recipe.size],
        "interpolation": recipe.interpolation,
        "crop_pct": 1.0,
        "crop_mode": {"crop": "center", "squash": "squash", "pad": "border"}[recipe.resize],
        "mean": list(recipe.mean),
        "std": list(recipe.std),
    }
    image = {"image_processor_type": "TimmWrapperImageProcessor", "pretrained_cfg": pretrained_cfg, "architecture": None}
    classes = {"clip": "CLIPProcessor", "siglip": "SiglipProcessor"}
    processor_class = classes.get(kind, "VisionTextDualEncoderProcessor")
    processor = {"processor_class": processor_class, "image_processor": image}
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=1))
    # CLIPImageProcessor reads its own keys here, and would take CLIP's size and statistics where they are missing.
    both = recipe.to_transformers() | image
    (folder / "preprocessor_config.json").write_text(json.dumps(both, indent=1))


# ---------------------------------------------------------------------------------------------------------------------
# Building the model


def _choose_builder(encoders: Encoders) -> Callable[[], Any] | str:
    """Return a function that builds the transformers model with the encoders' weights, or which part it cannot hold."""
    tower, image_tower = encoders.text_tower, encoders.image_tower
    assert tower is not None
    assert image_tower is not None
    text = text_weights.text_spec(tower)
    if isinstance(text, TextSpec) and not text.causal:
        error = _find_siglip_error(encoders)
        return error if error is not None else partial(_build_siglip, encoders, text)
    if isinstance(text, str) and not (tower.pool == "tower" and tower.trims):
        return f"{text} pooled by {tower.pool}: transformers pools a text model only in the way that its class defines"
    if isinstance(text, TextSpec) and encoders.end_id in (None, 2):
        return (
            "the end of a text: transformers pools a CLIP text model at the end token, whose id must not be 2, and this "
            f"tokenizer's is {encoders.end_id}"
        )
    vision = vit_weights.vit_spec(image_tower.model)
    if isinstance(text, TextSpec) and isinstance(vision, ViTSpec) and vision.pre_norm and vision.pool == "token":
        return partial(_build_clip, encoders, text, vision)
    arguments = _find_timm_arguments(image_tower)
    return arguments if isinstance(arguments, str) else partial(_build_dual, encoders, text, arguments)


def _convert_text_tower(encoders: Encoders, spec: TextSpec) -> tuple[TextSpec, dict[str, Tensor]]:
    """Return the architecture and weights of a causal text tower that pools at the end token.

    The weights are under transformers' names, with `text_projection.weight` (D, C).
    """
    tower = encoders.text_tower
    assert tower is not None
    weights = text_weights.to_open_clip(tower, _get_projection(encoders, "text"))
    spec, weights = text_weights.cut_positions(spec, weights, encoders.text.length)
    if tower.pool == "avg":
        spec, weights = mean_pooling.to_attention_layer(spec, weights)
    matrix = weights.pop("text_projection").t().contiguous()
    return spec, text_weights.to_transformers(weights) | {"text_projection.weight": matrix}


def _to_text_config(encoders: Encoders, spec: TextSpec) -> dict[str, Any]:
    """Return the text_config of a model of transformers, with the ids of the tokenizer's special tokens."""
    tokenizer = encoders.text.tokenizer
    special_ids = {
        "eos_token_id": encoders.end_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": encoders.text.pad_id,
    }
    return text_weights.to_text_args(spec) | special_ids | {"projection_dim": encoders.dim}


def _build_clip(encoders: Encoders, text: TextSpec, vision: ViTSpec) -> Any:
    """Return a CLIPModel with the encoders' weights."""
    from transformers import CLIPConfig, CLIPModel

    assert encoders.image_tower is not None
    spec, weights = _convert_text_tower(encoders, text)
    settings = _to_text_config(encoders, spec)
    model = CLIPModel(
        CLIPConfig(
            text_config=settings,
            vision_config=vit_weights.to_vision_config(vision) | {"projection_dim": encoders.dim},
            projection_dim=encoders.dim,
        )
    )
    named = {name if name.startswith("text_projection") else f"text_model.{name}": value for name, value in weights.items()}
    vision_weights = vit_weights.to_clip(vit_weights.to_open_clip(encoders.image_tower.model))
    named |= {f"vision_model.{name}": value for name, value in vision_weights.items()}
    return _load_weights(model, encoders, named)


def _build_dual(encoders: Encoders, text: TextSpec | str, arguments: dict[str, Any]) -> Any:
    """Return a VisionTextDualEncoderModel with the encoders' weights.

    arguments: the model_args with which timm builds the image tower.
    """
    from transformers import AutoConfig, TimmWrapperConfig, VisionTextDualEncoderConfig, VisionTextDualEncoderModel

    tower, image_tower = encoders.text_tower, encoders.image_tower
    assert tower is not None
    assert image_tower is not None
    if isinstance(text, TextSpec):
        spec, weights = _convert_text_tower(encoders, text)
        settings = _to_text_config(encoders, spec)
        text_config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        named = {name if name.startswith("text_projection") else f"text_model.{name}": value for name, value in weights.items()}
    else:
        text_config, weights = _cut_positions(tower.model, encoders.text.length)
        named = {f"text_model.{name}": value for name, value in weights.items()}
        named["text_projection.weight"] = _get_projection(encoders, "text")
    name = image_tower.config.name.split(".")[0]
    vision_config = TimmWrapperConfig(architecture=name, model_args=arguments).to_dict()
    config = VisionTextDualEncoderConfig(
        vision_config=vision_config | {"hidden_size": image_tower.pooled_width, "num_classes": 0, "label_names": []},
        text_config=text_config.to_dict(),
        projection_dim=encoders.dim,
    )
    model = VisionTextDualEncoderModel(config)
    named |= {f"vision_model.timm_model.{name}": value for name, value in image_tower.model.state_dict().items()}
    return _load_weights(model, encoders, named)


def _cut_positions(model: Any, length: int) -> tuple[Any, dict[str, Tensor]]:
    """Return configuration and weights of a text model of transformers, without the positions beyond `length`.

    A table of positions that is not BERT's stays whole.
    """
    name, config, weights = "embeddings.position_embeddings.weight", copy.deepcopy(model.config), dict(model.state_dict())
    count = hf_models.count_positions(model)
    if count is not None and count > length and name in weights and len(weights[name]) == config.max_position_embeddings:
        config.max_position_embeddings -= count - length
        weights[name] = weights[name][: config.max_position_embeddings]
    return config, weights


def _find_siglip_error(encoders: Encoders) -> str | None:
    """Return which part of the encoders a SiglipModel cannot hold, or None."""
    image_tower = encoders.image_tower
    assert image_tower is not None
    vision = vit_weights.siglip_spec(image_tower.model)
    if isinstance(vision, str):
        return f"{vision}, together with a text tower that is SigLIP's and attends to padding"
    if encoders.projection("image") is not None:
        return "the projection of the image tower: SiglipModel has none (model.projection=none trains it so)"
    if encoders.text.length != PIPELINE_LENGTH:
        return f"texts of {encoders.text.length} tokens: transformers pads those of SigLIP to {PIPELINE_LENGTH}"
    return None


def _build_siglip(encoders: Encoders, text: TextSpec) -> Any:
    """Return a SiglipModel with the encoders' weights."""
    from transformers import SiglipConfig, SiglipModel

    tower, image_tower = encoders.text_tower, encoders.image_tower
    assert tower is not None
    assert image_tower is not None
    vision = vit_weights.siglip_spec(image_tower.model)
    assert not isinstance(vision, str)
    vision_config = vit_weights.to_vision_config(vision)
    weights = text_weights.to_open_clip(tower, encoders.projection("text"))
    text, weights = text_weights.cut_positions(text, weights, encoders.text.length)
    heads = {f"head.{kind}": weights.pop(f"text_projection.{kind}") for kind in ("weight", "bias")}
    named = {f"text_model.{name}": value for name, value in (text_weights.to_transformers(weights) | heads).items()}
    named |= {f"vision_model.{name}": value for name, value in vit_weights.to_siglip(image_tower.model).items()}
    settings = text_weights.to_text_args(text) | {"projection_size": encoders.dim}
    model = SiglipModel(SiglipConfig(text_config=settings, vision_config=vision_config))
    bias = encoders.model.logit_bias
    return _load_weights(model, encoders, named | {"logit_bias": torch.zeros(1) if bias is None else bias.reshape(1)})


def _get_projection(encoders: Encoders, modality: str) -> Tensor:
    """Return the projection matrix (D, P) of a modality: the identity if there is none."""
    matrix = encoders.projection(modality)
    return torch.eye(encoders.dim) if matrix is None else matrix


def _load_weights(model: Any, encoders: Encoders, weights: dict[str, Tensor]) -> Any:
    """Load weights, image projection and logit scale into a model, strictly; return it in eval mode."""
    source = encoders.model
    if hasattr(model, "visual_projection"):
        weights = {"visual_projection.weight": _get_projection(encoders, "image"), **weights}
    weights["logit_scale"] = source.logit_scale.reshape(model.logit_scale.shape)
    model.load_state_dict({name: value.detach().float() for name, value in weights.items()})
    return model.eval()


def _find_timm_arguments(tower: Any) -> dict[str, Any] | str:
    """Return the model_args with which timm builds this image tower, or which part it cannot build."""
    import timm

    model, config = tower.model, tower.config
    if config.stem:
        return f"the image tower's stem, image.stem={config.stem}, which timm does not have"
    arguments = {key: value for key, value in config.args.items() if key not in TIMM_ONLY}
    if config.pool != "tower" and hasattr(model, "global_pool") and hasattr(model, "blocks"):
        arguments |= {"global_pool": model.global_pool, "fc_norm": not isinstance(model.fc_norm, torch.nn.Identity)}
    name = config.name.split(".")[0]
    for size in ({"img_size": config.size}, {}):
        try:
            other: Any = timm.create_model(name, num_classes=0, **arguments, **size)
            other.load_state_dict(model.state_dict())
            is_same = _has_same_output(tower, other.eval())
        except (TypeError, RuntimeError, AssertionError, ValueError, AttributeError):
            continue  # no such argument, other weights, or no pooling by timm's forward_head
        if is_same:
            return arguments | size
    finer = f", image.stride={config.stride}" if config.stride else ""
    return f"the image tower: timm's {name} with image.args{finer} and pool={config.pool} cannot be built by timm alone"


@torch.no_grad()
def _has_same_output(tower: Any, other: Any) -> bool:
    """Return whether a timm model gives the pooled output of the image tower, for a fixed image."""
    size = tower.config.size
    image = torch.linspace(-2, 2, 3 * size * size).sin().reshape(1, 3, size, size)
    output, expected = other.forward_head(other.forward_features(image)), tower(image, None).pooled
    return output.shape == expected.shape and bool((output - expected).abs().max() <= 1e-5 * expected.abs().max())


# ---------------------------------------------------------------------------------------------------------------------
# Loading with transformers alone


def load(folder: Path) -> Any:
    """Load an exported folder with transformers and return a function that embeds with it.

    Returns:
        embed(images (b, 3, S, S) float32, normalized; texts) -> image and text embeddings, (b, D) each. Of a model without
        images, sounds (b, S) in [-1, 1] take their place.
    """
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    with quiet_transformers():
        if AutoConfig.from_pretrained(folder).model_type == "clap":
            return clap.Clap(folder).embed
        model = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    length = tokenizer.model_max_length
    padding = "max_length" if model.config.model_type == "siglip" else True

    @torch.no_grad()
    def embed(images: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
        tokens = tokenizer(texts, return_tensors="pt", padding=padding, truncation=True, max_length=length)
        tokens.pop("token_type_ids", None)
        out = model(pixel_values=images, **tokens)
        return out.image_embeds, out.text_embeds

    return embed
