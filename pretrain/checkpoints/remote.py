"""Copies of checkpoints in an object store or in another folder: uploaded, rotated, and downloaded again.

    ADDRESS/checkpoints/step-0001000/      the files of a checkpoint; manifest.json is written last, and deleted first
    ADDRESS/checkpoints/latest             one line of text: the newest complete one; `best` likewise

A checkpoint whose manifest is not there is not complete. What is downloaded is verified before it is used.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pretrain.checkpoints import rotation
from pretrain.checkpoints.store import integrity_error, list_manifest, parse_step, point_to, read_pointer
from pretrain.data.shards.stores import STORES, call_store, is_store
from pretrain.errors import ConfigError, UserError
from pretrain.printable import one_safe_line
from pretrain.runtime.console import log_info
from pretrain.runtime.files import flush

T = TypeVar("T")

RETRY_SECONDS = (1.0, 5.0, 30.0)
"""Seconds to wait before each further attempt to transfer a file."""

_STEP = re.compile(r"step-\d{1,12}")
_MANIFEST = "manifest.json"


def check_address(address: str, key: str) -> None:
    """Refuse an address whose scheme is of no store. key: the setting that names it. Raises ConfigError."""
    if "://" in address and not is_store(address):
        schemes = ", ".join(f"{scheme}://" for scheme in STORES)
        raise ConfigError(f"{key}={address} is the address of no store; it can begin with {schemes}, or be a folder")


def _call(url: str, action: Callable[[Any, str], T]) -> T:
    """Return action(file system, path), tried again after errors. Raises OSError or UserError."""

    def call() -> T:
        if is_store(url):
            return call_store(url, action)
        from fsspec.implementations.local import LocalFileSystem

        return action(LocalFileSystem(auto_mkdir=True), url)

    for seconds in RETRY_SECONDS:
        try:
            return call()
        except (FileNotFoundError, PermissionError):
            raise
        except OSError:
            time.sleep(seconds)
    return call()


def _put(system: Any, path: str, source: Path) -> None:
    system.put_file(str(source), path)


def _get(system: Any, path: str, target: Path) -> None:
    system.get_file(path, str(target))


def _read(url: str) -> bytes:
    return _call(url, lambda system, path: bytes(system.cat_file(path)))


def _read_step(address: str, pointer: str) -> str:
    """Return the name of the checkpoint folder that `latest` or `best` names; "" where there is none."""
    try:
        name = _read(f"{address}/checkpoints/{pointer}")[:100].decode(errors="replace").strip()
    except FileNotFoundError:
        return ""
    return name if _STEP.fullmatch(name) else ""


def list_files(address: str) -> dict[str, list[str]]:
    """Return the paths of the files of each checkpoint folder, by its name. Raises OSError or UserError."""

    def find(system: Any, path: str) -> list[str]:
        system.invalidate_cache()  # of listings that were made before
        base = path.rstrip("/")
        return [str(name)[len(base) + 1 :] for name in system.find(base)]

    files: dict[str, list[str]] = {}
    for name in _call(f"{address}/checkpoints", find):
        folder, _, file = name.partition("/")
        if file and _STEP.fullmatch(folder):
            files.setdefault(folder, []).append(file)
    return files


def _delete(address: str, name: str, files: list[str]) -> None:
    """Delete the files of a checkpoint folder, the manifest first. Raises OSError or UserError."""
    for file in sorted(files, key=lambda file: file != _MANIFEST):
        _call(f"{address}/checkpoints/{name}/{file}", lambda system, path: system.rm_file(path))


def upload(folder: Path, address: str, report: Callable[[str], None]) -> None:
    """Copy a complete checkpoint to ADDRESS/checkpoints, and let `latest`, and `best` if it is that, name it.

    report: called with what is done next. Raises OSError or UserError.
    """
    manifest = (folder / _MANIFEST).read_bytes()
    names = list_manifest(folder)
    target = f"{address}/checkpoints/{folder.name}"
    _delete(address, folder.name, list_files(address).get(folder.name, []))  # of another branch, or half of this one
    for number, name in enumerate(names, 1):
        report(f"{name}, file {number} of {len(names)}")
        _call(f"{target}/{name}", partial(_put, source=folder / name))
    report(_MANIFEST)
    _call(f"{target}/{_MANIFEST}", lambda system, path: system.pipe_file(path, manifest))
    pointers = ["latest", *(["best"] if read_pointer(folder.parent, "best") == folder else [])]
    for pointer in pointers:
        _call(f"{address}/checkpoints/{pointer}", lambda system, path: system.pipe_file(path, f"{folder.name}\n".encode()))


def rotate(address: str, keep: int, newest: Path, good: Path | None) -> None:
    """Delete copies as rotation deletes checkpoints: all but the newest `keep`, the best one and `good`; keep <= 0 none.

    Those of later steps than `newest`, which another branch has left, are neither counted nor deleted. Raises OSError or
    UserError.
    """
    if keep <= 0:
        return
    files = list_files(address)
    names = sorted((name for name in files if parse_step(Path(name)) <= parse_step(newest)), key=lambda n: parse_step(Path(n)))
    complete = [name for name in names if _MANIFEST in files[name]]
    protected = {_read_step(address, "best"), good.name if good is not None else "", *complete[-keep:]}
    for name in names:
        if name not in protected:
            _delete(address, name, files[name])


# ---------------------------------------------------------------------------------------------------------------------
# Downloads


def download(url: str, checkpoints: Path) -> Path:
    """Download the checkpoint to resume from into the folder `checkpoints`, and the best one with it; return its folder.

    Call it on rank 0, which holds the run's lock, where `checkpoints` has none of its own.

    Args:
        url: of a checkpoint, or the address where a run has copied its checkpoints: the newest complete one is taken.

    Raises:
        UserError: there is no complete checkpoint, or it cannot be read.
    """
    address, _, name = url.rstrip("/").rpartition("/")
    is_one = bool(_STEP.fullmatch(name)) and address.endswith("/checkpoints")
    address = address.removesuffix("/checkpoints") if is_one else url.rstrip("/")
    try:
        files = list_files(address)
        complete = sorted((n for n in files if _MANIFEST in files[n]), key=lambda n: parse_step(Path(n)), reverse=True)
        latest, best = _read_step(address, "latest"), _read_step(address, "best")
        candidates = [n for n in complete if n == name] if is_one else sorted(complete, key=lambda n: n != latest)
        for candidate in candidates:
            folder = _download_one(address, candidate, checkpoints)
            if folder is None:
                continue
            if best in complete and best != candidate and parse_step(Path(best)) < parse_step(folder):
                _download_one(address, best, checkpoints)
            if (checkpoints / best / _MANIFEST).exists() and best and parse_step(Path(best)) <= parse_step(folder):
                point_to(checkpoints, "best", checkpoints / best)
            point_to(checkpoints, "latest", folder)
            return folder
    except OSError as error:
        raise UserError(one_safe_line(f"resume={url} cannot be read: {error}")) from error
    raise UserError(f"resume={url} holds no complete checkpoint (looked for {address}/checkpoints/step-*/{_MANIFEST})")


def _download_one(address: str, name: str, checkpoints: Path) -> Path | None:
    """Download and verify a checkpoint; None where it is damaged, with a line. Raises OSError or UserError."""
    source, final, hidden = f"{address}/checkpoints/{name}", checkpoints / name, checkpoints / f".{name}.partial"
    rotation.delete(hidden)
    try:
        error = _fetch(source, hidden)
        if error is not None:
            log_info(f"skipping the damaged checkpoint {source}: {error}")
            return None
        if os.path.lexists(final):  # a damaged one: a run folder with others is refused
            rotation.delete(final)
        hidden.rename(final)
        flush(checkpoints)
        return final
    finally:
        rotation.delete(hidden)


def _fetch(source: str, folder: Path) -> str | None:
    """Download a checkpoint's files into a new folder; return why it is damaged, or None. Raises OSError or UserError."""
    folder.mkdir(parents=True)
    try:
        (folder / _MANIFEST).write_bytes(_read(f"{source}/{_MANIFEST}"))
        names = list_manifest(folder)
        for number, file in enumerate(names, 1):
            log_info(f"downloading {source}: {file}, file {number} of {len(names)}")
            target = folder / file
            target.parent.mkdir(parents=True, exist_ok=True)
            _call(f"{source}/{file}", partial(_get, target=target))
            flush(target)
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    flush(folder)
    return integrity_error(folder)
