"""What a new run takes from `init`: another run or a published model, as a whole or tower by tower.

    init: runs/other                         towers, projections, scale
    init: openai/clip-vit-base-patch32       the same, from transformers or open_clip (see loading.load_model)
    init: {image: runs/a, text: runs/b}      the named towers only, each from its own run; projections start anew

A section of the configuration that names no architecture (image, text: no name, no args) takes that of init.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain import config as configuration
from pretrain.checkpoints import loading, store
from pretrain.checkpoints.loading import LoadedModel
from pretrain.data.text import load_tokenizer
from pretrain.errors import ConfigError, UserError
from pretrain.model import DualEncoder, ModelSchema
from pretrain.runtime.console import log_info
from pretrain.towers.meta_copy import is_on_meta

NOT_INHERITED = ("tokenizer", "trainable_blocks", "checkpointing", "patch_dropout")
"""Tower settings that are not architecture: a folder of the other run (see `choose_tokenizer`), and how it trained."""


@lru_cache(maxsize=2)
def _load_once(run: str) -> LoadedModel:
    """Load a run once for its configuration, tokenizer and weights.

    `load_weights` clears this cache at its end.
    """
    return loading.load_model(run)


def _load_source(init: Any, name: str) -> LoadedModel:
    """Load the run or model that `init` names for a tower, once.

    Raises UserError; where it is the weights of one tower alone, the error names the setting that takes them.
    """
    run = init if isinstance(init, str) else init[name]
    try:
        return _load_once(run)
    except UserError as error:
        path = Path(run).expanduser()
        is_run = (path / "config.yaml").exists() or (path / "checkpoints").exists() or (path / "open_clip_config.json").exists()
        if is_run or not path.exists():
            raise
        settings = {"image": f"image.weights={run}", "text": f"text.name={run}", "audio": f"audio.name={run}"}
        choices = [settings[name]] if isinstance(init, dict) and name in settings else list(settings.values())
        raise ConfigError(
            f"init={init}: {error}; init takes runs, and models of texts with images or sounds; the weights of one tower are "
            f"{' or '.join(choices)}"
        ) from error


def check(init: Any) -> None:
    """Refuse a value that `init` cannot have. Raises ConfigError."""
    if isinstance(init, dict):
        if not init or not all(isinstance(run, str) for run in init.values()):
            raise ConfigError(f"init={init} must name a run for each tower: init: {{image: RUN, text: RUN}}, or one of them")
    elif init is not None and not isinstance(init, str):
        raise ConfigError(f"init={init!r} must be a run, a checkpoint or a published model, or one for each tower")


def with_init_defaults(values: dict[str, Any], checkpoint: Path | None = None) -> dict[str, Any]:
    """Return configuration values with init's architecture as default of the sections that name none.

    Args:
        values: the values of configuration file and command line, as nested dictionaries.
        checkpoint: of the run that resumes, whose architecture is taken instead of init's, which is not read.

    Raises:
        ConfigError: `init` has a value it cannot have.
        UserError: the run that `init` names cannot be loaded.
    """
    for note in configuration.notes(values):
        log_info(note)
    init = configuration.read_text_field(values, "init")
    check(init)
    merged, inherits = configuration.merge(values, {}), False
    saved = None if checkpoint is None or init is None else read_schema(checkpoint)
    names = ["image", "text", *(init if isinstance(init, dict) else ())]
    if isinstance(init, str):  # the whole model, with all its towers
        names += list((_load_source(init, "image").config if saved is None else saved).others)
    for name in _runs_by_tower(init, tuple(dict.fromkeys(names))):
        section = values.get(name, {})
        if section is None and name not in ("image", "text"):  # left out; a schema knows no further towers that are null
            merged.pop(name)
        if section is not None and not {"name", "args", "tower"} & set(section):
            source = _load_source(init, name) if saved is None else None
            inherited = configuration.to_dict(source.config if source is not None else saved).get(name)
            if inherited is None:  # it has no such tower
                if isinstance(init, str) and not section:
                    merged[name] = None
                continue
            inherited = {key: value for key, value in inherited.items() if key not in NOT_INHERITED}
            if source is not None:
                inherited |= source.model.tower(name).settings_for(section)
            merged[name], inherits = configuration.merge(inherited, section), True
    if isinstance(init, str) and inherits:
        inherited = configuration.to_dict(_load_once(init).config if saved is None else saved)["model"]
        defaults = {key: inherited[key] for key in ("dim", "projection")}
        merged["model"] = configuration.merge(defaults, values.get("model") or {})
    return merged


def read_schema(checkpoint: Path) -> ModelSchema:
    """Return the part of a checkpoint's configuration that defines the encoders. Raises ConfigError."""
    path = checkpoint / "config.yaml"
    return configuration.build(ModelSchema, configuration.read_yaml(path), str(path), partial=True)


def choose_tokenizer(init: Any, text: Any) -> Any:
    """Return the tokenizer that the configuration section `text` names, else that of init's text tower."""
    name, run = text.tokenizer or text.name, _runs_by_tower(init, ("text",)).get("text")
    return _load_source(init, "text").tokenizer if run is not None and not name else load_tokenizer(name)


def _check_same_vocabulary(tokenizer: Any, run: str, expected: Any) -> None:
    """Refuse a tokenizer whose vocabulary is not the one that init's text tower was trained with.

    expected: that tokenizer. Raises ConfigError.
    """
    if tokenizer.get_vocab() != expected.get_vocab():
        a, b = len(tokenizer), len(expected)
        counts = f"{a} tokens, not {b}" if a != b else f"{a} tokens too, but other ones"
        raise ConfigError(
            f"text.tokenizer differs from the tokenizer of init={run} ({counts}): the token ids would not mean what its text "
            "tower has learned; leave text.tokenizer out"
        )


def load_weights(model: DualEncoder, init: Any, partial: bool, tokenizer: Any) -> None:
    """Load init's weights into the model.

    Args:
        init: a run, or a run for each tower.
        partial: load the weights that fit, and report the others, instead of raising an error.
        tokenizer: the model's, which must have the vocabulary of init's; None for a model without text.

    Raises:
        UserError: weights do not fit and `partial` is false; counts and names them.
        ConfigError: the tokenizer has another vocabulary than init's.
    """
    for run in _runs_by_tower(init, ("text",)).values():
        if tokenizer is not None:
            _check_same_vocabulary(tokenizer, run, _load_source(init, "text").tokenizer)
    if isinstance(init, str):
        loaded = _load_source(init, "image")
        weights = _match_logit_bias(loaded.model.state_dict(), model)
        for name, tower in model.towers.items():
            prefix = f"towers.{name}."
            own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
            weights |= {prefix + key: value for key, value in _fit(tower, own, name).items()}
        _load_into(model, weights, init, partial)
        log_info(f"weights start from {loaded.folder}")
    else:
        for name, run in init.items():
            source, tower = _load_source(init, name).model, model.tower(name)
            _load_into(tower, _fit(tower, source.tower(name).state_dict(), name), f"{run} ({name} tower)", partial)
            log_info(f"weights of the {name} tower start from {_load_once(run).folder}")
    _load_once.cache_clear()


def _runs_by_tower(init: Any, names: tuple[str, ...]) -> dict[str, str]:
    """Return the run that each tower of `names` starts from, without the towers that start from none."""
    if isinstance(init, str):
        return dict.fromkeys(names, init)
    return {name: init[name] for name in names if name in (init or {})}


def _fit(tower: Any, weights: dict[str, Tensor], modality: str) -> dict[str, Tensor]:
    """Return weights of a tower with their positions resampled to another size of `tower`, and say so."""
    fitted: dict[str, Tensor] = tower.fit_weights(weights)
    for name in [name for name, value in fitted.items() if value.shape != weights[name].shape]:
        before, after = list(weights[name].shape), list(fitted[name].shape)
        log_info(f"init: {modality} {name} is resampled from {before} to {after}")
    return fitted


def _match_logit_bias(weights: dict[str, Tensor], model: DualEncoder) -> dict[str, Tensor]:
    """Return the weights with a logit bias if and only if the model has one.

    The bias belongs to the loss: with another loss than init's, the model starts from its own bias, or has none.
    """
    weights = dict(weights)
    if model.logit_bias is None:
        weights.pop("logit_bias", None)
    else:
        weights.setdefault("logit_bias", model.logit_bias.detach())
    return weights


def _load_into(module: Any, weights: dict[str, Tensor], where: str, partial: bool) -> None:
    """Load weights into a module, strictly unless `partial`; `where` names their source in messages."""
    if not partial:
        try:
            store.load_weights(module, weights, where)
        except UserError as error:
            raise UserError(f"init={error}; init_partial=true loads only the weights that fit") from error
        return
    current = module.state_dict()
    fitting = {name: value for name, value in weights.items() if name in current and current[name].shape == value.shape}
    if not is_on_meta(module):
        module.load_state_dict({**current, **fitting})
    unchanged = sorted(set(current) - set(fitting))
    log_info(
        f"init={where}: {len(fitting)} of {len(current)} weights start from it, {len(weights) - len(fitting)} of its weights "
        "do not fit"
        + (f"; not from init: {', '.join(unchanged[:3])}{', ...' if len(unchanged) > 3 else ''}" if unchanged else "")
    )
