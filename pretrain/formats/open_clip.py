"""Export to open_clip: a folder for create_model_from_pretrained("local-dir:DIR") and get_tokenizer.

    open_clip_config.json  open_clip_model.safetensors  tokenizer files  README.md

A plain vision transformer and the text transformers of CLIP and SigLIP become open_clip's own towers. Any other timm model
stays timm's, if its name alone builds it. A BERT or RoBERTa pooled by its mean or its first token stays transformers',
described by a config.json. Weights are under OpenAI's names, which every version of open_clip reads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.formats import Encoders, block_weights, mean_pooling, portable_tokenizer, text_weights, unsupported, vit_weights
from pretrain.formats.block_weights import Weights
from pretrain.formats.text_weights import TextSpec
from pretrain.formats.vit_weights import ViTSpec
from pretrain.runtime.files import save_weights
from pretrain.towers.timm import ImageTower

HF_MODEL_TYPES = ("bert", "roberta", "xlm-roberta")
"""Text models of transformers that open_clip builds (its hf_configs.py) and that this module has been tested with."""
HF_POOLERS = {"avg": "mean_pooler", "cls": "cls_last_hidden_state_pooler"}
"""text.pool -> hf_pooler_type."""

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"

TowerExport = tuple[dict[str, Any], Weights]
"""A tower's section of open_clip's configuration, and its weights."""


def export_error(encoders: Encoders) -> str | None:
    """Return which part of the encoders open_clip cannot hold, or None."""
    if error := unsupported(encoders):
        return error
    spec = _get_text_spec(encoders)
    if isinstance(spec, str) and not is_transformers_text(encoders):
        return spec
    image = _convert_image_tower(encoders, _has_quick_gelu(encoders, spec))
    return image if isinstance(image, str) else None


def is_transformers_text(encoders: Encoders) -> bool:
    """Return whether open_clip holds the text tower as a model of transformers, with one of its poolers.

    It masks padding by the id of the padding token, which must therefore be used for nothing else.
    """
    tower = encoders.text_tower
    assert tower is not None
    config: Any = tower.model.config
    is_known = config.model_type in HF_MODEL_TYPES and tower.pool in HF_POOLERS
    return is_known and tower.pad_id is not None and tower.pad_id == encoders.text.pad_id == config.pad_token_id


def write(encoders: Encoders, folder: Path, target: Path | None = None) -> None:
    """Write model, preprocessing and tokenizer into an existing folder.

    `export_error` must be None for the encoders. target: where the folder will lie in the end, if not there.
    """
    spec = _get_text_spec(encoders)
    image = _convert_image_tower(encoders, _has_quick_gelu(encoders, spec))
    assert not isinstance(image, str)
    model = encoders.model
    vision_cfg, weights = image
    if isinstance(spec, str):
        text_cfg, text = _convert_transformers_text(encoders, folder, target or folder)
    else:
        text_cfg, text = _convert_text_tower(encoders, spec)
    weights = {f"visual.{name}": value for name, value in weights.items()} | text
    weights["logit_scale"] = model.logit_scale.detach().reshape(())
    config: dict[str, Any] = {
        "embed_dim": encoders.dim,
        "quick_gelu": _has_quick_gelu(encoders, spec),
        "vision_cfg": vision_cfg,
        "text_cfg": text_cfg,
    }
    if model.logit_bias is not None:
        weights["logit_bias"] = model.logit_bias.detach().reshape(())
        config["init_logit_bias"] = float(model.logit_bias.detach())
    save_weights(folder / WEIGHTS, {name: value.float() for name, value in weights.items()}, {"format": "pt"})
    content = {"model_cfg": config, "preprocess_cfg": encoders.preprocess.to_open_clip()}
    (folder / CONFIG).write_text(json.dumps(content, indent=1))
    portable_tokenizer.save(encoders.text, folder)


# ---------------------------------------------------------------------------------------------------------------------
# Towers


def _get_text_spec(encoders: Encoders) -> TextSpec | str:
    tower = encoders.text_tower
    assert tower is not None
    return text_weights.text_spec(tower)


def _has_quick_gelu(encoders: Encoders, spec: TextSpec | str) -> bool:
    """Return whether open_clip's own towers are to have OpenAI's activation: one setting for the towers of both modalities."""
    if isinstance(spec, TextSpec):
        return spec.act == "quick_gelu"
    assert encoders.image_tower is not None
    vision = vit_weights.vit_spec(encoders.image_tower.model)
    return isinstance(vision, ViTSpec) and vision.act == "quick_gelu"


def _convert_transformers_text(encoders: Encoders, folder: Path, target: Path) -> TowerExport:
    """Return text_cfg and weights of a text tower that open_clip builds with transformers; write its config.json.

    open_clip finds config.json by `hf_model_name`, a folder or a name on the hub.
    """
    tower = encoders.text_tower
    assert tower is not None
    model: Any = tower.model
    model.config.save_pretrained(folder)
    weights = {f"text.transformer.{name}": value.detach() for name, value in model.state_dict().items()}
    projection = encoders.projection("text")
    if projection is not None:
        weights["text.proj.weight"] = projection
    config = {
        "context_length": encoders.text.length,
        "hf_model_name": str(target.resolve()),
        "hf_model_pretrained": False,
        "hf_tokenizer_name": ".",
        "hf_pooler_type": HF_POOLERS[tower.pool],
        "hf_proj_type": None if projection is None else "linear",
    }
    return config, weights


def _convert_text_tower(encoders: Encoders, spec: TextSpec) -> TowerExport:
    """Return text_cfg, and the text tower's weights under the names of open_clip's CLIP class."""
    tower, length = encoders.text_tower, encoders.text.length
    assert tower is not None
    weights = text_weights.to_open_clip(tower, encoders.projection("text"))
    spec, weights = text_weights.cut_positions(spec, weights, length)
    if tower.pool == "avg":
        spec, weights = mean_pooling.to_attention_layer(spec, weights)
    config: dict[str, Any] = {
        "context_length": length,
        "vocab_size": spec.vocab,
        "hf_tokenizer_name": ".",  # get_tokenizer("local-dir:DIR") then reads DIR
        "width": spec.width,
        "heads": spec.heads,
        "layers": spec.depth,
        "mlp_ratio": block_weights.compute_mlp_ratio(spec.hidden, spec.width),
        "norm_kwargs": {"eps": spec.eps},
    }
    if spec.act == "gelu_tanh":
        config["act_kwargs"] = {"approximate": "tanh"}
    if not spec.causal:
        return config | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}, weights
    end_id = encoders.end_id
    if end_id == spec.vocab - 1:
        return config | {"pool_type": "argmax"}, weights  # pool at the highest id, as OpenAI does: older versions know no other
    return config | {"pool_type": "eos", "eos_id": end_id}, weights


def _convert_image_tower(encoders: Encoders, is_quick: bool) -> TowerExport | str:
    """Return vision_cfg and the image tower's weights, or which part of it open_clip cannot hold.

    The names of the weights are without `visual.`.

    is_quick: the text tower's activation is quick_gelu, which open_clip can only set for both towers.
    """
    tower = encoders.image_tower
    assert tower is not None
    model: Any = tower.model
    projection = encoders.projection("image")
    spec = vit_weights.vit_spec(model)
    if isinstance(spec, ViTSpec) and spec.width % spec.heads == 0 and (spec.act == "quick_gelu") == is_quick:
        config: dict[str, Any] = {
            "image_size": spec.size,
            "patch_size": spec.patch,
            "width": spec.width,
            "layers": spec.depth,
            "head_width": spec.width // spec.heads,
            "mlp_ratio": block_weights.compute_mlp_ratio(spec.hidden, spec.width),
            "no_ln_pre": not spec.pre_norm,
            "pool_type": "tok" if spec.pool == "token" else "avg",
            "final_ln_after_pool": spec.norm_after,
            "norm_kwargs": {"eps": spec.eps},
        }
        if spec.act == "gelu_tanh":
            config["act_kwargs"] = {"approximate": "tanh"}
        matrix = torch.eye(spec.width) if projection is None else projection.t().contiguous()
        return config, vit_weights.to_open_clip(model) | {"proj": matrix}
    timm_config = _find_timm_config(encoders)
    if timm_config is not None:
        weights = {f"trunk.{name}": value.detach() for name, value in model.state_dict().items()}
        if projection is None:
            return timm_config | {"timm_proj": "none"}, weights
        return timm_config | {"timm_proj": "linear"}, weights | {"head.proj.weight": projection}
    if isinstance(spec, ViTSpec):
        return (
            f"the activations of the towers, {spec.act} for images and {'quick_gelu' if is_quick else 'another'} for texts: "
            "open_clip has one for both (text.args.hidden_act=gelu trains such a pair)"
        )
    finer = f", without image.stride={tower.config.stride}" if tower.config.stride else ""
    return f"{spec}, and timm builds another model from the name {tower.config.name} alone{finer}"


def _find_timm_config(encoders: Encoders) -> dict[str, Any] | None:
    """Return vision_cfg if a timm model's name alone builds the image tower, as open_clip does, else None.

    Whether it is the same model is checked by its output for an image.
    """
    import timm

    tower = encoders.image_tower
    assert tower is not None
    name = tower.config.name.split(".")[0]
    if not timm.is_model(name):
        return None
    shapes = {key: value.shape for key, value in tower.model.state_dict().items()}
    for pool in ("", "avg", "token", "map"):
        if _get_shapes(name, pool) != shapes:
            continue  # another architecture, or no such pooling, found without allocating the model
        other: Any = timm.create_model(name)
        other.reset_classifier(0, **({"global_pool": pool} if pool else {}))
        other.load_state_dict(tower.model.state_dict())
        if _has_same_output(tower, other.eval()):
            return {"timm_model_name": name, "timm_pool": pool, "image_size": tower.config.size}
    return None


def _get_shapes(name: str, pool: str) -> dict[str, torch.Size]:
    """Return the shapes of a timm model's weights as open_clip builds it; empty if it has no such pooling.

    The model is built on the meta device: nothing is computed.
    """
    import timm

    try:
        with torch.device("meta"):
            model: Any = timm.create_model(name)
            model.reset_classifier(0, **({"global_pool": pool} if pool else {}))
    except (RuntimeError, AssertionError, TypeError, ValueError, NotImplementedError):
        return {}
    return {name: value.shape for name, value in model.state_dict().items()}


@torch.no_grad()
def _has_same_output(tower: ImageTower, other: nn.Module) -> bool:
    """Return whether a timm model gives the pooled output of the image tower, for a fixed image."""
    size = tower.config.size
    image = torch.linspace(-2, 2, 3 * size * size).sin().reshape(1, 3, size, size)
    try:
        output = other(image)
    except (RuntimeError, AssertionError, TypeError, ValueError, AttributeError):  # the model takes other images
        return False
    expected = tower(image, None).pooled
    return output.shape == expected.shape and bool((output - expected).abs().max() <= 1e-5 * expected.abs().max())


# ---------------------------------------------------------------------------------------------------------------------
# Loading with open_clip alone


def load(folder: Path) -> Any:
    """Load an exported folder with open_clip and return a function that embeds with it.

    Returns:
        embed(images (b, 3, S, S) float32, normalized; texts) -> image and text embeddings, (b, D) each.

    None if open_clip is not installed.
    """
    try:
        import open_clip
    except ImportError:
        return None
    text_cfg = json.loads((folder / CONFIG).read_text())["model_cfg"]["text_cfg"]
    if "hf_model_name" in text_cfg:
        text_cfg["hf_model_name"] = str(folder)  # which may have another name than later
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}", text_cfg=text_cfg)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()

    @torch.no_grad()
    def embed(images: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
        return model.encode_image(images, normalize=True), model.encode_text(tokenizer(texts), normalize=True)

    return embed
