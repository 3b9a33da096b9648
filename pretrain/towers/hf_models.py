"""Builds text models of the transformers library: finds their class and configuration. hf_audio.py does so for sounds."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from pretrain.errors import ConfigError, closest


class ModelSource(Protocol):
    """The fields of a tower's Config that say which model of the library to build."""

    @property
    def name(self) -> str | None: ...
    @property
    def args(self) -> dict[str, Any]: ...
    @property
    def pretrained(self) -> bool | None: ...


class TextModelConfig(ModelSource, Protocol):
    """Those of a text tower (transformers.py), and how it pools."""

    @property
    def pool(self) -> str: ...


UNMASKED_TYPES = ("siglip_text_model", "siglip2_text_model")
"""Model types that were trained, with their own pooler, without a padding mask."""


def attends_to_padding(model: nn.Module) -> bool:
    """Whether the model was trained without a padding mask, so that it attends to padding."""
    return getattr(getattr(model, "config", None), "model_type", "") in UNMASKED_TYPES


def one_line(error: Exception) -> str:
    """Return the message of another library's error in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


class LoadedTextModel(NamedTuple):
    """A text model without any head, in float32."""

    model: Any
    pool: str
    """How its states are pooled: text.pool, where `auto` is resolved."""
    origin: str
    """Where its weights are from, in words; empty for random ones."""


def load_text_model(config: TextModelConfig, tokenizer: Any) -> LoadedTextModel:
    """Build the text model, and load its weights if text.name names it. Raises ConfigError.

    Of an encoder-decoder model, the encoder is returned.
    """
    logging.getLogger("transformers.configuration_utils").setLevel(logging.ERROR)  # it warns of ids outside a small vocabulary
    settings = _settings_from_args(config, tokenizer) if config.name is None else _settings_from_name(config)
    settings.use_cache = False  # decoders would store keys and values that nothing reads
    model_class = _find_model_class(settings)
    pool = read_pooling(config.name) if config.pool == "auto" else config.pool
    is_loaded = config.name is not None and config.pretrained is not False
    missing: list[str] = []
    extra: dict[str, Any] = {}
    if pool != "tower" and "add_pooling_layer" in inspect.signature(model_class.__init__).parameters:
        extra["add_pooling_layer"] = False
    try:
        if is_loaded:
            options = {
                "config": settings,
                "dtype": torch.float32,
                "output_loading_info": True,
                "trust_remote_code": False,
                **extra,
            }
            with quiet():
                model, info = model_class.from_pretrained(config.name, **options)
            missing = sorted(info["missing_keys"])
        else:
            model = model_class(settings, **extra)
    except OSError as error:
        raise ConfigError(
            f"text.name={config.name!r}: the weights cannot be loaded: {one_line(error)}; "
            "text.pretrained=false starts at random"
        ) from error
    except Exception as error:  # transformers raises errors of many types for impossible sizes
        raise ConfigError(f"text.args: {model_class.__name__} cannot be built: {one_line(error)}") from error
    origin = describe_origin(config.name, model, missing) if is_loaded else ""
    model = model.get_encoder() if settings.is_encoder_decoder and hasattr(model, "decoder") else model
    return LoadedTextModel(model, pool, origin)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from printing a progress bar and a table of weights: a run says in one line what was loaded."""
    from transformers.utils import logging as hf_logging

    verbosity, has_bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if has_bar:
            hf_logging.enable_progress_bar()


def describe_origin(name: str | None, model: nn.Module, missing: list[str], section: str = "text") -> str:
    """Return where the weights of a model are from, and which are missing. section: of the configuration.

    Raises ConfigError where more than a tenth of the model's numbers are missing: it would train from random weights.
    """
    sizes = {key: tensor.numel() for key, tensor in model.state_dict().items()}
    names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    if sum(sizes.get(key, 0) for key in missing) > 0.1 * sum(sizes.values()):
        raise ConfigError(
            f"{section}.name={name!r} lacks {len(missing)} of {len(sizes)} weights of {type(model).__name__}: {names}; "
            f"{section}.pretrained=false starts at random"
        )
    return f"{name}: {len(sizes) - len(missing)} of {len(sizes)} tensors" + (
        f"; {len(missing)} stay random: {names}" if missing else ""
    )


SENTENCE_POOLING = {"mean": "avg", "mean_tokens": "avg", "mean_sqrt_len_tokens": "avg", "cls": "cls", "cls_token": "cls",
                    "lasttoken": "eot"}  # fmt: skip
"""Pooling modes of sentence-transformers as text.pool. mean_sqrt_len differs from the mean by its length alone, which
normalizing removes."""


def read_pooling(name: str | None) -> str:
    """Return the pooling that text.pool=auto means: that of a sentence-transformers model, else eot (CLIP's).

    name: text.name, a folder or a hub name. Raises ConfigError for a pooling that text.pool does not have.
    """
    path = None if name is None else _find_pooling_file(name)
    if path is None:
        return "eot"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        mode = content.get("pooling_mode")
        active = [key.removeprefix("pooling_mode_") for key, on in content.items() if key.startswith("pooling_mode_") and on]
        modes = [mode] if isinstance(mode, str) else list(mode or active)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"text.name={name!r}: {path} cannot be read: {one_line(error)}; give text.pool") from error
    if len(modes) == 1 and modes[0] in SENTENCE_POOLING:
        return SENTENCE_POOLING[modes[0]]
    raise ConfigError(
        f"text.name={name!r} pools by {' and '.join(map(str, modes)) or 'nothing'} ({path.parent.name}/{path.name}), "
        "which is not possible here; give text.pool=avg, cls or eot"
    )


def _find_pooling_file(name: str) -> Path | None:
    """Return the config.json of the pooling module of a sentence-transformers model; None for other models."""
    from transformers.utils import cached_file

    folder = "1_Pooling"
    if not Path(name).is_dir():
        flags = ("gated_repo", "missing_entries", "connection_errors")
        options: dict[str, Any] = {f"_raise_exceptions_for_{flag}": False for flag in flags}
        fetched = cached_file(name, f"{folder}/config.json", **options)
        return None if fetched is None else Path(fetched)
    modules = Path(name) / "modules.json"
    if modules.is_file():
        try:
            entries = json.loads(modules.read_text(encoding="utf-8"))
            paths = [entry["path"] for entry in entries if str(entry["type"]).endswith("Pooling")]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"text.name={name!r}: {modules} cannot be read: {one_line(error)}; give text.pool") from error
        folder = paths[0] if paths else folder
    path = Path(name) / folder / "config.json"
    return path if path.is_file() else None


def inline_args(model: Any) -> dict[str, Any]:
    """Return the model's configuration as text.args or audio.args: its model_type and all that is not a default.

    The size of the vocabulary is always named: a tokenizer with fewer tokens would shrink it otherwise.
    """
    config_class = type(model.config)
    settings, defaults = model.config.to_dict(), config_class().to_dict()
    left_out = {"transformers_version", "architectures", "dtype", "use_cache", "id2label", "label2id"}
    names = [f.name for f in dataclasses.fields(config_class) if f.name not in left_out]
    changed = {n: settings[n] for n in names if n in settings and settings[n] != defaults.get(n)}
    vocabulary = {"vocab_size": settings["vocab_size"]} if "vocab_size" in settings else {}
    return {"model_type": config_class.model_type} | vocabulary | changed


def find_end_id(tokenizer: Any) -> int | None:
    """Return the id of the token that ends a text and occurs only there, or None.

    None where the same token begins texts too (GPT-2, OPT), and for tokenizers that name no end token.
    """
    end = getattr(tokenizer, "eos_token_id", None)
    return end if isinstance(end, int) and end != getattr(tokenizer, "bos_token_id", None) else None


def find_pad_id(tokenizer: Any) -> int | None:
    """Return the id of the token that pads texts and has no other use, or None."""
    pad = getattr(tokenizer, "pad_token_id", None)
    names = ("eos_token_id", "sep_token_id", "bos_token_id", "cls_token_id", "unk_token_id")
    return pad if isinstance(pad, int) and all(pad != getattr(tokenizer, name, None) for name in names) else None


class PositionTable(NamedTuple):
    """A model's table of learned positions."""

    name: str
    """Of the module."""
    rows: int
    width: int
    first: int
    """The row of the first token. RoBERTa and its relatives begin at padding_idx + 1: the rows before are never read."""


def find_positions(model: nn.Module) -> PositionTable | None:
    """Return a model's table of positions; None for a model without such a table."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("position_embedding", "position_embeddings") and isinstance(module, nn.Embedding):
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            return PositionTable(name, module.num_embeddings, module.embedding_dim, first)
    return None


def count_positions(model: nn.Module) -> int | None:
    """Return the number of tokens that a model's table of positions allows; None for a model without such a table."""
    table = find_positions(model)
    return None if table is None else table.rows - table.first


def drop_pooler(model: Any) -> None:
    """Remove the model's own pooling layer, whose weights would get no gradient."""
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    if attends_to_padding(model):
        model.head = nn.Identity()


def _settings_from_args(config: TextModelConfig, tokenizer: Any) -> Any:
    """Return the transformers configuration that text.args describes. Raises ConfigError."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    args = dict(config.args)
    model_type = args.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ConfigError(
            f"text.args.model_type={model_type!r} is not in transformers{closest(model_type, list(CONFIG_MAPPING))}"
        )
    config_class = CONFIG_MAPPING[model_type]
    refuse_unknown_args(config_class, args)
    if tokenizer is not None:
        args = {**_args_from_tokenizer(tokenizer), **args}
    elif "vocab_size" not in args:
        raise ConfigError("text.args has no vocab_size and there is no tokenizer to take it from")
    return build_settings(config_class, args)


def _args_from_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """Return the size of the vocabulary and the ids of the special tokens.

    A padding token that is also the end of text (as in CLIP's tokenizer) is left out: models that know their padding token
    keep its embedding at zero.
    """
    pad, eos, bos = tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id
    args = {"vocab_size": len(tokenizer), "eos_token_id": eos, "bos_token_id": bos}
    return {**args, "pad_token_id": None if pad in (eos, bos) else pad}


def _settings_from_name(config: TextModelConfig) -> Any:
    """Return the configuration of the model text.name, changed by text.args. Raises ConfigError."""
    from transformers import AutoConfig

    args = {key: value for key, value in config.args.items() if key != "model_type"}
    try:
        settings = AutoConfig.from_pretrained(config.name or "", trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"text.name={config.name!r} is neither a folder nor on the hub as a transformers model: {one_line(error)}"
        ) from error
    settings = settings.get_text_config()  # the text model of an image-text model such as CLIP or SigLIP
    refuse_unknown_args(type(settings), args)
    return build_settings(type(settings), {**settings.to_dict(), **args}) if args else settings


def build_settings(config_class: Any, args: dict[str, Any], section: str = "text") -> Any:
    """Return an instance of a transformers configuration class. Raises ConfigError. section: of our configuration."""
    try:
        return config_class(**args)
    except Exception as error:  # transformers' strict dataclasses have their own error classes
        raise ConfigError(f"{section}.args: {one_line(error)}") from error


def refuse_unknown_args(config_class: Any, args: dict[str, Any], section: str = "text") -> None:
    """Raise ConfigError for an argument that the configuration class does not have."""
    known = {f.name for f in dataclasses.fields(config_class)} if dataclasses.is_dataclass(config_class) else set()
    known |= set(config_class.attribute_map) | {"attn_implementation"}
    for key in args:
        if len(known) > 1 and key not in known:
            raise ConfigError(f"{section}.args.{key}: {config_class.__name__} has no such setting{closest(key, sorted(known))}")


def _find_model_class(settings: Any) -> Any:
    """Return the model's class: the text encoder if transformers has one, else the model without a head."""
    from transformers.models.auto import modeling_auto as auto

    config_class = type(settings)
    for mapping in (auto.MODEL_FOR_TEXT_ENCODING_MAPPING, auto.MODEL_MAPPING):
        if config_class in mapping:
            model_class = mapping[config_class]
            return model_class[0] if isinstance(model_class, tuple) else model_class
    # The text models of image-text models (SiglipTextConfig) are in neither mapping.
    module = importlib.import_module(config_class.__module__.replace(".configuration_", ".modeling_"))
    name = config_class.__name__.replace("Config", "Model")
    if not hasattr(module, name):
        raise ConfigError(f"text: transformers has no text model for model_type={config_class.model_type!r}")
    return getattr(module, name)
