"""What a run that resumes takes from its checkpoint, and what must not differ from it.

The same command can mean another model after an upgrade, because fields that the configuration leaves out take new defaults.
Weights of the same shapes then load without an error. So the fields that decide what the model computes are compared with
those that the checkpoint was saved with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pretrain import config as configuration
from pretrain.checkpoints import loading
from pretrain.data.text import load_tokenizer
from pretrain.errors import ConfigError
from pretrain.model import ModelSchema

T = TypeVar("T", bound=ModelSchema)

IDENTITY = {
    "image": ("tower", "size", "stem", "mean", "std", "resize", "pad_color", "interpolation", "pool"),
    "text": ("tower", "length", "pool"),
}
"""By section: fields that change what the model computes, while its weights may keep their names and shapes."""


def without_weights(config: T, checkpoint: Path | None) -> T:
    """Return the configuration to build a resumed model from: the image tower loads no weights, as the checkpoint holds them.

    The mean and standard deviation that came with those weights are the checkpoint's, where the configuration sets none.
    """
    saved = read_config(checkpoint).get("image") if checkpoint is not None else None
    image = config.image
    if not isinstance(saved, dict) or not all(saved.get(key) and hasattr(image, key) for key in ("mean", "std")):
        return config
    statistics = {key: getattr(image, key) or [float(value) for value in saved[key]] for key in ("mean", "std")}
    return replace(config, image=replace(image, pretrained=False, weights=None, **statistics))


def refuse_other_model(config: ModelSchema, tokenizer: Any, checkpoint: Path | None) -> None:
    """Refuse to resume with another model or tokenizer than the checkpoint was saved with.

    config: as checkpoints hold it (`model.portable_config`). Raises ConfigError, which names the key and both values.
    """
    if checkpoint is None:
        return
    for key, old, new in _pair_identity(read_config(checkpoint), configuration.to_dict(config)):
        if old != new:
            raise ConfigError(
                f"cannot resume {checkpoint}: {key} is {new!r} now and was {old!r}; set {key}={_setting(old)}, or start "
                f"another run from its weights: run=NEW init={checkpoint}"
            )
    folder = checkpoint / loading.TOKENIZER
    if tokenizer is None or not folder.is_dir():
        return
    saved = load_tokenizer(folder)
    if saved.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"cannot resume {checkpoint}: the tokenizer has {len(tokenizer)} tokens now, and other ones than the {len(saved)} "
            f"of the checkpoint; text.tokenizer={folder} is the one that it was trained with"
        )


def _pair_identity(saved: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, saved value, value now) of each field of the identity that both configurations have."""
    for section, keys in IDENTITY.items():
        old, new = saved.get(section), now.get(section)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from ((f"{section}.{key}", old[key], new[key]) for key in keys if key in old and key in new)
    activations = _text_activation(saved), _text_activation(now)
    if all(activations):
        yield "text.args.hidden_act", *activations


def read_config(checkpoint: Path) -> dict[str, Any]:
    """Return the configuration that a checkpoint holds; empty where it holds none."""
    path = checkpoint / "config.yaml"
    return configuration.read_yaml(path) if path.exists() else {}


def _text_activation(values: dict[str, Any]) -> str | None:
    """Return the activation of the text tower, which `text.args` names unless it is the architecture's default."""
    text = values.get("text")
    args = text.get("args") if isinstance(text, dict) else None
    if not isinstance(args, dict) or "model_type" not in args:
        return None
    from transformers import CONFIG_MAPPING

    default = CONFIG_MAPPING[args["model_type"]]() if args["model_type"] in CONFIG_MAPPING else None
    activation: str | None = args.get("hidden_act", getattr(default, "hidden_act", None))
    return activation


def _setting(value: Any) -> str:
    """Return a value as it is written behind key=."""
    if isinstance(value, list):
        return f"[{','.join(map(_setting, value))}]"
    return "null" if value is None else str(value)
