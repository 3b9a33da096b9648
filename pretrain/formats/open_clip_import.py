"""Import models from open_clip's folders and weight files.

Every error names the model as the user gave it, in `source`.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pretrain import config as configuration
from pretrain.data.images import parse_resize
from pretrain.data.text import load_tokenizer
from pretrain.errors import ConfigError, UserError, closest
from pretrain.formats import ImportedModel, portable_tokenizer, text_weights, vit_weights
from pretrain.formats.block_weights import Weights
from pretrain.formats.open_clip import CONFIG, WEIGHTS
from pretrain.formats.text_weights import TextSpec
from pretrain.formats.vit_weights import ViTSpec
from pretrain.model import ModelSchema
from pretrain.runtime.files import read_json_object
from pretrain.towers import hf_models
from pretrain.towers.hf_models import one_line

WEIGHT_NAMES = (WEIGHTS, "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors")
"""Names of weight files in a folder, in the order of preference."""

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
"""Keys of vision_cfg and text_cfg that this module understands; any other key that is set is refused by name."""


def read(source: str) -> ImportedModel:
    """Read a model of open_clip.

    Args:
        source: a folder, a weight file beside open_clip's params.txt, or MODEL:FILE with a name of open_clip.list_models().

    Raises:
        UserError: it cannot be read, or a part of it cannot be imported.
    """
    path, content = _find_files(source)
    weights = _load_weights(path)
    try:
        return _read_model(source, path, content, weights)
    except UserError:
        raise
    except Exception as error:  # a configuration may hold anything: values of other types, sizes that do not fit
        reason = f"there is no {error}" if isinstance(error, KeyError) else one_line(error)
        raise UserError(f"{source}: {CONFIG} and weights cannot be read: {reason}") from error


def _read_model(source: str, path: Path, content: dict[str, Any], weights: Weights) -> ImportedModel:
    """Read a model from its weights and the content of open_clip_config.json. Raises errors of many types for damaged ones."""
    config = dict(content.get("model_cfg", content))
    vision_cfg, text_cfg = config["vision_cfg"], config["text_cfg"]
    _refuse_oversized(config, weights, source)
    if "multimodal_cfg" in config:
        raise UserError(f"{source} is a CoCa model, whose decoder cannot be imported")
    is_quick = bool(config.get("quick_gelu"))
    named: dict[str, Tensor] = {}
    text, text_projection = _read_text(text_cfg, weights, is_quick, path.parent, source, named)
    image, image_projection = _read_vision(vision_cfg, weights, is_quick, source, named)
    dim = config["embed_dim"]
    model: dict[str, Any] = {"dim": dim}
    if image_projection is None and text_projection is None:
        model["projection"] = "none"
    else:
        for modality, matrix in (("image", image_projection), ("text", text_projection)):
            named[f"projections.{modality}.weight"] = torch.eye(dim) if matrix is None else matrix.contiguous()
    for scalar in ("logit_scale", "logit_bias"):
        if scalar in weights:
            named[scalar] = weights.pop(scalar).reshape(1)
    if "logit_bias" in named:
        model["logit_bias"] = float(named["logit_bias"])
    recipe = content.get("preprocess_cfg") or {}
    image |= {key: list(recipe[key]) for key in ("mean", "std") if key in recipe}
    image |= {"interpolation": recipe.get("interpolation", "bicubic")}
    image |= parse_resize(recipe)
    length = text["length"]
    folder = path.parent
    has_tokenizer = any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))
    tokenizer_name = str(folder) if has_tokenizer else text_cfg.get("hf_tokenizer_name")
    tokenizer = load_tokenizer(tokenizer_name) if tokenizer_name else portable_tokenizer.build_openai_tokenizer(length)
    values = {"image": image, "text": text, "model": model}
    schema = configuration.build(ModelSchema, values, source)
    return ImportedModel(schema, named | weights, tokenizer)  # store.load_weights reports weights that no tower has used


def _refuse_oversized(config: dict[str, Any], weights: Weights, source: str) -> None:
    """Raise UserError where the configuration describes towers far larger than the weights."""
    largest = max((side for value in weights.values() for side in value.shape), default=0)
    stored = sum(value.numel() for value in weights.values())
    for name in ("vision_cfg", "text_cfg"):
        section = config[name]
        limits = {"layers": len(weights), "embed_dim": largest, "width": largest, "context_length": 1 << 20}
        limits |= {"vocab_size": 1 << 24, "image_size": 1 << 16, "mlp_ratio": 1 << 10, "heads": 1 << 12, "head_width": 1 << 16}
        for key, value in {**section, "embed_dim": config["embed_dim"]}.items():
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int | float) and key in limits and not 0 <= number <= max(limits[key], 2):
                    raise UserError(f"{source}: {name}.{key}={number} does not fit the weights")
        sizes = {key: section.get(key, 0) for key in ("width", "layers", "image_size", "patch_size", "mlp_ratio")}
        sizes |= {key: section.get(key, 0) for key in ("vocab_size", "context_length")}
        if not all(isinstance(size, int | float) for size in sizes.values()):
            continue  # the layers of a ResNet are a list, the size of an image may be one
        width = sizes["width"]
        patches = (sizes["image_size"] // sizes["patch_size"]) ** 2 if sizes["patch_size"] and width else 0
        tables = width * (sizes["vocab_size"] + sizes["context_length"] + patches)
        blocks = sizes["layers"] * width * width * (4 + 2 * sizes["mlp_ratio"]) if width else 0
        if tables + blocks > stored:
            raise UserError(f"{source}: {name} describes {tables + blocks:,.0f} parameters, and its weights hold {stored:,}")


def _find_files(source: str) -> tuple[Path, dict[str, Any]]:
    """Return the weight file and the content of open_clip_config.json.

    For a weight file outside such a folder, the content is that of the model which MODEL or params.txt names.
    """
    path = Path(source)
    if path.is_dir():
        names = [*WEIGHT_NAMES, *sorted(p.name for p in path.iterdir() if p.suffix in (".safetensors", ".bin", ".pt", ".pth"))]
        weight_file = next((path / name for name in names if (path / name).exists()), None)
        if weight_file is None:
            raise UserError(f"{path} has {CONFIG} but no weight file ({', '.join(WEIGHT_NAMES)})")
        try:
            return weight_file, read_json_object(path / CONFIG)
        except (OSError, ValueError) as error:
            raise UserError(f"{path / CONFIG} cannot be read: {error}") from error
    name, _, file = source.rpartition(":")
    path = Path(file)
    if not name:
        params = next((p / "params.txt" for p in list(path.resolve().parents)[:2] if (p / "params.txt").exists()), None)
        lines = (
            dict(line.split(": ", 1) for line in params.read_text(errors="replace").splitlines() if ": " in line)
            if params
            else {}
        )
        name = lines.get("model", "")
    if not name:
        raise UserError(f"{path} does not say which model it is: give MODEL:{path}, with a name of open_clip.list_models()")
    try:
        import open_clip
    except ImportError as error:
        raise UserError(f"{source}: the architecture of {name} comes with open_clip: pip install open_clip_torch") from error
    config = open_clip.get_model_config(name)
    if config is None:
        raise UserError(f"{source}: {name} is not a model of open_clip{closest(name, open_clip.list_models())}")
    return path, {"model_cfg": config}


def _load_weights(path: Path) -> Weights:
    """Load a state dict under the names of open_clip's CLIP class, in float32.

    It is read weights-only: no file is unpickled into code. Raises UserError.
    """
    try:
        if path.suffix == ".safetensors":
            loaded: Any = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ConfigError(f"there is no file {path}") from error
    except Exception as error:  # torch's unpickler raises many types of exceptions for files that hold more than weights
        raise UserError(f"{path} cannot be read as weights alone: {one_line(error)}") from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(f"{path} holds no state dict")
    weights = {name.removeprefix("module.").removeprefix("_orig_mod."): value.float() for name, value in loaded.items()}
    return {name: value for name, value in weights.items() if not name.endswith(("attn_mask", "position_ids"))}


def _refuse_unknown(section: str, config: dict[str, Any], known_keys: set[str], source: str) -> None:
    """Raise UserError if a key is set that this module does not understand."""
    for key, value in config.items():
        if key not in known_keys and value not in (None, False):
            raise UserError(f"{source}: {section}.{key}={value} has no counterpart in clipfuse")


def _get_activation(is_quick: bool, config: dict[str, Any]) -> str:
    """Return the activation of a tower: gelu, quick_gelu or gelu_tanh."""
    is_tanh = (config.get("act_kwargs") or {}).get("approximate") == "tanh"
    return "quick_gelu" if is_quick else "gelu_tanh" if is_tanh else "gelu"


def _pop_prefix(weights: Weights, prefix: str) -> Weights:
    """Remove the weights whose names have a prefix, and return them without the prefix."""
    return {name.removeprefix(prefix): weights.pop(name) for name in list(weights) if name.startswith(prefix)}


def _read_vision(
    config: dict[str, Any], weights: Weights, is_quick: bool, source: str, named: Weights
) -> tuple[dict[str, Any], Tensor | None]:
    """Return the section `image`, and the projection (D, P) or None; add the tower's weights to `named`."""
    _refuse_unknown("vision_cfg", config, VISION_KEYS, source)
    if config.get("timm_model_name"):
        return _read_timm(config, weights, source, named)
    if not isinstance(config.get("layers", 12), int):
        layers = config["layers"]
        raise UserError(f"{source}: vision_cfg.layers={layers}, OpenAI's modified ResNet, has no counterpart in clipfuse")
    tower = _pop_prefix(weights, "visual.")
    width, size = config.get("width", 768), config.get("image_size", 224)
    spec = ViTSpec(
        size=size if isinstance(size, int) else size[0],
        patch=config.get("patch_size", 16),
        width=width,
        depth=config.get("layers", 12),
        heads=width // config.get("head_width", 64),
        hidden=int(width * config.get("mlp_ratio", 4.0)),
        act=_get_activation(is_quick, config),
        eps=(config.get("norm_kwargs") or {}).get("eps", 1e-5),
        pre_norm=not config.get("no_ln_pre", False),
        pool={"tok": "token"}.get(config.get("pool_type", "tok"), config.get("pool_type", "tok")),
        norm_after=config.get("final_ln_after_pool", False),
    )
    if spec.pool not in ("token", "avg"):
        raise UserError(f"{source}: vision_cfg.pool_type={spec.pool} has no counterpart in clipfuse")
    projection = tower.pop("proj").t() if "proj" in tower else None
    named |= {f"towers.image.model.{name}": value for name, value in vit_weights.from_open_clip(tower, spec).items()}
    return vit_weights.to_image_config(spec), projection


def _read_timm(config: dict[str, Any], weights: Weights, source: str, named: Weights) -> tuple[dict[str, Any], Tensor | None]:
    """Return the same as `_read_vision`, for an image tower that is a timm model."""
    name, pool, proj = config["timm_model_name"], config.get("timm_pool", "avg"), config.get("timm_proj", "linear")
    if proj not in ("linear", "none") or config.get("timm_proj_bias") or pool not in ("", "avg", "token", "map"):
        raise UserError(f"{source}: vision_cfg.timm_proj={proj}, timm_pool={pool} have no counterpart in clipfuse")
    import timm

    args: dict[str, Any] = {}
    with torch.device("meta"):  # allocates nothing: only its class is needed
        kind = type(timm.create_model(name)).__name__
    if pool and kind == "VisionTransformer":
        args = {"global_pool": pool, "fc_norm": any(key.startswith("visual.trunk.fc_norm.") for key in weights)}
    size = config.get("image_size", 224)
    named |= {f"towers.image.model.{key}": value for key, value in _pop_prefix(weights, "visual.trunk.").items()}
    settings = {"tower": "timm", "name": name, "pretrained": False, "args": args}
    return settings | {"size": size if isinstance(size, int) else size[0]}, weights.pop("visual.head.proj.weight", None)


def _read_text(
    config: dict[str, Any], weights: Weights, is_quick: bool, folder: Path, source: str, named: Weights
) -> tuple[dict[str, Any], Tensor | None]:
    """Return the section `text`, and the projection (D, C) or None; add the tower's weights to `named`."""
    _refuse_unknown("text_cfg", config, TEXT_KEYS, source)
    if config.get("hf_model_name"):
        return _read_transformers(config, weights, folder, source, named)
    tower = _pop_prefix(weights, "text.")
    if not tower:  # OpenAI's layout: the text transformer's weights have no prefix
        names = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")
        tower = {name: weights.pop(name) for name in list(weights) if name.startswith(names)}
    causal, width = not config.get("no_causal_mask", False), config.get("width", 512)
    pool = config.get("pool_type", "argmax")
    if pool not in (("argmax", "eos") if causal else ("last",)) or (causal and config.get("proj_bias")):
        raise UserError(f"{source}: text_cfg with pool_type={pool}, no_causal_mask={not causal} has no counterpart in clipfuse")
    spec = TextSpec(
        vocab=config.get("vocab_size", 49408),
        positions=config.get("context_length", 77),
        width=width,
        depth=config.get("layers", 12),
        heads=config.get("heads", 8),
        hidden=int(width * config.get("mlp_ratio", 4.0)),
        act=_get_activation(is_quick, config),
        eps=(config.get("norm_kwargs") or {}).get("eps", 1e-5),
        causal=causal,
        eos=config.get("eos_id") if pool == "eos" else config.get("vocab_size", 49408) - 1,
    )
    args = text_weights.to_text_args(spec)
    settings = {"tower": "transformers", "args": args, "length": spec.positions, "pretrained": False}
    if causal:
        projection = tower.pop("text_projection", None)
    else:
        heads = [tower.pop(f"text_projection.{kind}", None) for kind in ("weight", "bias")]
        if heads[0] is None or heads[1] is None:
            raise UserError(f"{source}: a text tower without causal mask and without proj_bias has no counterpart in clipfuse")
        tower |= {"head.weight": heads[0], "head.bias": heads[1]}
        args["projection_size"] = len(heads[1])
        projection = None
    named |= {f"towers.text.model.{name}": value for name, value in text_weights.to_transformers(tower).items()}
    return settings | {"pool": "eot" if causal else "tower"}, None if projection is None else projection.t()


def _load_text_config(folder: Path, source: str) -> Any:
    """Return the configuration of a text model of transformers from a folder's config.json. Raises UserError."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many types of exceptions for files that do not fit
        raise UserError(f"{source}: transformers cannot read config.json, of the text tower: {one_line(error)}") from error


def _read_transformers(
    config: dict[str, Any], weights: Weights, folder: Path, source: str, named: Weights
) -> tuple[dict[str, Any], Tensor | None]:
    """Return the same as `_read_text`, for a text tower that is a model of transformers."""
    poolers = {"mean_pooler": "avg", "cls_pooler": "tower", "cls_last_hidden_state_pooler": "cls"}
    pooler, proj = config.get("hf_pooler_type", "mean_pooler"), config.get("hf_proj_type", "mlp")
    if pooler not in poolers or proj not in ("linear", None, "") or "text.proj.0.weight" in weights:
        raise UserError(f"{source}: text_cfg.hf_proj_type={proj}, hf_pooler_type={pooler} have no counterpart in clipfuse")
    projection = weights.pop("text.proj.weight", None)
    named |= {f"towers.text.model.{name}": value for name, value in _pop_prefix(weights, "text.transformer.").items()}
    settings: dict[str, Any] = {"tower": "transformers", "pretrained": False, "pool": poolers[pooler]}
    if (folder / "config.json").is_file():  # an export of clipfuse, whose text tower has no name
        model_config = _load_text_config(folder, source)
        settings["args"] = hf_models.inline_args(SimpleNamespace(config=model_config))
    else:
        settings["name"] = config["hf_model_name"]
    return settings | {"length": config.get("context_length", 77)}, projection
