"""The index of one tar shard: the byte range of each member of each sample, its keys, and what was odd about it.

The members KEY.jpg, KEY.txt, KEY.json that follow one another are one sample: KEY is the path up to the first dot of the file
name, the rest in lower case is the extension (webdataset's rules). Made by one pass over the headers when a shard is opened
first, and kept as NAME.tar.idx beside it, or in the cache folder where that cannot be written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.data.shards.cache import ShardCache, is_remote, read_small_file
from pretrain.data.shards.tar import Members, read_members
from pretrain.errors import UserError
from pretrain.runtime.files import replace_atomically

log = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]

DUPLICATE_MEMBER, DUPLICATE_KEY = 1, 2
"""Flags of a sample: two members with the same extension; a key that came before in the shard."""

_VERSION = 1
_ARRAYS = ("starts", "members", "flags", "key_ends", "key_bytes")


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Where everything in a shard lies. n samples, m members; sample i owns members starts[i] up to starts[i + 1]."""

    path: str
    size: int
    mtime_ns: int
    fingerprint: str
    extensions: list[str]
    starts: Ints  # (n + 1,)
    members: Ints  # (m, 3): which of the extensions, first byte of the content in the file, bytes
    flags: npt.NDArray[np.uint8]  # (n,)
    key_ends: Ints  # (n + 1,)
    key_bytes: npt.NDArray[np.uint8]  # keys laid end to end, as UTF-8

    @property
    def count(self) -> int:
        """Samples in the shard (n)."""
        return len(self.flags)

    @cached_property
    def name(self) -> str:
        """What keys begin with: the file's name without .tar."""
        return os.path.basename(self.path).removesuffix(".tar")

    def key(self, sample: int) -> str:
        """KEY of a sample; bytes that are no UTF-8 are written as escapes."""
        return self.key_bytes[self.key_ends[sample] : self.key_ends[sample + 1]].tobytes().decode("utf-8", "backslashreplace")

    @property
    def keys(self) -> list[str]:
        """KEY of every sample."""
        return [self.key(i) for i in range(self.count)]


def load_index(path: str, cache: ShardCache | None = None) -> ShardIndex:
    """The index of a shard: the saved one if it still fits the file, else from one pass over the headers, which is saved.

    Raises:
        UserError: the file is damaged, or holds another number of samples than its stats say; one line that names it.
        OSError: it cannot be read.
    """
    cache = cache or ShardCache()
    file = cache.fetch(path)
    found = _load_saved(file, cache)
    if found is None:
        found = _build(file)
        _save(found, cache)
    said, by = recorded_count(path)
    if said is not None and said != found.count:
        raise UserError(
            f"{path} holds {found.count:,} samples, but {by} says {said:,}: it was cut short, or one of the two is old"
        )
    return found


def _build(path: str) -> ShardIndex:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        stat = os.fstat(fd)
        return ShardIndex(
            path, stat.st_size, stat.st_mtime_ns, _fingerprint(fd, stat.st_size), **_group_members(read_members(fd, path))
        )
    finally:
        os.close(fd)


def _group_members(members: Members) -> dict[str, Any]:
    """Members that follow one another under the same key -> samples, by webdataset's naming rules."""
    extensions: dict[str, int] = {}
    keys: list[bytes] = []
    flags: list[int] = []
    starts: list[int] = []
    rows: list[tuple[int, int, int]] = []
    last: str | None = None
    seen_keys: set[str] = set()
    seen_kinds: set[int] = set()
    for name, offset, length in zip(*members, strict=True):
        base = name[name.rfind("/") + 1 :]
        stem, dot, extension = base.partition(".")
        if not stem or not dot or (name.startswith("__") and name.partition("/")[0].endswith("__")):
            continue  # no extension, a hidden file, or notes about the archive
        key = name[: len(name) - len(base)] + stem
        if key != last:
            starts.append(len(rows))
            keys.append(key.encode("utf-8", "surrogateescape"))
            flags.append(DUPLICATE_KEY if key in seen_keys else 0)
            seen_keys.add(key)
            last, seen_kinds = key, set()
        kind = extensions.setdefault(extension.lower(), len(extensions))
        if kind in seen_kinds:
            flags[-1] |= DUPLICATE_MEMBER
        seen_kinds.add(kind)
        rows.append((kind, offset, length))
    return {
        "extensions": list(extensions),
        "starts": np.array([*starts, len(rows)], dtype=np.int64),
        "members": np.array(rows, dtype=np.int64).reshape(-1, 3),
        "flags": np.array(flags, dtype=np.uint8),
        "key_ends": np.cumsum([0, *map(len, keys)], dtype=np.int64),
        "key_bytes": np.frombuffer(b"".join(keys), dtype=np.uint8),
    }


def _fingerprint(fd: int, size: int) -> str:
    """A digest of a few blocks all over the file: with size and time, tells it from one that took its place."""
    h = hashlib.blake2b(str(size).encode(), digest_size=16)
    for i in range(4):
        h.update(os.pread(fd, 4096, max(0, size - 4096) * i // 3))
    return h.hexdigest()


# ---- the saved index -------------------------------------------------------------------------------------------------


def _index_paths(path: str, cache: ShardCache) -> list[Path]:
    return [Path(f"{path}.idx"), Path(f"{cache.cached_path(os.path.abspath(path), 'index')}.idx")]


def indexed_count(path: str, cache: ShardCache) -> int | None:
    """Samples in a local shard according to a saved index that fits it, if there is one."""
    meta, _ = _find_saved(path, cache)
    return None if meta is None else int(meta["count"])


def _load_saved(path: str, cache: ShardCache) -> ShardIndex | None:
    meta, place = _find_saved(path, cache)
    if meta is None:
        return None
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _fingerprint(fd, meta["size"]) != meta["fingerprint"]:
            log.warning("%s is stale, the shard has changed since: indexing it again", place)
            return None
    finally:
        os.close(fd)
    del meta["count"], meta["version"]
    try:
        with open(place, "rb") as file, np.load(file, allow_pickle=False) as stored:
            return ShardIndex(path, **meta, **{name: stored[name] for name in _ARRAYS})
    except Exception as error:
        _warn_unusable(place, error)
        return None


def _find_saved(path: str, cache: ShardCache) -> tuple[dict[str, Any] | None, Path]:
    """What heads the saved index whose size and time are those of the shard, and where it is."""
    stat = os.stat(path)
    for place in _index_paths(path, cache):
        try:
            with open(place, "rb") as file, np.load(file, allow_pickle=False) as stored:
                meta: dict[str, Any] = json.loads(stored["meta"].tobytes())
            if meta["version"] != _VERSION:
                continue
            if (meta["size"], meta["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns):
                return meta, place
            log.warning("%s is stale, the shard has changed since: indexing it again", place)
        except FileNotFoundError:
            continue
        except Exception as error:  # whatever a damaged file of ours makes numpy raise: it is made anew
            _warn_unusable(place, error)
    return None, Path()


def _warn_unusable(place: Path, error: Exception) -> None:
    log.warning("%s cannot be used (%s): indexing the shard again", place, error)


def _save(made: ShardIndex, cache: ShardCache) -> None:
    """Beside the shard, or in the cache folder; where neither can be written, nowhere."""
    meta = {
        "version": _VERSION,
        "count": made.count,
        "size": made.size,
        "mtime_ns": made.mtime_ns,
        "fingerprint": made.fingerprint,
        "extensions": made.extensions,
    }
    arrays = {name: getattr(made, name) for name in _ARRAYS}
    for place in _index_paths(made.path, cache):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with replace_atomically(place) as partial, open(partial, "wb") as out:
                np.savez(out, meta=np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8), **arrays)
            return
        except OSError as error:
            log.debug("no index at %s: %s", place, error)


# ---- counts that others wrote ----------------------------------------------------------------------------------------


def recorded_count(path: str) -> tuple[int | None, str]:
    """(count, file that says so): img2dataset's NAME_stats.json, or a sizes.json of {"NAME.tar": count} in the folder."""
    if path.startswith("pipe:"):
        return None, ""
    folder, slash, name = path.rpartition("/")
    stats, sizes = path.removesuffix(".tar") + "_stats.json", folder + slash + "sizes.json"
    for file, entry in ((stats, "successes"), (sizes, name)):
        count = _read_json_object(file, _modified_ns(file)).get(entry)
        if isinstance(count, int) and count >= 0:
            return count, file
    return None, ""


def _modified_ns(file: str) -> int | None:
    """When a local file was changed last; None if there is none."""
    try:
        return 0 if is_remote(file) else os.stat(file).st_mtime_ns
    except OSError:
        return None


@lru_cache(maxsize=64)
def _read_json_object(file: str, changed: int | None) -> dict[str, Any]:
    """The object in a json file; empty where there is no file, or something else in it."""
    if changed is None:
        return {}
    data = read_small_file(file) if is_remote(file) else Path(file).read_bytes()
    try:
        content = json.loads(data or b"{}")
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
