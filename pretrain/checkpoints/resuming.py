"""What a run that resumes takes from its checkpoint, and what must not differ from it.

The checkpoint holds all weights, the architecture and the tokenizer. So a run that resumes reads nothing that it started from:
neither `init` nor image.weights nor text.name needs to be there.

The same command can mean another model after an upgrade, because fields that the configuration leaves out take new defaults.
Weights of the same shapes then load without an error. So the fields that decide what the model computes are compared with
those that the checkpoint was saved with.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from pretrain import config as configuration
from pretrain.checkpoints import loading, store
from pretrain.config.values import shorten
from pretrain.data.text import load_tokenizer
from pretrain.errors import ConfigError
from pretrain.model import ModelSchema
from pretrain.runtime.console import log_info

T = TypeVar("T", bound=ModelSchema)

MODEL_SECTIONS = ("image", "text", "fusion", "context", "task", "adapt")
"""Sections of a configuration whose fields decide what the model computes. Those of further towers are compared as well."""

TRAINING_FIELDS = {
    "": {"pretrained", "weights", "tokenizer", "trainable_blocks", "checkpointing", "groups", "static_groups", "group_shapes"},
    "adapt": {"freeze", "contrastive"},
    "adapt.lora": {"towers", "targets"},
    "image.args": {"weight_init"},
    "text.args": {"initializer_range", "initializer_factor"},
    "audio.args": {"initializer_range", "initializer_factor"},
}
"""By section, "" for all: fields that may change when a run resumes. They say how weights begin and are trained, or change the
names of weights, which are compared. Rates of dropout may change, too."""


# ---------------------------------------------------------------------------------------------------------------------
# What the checkpoint says


def read_config(checkpoint: Path) -> dict[str, Any]:
    """Return the configuration that a checkpoint holds; empty where it holds none."""
    path = checkpoint / "config.yaml"
    return configuration.read_yaml(path) if path.exists() else {}


def find_saved(values: dict[str, Any], default_run: str) -> Path | None:
    """Return a checkpoint of the run that this configuration resumes; None where it begins, or has none that can be read.

    All checkpoints of a run are of one model. So the files are not verified, and the run's lock is not needed.

    Args:
        values: the values of configuration file and command line.
        default_run: the name of a run whose configuration names none.

    Raises:
        ConfigError: `run` or `resume` has a value that it cannot have.
    """
    run = configuration.read_text_field(values, "run", default_run)
    resume = configuration.read_text_field(values, "resume", "auto")
    if not isinstance(run, str) or not isinstance(resume, str) or resume == "never":
        return None
    own = Path(run) if os.sep in run else Path("runs") / run
    candidates = _list_checkpoints(own)
    if resume != "auto":
        candidates = _list_checkpoints(Path(resume)) or _list_checkpoints(Path("runs") / resume) or candidates
    for checkpoint in candidates:
        try:
            if read_config(checkpoint):
                return checkpoint
        except ConfigError:  # it is damaged; who resumes from it gets the error
            continue
    return None


def _list_checkpoints(path: Path) -> list[Path]:
    """Return the checkpoint folder `path`, or those of the run folder `path`, newest first."""
    is_checkpoint = (path / "model.safetensors").exists()
    return [path] if is_checkpoint else store.list_complete(path / "checkpoints")[::-1]


def _read_run_config(checkpoint: Path) -> dict[str, Any]:
    """Return the configuration in the folder of the run that saved a checkpoint; empty where it cannot be read.

    Other than the checkpoint's, it names what the run started from.
    """
    path = checkpoint.absolute().parent.parent / "config.yaml"
    try:
        return configuration.read_yaml(path) if path.exists() else {}
    except ConfigError:
        return {}


# ---------------------------------------------------------------------------------------------------------------------
# What a resumed run is built from


def without_sources(config: T, checkpoint: Path | None) -> T:
    """Return the configuration to build a resumed model from, which reads nothing that the run started from.

    Without `init` and pretrained weights. What came with them is the checkpoint's: mean and standard deviation of the images,
    the architecture of a folder that is gone, and the tokenizer.

    Raises ConfigError.
    """
    if checkpoint is None:
        return config
    saved, started = read_config(checkpoint), _read_run_config(checkpoint)
    if hasattr(config, "init"):
        if config.init is not None and "init" in started and started["init"] != config.init:
            log_info(f"init={config.init} is not read: the run goes on from {checkpoint}")
        config = replace(config, init=None)  # type: ignore[call-arg]
    towers = {
        "image": _without_image_sources(config.image, _section(saved, "image"), _section(started, "image")),
        "text": _without_text_sources(config.text, _section(saved, "text"), _section(started, "text"), checkpoint),
        "others": {
            name: _without_other_sources(tower, _section(saved, name), _section(started, name))
            for name, tower in config.others.items()
        },
    }
    return replace(config, **towers)


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    section = values.get(name)
    return section if isinstance(section, dict) else {}


def _without_weights(tower: Any) -> Any:
    """Return a tower's Config that loads no weights."""
    names = {f.name for f in fields(tower)} if tower is not None else set()
    changes = {name: value for name, value in (("pretrained", False), ("weights", None)) if name in names}
    return replace(tower, **changes) if changes else tower


def _without_image_sources(image: Any, saved: dict[str, Any], started: dict[str, Any]) -> Any:
    """Return the image tower's Config; saved, started: its sections in the checkpoint and in the run folder."""
    if image is None or saved.get("tower") != image.tower:
        return _without_weights(image)
    changes: dict[str, Any] = {}
    for key in ("mean", "std"):
        values = saved.get(key)
        if getattr(image, key, 0) is None and isinstance(values, list) and all(isinstance(v, int | float) for v in values):
            changes[key] = [float(value) for value in values]
    name, args = getattr(image, "name", None), saved.get("args")
    is_elsewhere = isinstance(name, str) and ":" in name and _is_gone(name.partition(":")[2], name, started)
    if is_elsewhere and isinstance(saved.get("name"), str):
        changes["name"] = saved["name"]
    if isinstance(args, dict) and ("name" in changes or getattr(image, "weights", None)):
        changes["args"] = {**args, **image.args}  # those that came with the folder
    return _without_weights(replace(image, **changes))


def _without_text_sources(text: Any, saved: dict[str, Any], started: dict[str, Any], checkpoint: Path) -> Any:
    """Return the text tower's Config; saved, started: its sections in the checkpoint and in the run folder."""
    if text is None:
        return None
    changes: dict[str, Any] = {}
    name, tokenizer = getattr(text, "name", None), getattr(text, "tokenizer", None)
    is_name_gone = isinstance(name, str) and _is_gone(name, name, started)
    args = saved.get("args")
    if is_name_gone and saved.get("tower") == text.tower and isinstance(args, dict) and hasattr(text, "args"):
        defaults = _text_defaults(args)  # a new model would take these of the tokenizer
        ids = {key: defaults[key] for key in ("eos_token_id", "bos_token_id", "pad_token_id") if key in defaults}
        own = {key: value for key, value in text.args.items() if key != "model_type"}
        changes = {"name": None, "args": {**ids, **args, **own}}
        if getattr(text, "pool", None) == "auto" and isinstance(saved.get("pool"), str):
            changes["pool"] = saved["pool"]
    folder = checkpoint / loading.TOKENIZER
    is_tokenizer_gone = _is_gone(tokenizer, tokenizer, started, "tokenizer") if tokenizer else is_name_gone or not name
    if hasattr(text, "tokenizer") and is_tokenizer_gone and folder.is_dir():
        changes["tokenizer"] = str(folder)
    return _without_weights(replace(text, **changes))


def _without_other_sources(tower: Any, saved: dict[str, Any], started: dict[str, Any]) -> Any:
    """Return a further tower's Config; saved, started: its sections in the checkpoint and in the run folder.

    Where the model's folder is gone, what came with it is the checkpoint's: architecture, and how spectrograms are computed.
    """
    name = getattr(tower, "name", None)
    is_gone = isinstance(name, str) and saved.get("name", name) is None and _is_gone(name, name, started)
    if is_gone and saved.get("tower") == tower.tower:
        own = {spec.name: getattr(tower, spec.name) for spec in fields(tower)}
        inherited = {key: value for key, value in saved.items() if key in own and own[key] in (None, {}, [])}
        inherited |= {"name": None, "args": {**saved.get("args", {}), **own.get("args", {})}}
        tower = replace(tower, **inherited)
    return _without_weights(tower)


def _is_gone(folder: str, name: str, started: dict[str, Any], key: str = "name") -> bool:
    """Return whether a model or tokenizer cannot be read again from where the run started: its folder is not there.

    A name of the hub counts as gone, so that resuming needs no network, unless it is another one than the run started from.

    Args:
        folder: the path, which may be a name of the hub.
        name: the value of the field `key` now.
        started: the section of the configuration that the run started with.
    """
    return not Path(folder).expanduser().is_dir() and started.get(key, name) == name


# ---------------------------------------------------------------------------------------------------------------------
# What must not differ


def refuse_other_model(config: ModelSchema, tokenizer: Any, checkpoint: Path | None, model: nn.Module) -> None:
    """Refuse to resume with another model or tokenizer than the checkpoint was saved with.

    Call it before anything is written into the run folder.

    Args:
        config: as checkpoints hold it (`model.portable_config`).
        tokenizer: of the model; None = it reads no text.
        model: as it is trained, for the names and shapes of its weights.

    Raises:
        ConfigError: a field differs; the message names the key and both values. Or the tokenizer differs.
        UserError: names or shapes of weights differ.
    """
    if checkpoint is None:
        return
    saved, now = read_config(checkpoint), configuration.to_dict(config)
    if ("task" in saved) != ("task" in now):
        kinds = ("fine-tuning", "pretraining") if "task" in saved else ("pretraining", "fine-tuning")
        raise ConfigError(f"cannot resume {checkpoint}: it is of a {kinds[0]} run, not of {kinds[1]}; choose another run=NEW")
    folder = checkpoint / loading.TOKENIZER
    if tokenizer is not None and folder.is_dir():
        _refuse_other_tokenizer(tokenizer, checkpoint, folder)
    other = "run=NEW starts another" if "task" in now else f"start another from its weights: run=NEW init={checkpoint}"
    for key, old, new in _list_differences(saved, now):
        raise ConfigError(
            f"cannot resume {checkpoint}: {key} is {shorten(repr(new))} now and was {shorten(repr(old))}; set "
            f"{key}={shorten(_setting(old))}, or {other}"
        )
    store.refuse_other_model(model, checkpoint)


def _refuse_other_tokenizer(tokenizer: Any, checkpoint: Path, folder: Path) -> None:
    saved = load_tokenizer(folder)
    if saved.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"cannot resume {checkpoint}: the tokenizer has {len(tokenizer)} tokens now, and other ones than the {len(saved)} "
            f"of the checkpoint; text.tokenizer={folder} is the one that it was trained with"
        )


def _list_differences(saved: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, saved value, value now) of each field that decides what the model computes and differs.

    A field that only one of them has came with an upgrade, or went with it.
    """
    towers = [name for name, section in now.items() if isinstance(section, dict) and "tower" in section]
    sections = [name for name in dict.fromkeys((*MODEL_SECTIONS, *towers)) if name in saved and name in now]
    for name in (*sections, *[name for name in ("tokens",) if name in saved and name in now]):
        yield from _compare(name, _plain(saved[name]), _plain(now[name]))


def _compare(key: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    if not isinstance(old, dict) or not isinstance(new, dict):
        if key == "image.name" and isinstance(old, str) and isinstance(new, str):
            old, new = old.partition(".")[0], new.partition(".")[0]  # without timm's tag, which names weights
        if old != new:
            yield key, old, new
        return
    names = [name for name in new if name in old]
    if key.endswith(".args"):  # every argument may be left out
        defaults = _text_defaults(new) if key == "text.args" else {}
        old, new = ({**defaults, **{k: v for k, v in args.items() if not defaults or k in defaults}} for args in (old, new))
        names = list(dict.fromkeys((*old, *new)))
    for name in names:
        is_trained = name in TRAINING_FIELDS[""] | TRAINING_FIELDS.get(key, set()) or "drop" in str(name)
        if not is_trained:
            yield from _compare(f"{key}.{name}", old.get(name), new.get(name))


def _text_defaults(args: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of the text model that text.args describes, with their defaults; empty where it names none."""
    from transformers import CONFIG_MAPPING

    model_type = args.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return {}
    config_class = CONFIG_MAPPING[model_type]
    names = {f.name for f in fields(config_class)} if hasattr(config_class, "__dataclass_fields__") else set()
    defaults = {name: value for name, value in config_class().to_dict().items() if name in names}
    return {**_plain(defaults), "model_type": model_type}


def _plain(value: Any) -> Any:
    """Return a value with lists for tuples, as YAML reads them back."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _setting(value: Any) -> str:
    """Return a value as it is written behind key=."""
    if isinstance(value, list):
        return f"[{','.join(map(_setting, value))}]"
    return "null" if value is None else str(value)
