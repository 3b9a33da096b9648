"""Checkpoints: written atomically, verified, rotated, resumed; and loaded for inference.

    checkpoints/step-0001000/   config.yaml model.safetensors tokenizer/ manifest.json state/
    checkpoints/latest          one line of text: the newest complete one; `best` likewise

A folder is written under a hidden name, flushed to disk, and renamed: it is complete or it is not there. Its manifest holds
size and SHA-256 of every file. Our own loads are weights-only: no file is ever unpickled into code.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pretrain.errors import UserError
from pretrain.runtime import distributed
from pretrain.runtime.agree import on_all, on_main
from pretrain.runtime.files import flush, save_weights, write_text

_STEP = re.compile(r"step-(\d+)$")


def parse_step(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    match = _STEP.search(folder.name)
    if match is None:
        raise UserError(f"{folder} is not a checkpoint folder: its name must be step-NUMBER")
    return int(match[1])


def list_complete(checkpoints: Path) -> list[Path]:
    """The checkpoint folders below `checkpoints`, oldest first. A folder with a manifest was renamed whole."""
    found = [path.parent for path in checkpoints.glob("step-*/manifest.json") if _STEP.search(path.parent.name)]
    return sorted(found, key=parse_step)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def save(
    checkpoints: Path,
    step: int,
    weights: dict[str, Tensor],
    files: Callable[[Path], None],
    state: Callable[[Path], None],
    *,
    keep: int,
    best: bool = False,
) -> Path:
    """Writes checkpoints/step-NUMBER and moves `latest` (and `best`) to it. Every rank calls it.

    weights: what model.safetensors holds, complete on rank 0. files(folder) writes what belongs beside it, on rank 0;
    state(folder/"state") writes the resume state, on every rank. Older ones beyond `keep` go afterwards, never the best.
    Raises UserError where the disk is full or cannot be written; what was there before stays.
    """
    final = checkpoints / f"step-{step:07d}"
    partial = checkpoints / f".{final.name}.partial"

    def prepare() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "state").mkdir(parents=True)

    def write() -> None:
        try:
            state(partial / "state")
            if distributed.is_main():
                save_weights(partial / "model.safetensors", weights)
                files(partial)
        except SafetensorError as error:  # what safetensors makes of a full disk
            raise OSError(str(error)) from error

    def publish() -> None:
        _seal(partial, final, step)
        write_text(checkpoints / "latest", final.name + "\n", sync=True)
        if best:
            write_text(checkpoints / "best", final.name + "\n", sync=True)
        _rotate(checkpoints, keep)

    try:
        on_main(prepare)
        on_all(write)
        on_main(publish)
    except (UserError, OSError) as error:  # on every rank, or on none
        if distributed.is_main():
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"cannot write the checkpoint of step {step} into {checkpoints}: {error}; older ones are intact"
        ) from error
    return final


def _seal(partial: Path, final: Path, step: int) -> None:
    """Manifest, flush, rename."""
    paths = sorted(path for path in partial.rglob("*") if path.is_file())
    with ThreadPoolExecutor(4) as pool:
        sums = list(pool.map(_digest, paths))
    files = {
        path.relative_to(partial).as_posix(): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, sums, strict=True)
    }
    (partial / "manifest.json").write_text(json.dumps({"step": step, "time": time.time(), "files": files}, indent=1))
    for path in [*paths, partial / "manifest.json", *[p for p in partial.rglob("*") if p.is_dir()], partial]:
        flush(path)
    if final.exists():  # the same step again, after a resume that went back before it
        shutil.rmtree(final)
    partial.rename(final)
    flush(final.parent)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _rotate(checkpoints: Path, keep: int) -> None:
    if keep <= 0:
        return
    best = read_pointer(checkpoints, "best")
    for old in list_complete(checkpoints)[:-keep]:
        if old != best:
            # The manifest goes first: a deletion that is cut short leaves no folder that looks complete.
            (old / "manifest.json").unlink()
            shutil.rmtree(old)


def read_pointer(checkpoints: Path, name: str) -> Path | None:
    """The folder that `latest` or `best` names, if it is there."""
    link = checkpoints / name
    if not link.exists():
        return None
    folder = checkpoints / link.read_text().strip()
    return folder if (folder / "manifest.json").exists() else None


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def integrity_error(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, in words, or None: every file is there with its size and its SHA-256."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        listed: dict[str, Any] = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"manifest.json is not readable ({error})"
    for name, entry in listed.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["size"]:
            return f"{name} has {path.stat().st_size} bytes, its manifest says {entry['size']}"
    with ThreadPoolExecutor(4) as pool:
        sums = pool.map(_digest, [folder / name for name in listed])
        for (name, entry), digest in zip(listed.items(), sums, strict=True):
            if digest != entry["sha256"]:
                return f"{name} does not match its checksum"
    return None


def find_newest(checkpoints: Path, report: Callable[[str], None]) -> Path | None:
    """The newest complete and verified checkpoint; a damaged one is named and passed over."""
    for folder in reversed(list_complete(checkpoints)):
        wrong = integrity_error(folder)
        if wrong is None:
            return folder
        report(f"passing over {folder}: {wrong}")
    return None


def find(run: str | Path) -> Path:
    """The checkpoint folder that RUN means: itself, or a run folder's best, else newest verified. Raises UserError."""
    path = Path(run)
    if not path.exists() and not path.is_absolute() and len(path.parts) == 1 and (Path("runs") / path).exists():
        path = Path("runs") / path
    if not path.exists():
        raise UserError(f"no run or checkpoint at {run}; give a run folder (runs/NAME) or one of its checkpoints")
    if (path / "model.safetensors").exists():
        if (path / "manifest.json").exists() and (wrong := integrity_error(path)):
            raise UserError(f"{path} cannot be used: {wrong}")
        return path
    best = read_pointer(path / "checkpoints", "best")
    if best is not None and integrity_error(best) is None:
        return best
    found = find_newest(path / "checkpoints", print)
    if found is None:
        raise UserError(f"{path} holds no complete checkpoint (looked for {path}/checkpoints/step-*/manifest.json)")
    return found


def read_weights(folder: Path) -> dict[str, Tensor]:
    """model.safetensors of a checkpoint folder. Raises UserError where it is damaged."""
    try:
        return load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / 'model.safetensors'} cannot be read: {error}") from error


def load_weights(model: nn.Module, weights: dict[str, Tensor], where: Path | str) -> None:
    """Puts weights into a model, strictly. Raises UserError that counts and names what differs."""
    mine = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in weights.items()}
    missing, extra = sorted(mine.keys() - given.keys()), sorted(given.keys() - mine.keys())
    shapes = sorted(name for name in mine.keys() & given.keys() if mine[name] != given[name])
    said = []
    if missing:
        said.append(f"{len(missing)} weights are missing (first {missing[0]})")
    if extra:
        said.append(f"{len(extra)} are not in the model (first {extra[0]})")
    if shapes:
        name = shapes[0]
        said.append(f"{len(shapes)} have another shape (first {name}: {list(given[name])}, the model has {list(mine[name])})")
    if said:
        raise UserError(f"{where} is a checkpoint of another architecture: {'; '.join(said)}")
    model.load_state_dict(weights)


def save_tensors(path: Path, value: dict[str, Any]) -> None:
    """Tensors and plain values that `load_tensors` reads back weights-only. Raises OSError where the disk is full."""
    with path.open("wb") as file:  # given a path, torch's own writer turns a full disk into an unrelated RuntimeError
        torch.save(value, file)


def load_tensors(path: Path) -> dict[str, Any]:
    """What `save_tensors` wrote. Raises UserError where it is damaged."""
    try:
        loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return loaded
