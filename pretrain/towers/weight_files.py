"""Reads the weights of a timm model from files that other trainers wrote.

    load_weights(model, "resnet50.pth") -> LoadedWeights, whose str() says what was loaded and what was not

A file is safetensors, or what torch.save() wrote (.pth, .pt, .bin, .tar, .ckpt), read with weights_only. A folder is what
timm's save_for_hf() or transformers' save_pretrained() wrote, or holds one weight file. The state dict may be nested
(`state_dict`, `model`, `teacher`, ...), and its names may have a prefix (`module.`, `backbone.`, `encoder.`, ...): the state
dict and the prefix whose names and shapes fit the model best are taken. timm's own conversions of published checkpoints
follow, which also resample position embeddings.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from pretrain.errors import ConfigError

SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".tar")
"""Suffixes of weight files."""
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
"""Weight files of a folder of timm or transformers, in the order of preference."""
ENOUGH = 0.9
"""Fraction of the model's numbers that must come from the file: with less, the file belongs to another model."""
SKIPPED = ("optimizer", "optimizers", "optimizer_states", "lr_schedulers", "scheduler", "amp", "scaler")
"""Keys of checkpoints below which there are no weights of a model."""
PREFERRED = ("ema", "teacher")
"""State dicts that are evaluated by convention: averaged weights, and the teacher of DINO and iBOT."""
AVOIDED = ("momentum", "encoder_k", "target", "student")
"""State dicts that are not evaluated by convention, where another fits as well."""


@dataclass
class LoadedWeights:
    """What was loaded into a model, and what was not."""

    source: Path
    """The file."""
    part: str
    """State dict and prefix inside the file, with dots; empty for the names as they are."""
    loaded: int
    total: int
    """Tensors of the model, without the counters of BatchNorm."""
    missing: list[str] = field(default_factory=list)
    """Tensors of the model that stay random."""
    unused: list[str] = field(default_factory=list)
    """Tensors of the file that do not fit the model, without the classifier."""
    classifier: int = 0
    """Tensors of the classifier, which were ignored."""
    statistics: dict[str, list[float]] = field(default_factory=dict)
    """mean and std of the channels, from the folder's config.json."""

    def __str__(self) -> str:
        """Return what was loaded in one line."""
        part = f" ({self.part.rstrip('.')})" if self.part else ""
        notes = [f"{self.source}{part}: {self.loaded} of {self.total} tensors"]
        if self.missing:
            notes.append(f"{len(self.missing)} stay random: {_list(self.missing)}")
        if self.classifier:
            notes.append(f"its classifier ignored ({self.classifier})")
        if self.unused:
            notes.append(f"{len(self.unused)} of the file do not fit: {_list(self.unused)}")
        return "; ".join(notes)


def load_weights(model: nn.Module, source: str, classifiers: tuple[str, ...] = ()) -> LoadedWeights:
    """Load a file or folder into a timm model, in place. Raises ConfigError where it is no weights of this model.

    classifiers: names of the classifier's modules, whose weights are ignored.
    """
    path, statistics = find_file(source), _read_statistics(Path(source))
    target = {name: tensor.shape for name, tensor in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    state_dicts = dict(_find_state_dicts(_read_file(path)))
    if not state_dicts:
        raise ConfigError(f"image.weights={source}: {path.name} holds no named tensors")
    part, weights = _choose_weights(state_dicts, model, target)
    fitting = {name: tensor for name, tensor in weights.items() if name in target and tensor.shape == target[name]}
    counters = {n: t for n, t in weights.items() if n.endswith("num_batches_tracked") and n in model.state_dict()}
    others = [name for name in weights if name not in fitting and name not in counters]
    is_classifier = {name: any(name.startswith(f"{module}.") for module in classifiers) for name in others}
    report = LoadedWeights(
        path,
        part,
        len(fitting),
        len(target),
        [name for name in target if name not in fitting],
        [name for name in others if not is_classifier[name]],
        sum(is_classifier.values()),
        statistics,
    )
    numbers = sum(target[name].numel() for name in fitting) / max(1, sum(shape.numel() for shape in target.values()))
    if numbers < ENOUGH:
        raise ConfigError(
            f"image.weights={source}: these are not weights of this {type(model).__name__}: {len(fitting)} of its "
            f"{len(target)} tensors ({100 * numbers:.0f}% of its numbers) fit{_explain_misfit(path, weights, target)}"
        )
    if bad := [name for name, tensor in fitting.items() if tensor.is_floating_point() and not tensor.isfinite().all()]:
        raise ConfigError(f"image.weights={source}: not all numbers are finite in {_list(bad)}")
    model.load_state_dict({**fitting, **counters}, strict=False)
    return report


def find_file(source: str) -> Path:
    """Return the weight file that a file or folder names. Raises ConfigError."""
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise ConfigError(f"image.weights={source}: there is no such file or folder; published weights: image.pretrained=true")
    if (path / "checkpoints").is_dir() or (path / "manifest.json").is_file():
        raise ConfigError(f"image.weights={source} is a run of clipfuse: use init={{image: {source}}}")
    names = [name for name in FOLDER_FILES if (path / name).is_file()]
    names = names or sorted(p.name for p in path.iterdir() if p.is_file() and p.suffix in SUFFIXES)
    if not names or (len(names) > 1 and names[0] not in FOLDER_FILES):
        listing = f"holds {len(names)} weight files: {_list(names)}; name one of them" if names else "holds no weight file"
        raise ConfigError(f"image.weights={source} {listing} ({', '.join(SUFFIXES)})")
    return path / names[0]


def read_folder_config(source: Path) -> dict[str, Any]:
    """Return the config.json beside the weights of a folder; empty where there is none. Raises ConfigError."""
    path = source.expanduser() / "config.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"image.weights: {path} is not readable JSON: {_one_line(error)}") from error
    return content if isinstance(content, dict) else {}


def _read_statistics(source: Path) -> dict[str, list[float]]:
    """Return the mean and standard deviation that a folder's config.json names, if it names them."""
    published = read_folder_config(source).get("pretrained_cfg")
    values = published if isinstance(published, dict) else {}
    return {
        key: [float(number) for number in values[key]]
        for key in ("mean", "std")
        if isinstance(values.get(key), list)
        and len(values[key]) == 3
        and all(isinstance(number, (int, float)) for number in values[key])
    }


# ---------------------------------------------------------------------------------------------------------------------
# Reading a file


def _read_file(path: Path) -> Any:
    """Read the content of a weight file without running code that it may hold. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            head = file.read(9)
        if head[8:9] == b"{":  # the header of safetensors: its length in 8 bytes, then JSON
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(_list_plain_types()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise errors of many types for files of other kinds
        reason = _one_line(error)
        if "Weights only load failed" in reason and (blocked := _find_blocked_types(path)):
            reason = f"it holds Python objects{blocked}, which are not loaded; save its state_dict() alone"
        raise ConfigError(f"image.weights={path}: not a readable file of weights: {reason}") from error


def _list_plain_types() -> list[Any]:
    """Return the types of plain values that trainers store beside weights: arguments, paths, numbers of NumPy."""
    import numpy as np

    kinds = [np.dtype, np.ndarray, np.float64, np.float32, np.int64, *(type(np.dtype(kind)) for kind in "fdilqb?")]
    core = getattr(np, "_core", None) or np.core
    return [argparse.Namespace, pathlib.PosixPath, core.multiarray.scalar, *dict.fromkeys(kinds)]


def _find_blocked_types(path: Path) -> str:
    """Return " (name, ...)" of the types that weights_only refuses in a file."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (RuntimeError, ValueError, OSError):
        return ""  # files of the format before torch 1.6 cannot be searched
    return f" ({_list(sorted(set(names)))})" if names else ""


def _find_state_dicts(content: Any, path: str = "", depth: int = 4) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield (path with dots, tensors) of each dictionary of named tensors inside a checkpoint."""
    if not isinstance(content, Mapping) or depth == 0:
        return
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if tensors:
        yield path, tensors
    for key, value in content.items():
        if isinstance(key, str) and key not in SKIPPED:
            yield from _find_state_dicts(value, f"{path}{key}.", depth - 1)


# ---------------------------------------------------------------------------------------------------------------------
# Matching with the model


def _choose_weights(
    state_dicts: dict[str, dict[str, Tensor]], model: nn.Module, target: dict[str, torch.Size]
) -> tuple[str, dict[str, Tensor]]:
    """Return (state dict and prefix, weights without the prefix) that fit the model best."""
    choices = [
        (path, prefix, count)
        for path, weights in state_dicts.items()
        for prefix, count in _count_names(weights, target).items()
    ]
    choices.sort(key=lambda choice: (-choice[2], _rank(choice[0] + choice[1])))
    best = [(path + prefix, _without_prefix(state_dicts[path], prefix)) for path, prefix, _ in choices[:6]]
    best += list(state_dicts.items())
    # Published checkpoints may have other names throughout: each state dict, without what all of its names begin with.
    best += [
        (path + (shared := _shared_prefix(weights)), _without_prefix(weights, shared)) for path, weights in state_dicts.items()
    ]
    if _count_fitting(best[0][1], target) == len(target):
        return best[0]
    convert = _find_conversion(model)
    results = [(part, weights, converted) for part, weights in best for converted in (weights, convert(weights))]
    part, _, weights = max(results, key=lambda result: _count_fitting(result[2], target))
    return part, weights


def _count_names(weights: dict[str, Tensor], target: dict[str, torch.Size]) -> Counter[str]:
    """Return by prefix how many of the weights fit the model in name and shape without it."""
    counts: Counter[str] = Counter()
    for name, tensor in weights.items():
        starts = [0, *(i + 1 for i, character in enumerate(name) if character == ".")]
        counts.update(name[:start] for start in starts if target.get(name[start:]) == tensor.shape)
    return counts


def _rank(part: str) -> tuple[int, int]:
    """Return the order of state dicts and prefixes that fit equally well: smaller is better."""
    is_preferred, is_avoided = (any(word in part for word in words) for words in (PREFERRED, AVOIDED))
    return (0 if is_preferred else 2 if is_avoided else 1), len(part)


def _without_prefix(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in weights.items() if name.startswith(prefix)}


def _shared_prefix(weights: dict[str, Tensor]) -> str:
    """Return what all names begin with, up to a dot."""
    first, last = min(weights), max(weights)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[: first.rfind(".", 0, length) + 1]


def _count_fitting(weights: dict[str, Tensor], target: dict[str, torch.Size]) -> int:
    return sum(target.get(name) == tensor.shape for name, tensor in weights.items())


def _find_conversion(model: nn.Module) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Return timm's conversion of published checkpoints for this kind of model; the identity where it has none."""
    module = sys.modules[type(model).__module__]
    function = getattr(module, "checkpoint_filter_fn", None) or getattr(module, "_filter_fn", None)

    def convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        if function is None:
            return weights
        takes_model = function.__code__.co_argcount > 1
        try:
            converted = function(dict(weights), model) if takes_model else function(dict(weights))
        except (KeyError, IndexError, ValueError, TypeError, AttributeError, RuntimeError, AssertionError):
            return weights  # made for other names than these: the weights are judged as they are
        return {name: tensor for name, tensor in cast(dict[str, Any], converted).items() if isinstance(tensor, Tensor)}

    return convert


def resample(model: nn.Module, weights: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Return weights of this timm model built for another size of image, with their positions resampled.

    weights: by timm's names after `prefix`. Those that cannot be made to fit are returned as they are.
    """
    target = {prefix + name: tensor.shape for name, tensor in model.state_dict().items()}
    if all(target.get(name) in (None, tensor.shape) for name, tensor in weights.items()):
        return weights
    converted = _find_conversion(model)(_without_prefix(weights, prefix))
    resampled = {prefix + name: tensor for name, tensor in converted.items()}
    return {
        name: resampled[name] if name in resampled and resampled[name].shape == target.get(name) else tensor
        for name, tensor in weights.items()
    }


def _explain_misfit(path: Path, weights: dict[str, Tensor], target: dict[str, torch.Size]) -> str:
    """Return what speaks for another model: its name in config.json, tensors of another shape, or other names."""
    config = read_folder_config(path.parent)
    architecture = config.get("architecture") or config.get("model_type")
    wrong = [name for name, tensor in weights.items() if name in target and tensor.shape != target[name]]
    if architecture:
        hint = f"; its config.json says {architecture}"
    elif wrong:
        hint = f"; {wrong[0]} is {list(weights[wrong[0]].shape)} in the file, {list(target[wrong[0]])} in the model"
    else:
        hint = f"; the file has {_list(list(weights))}, the model {_list(list(target))}"
    return f"{hint}; image.name and image.args must be those of the file, in timm's names"


def _list(names: list[str], most: int = 3) -> str:
    """Return the first names, and how many there are more."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
