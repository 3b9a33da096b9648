"""What a run starts from: `init`, a run of ours or a published model, whole or one tower of it.

    init: runs/other                         towers, projections, scale
    init: openai/clip-vit-base-patch32       the same, from transformers or open_clip (inference.load_model says what it reads)
    init: {image: runs/a, text: runs/b}      towers only, each from its own; projections start anew

A section of the configuration that says nothing of its architecture (image, text: no name, no args) takes init's.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import Tensor

from pretrain import config as configuration
from pretrain.checkpoints import loading, store
from pretrain.checkpoints.loading import LoadedModel
from pretrain.data.text import load_tokenizer
from pretrain.errors import ConfigError, UserError
from pretrain.model import DualEncoder
from pretrain.runtime.console import log_info

NOT_INHERITED = ("tokenizer", "trainable_blocks", "checkpointing", "patch_dropout")
"""Settings of a tower that are no architecture: a folder of theirs (`tokenizer` below reads it), and how it trained."""


@lru_cache(maxsize=2)
def _loaded(run: str) -> LoadedModel:
    """Read once for configuration, tokenizer and weights; let go of when the weights are in place."""
    return loading.load_model(run)


def check(init: Any) -> None:
    """Refuses what `init` cannot be. Raises ConfigError."""
    if isinstance(init, dict):
        if not init or not all(isinstance(run, str) for run in init.values()):
            raise ConfigError(f"init={init} must name a run for each tower: init: {{image: RUN, text: RUN}}, or one of them")
    elif init is not None and not isinstance(init, str):
        raise ConfigError(f"init={init!r} must be a run, a checkpoint or a published model, or one for each tower")


def with_init_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """What file and command line say, with the architecture of `init` under the sections that name none."""
    init = given.get("init")
    check(init)
    merged, taken = dict(given), False
    for name, run in _towers(init, ("image", "text")).items():
        section = given.get(name, {})
        if section is not None and not {"name", "args", "tower"} & set(section):
            theirs = configuration.to_dict(_loaded(run).config)[name]
            theirs = {key: value for key, value in theirs.items() if key not in NOT_INHERITED}
            merged[name], taken = configuration.merge(theirs, section), True
    if isinstance(init, str) and taken:
        theirs = configuration.to_dict(_loaded(init).config)["model"]
        merged["model"] = configuration.merge({key: theirs[key] for key in ("dim", "projection")}, given.get("model") or {})
    return merged


def choose_tokenizer(init: Any, text: Any) -> Any:
    """The tokenizer of the configuration, else init's."""
    named, run = text.tokenizer or text.name, _towers(init, ("text",)).get("text")
    return _loaded(run).tokenizer if run is not None and not named else load_tokenizer(named)


def _same_words(ours: Any, run: str) -> None:
    """Refuses a tokenizer that is not that of the text tower's weights. Raises ConfigError."""
    theirs = _loaded(run).tokenizer
    if ours.get_vocab() != theirs.get_vocab():
        a, b = len(ours), len(theirs)
        counts = f"{a} tokens, not {b}" if a != b else f"{a} tokens too, but other ones"
        raise ConfigError(
            f"text.tokenizer differs from the tokenizer of init={run} ({counts}): what its text tower learnt means something "
            "else; leave text.tokenizer out"
        )


def load_weights(model: DualEncoder, init: Any, partial: bool, tokenizer: Any) -> None:
    """Puts init's weights into the model. Raises UserError, counting and naming, where they do not fit, unless `partial`;
    and where the texts are cut into other tokens than those the weights know."""
    for run in _towers(init, ("text",)).values():
        if tokenizer is not None:  # None: a model without texts
            _same_words(tokenizer, run)
    if isinstance(init, str):
        loaded = _loaded(init)
        weights = _scalars(loaded.model.state_dict(), model, init)
        _put(model, weights, init, partial)
        log_info(f"weights start from {loaded.folder}")
    else:
        for name, run in init.items():
            theirs = _loaded(run).model
            _put(model.tower(name), theirs.tower(name).state_dict(), f"{run} ({name} tower)", partial)
            log_info(f"weights of the {name} tower start from {_loaded(run).folder}")
    _loaded.cache_clear()


def _towers(init: Any, names: tuple[str, ...]) -> dict[str, str]:
    """Tower -> the run it starts from."""
    if isinstance(init, str):
        return dict.fromkeys(names, init)
    return {name: init[name] for name in names if name in (init or {})}


def _scalars(weights: dict[str, Tensor], model: DualEncoder, init: str) -> dict[str, Tensor]:
    """A bias of the logits belongs to the loss: another loss than init's begins with its own, or does without."""
    weights = dict(weights)
    if model.logit_bias is None:
        weights.pop("logit_bias", None)
    else:
        weights.setdefault("logit_bias", model.logit_bias.detach())
    return weights


def _put(module: Any, weights: dict[str, Tensor], where: str, partial: bool) -> None:
    if not partial:
        try:
            store.load_weights(module, weights, where)
        except UserError as error:
            raise UserError(f"init={error}; init_partial=true takes what fits") from error
        return
    own = module.state_dict()
    fits = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    module.load_state_dict({**own, **fits})
    left = sorted(set(own) - set(fits))
    log_info(
        f"init={where}: {len(fits)} of {len(own)} weights start from it, {len(weights) - len(fits)} of its own were left out"
        + (f"; new: {', '.join(left[:3])}{', ...' if len(left) > 3 else ''}" if left else "")
    )
