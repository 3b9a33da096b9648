"""Write a checkpoint so that it is complete or not there, and put a folder in order after a save that was killed.

A folder is written under a hidden name, flushed to disk, and renamed. Then `best` and `latest` move to it, and rotation deletes
older ones. Only rank 0 writes: the strategies gather everything there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from pretrain.checkpoints import rotation
from pretrain.checkpoints.store import (
    hash_file,
    integrity_error,
    list_complete,
    list_replaced,
    point_to,
    read_pointer,
    replaced_path,
)
from pretrain.errors import UserError
from pretrain.runtime.agree import on_main
from pretrain.runtime.files import flush, read_json_object, save_tensors, save_weights

Content = Mapping[str, Callable[[Path], Any]]
"""By path within a checkpoint: a function that writes the file of the path that it is given."""


class SaveError(UserError):
    """A checkpoint could not be written, because the disk is full, for example."""

    is_complete = False
    """Whether the checkpoint is there nevertheless: what came after its rename failed."""


def weights_file(weights: dict[str, Tensor]) -> Callable[[Path], None]:
    """Return a function that writes weights as safetensors."""
    return partial(save_weights, weights=weights)


def tensors_file(value: dict[str, Any]) -> Callable[[Path], None]:
    """Return a function that writes tensors and plain values with torch.save."""
    return partial(save_tensors, value=value)


def capture_files(write: Callable[[Path], None]) -> Content:
    """Return the files that write(folder) writes, from memory: a tokenizer cannot be saved while another thread uses it.

    Raises OSError.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            write(folder)
        except Exception as error:
            raise _as_os_error(error) or error from error
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: partial(Path.write_bytes, data=data) for name, data in files.items()}


def save(checkpoints: Path, step: int, content: Content, **more: Any) -> Path:
    """Write a checkpoint as `write_checkpoint` does, on rank 0, while the others wait. Collective. Raises SaveError.

    content: on rank 0; other ranks give any.
    """
    return on_main(lambda: write_checkpoint(checkpoints, step, content, **more))


def write_checkpoint(
    checkpoints: Path,
    step: int,
    content: Content,
    *,
    keep: int,
    best: bool = False,
    good: Path | None = None,
    is_good: bool = False,
    report: Callable[[str], None] = lambda phase: None,
    upload: Callable[[Path, Path | None], Path | None] = lambda checkpoint, good: None,
) -> Path:
    """Write checkpoints/step-NUMBER, move `latest` (and `best`) to it, rotate, and return it. On rank 0, in any thread.

    Args:
        content: its files.
        keep: older checkpoints beyond this number are deleted afterwards, but neither the best one nor `good`; 0 keeps all.
        best: `best` names this checkpoint from now on.
        good: the last checkpoint that is known to give finite losses.
        is_good: this checkpoint is known to give them, so that rotation may delete `good` too.
        report: called with what is done next, in a few words. What it raises ends the save.
        upload: called with the complete checkpoint and the good one; returns the folder that it still reads, if any.

    Raises:
        SaveError: the disk is full or cannot be written; earlier checkpoints stay.
    """
    final = checkpoints / f"step-{step:07d}"
    partial_folder = checkpoints / f".{final.name}.partial"
    is_complete = False
    try:
        report("recovering earlier ones")
        recover(checkpoints)
        for name, write_file in content.items():
            report(f"writing {name}")
            path = partial_folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path)
        _seal(partial_folder, final, list(content), {"step": step, "best": best, "time": time.time()}, report)
        is_complete = True
        report("rotating")
        if best:
            point_to(checkpoints, "best", final)
        point_to(checkpoints, "latest", final)  # last: where it names another one, `recover` finishes this
        good = final if is_good else good
        rotation.rotate(checkpoints, keep, good, upload(final, good))
    except BaseException as error:
        shutil.rmtree(partial_folder, ignore_errors=True)
        cause = _as_os_error(error)
        if cause is None:
            raise
        failure = SaveError(f"cannot write the checkpoint of step {step} into {checkpoints}: {cause}; older ones are intact")
        failure.is_complete = is_complete
        raise failure from error
    return final


def _as_os_error(error: BaseException) -> OSError | None:
    """Return the error of the operating system that an error is or reports; None for any other."""
    if isinstance(error, OSError):
        return error
    code = re.search(r"\(os error (\d+)\)", str(error))  # as libraries written in Rust report a full disk
    if code is not None:
        return OSError(int(code[1]), os.strerror(int(code[1])))
    return OSError(str(error)) if isinstance(error, SafetensorError) else None


def _seal(
    partial_folder: Path, final: Path, names: list[str], description: dict[str, Any], report: Callable[[str], None]
) -> None:
    """Write the manifest, flush every file to disk, and rename the folder to `final`.

    Args:
        names: all files that were written. One that is gone since is an error: a manifest without it would call what is left
            complete.
        description: what the manifest says besides the files.
    """
    report("hashing")
    paths = sorted(partial_folder / name for name in names)
    with ThreadPoolExecutor(4) as pool:
        digests = list(pool.map(hash_file, paths))
    files = {
        path.relative_to(partial_folder).as_posix(): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, digests, strict=True)
    }
    (partial_folder / "manifest.json").write_text(json.dumps({**description, "files": files}, indent=1))
    report("flushing to disk")
    folders = [path for path in partial_folder.rglob("*") if path.is_dir()]
    for path in [*paths, partial_folder / "manifest.json", *folders, partial_folder]:
        flush(path)
    replaced = replaced_path(final)
    is_replacing = os.path.lexists(final)  # the run resumed from an earlier step and reached this one again
    if is_replacing:
        final.rename(replaced)
    try:
        partial_folder.rename(final)
    except BaseException:
        if is_replacing and not os.path.lexists(final):
            replaced.rename(final)
        raise
    flush(final.parent)
    rotation.delete(replaced)


def recover(checkpoints: Path) -> None:
    """Undo or finish a save that was killed, whose checkpoint may be hidden, or not named by `best` and `latest`.

    Only for the process that holds the run's lock, on rank 0: others would disturb a save. Raises SaveError.
    """
    try:
        for hidden, folder in list_replaced(checkpoints):
            if (hidden / "manifest.json").exists() and not os.path.lexists(folder):
                hidden.rename(folder)
        for leftover in checkpoints.glob(".step-*.partial"):
            rotation.delete(leftover)
        newest = list_complete(checkpoints)[-1:]
        if newest and read_pointer(checkpoints, "latest") != newest[0] and integrity_error(newest[0]) is None:
            if read_json_object(newest[0] / "manifest.json").get("best") is True:
                point_to(checkpoints, "best", newest[0])
            point_to(checkpoints, "latest", newest[0])
    except OSError as error:
        raise SaveError(f"{checkpoints} cannot be put in order after a save that was killed: {error}") from error
