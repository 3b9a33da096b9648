"""open_clip: a folder that `open_clip.create_model_from_pretrained("local-dir:DIR")` and `get_tokenizer` load.

    open_clip_config.json  open_clip_model.safetensors  tokenizer files  README.md

A plain vision transformer and the text transformers of CLIP and SigLIP are open_clip's own towers; any other timm model
stays timm's, where its plain name builds it. Weights are under OpenAI's names, which every version of open_clip knows.
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

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"

Part = tuple[dict[str, Any], Weights]
"""A tower's section of the configuration, and its weights."""


def export_error(encoders: Encoders) -> str | None:
    """Which part of the encoders open_clip cannot hold, or None."""
    if wrong := unsupported(encoders):
        return wrong
    made = _words(encoders)
    if isinstance(made, str):
        return made
    image = _vision(encoders, made.act == "quick_gelu")
    return image if isinstance(image, str) else None


def write(encoders: Encoders, folder: Path) -> None:
    """Writes the folder, which exists. The encoders have no `problem`."""
    made = _words(encoders)
    assert not isinstance(made, str)
    image = _vision(encoders, made.act == "quick_gelu")
    assert not isinstance(image, str)
    model = encoders.model
    text_cfg, text = _text(encoders, made)
    vision_cfg, weights = image
    weights = {f"visual.{name}": value for name, value in weights.items()} | text
    weights["logit_scale"] = model.logit_scale.detach().reshape(())
    config: dict[str, Any] = {
        "embed_dim": encoders.dim,
        "quick_gelu": made.act == "quick_gelu",
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


def _words(encoders: Encoders) -> TextSpec | str:
    tower = encoders.text_tower
    assert tower is not None
    return text_weights.text_spec(tower)


def _text(encoders: Encoders, made: TextSpec) -> Part:
    """text_cfg, and weights under the names of open_clip's CLIP class."""
    tower, length = encoders.text_tower, encoders.text.length
    assert tower is not None
    weights = text_weights.to_open_clip(tower, encoders.projection("text"))
    if tower.pool == "avg":
        made, weights = mean_pooling.to_attention_layer(made, weights)
    weights["positional_embedding"] = weights["positional_embedding"][:length].contiguous()
    config: dict[str, Any] = {
        "context_length": length,
        "vocab_size": made.vocab,
        "hf_tokenizer_name": ".",  # get_tokenizer("local-dir:DIR") then reads DIR
        "width": made.width,
        "heads": made.heads,
        "layers": made.depth,
        "mlp_ratio": block_weights.compute_mlp_ratio(made.hidden, made.width),
        "norm_kwargs": {"eps": made.eps},
    }
    if made.act == "gelu_tanh":
        config["act_kwargs"] = {"approximate": "tanh"}
    if not made.causal:
        return config | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}, weights
    end = encoders.text.tokenizer.eos_token_id
    if end == made.vocab - 1:
        return config | {"pool_type": "argmax"}, weights  # the highest id: OpenAI's rule, which older versions know too
    return config | {"pool_type": "eos", "eos_id": end}, weights


def _vision(encoders: Encoders, quick: bool) -> Part | str:
    """vision_cfg and weights (without `visual.`), or which part of the image tower has no place there."""
    tower = encoders.image_tower
    assert tower is not None
    model: Any = tower.model
    project = encoders.projection("image")
    made = vit_weights.vit_spec(model)
    if isinstance(made, ViTSpec) and made.width % made.heads == 0 and (made.act == "quick_gelu") == quick:
        config: dict[str, Any] = {
            "image_size": made.size,
            "patch_size": made.patch,
            "width": made.width,
            "layers": made.depth,
            "head_width": made.width // made.heads,
            "mlp_ratio": block_weights.compute_mlp_ratio(made.hidden, made.width),
            "no_ln_pre": not made.pre_norm,
            "pool_type": "tok" if made.pool == "token" else "avg",
            "final_ln_after_pool": made.norm_after,
            "norm_kwargs": {"eps": made.eps},
        }
        if made.act == "gelu_tanh":
            config["act_kwargs"] = {"approximate": "tanh"}
        matrix = torch.eye(made.width) if project is None else project.t().contiguous()
        return config, vit_weights.to_open_clip(model) | {"proj": matrix}
    by_name = _by_name(encoders)
    if by_name is not None:
        weights = {f"trunk.{name}": value.detach() for name, value in model.state_dict().items()}
        if project is None:
            return by_name | {"timm_proj": "none"}, weights
        return by_name | {"timm_proj": "linear"}, weights | {"head.proj.weight": project}
    if isinstance(made, ViTSpec):
        return (
            f"the activations of the towers, {made.act} for pictures and {'quick_gelu' if quick else 'another'} for texts: "
            "open_clip has one for both (text.args.hidden_act=gelu trains such a pair)"
        )
    return f"{made}, and timm's {tower.config.name} by name is another model"


def _by_name(encoders: Encoders) -> dict[str, Any] | None:
    """vision_cfg where the plain name of a timm model builds this one, tried on a picture; open_clip passes no arguments."""
    import timm

    tower = encoders.image_tower
    assert tower is not None
    name = tower.config.name.split(".")[0]
    if not timm.is_model(name):
        return None
    shapes = {key: value.shape for key, value in tower.model.state_dict().items()}
    for pool in ("", "avg", "token", "map"):
        if _shapes(name, pool) != shapes:
            continue  # another architecture, or no such pooling; seen without building it
        other: Any = timm.create_model(name)
        other.reset_classifier(0, **({"global_pool": pool} if pool else {}))
        other.load_state_dict(tower.model.state_dict())
        if _same(tower, other.eval()):
            return {"timm_model_name": name, "timm_pool": pool, "image_size": tower.config.size}
    return None


def _shapes(name: str, pool: str) -> dict[str, torch.Size]:
    """Of the weights of a timm model as open_clip builds it; none where it cannot pool so. Nothing is computed."""
    import timm

    try:
        with torch.device("meta"):
            model: Any = timm.create_model(name)
            model.reset_classifier(0, **({"global_pool": pool} if pool else {}))
    except (RuntimeError, AssertionError, TypeError, ValueError, NotImplementedError):
        return {}
    return {name: value.shape for name, value in model.state_dict().items()}


@torch.no_grad()
def _same(tower: ImageTower, other: nn.Module) -> bool:
    size = tower.config.size
    picture = torch.linspace(-2, 2, 3 * size * size).sin().reshape(1, 3, size, size)
    try:
        theirs = other(picture)
    except (RuntimeError, AssertionError):  # it takes pictures of another size
        return False
    ours = tower(picture, None).pooled
    return theirs.shape == ours.shape and bool((theirs - ours).abs().max() <= 1e-5 * ours.abs().max())


# ---------------------------------------------------------------------------------------------------------------------
# Loading, as a stranger would


def load(folder: Path) -> Any:
    """What open_clip makes of the folder: (images (b, 3, S, S), texts) -> embeddings; None where it is not installed."""
    try:
        import open_clip
    except ImportError:
        return None
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()

    @torch.no_grad()
    def embed(images: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
        return model.encode_image(images, normalize=True), model.encode_text(tokenizer(texts), normalize=True)

    return embed
