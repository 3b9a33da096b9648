"""transformers: a folder that AutoProcessor and AutoModel load, and with them the zero-shot-image-classification pipeline.

    config.json  model.safetensors  processor_config.json  tokenizer files  README.md

CLIPModel or SiglipModel where the architecture is exactly theirs; else VisionTextDualEncoderModel, with the timm model as it
is (TimmWrapperModel) and the text model as it is. Pictures are prepared by timm's transforms: of transformers' processors
that one alone resizes and crops bit for bit as in training's evaluation (others differ in rounding, and by a pixel in where
they crop). It wants pictures in RGB.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.formats import Encoders, mean_pooling, portable_tokenizer, text_weights, unsupported, vit_weights
from pretrain.formats.text_weights import TextSpec
from pretrain.formats.vit_weights import ViTSpec
from pretrain.runtime.files import apply_umask

TIMM_ONLY = ("weight_init", "fix_init", "drop_path_rate", "drop_rate", "proj_drop_rate", "attn_drop_rate", "patch_drop_rate")
"""Arguments of timm that are for training only."""

PIPELINE_LENGTH = 64
"""To which transformers' pipelines fill up the texts of SigLIP."""


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bars and remarks; what goes wrong is said in our one line."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def export_error(encoders: Encoders) -> str | None:
    """Which part of the encoders transformers cannot hold, or None."""
    if wrong := unsupported(encoders):
        return wrong
    made = _make(encoders)
    return made if isinstance(made, str) else None


def write(encoders: Encoders, folder: Path) -> None:
    """Writes the folder, which exists. The encoders have no `problem`."""
    with quiet():
        made = _make(encoders)
        assert not isinstance(made, str)
        made.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        apply_umask(weights)
    tokenizer = portable_tokenizer.build_portable(encoders.text)
    if made.config.model_type == "siglip":
        # Its text model attends to padding. Saved is the attribute, where it was given when the tokenizer was made.
        tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = ["input_ids"]
    tokenizer.save_pretrained(folder)
    _processor(encoders, folder, made.config.model_type)


def _processor(encoders: Encoders, folder: Path, kind: str) -> None:
    recipe = encoders.preprocess
    pretrained_cfg = {
        "input_size": [3, recipe.size, recipe.size],
        "interpolation": recipe.interpolation,
        "crop_pct": 1.0,
        "crop_mode": "squash" if recipe.resize == "squash" else "center",
        "mean": list(recipe.mean),
        "std": list(recipe.std),
    }
    image = {"image_processor_type": "TimmWrapperImageProcessor", "pretrained_cfg": pretrained_cfg, "architecture": None}
    classes = {"clip": "CLIPProcessor", "siglip": "SiglipProcessor"}
    word = classes.get(kind, "VisionTextDualEncoderProcessor")
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": word, "image_processor": image}, indent=1))
    (folder / "preprocessor_config.json").write_text(json.dumps(image, indent=1))


# ---------------------------------------------------------------------------------------------------------------------
# The model


def _make(encoders: Encoders) -> Any:
    """The transformers model with the weights in it, or what keeps it from being one."""
    tower, image_tower = encoders.text_tower, encoders.image_tower
    assert tower is not None
    assert image_tower is not None
    text = text_weights.text_spec(tower)
    if isinstance(text, TextSpec) and not text.causal:
        return _siglip(encoders, text)
    if isinstance(text, str) and not (tower.pool == "tower" and tower.trims):
        return f"{text} pooled by {tower.pool}, and transformers pools a text model in its own way only"
    picture = vit_weights.vit_spec(image_tower.model)
    if isinstance(text, TextSpec) and isinstance(picture, ViTSpec) and picture.pre_norm and picture.pool == "token":
        return _clip(encoders, text, picture)
    return _dual(encoders, text)


def _text(encoders: Encoders, made: TextSpec) -> tuple[TextSpec, dict[str, Tensor]]:
    """A causal text tower under transformers' names, with `text_projection.weight` (D, C)."""
    tower = encoders.text_tower
    assert tower is not None
    weights = text_weights.to_open_clip(tower, _matrix(encoders, "text"))
    if tower.pool == "avg":
        made, weights = mean_pooling.to_attention_layer(made, weights)
    project = weights.pop("text_projection").t().contiguous()
    return made, text_weights.to_transformers(weights) | {"text_projection.weight": project}


def _text_settings(encoders: Encoders, made: TextSpec) -> dict[str, Any]:
    tokenizer = encoders.text.tokenizer
    ends = {
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": encoders.text.pad_id,
    }
    return text_weights.to_text_args(made) | ends


def _clip(encoders: Encoders, text: TextSpec, picture: ViTSpec) -> Any:
    from transformers import CLIPConfig, CLIPModel

    assert encoders.image_tower is not None
    made, weights = _text(encoders, text)
    settings = _text_settings(encoders, made)
    model = CLIPModel(
        CLIPConfig(
            text_config=settings,
            vision_config=vit_weights.to_vision_config(picture),
            projection_dim=encoders.dim,
        )
    )
    named = {name if name.startswith("text_projection") else f"text_model.{name}": value for name, value in weights.items()}
    pictures = vit_weights.to_clip(vit_weights.to_open_clip(encoders.image_tower.model))
    named |= {f"vision_model.{name}": value for name, value in pictures.items()}
    return _filled(model, encoders, named)


def _dual(encoders: Encoders, text: TextSpec | str) -> Any:
    from transformers import AutoConfig, TimmWrapperConfig, VisionTextDualEncoderConfig, VisionTextDualEncoderModel

    tower, image_tower = encoders.text_tower, encoders.image_tower
    assert tower is not None
    assert image_tower is not None
    arguments = _timm_arguments(image_tower)
    if isinstance(arguments, str):
        return arguments
    if isinstance(text, TextSpec):
        made, weights = _text(encoders, text)
        settings = _text_settings(encoders, made)
        text_config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        named = {name if name.startswith("text_projection") else f"text_model.{name}": value for name, value in weights.items()}
    else:
        text_config: Any = tower.model.config  # type: ignore[no-redef]
        named = {f"text_model.{name}": value for name, value in tower.model.state_dict().items()}
        named["text_projection.weight"] = _matrix(encoders, "text")
    name = image_tower.config.name.split(".")[0]
    vision_config = TimmWrapperConfig(architecture=name, model_args=arguments).to_dict()
    config = VisionTextDualEncoderConfig(
        vision_config=vision_config | {"hidden_size": image_tower.pooled_width, "num_classes": 0, "label_names": []},
        text_config=text_config.to_dict(),
        projection_dim=encoders.dim,
    )
    model = VisionTextDualEncoderModel(config)
    named |= {f"vision_model.timm_model.{name}": value for name, value in image_tower.model.state_dict().items()}
    return _filled(model, encoders, named)


def _siglip(encoders: Encoders, text: TextSpec) -> Any:
    """SiglipModel, whose image tower has no projection; or what keeps it from being one."""
    from transformers import SiglipConfig, SiglipModel

    tower, image_tower = encoders.text_tower, encoders.image_tower
    assert tower is not None
    assert image_tower is not None
    picture = vit_weights.siglip_spec(image_tower.model)
    if isinstance(picture, str):
        return f"{picture}, beside a text tower that is SigLIP's and attends to padding"
    if encoders.projection("image") is not None:
        return "the projection of the image tower: SiglipModel has none (model.projection=none trains it so)"
    if encoders.text.length != PIPELINE_LENGTH:
        return f"texts of {encoders.text.length} tokens: transformers fills up SigLIP's to {PIPELINE_LENGTH}"
    vision_config = vit_weights.to_vision_config(picture)
    settings = text_weights.to_text_args(text) | {"projection_size": encoders.dim}
    model = SiglipModel(SiglipConfig(text_config=settings, vision_config=vision_config))
    weights = text_weights.to_open_clip(tower, encoders.projection("text"))
    heads = {f"head.{kind}": weights.pop(f"text_projection.{kind}") for kind in ("weight", "bias")}
    named = {f"text_model.{name}": value for name, value in (text_weights.to_transformers(weights) | heads).items()}
    named |= {f"vision_model.{name}": value for name, value in vit_weights.to_siglip(image_tower.model).items()}
    bias = encoders.model.logit_bias
    return _filled(model, encoders, named | {"logit_bias": torch.zeros(1) if bias is None else bias.reshape(1)})


def _matrix(encoders: Encoders, modality: str) -> Tensor:
    """The projection, the identity where there is none."""
    project = encoders.projection(modality)
    return torch.eye(encoders.dim) if project is None else project


def _filled(model: Any, encoders: Encoders, weights: dict[str, Tensor]) -> Any:
    """The weights in the model, with projection and scale; strictly."""
    ours = encoders.model
    if hasattr(model, "visual_projection"):
        weights = {"visual_projection.weight": _matrix(encoders, "image"), **weights}
    weights["logit_scale"] = ours.logit_scale.reshape(model.logit_scale.shape)
    model.load_state_dict({name: value.detach().float() for name, value in weights.items()})
    return model.eval()


def _timm_arguments(tower: Any) -> dict[str, Any] | str:
    """model_args with which timm's own name builds this model, pooling and all; or what it cannot build."""
    import timm

    model, config = tower.model, tower.config
    if config.stem:
        return f"the image tower's own stem, image.stem={config.stem}, which timm does not know"
    arguments = {key: value for key, value in config.args.items() if key not in TIMM_ONLY}
    if config.pool != "tower" and hasattr(model, "global_pool") and hasattr(model, "blocks"):
        arguments |= {"global_pool": model.global_pool, "fc_norm": not isinstance(model.fc_norm, torch.nn.Identity)}
    name = config.name.split(".")[0]
    for sized in ({"img_size": config.size}, {}):
        try:
            other: Any = timm.create_model(name, num_classes=0, **arguments, **sized)
            other.load_state_dict(model.state_dict())
        except (TypeError, RuntimeError, AssertionError, ValueError):
            continue
        if _same(tower, other.eval()):
            return arguments | sized
    return f"the image tower: timm's {name} with image.args and pool={config.pool} is not built by timm alone"


@torch.no_grad()
def _same(tower: Any, other: Any) -> bool:
    size = tower.config.size
    picture = torch.linspace(-2, 2, 3 * size * size).sin().reshape(1, 3, size, size)
    theirs, ours = other.forward_head(other.forward_features(picture)), tower(picture, None).pooled
    return theirs.shape == ours.shape and bool((theirs - ours).abs().max() <= 1e-5 * ours.abs().max())


# ---------------------------------------------------------------------------------------------------------------------
# Loading, as a stranger would


def load(folder: Path) -> Any:
    """What transformers makes of the folder: (images (b, 3, S, S), texts) -> embeddings."""
    from transformers import AutoModel, AutoTokenizer

    with quiet():
        model = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    length = tokenizer.model_max_length
    padding = "max_length" if model.config.model_type == "siglip" else True

    @torch.no_grad()
    def embed(images: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
        words = tokenizer(texts, return_tensors="pt", padding=padding, truncation=True, max_length=length)
        words.pop("token_type_ids", None)
        out = model(pixel_values=images, **words)
        return out.image_embeds, out.text_embeds

    return embed
