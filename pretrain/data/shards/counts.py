"""Counts of samples without the shards: from files beside them, or from the headers of a remote shard.

Beside the shards there may be, in this order of preference:

    shards.json       {"NAME.tar": [samples, bytes, digest]}, which `clipfuse data check --manifest` writes
    NAME_stats.json   written by img2dataset, one for each shard; for remote shards it is looked for last
    sizes.json        {"NAME.tar": samples}
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.data.shards import stores
from pretrain.data.shards.ranges import Ranges, open_ranges
from pretrain.data.shards.retries import retry_part
from pretrain.data.shards.stores import is_store
from pretrain.data.shards.tar import BLOCK, Members, scan_members
from pretrain.data.shards.transfer import describe_timeout, read_small_file, run_limited
from pretrain.data.shards.urls import is_http, is_remote
from pretrain.errors import ConfigError, UserError
from pretrain.runtime.files import parse_json_object, read_bytes, replace_atomically

MANIFEST = "shards.json"
"""Name of the manifest of a folder of shards."""

HEADER_WINDOW = 1 << 14
"""Bytes that one request for headers brings: those of an image, and the caption and json that follow it."""

_MAX_WINDOW = 1 << 20
_FOLDER_SECONDS = 300.0  # how long the files of a remote folder are not read again


class Record(NamedTuple):
    """What a file beside a shard says of it: samples, the name of that file, size in bytes, and BLAKE2b of 16 bytes."""

    samples: int | None = None
    file: str = ""
    size: int | None = None
    digest: str = ""


def find_record(path: str) -> Record:
    """Return what the files beside a shard say of it; an empty record where they say nothing."""
    if path.startswith("pipe:"):
        return Record()
    return _find_remote_record(path) if is_remote(path) else _find_local_record(path)


def recorded_count(path: str) -> tuple[int | None, str]:
    """Return (number of samples, file that states it), or (None, "") where no file states it."""
    record = find_record(path)
    return record.samples, record.file


def _split(path: str) -> tuple[str, str, str, str]:
    """Return folder (with its slash), name, path of the stats file, and, of a web address, the query with its "?"."""
    path, mark, query = path.partition("?") if is_http(path) else (path, "", "")
    folder, slash, name = path.rpartition("/")
    return folder + slash, name, path.removesuffix(".tar") + "_stats.json", mark + query


def _find_local_record(path: str) -> Record:
    folder, name, stats, _ = _split(path)
    try:
        size = os.stat(path).st_size
    except OSError:
        size = None  # reading the shard will say what is wrong
    most = 1 << 40 if size is None else size // BLOCK  # each sample has a header
    entry = _read_json_object(folder + MANIFEST, _modified_ns(folder + MANIFEST)).get(name)
    record = _parse_entry(entry, folder + MANIFEST)
    if record.samples is not None and record.samples <= most and record.size in (size, None):
        return record
    for file, key in ((stats, "successes"), (folder + "sizes.json", name)):
        values = _read_json_object(file, _modified_ns(file))
        if _is_count(values.get(key), most):
            return Record(values[key], file)
    return Record()


# ---- files beside remote shards --------------------------------------------------------------------------------------


_answers: dict[str, tuple[float, Any]] = {}
"""By the name of a remote file: when it was read, and what it holds; by that of a folder the names in it."""

_locks: dict[str, threading.Lock] = {}


def find_manifest_record(path: str) -> Record:
    """Return what the manifest beside a shard says of it; an empty record where it says nothing."""
    if path.startswith("pipe:"):
        return Record()
    folder, name, _, query = _split(path)
    file = folder + MANIFEST
    manifest = _read_once(file, _read_remote_object, query) if is_remote(path) else _read_json_object(file, _modified_ns(file))
    return _parse_entry(manifest.get(name), file)


def _find_remote_record(path: str) -> Record:
    folder, name, stats, query = _split(path)
    record = find_manifest_record(path)
    if record.samples is not None:
        return record
    sizes = _read_once(folder + "sizes.json", _read_remote_object, query)
    if _is_count(sizes.get(name), 1 << 40):
        return Record(sizes[name], folder + "sizes.json")
    names = _read_once(folder, stores.list_names) if is_store(folder) else None
    if names is None or stats.rpartition("/")[2] in names:
        successes = _read_remote_object(stats + query).get("successes")
        if _is_count(successes, 1 << 40):
            return Record(successes, stats)
    return Record()


def _read_once(name: str, read: Callable[[str], Any], query: str = "") -> Any:
    """Return read(name + query), called once in a while however many threads ask, and whatever the query."""
    with _locks.setdefault(name, threading.Lock()):
        read_at, value = _answers.get(name, (-math.inf, None))
        if time.monotonic() - read_at > _FOLDER_SECONDS:
            value = read(name + query)
            _answers[name] = time.monotonic(), value
        return value


def _read_remote_object(file: str) -> dict[str, Any]:
    """Return the object in a remote json file; {} where there is no file or it holds no object."""
    try:
        return parse_json_object(read_small_file(file) or b"{}")
    except ValueError:
        return {}


# ---- headers of remote shards ----------------------------------------------------------------------------------------


def read_remote_members(url: str, seconds: float) -> Members:
    """Return the regular members of a remote shard, of which only the headers and what lies close to them are read.

    Raises:
        NoRangesError: the server sends whole files only.
        OSError: it cannot be read, or what comes is damaged.
        UserError: it cannot be opened, or takes more than `seconds`.
    """
    copied = 0

    def work() -> Members:
        ranges = retry_part(lambda: open_ranges(url, HEADER_WINDOW))
        last_end, window = 0, HEADER_WINDOW

        def read(length: int, at: int) -> bytes:
            nonlocal copied, last_end, window
            if length == HEADER_WINDOW:
                # Where members are small, larger reads bring hardly more bytes than many small ones.
                window = min(2 * window, _MAX_WINDOW) if 0 < at < last_end + window else HEADER_WINDOW
                length = window
            content = _read_range(ranges, at, at + length)
            copied += len(content)
            last_end = at + len(content)
            return content

        return scan_members(read, ranges.size, url, HEADER_WINDOW)

    return run_limited(work, seconds, lambda: describe_timeout(url, seconds, copied))


def _read_range(ranges: Ranges, start: int, end: int) -> bytes:
    end = min(end, ranges.size)
    return retry_part(lambda: ranges.read(start, end)) if start < end else b""


# ---- the manifest ----------------------------------------------------------------------------------------------------


def manifest_paths(shards: Iterable[str]) -> list[str]:
    """Return where the manifests of shards are written: one in each of their folders.

    Raises:
        ConfigError: a shard lies where nothing can be written.
    """
    folders: dict[str, None] = {}
    for shard in shards:
        if is_remote(shard) and not is_store(shard):
            raise ConfigError(
                f"--manifest writes {MANIFEST} beside the shards, and {shard} cannot be written: run it where they lie"
            )
        folders[_split(shard)[0] + MANIFEST] = None
    return list(folders)


def write_manifests(records: Mapping[str, Record]) -> list[str]:
    """Write the records of shards into the manifest of each folder, where records of other shards stay.

    Returns:
        The paths of the manifests.

    Raises:
        UserError: one cannot be written.
    """
    paths = manifest_paths(records)
    for path in paths:
        entries = dict(_read_remote_object(path) if is_remote(path) else _read_json_object(path, _modified_ns(path)))
        for shard, record in records.items():
            folder, name, _, _ = _split(shard)
            if folder + MANIFEST == path:
                entries[name] = [record.samples, record.size, record.digest]
        content = "{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(entries[name])}" for name in sorted(entries)) + "\n}\n"
        try:
            if is_remote(path):
                stores.write_object(path, content.encode())
                _answers.pop(path, None)
            else:
                with replace_atomically(Path(path)) as partial:
                    partial.write_text(content)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error}") from error
    return paths


def _parse_entry(entry: Any, file: str) -> Record:
    """Return the record of an entry of a manifest; an empty one where it is none."""
    if not isinstance(entry, list) or len(entry) != 3:
        return Record()
    count, size, digest = entry
    if not _is_count(count, 1 << 40) or not _is_count(size, 1 << 62) or not isinstance(digest, str):
        return Record()
    return Record(count, file, size, digest)


def _is_count(value: Any, most: int) -> bool:
    return type(value) is int and 0 <= value <= most


# ---- files beside local shards ---------------------------------------------------------------------------------------


def looks_complete(path: str) -> bool:
    """Return whether a local shard has the size that its stats file records, if any, and ends as a tar does: with zeros.

    It reads one block, so that a shard that was cut short is detected at the start of a run, whatever its stats file says.
    """
    stats = _split(path)[2]
    expected = _read_json_object(stats, _modified_ns(stats)).get("bytes")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        size = os.fstat(fd).st_size
        return size >= BLOCK and expected in (None, size) and not any(os.pread(fd, BLOCK, size - BLOCK))
    except OSError:
        return False
    finally:
        os.close(fd)


def _modified_ns(file: str) -> int | None:
    """Return the modification time of a local file, None if it does not exist."""
    try:
        return os.stat(file).st_mtime_ns
    except OSError:
        return None


@lru_cache(maxsize=64)
def _read_json_object(file: str, modified_ns: int | None) -> dict[str, Any]:
    """Return the object in a local json file; {} where there is no file or it holds no object.

    `modified_ns` is part of the key of the lru_cache, so that a changed file is read again.
    """
    if modified_ns is None:
        return {}
    try:
        return parse_json_object(read_bytes(Path(file)))
    except (OSError, ValueError):
        return {}
