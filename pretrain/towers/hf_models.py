"""Text models out of the transformers library: which class, which configuration, errors in one line."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import logging
from typing import Any, Protocol

import torch
from torch import nn

from pretrain.errors import ConfigError, closest


class TextModelConfig(Protocol):
    """What of a text tower's configuration names its model: see the Config in transformers.py."""

    @property
    def name(self) -> str | None: ...
    @property
    def args(self) -> dict[str, Any]: ...
    @property
    def pretrained(self) -> bool: ...
    @property
    def pool(self) -> str: ...


UNMASKED_TYPES = ("siglip_text_model", "siglip2_text_model")
"""Model types whose own pooler was trained without a padding mask."""


def attends_to_padding(model: nn.Module) -> bool:
    """Whether the model's own convention is to attend to padding."""
    return getattr(getattr(model, "config", None), "model_type", "") in UNMASKED_TYPES


def one_line(error: Exception) -> str:
    """An error of another library in one line of bounded length."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def load_text_model(config: TextModelConfig, tokenizer: Any) -> Any:
    """The bare text model, in float32. Raises ConfigError."""
    logging.getLogger("transformers.configuration_utils").setLevel(logging.ERROR)  # ids beyond a small vocabulary
    settings = _new_settings(config, tokenizer) if config.name is None else _named_settings(config)
    settings.use_cache = False  # decoders would collect keys and values that nobody reads
    kind = _model_class(settings)
    extra: dict[str, Any] = {}
    if config.pool != "tower" and "add_pooling_layer" in inspect.signature(kind.__init__).parameters:
        extra["add_pooling_layer"] = False
    try:
        if config.name is not None and config.pretrained:
            model = kind.from_pretrained(config.name, config=settings, dtype=torch.float32, **extra)
        else:
            model = kind(settings, **extra)
    except OSError as error:
        raise ConfigError(f"text.name={config.name!r}: the weights cannot be loaded: {one_line(error)}") from error
    except Exception as error:  # the library raises what it likes for impossible sizes
        raise ConfigError(f"text.args: {kind.__name__} cannot be built: {one_line(error)}") from error
    return model.get_encoder() if settings.is_encoder_decoder and hasattr(model, "decoder") else model


def inline_args(model: Any) -> dict[str, Any]:
    """The model's configuration as text.args: its type and all that differs from the type's defaults."""
    kind = type(model.config)
    plain, defaults = model.config.to_dict(), kind().to_dict()
    apart = {"transformers_version", "architectures", "dtype", "use_cache", "id2label", "label2id"}
    names = [f.name for f in dataclasses.fields(kind) if f.name not in apart]
    return {"model_type": kind.model_type} | {n: plain[n] for n in names if n in plain and plain[n] != defaults.get(n)}


def drop_pooler(model: Any) -> None:
    """Removes the model's own pooling layer, whose weights would get no gradient."""
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    if attends_to_padding(model):
        model.head = nn.Identity()


def _new_settings(config: TextModelConfig, tokenizer: Any) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    args = dict(config.args)
    kind = args.pop("model_type")
    if kind not in CONFIG_MAPPING:
        raise ConfigError(f"text.args.model_type={kind!r} is not in transformers{closest(kind, list(CONFIG_MAPPING))}")
    settings = CONFIG_MAPPING[kind]
    _known(settings, args)
    if tokenizer is not None:
        args = {**_from_tokenizer(tokenizer), **args}
    elif "vocab_size" not in args:
        raise ConfigError("text.args has no vocab_size and there is no tokenizer to take it from")
    return _make(settings, args)


def _from_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """Vocabulary and special tokens. A padding token that is also the end of text (CLIP's tokenizer) stays out: models
    that know their padding keep that row of the embedding at zero."""
    pad, eos, bos = tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id
    given = {"vocab_size": len(tokenizer), "eos_token_id": eos, "bos_token_id": bos}
    return {**given, "pad_token_id": None if pad in (eos, bos) else pad}


def _named_settings(config: TextModelConfig) -> Any:
    from transformers import AutoConfig

    args = {key: value for key, value in config.args.items() if key != "model_type"}
    try:
        settings = AutoConfig.from_pretrained(config.name or "")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"text.name={config.name!r} is neither a folder nor on the hub as a transformers model: {one_line(error)}"
        ) from error
    settings = settings.get_text_config()  # the text half of CLIP and SigLIP
    _known(type(settings), args)
    return _make(type(settings), {**settings.to_dict(), **args}) if args else settings


def _make(settings: Any, args: dict[str, Any]) -> Any:
    try:
        return settings(**args)
    except Exception as error:  # transformers' strict dataclasses have their own error classes
        raise ConfigError(f"text.args: {one_line(error)}") from error


def _known(settings: Any, args: dict[str, Any]) -> None:
    known = {f.name for f in dataclasses.fields(settings)} if dataclasses.is_dataclass(settings) else set()
    known |= set(settings.attribute_map) | {"attn_implementation"}
    for key in args:
        if len(known) > 1 and key not in known:
            raise ConfigError(f"text.args.{key}: {settings.__name__} has no such setting{closest(key, sorted(known))}")


def _model_class(settings: Any) -> Any:
    """The encoder of a family where transformers names one, else the bare model."""
    from transformers.models.auto import modeling_auto as auto

    kind = type(settings)
    for mapping in (auto.MODEL_FOR_TEXT_ENCODING_MAPPING, auto.MODEL_MAPPING):
        if kind in mapping:
            found = mapping[kind]
            return found[0] if isinstance(found, tuple) else found
    module = importlib.import_module(kind.__module__.replace(".configuration_", ".modeling_"))
    name = kind.__name__.replace("Config", "Model")  # text halves of pairs are in no list: SiglipTextConfig
    if not hasattr(module, name):
        raise ConfigError(f"text: transformers has no text model for model_type={kind.model_type!r}")
    return getattr(module, name)
