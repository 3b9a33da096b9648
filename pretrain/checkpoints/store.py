"""Checkpoint folders: written atomically, verified, rotated, and read again.

    checkpoints/step-0001000/   config.yaml model.safetensors tokenizer/ manifest.json state/
    checkpoints/latest          one line of text: the newest complete one; `best` likewise
    checkpoints/abandoned/      later checkpoints that resume=PATH left; removed when the new branch has a good one

A folder is written under a hidden name, flushed to disk, and renamed: it is complete or it is not there. One that a new
checkpoint of the same step replaces is hidden for a moment; `recover` names it again. The manifest holds size and SHA-256 of
every file. Our own loads are weights-only: no file is ever unpickled into code.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from pretrain.errors import ConfigError, UserError
from pretrain.runtime import distributed
from pretrain.runtime.agree import on_all, on_main
from pretrain.runtime.console import log_info
from pretrain.runtime.files import flush, read_bytes, read_json_object, save_weights, write_text
from pretrain.runtime.files import save_tensors as save_tensors  # part of this module's interface

_REPLACED = ".replaced.partial"
"""End of the name, which a dot begins, of a checkpoint whose place a new one of the same step takes."""
_STEP = re.compile(r"step-(\d+)$")
_HIDDEN_STEP = re.compile(rf"\.(step-\d+){re.escape(_REPLACED)}$")
_ABANDONED = "abandoned"
_BRANCH_STEP = "branch_step"
"""File in the folder of abandoned checkpoints: the step at which the branch that left them begins."""


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

    A checkpoint that was being replaced when its run was killed lies under a hidden name; see `recover`.
    """
    folders = {p for p in checkpoints.glob("step-*") if _STEP.search(p.name) and p.is_dir()}
    for hidden, folder in _list_replaced(checkpoints):
        candidate = folder if os.path.lexists(folder) else hidden
        if candidate.is_dir():
            folders.add(candidate)
    return sorted(folders, key=parse_step)


def _list_replaced(checkpoints: Path) -> list[tuple[Path, Path]]:
    """Return the checkpoints that new ones replace, or were to replace: (hidden folder, the name it had before)."""
    hidden = [(path, _HIDDEN_STEP.fullmatch(path.name)) for path in checkpoints.glob(f".step-*{_REPLACED}")]
    return [(path, checkpoints / match[1]) for path, match in hidden if match is not None]


def recover(checkpoints: Path) -> None:
    """Undo or finish a save that was killed, whose checkpoint may be hidden, or not named by `best` and `latest`.

    Only for the process that holds the run's lock, on rank 0: others would disturb a save. Raises UserError.
    """
    try:
        for hidden, folder in _list_replaced(checkpoints):
            if (hidden / "manifest.json").exists() and not os.path.lexists(folder):
                hidden.rename(folder)
        for leftover in checkpoints.glob(".step-*.partial"):
            _delete(leftover)
        newest = list_complete(checkpoints)[-1:]
        if newest and read_pointer(checkpoints, "latest") != newest[0] and integrity_error(newest[0]) is None:
            if read_json_object(newest[0] / "manifest.json").get("best") is True:
                point_to(checkpoints, "best", newest[0])
            point_to(checkpoints, "latest", newest[0])
    except OSError as error:
        raise UserError(f"{checkpoints} cannot be put in order after a save that was killed: {error}") from error


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
    good: Path | None = None,
    is_good: bool = False,
) -> Path:
    """Write checkpoints/step-NUMBER, move `latest` (and `best`) to it, and return it. Collective.

    Args:
        weights: the content of model.safetensors, complete on rank 0.
        files: files(folder) writes what belongs beside it; called on rank 0.
        state: state(folder / "state") writes the state to resume from; called on every rank.
        keep: older checkpoints beyond this number are deleted afterwards, but neither the best one nor `good`; 0 keeps all.
        best: `best` names this checkpoint from now on.
        good: the last checkpoint that is known to give finite losses.
        is_good: this checkpoint is known to give them, so that rotation may delete `good` too.

    Raises:
        UserError: the disk is full or cannot be written; earlier checkpoints stay.
    """
    final = checkpoints / f"step-{step:07d}"
    partial = checkpoints / f".{final.name}.partial"

    def prepare() -> None:
        recover(checkpoints)
        (partial / "state").mkdir(parents=True)

    def write() -> None:
        try:
            state(partial / "state")
            if distributed.is_main():
                save_weights(partial / "model.safetensors", weights)
                files(partial)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(str(error)) from error

    def publish() -> None:
        _seal(partial, final, {"step": step, "best": best, "time": time.time()})
        if best:
            point_to(checkpoints, "best", final)
        point_to(checkpoints, "latest", final)  # last: where it names another one, `recover` finishes this
        _rotate(checkpoints, keep, final if is_good else good)

    try:
        on_main(prepare)
        on_all(write)
        on_main(publish)
    except BaseException as error:
        if distributed.is_main():
            shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise UserError(
            f"cannot write the checkpoint of step {step} into {checkpoints}: {error}; older ones are intact"
        ) from error
    return final


def _seal(partial: Path, final: Path, description: dict[str, Any]) -> None:
    """Write the manifest, flush every file to disk, and rename the folder from `partial` to `final`.

    description: what the manifest says besides the files.
    """
    paths = sorted(path for path in partial.rglob("*") if path.is_file())
    with ThreadPoolExecutor(4) as pool:
        digests = list(pool.map(_hash_file, paths))
    files = {
        path.relative_to(partial).as_posix(): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, digests, strict=True)
    }
    (partial / "manifest.json").write_text(json.dumps({**description, "files": files}, indent=1))
    for path in [*paths, partial / "manifest.json", *[p for p in partial.rglob("*") if p.is_dir()], partial]:
        flush(path)
    replaced = final.with_name(f".{final.name}{_REPLACED}")
    is_replacing = os.path.lexists(final)  # the run resumed from an earlier step and reached this one again
    if is_replacing:
        final.rename(replaced)
    try:
        partial.rename(final)
    except BaseException:
        if is_replacing and not os.path.lexists(final):
            replaced.rename(final)
        raise
    flush(final.parent)
    _delete(replaced)


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _rotate(checkpoints: Path, keep: int, good: Path | None) -> None:
    """Delete all but the newest `keep` checkpoints, the best one and `good`; keep <= 0 deletes none.

    What cannot be deleted stays, with a line: the new checkpoint is written, and the run goes on.
    """
    if keep <= 0:
        return
    branch_step = _branch_step(checkpoints)
    if good is not None and good.parent == checkpoints and branch_step is not None and parse_step(good) > branch_step:
        _delete_abandoned(checkpoints / _ABANDONED)
    with suppress(OSError):
        (checkpoints / _ABANDONED).rmdir()  # where a deletion was killed at its end, it is empty
    best = read_pointer(checkpoints, "best")
    newest = list_complete(checkpoints)[-keep:]
    for folder in list_folders(checkpoints):
        if folder not in (best, good) and parse_step(folder) < parse_step(newest[0]):
            _delete(folder)


def _delete(folder: Path) -> None:
    """Delete a folder if it is there; of a link, only the link."""
    try:
        if folder.is_symlink():  # somebody moved the checkpoint to another disk: what lies there is not ours to delete
            folder.unlink()
        elif folder.exists():
            # The manifest goes first: an interrupted deletion leaves no folder that looks complete.
            (folder / "manifest.json").unlink(missing_ok=True)
            shutil.rmtree(folder)
    except OSError as error:
        log_info(f"{folder} cannot be deleted and stays: {error}")


def _delete_abandoned(folder: Path) -> None:
    """Delete the abandoned checkpoints, and last the file that says when they may be deleted."""
    for path in folder.iterdir():
        if path.name != _BRANCH_STEP:
            _delete(path)
    if [path.name for path in folder.iterdir()] == [_BRANCH_STEP]:
        _delete(folder)


def _branch_step(checkpoints: Path) -> int | None:
    """Return the step at which the branch begins that left the abandoned checkpoints.

    None where no file states it, as of earlier versions: whether a checkpoint is of that branch is then not known.
    """
    try:
        return int((checkpoints / _ABANDONED / _BRANCH_STEP).read_text())
    except (OSError, ValueError):
        return None


def refuse_foreign_origin(checkpoints: Path, origin: Path) -> None:
    """Refuse to resume from the checkpoint of another run in a folder that has checkpoints of its own.

    Such a folder's checkpoints would all be set aside; most likely, `run` was forgotten. Damaged ones do not count.
    Raises ConfigError.
    """
    if checkpoints.resolve() in origin.resolve().parents:
        return
    newest = find_newest(checkpoints, lambda line: None)
    if newest is not None:
        raise ConfigError(
            f"resume={origin} lies outside the run folder {checkpoints.parent}, which has its own checkpoints (newest "
            f"{newest.name}): resume=auto goes on with them, another run=NAME starts from {origin}"
        )


def set_aside(checkpoints: Path, origin: Path, step: int) -> list[Path]:
    """Move the checkpoints that a run leaves behind when it resumes from `origin` into checkpoints/abandoned; return them.

    They are those of later steps, or all where `origin` lies elsewhere. Left where they are, they would outlive the new
    checkpoints at the next rotation, and the run would resume from them. None is replaced: what an earlier branch has left
    under the same name stays, and the new one goes to checkpoints/abandoned/2, 3, ... Call it on rank 0. Raises OSError.

    Args:
        origin: a checkpoint folder, in `checkpoints` or elsewhere.
        step: its step.
    """
    folders = list_folders(checkpoints)
    is_inside = origin.resolve() in [folder.resolve() for folder in folders]
    abandoned = [folder for folder in folders if not is_inside or parse_step(folder) > step]
    if read_pointer(checkpoints, "best") in abandoned:
        (checkpoints / "best").unlink()
    if abandoned:
        (checkpoints / _ABANDONED).mkdir(exist_ok=True)
        write_text(checkpoints / _ABANDONED / _BRANCH_STEP, str(step), sync=True)
    for folder in reversed(abandoned):  # the newest first, so that an interruption leaves the oldest of them
        parents = (checkpoints / _ABANDONED / ("" if i == 1 else str(i)) for i in itertools.count(1))
        target = next(parent / folder.name for parent in parents if not os.path.lexists(parent / folder.name))
        target.parent.mkdir(exist_ok=True)
        folder.rename(target)
    if not is_inside:
        (checkpoints / "latest").unlink(missing_ok=True)
    elif abandoned:
        point_to(checkpoints, "latest", origin)
    return abandoned


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
    hidden = folder.with_name(f".{folder.name}{_REPLACED}")
    return hidden if not os.path.lexists(folder) and (hidden / "manifest.json").exists() else folder


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def _parse_manifest(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return {file: {size, sha256}} of a manifest. Raises ValueError where it is not what `save` writes."""
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
            digests = list(pool.map(_hash_file, [folder / name for name in entries]))
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
    first of each. `where` says in the message where the weights come from.
    """
    _refuse_other_shapes(model, {name: tuple(value.shape) for name, value in weights.items()}, where)
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
    """Return what `save_tensors` wrote. Raises UserError where it is damaged."""
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler raises many types of exceptions for damaged files
        raise UserError(f"{path} cannot be read: {str(error)[:300] or type(error).__name__}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__}, not what a run saves there")
    return loaded
