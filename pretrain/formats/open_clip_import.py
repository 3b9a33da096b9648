"""Reads open_clip's folders and files of weights. Each is named as it was given in every error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pretrain import config as configuration
from pretrain.data.text import load_tokenizer
from pretrain.errors import UserError, closest
from pretrain.formats import ImportedModel, portable_tokenizer, text_weights, vit_weights
from pretrain.formats.block_weights import Weights
from pretrain.formats.open_clip import CONFIG, WEIGHTS
from pretrain.formats.text_weights import TextSpec
from pretrain.formats.vit_weights import ViTSpec
from pretrain.model import ModelSchema
from pretrain.towers.hf_models import one_line

BEST = (WEIGHTS, "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors")
"""Files of weights in a folder, in the order of preference."""

VISION_KEYS = {
    "layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "no_ln_pre", "final_ln_after_pool", "pool_type",
    "act_kwargs", "norm_kwargs", "pos_embed_type", "patch_dropout", "output_tokens", "timm_model_name", "timm_model_pretrained",
    "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path", "attn_pooler_queries", "attn_pooler_heads",
}  # fmt: skip
TEXT_KEYS = {
    "context_length", "vocab_size", "hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode", "width", "heads", "layers",
    "mlp_ratio", "pad_id", "eos_id", "no_causal_mask", "pool_type", "proj_bias", "proj_type", "output_tokens", "act_kwargs",
    "norm_kwargs", "final_ln_after_pool", "hf_model_name", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type",
}  # fmt: skip
"""What of vision_cfg and text_cfg is understood; any other key that is set is refused by name."""


def read(source: str) -> ImportedModel:
    """A folder of open_clip, a file of weights beside open_clip's params.txt, or MODEL:FILE. Raises UserError."""
    path, content = _locate(source)
    config = dict(content.get("model_cfg", content))
    weights = _weights(path)
    vision_cfg, text_cfg = config["vision_cfg"], config["text_cfg"]
    if "multimodal_cfg" in config:
        raise UserError(f"{source} is a CoCa model, whose decoder has no place here")
    quick = bool(config.get("quick_gelu"))
    named: dict[str, Tensor] = {}
    text, project_text = _read_text(text_cfg, weights, quick, source, named)
    image, project_image = _read_vision(vision_cfg, weights, quick, source, named)
    dim = config["embed_dim"]
    model: dict[str, Any] = {"dim": dim}
    if project_image is None and project_text is None:
        model["projection"] = "none"
    else:
        for modality, matrix in (("image", project_image), ("text", project_text)):
            named[f"projections.{modality}.weight"] = torch.eye(dim) if matrix is None else matrix.contiguous()
    for scalar in ("logit_scale", "logit_bias"):
        if scalar in weights:
            named[scalar] = weights.pop(scalar).reshape(1)
    if "logit_bias" in named:
        model["logit_bias"] = float(named["logit_bias"])
    recipe = content.get("preprocess_cfg") or {}
    image |= {key: list(recipe[key]) for key in ("mean", "std") if key in recipe}
    image |= {"interpolation": recipe.get("interpolation", "bicubic")}
    image |= {"resize": "squash" if recipe.get("resize_mode") == "squash" else "crop"}
    length = text["length"]
    folder = path.parent
    own = any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))
    outside = text_cfg.get("hf_tokenizer_name")
    tokenizer = (
        load_tokenizer(str(folder) if own else outside) if own or outside else portable_tokenizer.build_openai_tokenizer(length)
    )
    values = {"image": image, "text": text, "model": model}
    built = configuration.build(ModelSchema, values, source)
    return ImportedModel(built, named | weights, tokenizer)  # what nobody asked for is counted where the weights are put in


def _locate(source: str) -> tuple[Path, dict[str, Any]]:
    """The file of weights, and what open_clip_config.json says or would say."""
    path = Path(source)
    if path.is_dir():
        names = [*BEST, *sorted(p.name for p in path.iterdir() if p.suffix in (".safetensors", ".bin", ".pt", ".pth"))]
        found = next((path / name for name in names if (path / name).exists()), None)
        if found is None:
            raise UserError(f"{path} has {CONFIG} and no weights beside it ({', '.join(BEST)})")
        return found, json.loads((path / CONFIG).read_text())
    name, _, file = source.rpartition(":")
    path = Path(file)
    if not name:
        notes = next((p / "params.txt" for p in list(path.resolve().parents)[:2] if (p / "params.txt").exists()), None)
        lines = dict(one.split(": ", 1) for one in notes.read_text().splitlines() if ": " in one) if notes else {}
        name = lines.get("model", "")
    if not name:
        raise UserError(f"{path} does not say which model it is: give MODEL:{path}, with a name of open_clip.list_models()")
    try:
        import open_clip
    except ImportError as error:
        raise UserError(f"{source}: open_clip knows what {name} is: pip install open_clip_torch") from error
    known = open_clip.get_model_config(name)
    if known is None:
        raise UserError(f"{source}: {name} is not a model of open_clip{closest(name, open_clip.list_models())}")
    return path, {"model_cfg": known}


def _weights(path: Path) -> Weights:
    """A state dict under the names of open_clip's CLIP class. Read weights-only: no file is unpickled into code."""
    try:
        if path.suffix == ".safetensors":
            loaded: Any = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}") from error
    except Exception as error:  # torch's unpickler raises what it likes for files that hold more than weights
        raise UserError(f"{path} cannot be read as weights alone: {one_line(error)}") from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(f"{path} holds no state dict")
    weights = {name.removeprefix("module.").removeprefix("_orig_mod."): value.float() for name, value in loaded.items()}
    return {name: value for name, value in weights.items() if not name.endswith(("attn_mask", "position_ids"))}


def _refuse(section: str, given: dict[str, Any], known: set[str], source: str) -> None:
    for key, value in given.items():
        if key not in known and value not in (None, False):
            raise UserError(f"{source}: {section}.{key}={value} has no counterpart here")


def _act(quick: bool, given: dict[str, Any]) -> str:
    tanh = (given.get("act_kwargs") or {}).get("approximate") == "tanh"
    return "quick_gelu" if quick else "gelu_tanh" if tanh else "gelu"


def _take(weights: Weights, prefix: str) -> Weights:
    """Moves the weights below a prefix out."""
    return {name.removeprefix(prefix): weights.pop(name) for name in list(weights) if name.startswith(prefix)}


def _read_vision(
    given: dict[str, Any], weights: Weights, quick: bool, source: str, named: Weights
) -> tuple[dict[str, Any], Tensor | None]:
    """image.*, and the projection (D, P) if there is one; the tower's weights go into `named`."""
    _refuse("vision_cfg", given, VISION_KEYS, source)
    if given.get("timm_model_name"):
        return _read_timm(given, weights, source, named)
    if not isinstance(given.get("layers", 12), int):
        raise UserError(f"{source}: vision_cfg.layers={given['layers']}, OpenAI's modified ResNet, has no counterpart here")
    own = _take(weights, "visual.")
    width, size = given.get("width", 768), given.get("image_size", 224)
    made = ViTSpec(
        size=size if isinstance(size, int) else size[0],
        patch=given.get("patch_size", 16),
        width=width,
        depth=given.get("layers", 12),
        heads=width // given.get("head_width", 64),
        hidden=int(width * given.get("mlp_ratio", 4.0)),
        act=_act(quick, given),
        eps=(given.get("norm_kwargs") or {}).get("eps", 1e-5),
        pre_norm=not given.get("no_ln_pre", False),
        pool={"tok": "token"}.get(given.get("pool_type", "tok"), given.get("pool_type", "tok")),
        norm_after=given.get("final_ln_after_pool", False),
    )
    if made.pool not in ("token", "avg"):
        raise UserError(f"{source}: vision_cfg.pool_type={made.pool} has no counterpart here")
    project = own.pop("proj").t() if "proj" in own else None
    named |= {f"towers.image.model.{name}": value for name, value in vit_weights.from_open_clip(own, made).items()}
    return vit_weights.to_image_config(made), project


def _read_timm(given: dict[str, Any], weights: Weights, source: str, named: Weights) -> tuple[dict[str, Any], Tensor | None]:
    name, pool, proj = given["timm_model_name"], given.get("timm_pool", "avg"), given.get("timm_proj", "linear")
    if proj not in ("linear", "none") or given.get("timm_proj_bias") or pool not in ("", "avg", "token", "map"):
        raise UserError(f"{source}: vision_cfg.timm_proj={proj}, timm_pool={pool} have no counterpart here")
    import timm

    args: dict[str, Any] = {}
    with torch.device("meta"):  # to see what it is, not to use it
        kind = type(timm.create_model(name)).__name__
    if pool and kind == "VisionTransformer":
        args = {"global_pool": pool, "fc_norm": any(key.startswith("visual.trunk.fc_norm.") for key in weights)}
    size = given.get("image_size", 224)
    named |= {f"towers.image.model.{key}": value for key, value in _take(weights, "visual.trunk.").items()}
    settings = {"tower": "timm", "name": name, "pretrained": False, "args": args}
    return settings | {"size": size if isinstance(size, int) else size[0]}, weights.pop("visual.head.proj.weight", None)


def _read_text(
    given: dict[str, Any], weights: Weights, quick: bool, source: str, named: Weights
) -> tuple[dict[str, Any], Tensor | None]:
    """text.*, and the projection (D, C) if there is one; the tower's weights go into `named`."""
    _refuse("text_cfg", given, TEXT_KEYS, source)
    if given.get("hf_model_name"):
        return _read_transformers(given, weights, source, named)
    own = _take(weights, "text.")
    if not own:  # OpenAI's layout: the text transformer stands beside `visual`
        names = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")
        own = {name: weights.pop(name) for name in list(weights) if name.startswith(names)}
    causal, width = not given.get("no_causal_mask", False), given.get("width", 512)
    pool = given.get("pool_type", "argmax")
    if pool not in (("argmax", "eos") if causal else ("last",)) or (causal and given.get("proj_bias")):
        raise UserError(f"{source}: text_cfg with pool_type={pool}, no_causal_mask={not causal} has no counterpart here")
    made = TextSpec(
        vocab=given.get("vocab_size", 49408),
        positions=given.get("context_length", 77),
        width=width,
        depth=given.get("layers", 12),
        heads=given.get("heads", 8),
        hidden=int(width * given.get("mlp_ratio", 4.0)),
        act=_act(quick, given),
        eps=(given.get("norm_kwargs") or {}).get("eps", 1e-5),
        causal=causal,
        eos=given.get("eos_id") if pool == "eos" else given.get("vocab_size", 49408) - 1,
    )
    args = text_weights.to_text_args(made)
    settings = {"tower": "transformers", "args": args, "length": made.positions, "pretrained": False}
    if causal:
        project = own.pop("text_projection", None)
    else:
        heads = [own.pop(f"text_projection.{kind}", None) for kind in ("weight", "bias")]
        if heads[0] is None or heads[1] is None:
            raise UserError(f"{source}: a text tower that sees all without proj_bias has no counterpart here")
        own |= {"head.weight": heads[0], "head.bias": heads[1]}
        args["projection_size"] = len(heads[1])
        project = None
    named |= {f"towers.text.model.{name}": value for name, value in text_weights.to_transformers(own).items()}
    return settings | {"pool": "eot" if causal else "tower"}, None if project is None else project.t()


def _read_transformers(
    given: dict[str, Any], weights: Weights, source: str, named: Weights
) -> tuple[dict[str, Any], Tensor | None]:
    poolers = {"mean_pooler": "avg", "cls_pooler": "tower", "cls_last_hidden_state_pooler": "cls"}
    pooler, proj = given.get("hf_pooler_type", "mean_pooler"), given.get("hf_proj_type", "mlp")
    if pooler not in poolers or proj not in ("linear", None, "") or "text.proj.0.weight" in weights:
        raise UserError(f"{source}: text_cfg.hf_proj_type={proj}, hf_pooler_type={pooler} have no counterpart here")
    project = weights.pop("text.proj.weight", None)
    named |= {f"towers.text.model.{name}": value for name, value in _take(weights, "text.transformer.").items()}
    settings = {"tower": "transformers", "name": given["hf_model_name"], "pretrained": False, "pool": poolers[pooler]}
    return settings | {"length": given.get("context_length", 77)}, project
