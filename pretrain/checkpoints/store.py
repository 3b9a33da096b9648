"""Checkpoint folders: how they are found, verified and read.

    checkpoints/step-0001000/   config.yaml model.safetensors tokenizer/ manifest.json state/
    checkpoints/latest          one line of text: the newest complete one; `best` likewise
    checkpoints/abandoned/      later checkpoints that resume=PATH left; removed when the new branch has a good one

A folder is complete or it is not there (writing.py). One that a new checkpoint of the same step replaces is hidden for a
moment. The manifest holds size and SHA-256 of every file. Our own loads are weights-only: no file is ever unpickled into code.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from pretrain.errors import ConfigError, UserError
from pretrain.runtime.console import log_info
from pretrain.runtime.files import read_bytes, read_json_object, write_text
from pretrain.towers.meta_copy import is_on_meta

_REPLACED = ".replaced.partial"
"""End of the name, which a dot begins, of a checkpoint whose place a new one of the same step takes."""
_STEP = re.compile(r"step-(\d+)$")
_HIDDEN_STEP = re.compile(rf"\.(step-\d+){re.escape(_REPLACED)}$")


def parse_step(folder: Path) -> int:
    """Return the step in a checkpoint folder's name. Raises UserError where the name is not step-NUMBER."""
    hidden = _HIDDEN_STEP.search(folder.name)
    match = _STEP.search(hidden[1] if hidden is not None else folder.name)
    if match is None:
        raise UserError(f"{folder} is not a checkpoint folder: its name must be step-NUMBER")
    return int(match[1])


def list_complete(checkpoints: Path) -> list[Path]:
    """Return the complete checkpoint folders below `checkpoints`, oldest first.

    A folder that has a manifest is complete: it was renamed after all its files had been written.
    """
    return [folder for folder in list_folders(checkpoints) if (folder / "manifest.json").exists()]


def list_folders(checkpoints: Path) -> list[Path]:
    """Return all checkpoint folders below `checkpoints`, oldest first, also those without a manifest.

    A checkpoint that was being replaced when its run was killed lies under a hidden name; see writing.recover.
    """
    folders = {p for p in checkpoints.glob("step-*") if _STEP.search(p.name) and p.is_dir()}
    for hidden, folder in list_replaced(checkpoints):
        candidate = folder if os.path.lexists(folder) else hidden
        if candidate.is_dir():
            folders.add(candidate)
    return sorted(folders, key=parse_step)


def list_replaced(checkpoints: Path) -> list[tuple[Path, Path]]:
    """Return the checkpoints that new ones replace, or were to replace: (hidden folder, the name it had before)."""
    hidden = [(path, _HIDDEN_STEP.fullmatch(path.name)) for path in checkpoints.glob(f".step-*{_REPLACED}")]
    return [(path, checkpoints / match[1]) for path, match in hidden if match is not None]


def replaced_path(folder: Path) -> Path:
    """Return the hidden name of a checkpoint folder while a new one of the same step takes its place."""
    return folder.with_name(f".{folder.name}{_REPLACED}")


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def point_to(checkpoints: Path, name: str, folder: Path) -> None:
    """Let the file `latest` or `best` name a checkpoint folder. Raises OSError."""
    write_text(checkpoints / name, folder.name + "\n", sync=True)


def read_pointer(checkpoints: Path, name: str) -> Path | None:
    """Return the checkpoint folder that the file `latest` or `best` names, or None if there is none."""
    try:
        folder = checkpoints / read_bytes(checkpoints / name, 4096).decode().strip()
    except (OSError, ValueError):  # there is none, or it holds something else
        return None
    if folder.parent != checkpoints or _STEP.fullmatch(folder.name) is None:
        return None
    folder = _locate(folder)
    return folder if (folder / "manifest.json").exists() else None


def _locate(folder: Path) -> Path:
    """Return a checkpoint folder, or the hidden one that it was renamed to when its run was killed."""
    hidden = replaced_path(folder)
    return hidden if not os.path.lexists(folder) and (hidden / "manifest.json").exists() else folder


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def _parse_manifest(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return {file: {size, sha256}} of a manifest. Raises ValueError where it is not what writing.py writes."""
    entries = manifest.get("files")
    if not isinstance(entries, dict) or not entries:
        raise ValueError("it lists no files")
    for name, entry in entries.items():
        size, digest = (entry.get(key) for key in ("size", "sha256")) if isinstance(entry, dict) else (None, None)
        if type(size) is not int or not isinstance(digest, str):
            raise ValueError(f"its entry of {name!r:.80} has no size and sha256")
        parts = name.split("/")
        if not 0 < len(name) < 1024 or max(map(len, parts)) > 255 or {"", ".", ".."} & set(parts) or "\0" in name:
            raise ValueError(f"{name!r:.80} is not a file below the checkpoint")
    return entries


def list_manifest(folder: Path) -> list[str]:
    """Return the paths of the files that a checkpoint's manifest lists. Raises OSError, and ValueError where it lists none."""
    return list(_parse_manifest(read_json_object(folder / "manifest.json")))


def integrity_error(folder: Path) -> str | None:
    """Return why a checkpoint is damaged, or None if every file has the size and SHA-256 in its manifest."""
    try:
        entries = _parse_manifest(read_json_object(folder / "manifest.json"))
    except (OSError, ValueError) as error:
        return f"manifest.json is not readable ({error})"
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["size"]:
            return f"{name} has {path.stat().st_size} bytes, its manifest says {entry['size']}"
    try:
        with ThreadPoolExecutor(4) as pool:
            digests = list(pool.map(hash_file, [folder / name for name in entries]))
    except OSError as error:
        return f"a file cannot be read: {error}"
    for (name, entry), digest in zip(entries.items(), digests, strict=True):
        if digest != entry["sha256"]:
            return f"{name} does not match its checksum"
    return None


def find_newest(checkpoints: Path, report: Callable[[str], None]) -> Path | None:
    """Return the newest complete and verified checkpoint, or None.

    `report` receives a line for each damaged checkpoint that is skipped.
    """
    for folder in reversed(list_folders(checkpoints)):
        error = integrity_error(folder)
        if error is None:
            return folder
        report(f"skipping the damaged checkpoint {folder}: {error}")
    return None


def find(run: str | Path) -> Path:
    """Return the checkpoint folder that RUN names.

    It is RUN itself, or a run folder's best checkpoint, else its newest verified one.

    Raises ConfigError where there is nothing, UserError where no checkpoint is complete or RUN is one that is damaged.
    """
    path = Path(run)
    if not path.exists() and not path.is_absolute() and len(path.parts) == 1 and (Path("runs") / path).exists():
        path = Path("runs") / path
    if path.name:
        path = _locate(path)
    if not path.exists():
        raise ConfigError(f"no run or checkpoint at {run}; give a run folder (runs/NAME) or one of its checkpoints")
    if (path / "model.safetensors").exists():
        if (path / "manifest.json").exists() and (error := integrity_error(path)):
            raise UserError(f"{path} cannot be used: {error}")
        return path
    best = read_pointer(path / "checkpoints", "best")
    if best is not None and integrity_error(best) is None:
        return best
    newest = find_newest(path / "checkpoints", log_info)
    if newest is None:
        raise UserError(f"{path} holds no complete checkpoint (looked for {path}/checkpoints/step-*/manifest.json)")
    return newest


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint folder's model.safetensors. Raises UserError where it is damaged."""
    try:
        return load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / 'model.safetensors'} cannot be read: {error}") from error


def load_weights(model: nn.Module, weights: dict[str, Tensor], where: Path | str) -> None:
    """Load weights into a model, strictly.

    Raises UserError where names or shapes differ: it counts the missing, extra and differently shaped weights and names the
    first of each. `where` says in the message where the weights come from. A model on the meta device is checked only.
    """
    _refuse_other_shapes(model, {name: tuple(value.shape) for name, value in weights.items()}, where)
    if not is_on_meta(model):
        model.load_state_dict(weights)


def refuse_other_model(model: nn.Module, checkpoint: Path) -> None:
    """Refuse a model that the weights to resume from do not fit; reads their names and shapes only. Raises UserError."""
    folder = training_weights_folder(checkpoint)
    try:
        with safe_open(folder / "model.safetensors", "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / 'model.safetensors'} cannot be read: {error}") from error
    _refuse_other_shapes(model, shapes, checkpoint)


def training_weights_folder(checkpoint: Path) -> Path:
    """Return the folder with the weights that training resumes from.

    It is state/weights where model.safetensors holds others: averaged weights, or weights with adapters merged.
    """
    folder = checkpoint / "state" / "weights"
    return folder if folder.exists() else checkpoint


def _refuse_other_shapes(model: nn.Module, actual: dict[str, tuple[int, ...]], where: Path | str) -> None:
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    missing, extra = sorted(expected.keys() - actual.keys()), sorted(actual.keys() - expected.keys())
    reshaped = sorted(name for name in expected.keys() & actual.keys() if expected[name] != actual[name])
    errors = []
    if missing:
        errors.append(f"{len(missing)} weights are missing (first {missing[0]})")
    if extra:
        errors.append(f"{len(extra)} are not in the model (first {extra[0]})")
    if reshaped:
        name = reshaped[0]
        shapes = f"{list(actual[name])}, the model has {list(expected[name])}"
        errors.append(f"{len(reshaped)} have another shape (first {name}: {shapes})")
    if errors:
        raise UserError(f"{where} is a checkpoint of another architecture: {'; '.join(errors)}")


def load_tensors(path: Path) -> dict[str, Any]:
    """Return what files.save_tensors wrote. Raises UserError where it is damaged."""
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler raises many types of exceptions for damaged files
        raise UserError(f"{path} cannot be read: {str(error)[:300] or type(error).__name__}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__}, not what a run saves there")
    return loaded
