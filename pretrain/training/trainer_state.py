"""The state of a run in a checkpoint, trainer.pt and the weights to resume from: read, and checked before it is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoints import store
from pretrain.errors import ConfigError, UserError
from pretrain.training.spikes import find_state_error

_TRAINER_STATE: dict[str, Any] = {
    "step": int,
    "skipped": int,
    "best": float | int,
    "identity": dict,
    "results": dict,
    "loader": dict,
}
_LOADER_STATE: dict[str, Any] = {"position": int, "seen": int, "run": int, "bad": dict}


def load_trainer_state(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's trainer.pt, as run_state.Run saves it.

    Raises UserError where the file is damaged or holds something else.
    """
    state = store.load_tensors(path)
    for values, kinds in ((state, _TRAINER_STATE), (state.get("loader"), _LOADER_STATE)):
        for name, kind in kinds.items():
            value: Any = values.get(name) if isinstance(values, dict) else None
            if not isinstance(value, kind) or isinstance(value, bool) or (kind is int and not 0 <= value < 1 << 62):
                raise UserError(f"{path} is damaged: {name} is {value!r:.80}")
    filtered = state["loader"].setdefault("filtered", {})  # older checkpoints have none
    if not isinstance(filtered, dict):
        raise UserError(f"{path} is damaged: filtered is {filtered!r:.80}")
    numbers = [*state["results"].values(), *state["loader"]["bad"].values(), *filtered.values()]
    names = [state.get("good"), *state["results"], *state["loader"]["bad"], *filtered]
    if not all(isinstance(n, int | float) for n in numbers) or not all(isinstance(n, str | None) for n in names):
        raise UserError(f"{path} is damaged: its results or its counts of bad samples are not numbers by name")
    if "spikes" in state and (error := find_state_error(state["spikes"])):  # older checkpoints have none
        raise UserError(f"{path} is damaged: spikes: {error}")
    if (state.get("good") or "step-0") != Path(state.get("good") or "step-0").name:
        raise UserError(f"{path} is damaged: good is {state['good']!r:.80}")
    try:
        json.dumps([state["identity"], state["loader"]["data"], state["loader"]["batch_size"]])  # plain values only
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error!r:.200}") from error
    return state


def refuse_other_identity(trainer_state: dict[str, Any], identity: dict[str, Any], checkpoint: Path) -> None:
    """Refuse to resume a run with other data, seed or batch size. Raises ConfigError, which names the value.

    trainer_state: of the checkpoint. identity: RunPlan's.
    """
    for name, value in identity.items():
        if trainer_state["identity"].get(name) != value:
            raise ConfigError(
                f"cannot resume {checkpoint}: {name} is {value!r} now and was {trainer_state['identity'].get(name)!r}; "
                "a run resumes with the same data, seed, batch size and model (resume=never run=NEW starts another)"
            )


def read_trainable_weights(folder: Path, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Return the weights in a folder. Raises UserError where one of `shapes` is missing or differs."""
    weights = store.read_weights(folder)
    for name, shape in shapes.items():
        if name not in weights or weights[name].shape != shape:
            actual = list(weights[name].shape) if name in weights else "not there"
            raise UserError(f"{folder / 'model.safetensors'} does not fit: {name} is {actual}, the model has {list(shape)}")
    return weights
