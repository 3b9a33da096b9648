"""The index of a tar shard: byte ranges of the members of samples, keys, and duplicate flags.

Consecutive members KEY.jpg, KEY.txt, KEY.json are one sample. KEY is the path up to the first dot of the file name; the rest,
in lower case, is the extension (webdataset's rules). The index is built by one pass over the headers when a shard is first
opened. It is saved as NAME.tar.idx beside the shard, or in the cache folder where that cannot be written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.data.shards.cache import ShardCache
from pretrain.data.shards.counts import read_remote_members, recorded_count
from pretrain.data.shards.names import name_shard
from pretrain.data.shards.tar import DamagedTarError, Members, read_members
from pretrain.errors import UserError
from pretrain.printable import one_safe_line
from pretrain.runtime.files import open_ordinary, parse_json_object, replace_atomically

log = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]

DUPLICATE_MEMBER, DUPLICATE_KEY = 1, 2
"""Flags of a sample: two of its members have the same extension; an earlier sample of the shard has the same key."""

_VERSION = 1
_ARRAYS = ("starts", "members", "flags", "key_ends", "key_bytes")


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Index of a shard of n samples and m members; sample i has members starts[i] to starts[i + 1] - 1."""

    path: str
    size: int
    mtime_ns: int
    fingerprint: str
    extensions: list[str]
    starts: Ints  # (n + 1,)
    members: Ints  # (m, 3): number of its extension, offset of its content in the file, length in bytes
    flags: npt.NDArray[np.uint8]  # (n,)
    key_ends: Ints  # (n + 1,)
    key_bytes: npt.NDArray[np.uint8]  # all keys, concatenated, as UTF-8
    origin: str = ""  # the path or url from which the shard at `path` was fetched; "" = path

    @property
    def count(self) -> int:
        """Number of samples in the shard (n)."""
        return len(self.flags)

    @cached_property
    def name(self) -> str:
        """The shard's name in keys: the file name without .tar, the same wherever the shard lies."""
        return name_shard(self.origin or self.path)

    def key(self, sample: int) -> str:
        """Return the KEY of a sample; bytes that are not UTF-8 are written as escapes."""
        return self.key_bytes[self.key_ends[sample] : self.key_ends[sample + 1]].tobytes().decode("utf-8", "backslashreplace")

    @property
    def keys(self) -> list[str]:
        """KEY of every sample."""
        return [self.key(i) for i in range(self.count)]

    @cached_property
    def apart(self) -> frozenset[int]:
        """Samples that are a part of one: other members of their key lie elsewhere in the tar, as after `tar *.jpg *.txt`."""
        repeated = {self.key(int(i)) for i in np.flatnonzero(self.flags & DUPLICATE_KEY)}
        parts: dict[str, list[int]] = {key: [] for key in repeated}
        for i in range(self.count) if repeated else ():
            if (key := self.key(i)) in parts:
                parts[key].append(i)
        apart: set[int] = set()
        for samples in parts.values():
            kinds = [kind for i in samples for kind in self.kinds(i)]
            if len(set(kinds)) == len(kinds):
                apart.update(samples)
        return frozenset(apart)

    def kinds(self, sample: int) -> list[str]:
        """Return the extensions of the members of a sample."""
        rows = self.members[self.starts[sample] : self.starts[sample + 1], 0]
        return [self.extensions[kind] for kind in rows]


def load_index(path: str, cache: ShardCache | None = None, file: str | None = None, check_count: bool = True) -> ShardIndex:
    """Return the index of a shard: the saved one where it matches, or else a new one, which is saved.

    Args:
        path: the shard, a file or a url.
        cache: where fetched shards and indices are kept; None = the default cache.
        file: the local file of the shard, where the caller holds it already.
        check_count: compare the number of samples with the one in a file beside the shard.

    Raises:
        UserError: the file is damaged, or its number of samples differs from that in its stats file.
        OSError: it cannot be read.
    """
    cache = cache or ShardCache()
    if file is None:
        with cache.hold(path) as held:
            return load_index(path, cache, held, check_count)
    try:
        shard_index = _load_saved(file, cache)
        if shard_index is None:
            shard_index = _build(file)
            _save(shard_index, cache)
    except DamagedTarError as error:
        if not cache.is_fetched(path):
            raise
        cache.mark_damaged(path)
        raise OSError(f"its copy in the cache was damaged: {error}") from error  # what is fetched is verified: fetch it again
    if check_count:
        try:
            check_recorded_count(path, shard_index.count)
        except UserError:
            cache.mark_damaged(path)
            raise
    return replace(shard_index, origin=path)


def check_recorded_count(path: str, count: int) -> None:
    """Raise UserError where a file beside a shard states another number of samples than the shard holds."""
    recorded, file = recorded_count(path)
    if recorded is not None and recorded != count:
        raise UserError(
            f"{path} holds {count:,} samples, but {file} says {recorded:,}: "
            "the shard was cut short, or one of the two files is outdated"
        )


def _build(path: str) -> ShardIndex:
    """Build the index of a local shard by one pass over its headers."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        stat = os.fstat(fd)
        return ShardIndex(
            path, stat.st_size, stat.st_mtime_ns, _fingerprint(fd, stat.st_size), **_group_members(read_members(fd, path))
        )
    finally:
        os.close(fd)


def count_by_headers(url: str, seconds: float) -> int:
    """Return the number of samples of a remote shard from its headers, without fetching it.

    Raises:
        NoRangesError: the server sends whole files only.
        OSError: the shard cannot be read, or what comes is damaged.
        UserError: it cannot be opened, or takes more than `seconds`.
    """
    try:
        return len(_group_members(read_remote_members(url, seconds))["flags"])
    except DamagedTarError as error:
        raise OSError(str(error)) from error  # perhaps on the way


def _group_members(members: Members) -> dict[str, Any]:
    """Group consecutive members of the same key into samples, by webdataset's naming rules.

    Returns:
        The fields of ShardIndex from `extensions` on, by name.
    """
    extensions: dict[str, int] = {}
    keys: list[bytes] = []
    flags: list[int] = []
    starts: list[int] = []
    rows: list[tuple[int, int, int]] = []
    last_key: str | None = None
    previous_keys: set[str] = set()
    kinds_of_sample: set[int] = set()
    for name, offset, length in zip(*members, strict=True):
        base = name[name.rfind("/") + 1 :]
        stem, dot, extension = base.partition(".")
        if not stem or not dot or (name.startswith("__") and name.partition("/")[0].endswith("__")):
            continue  # no extension, a hidden file, or metadata of the archive
        key = name[: len(name) - len(base)] + stem
        if key != last_key:
            starts.append(len(rows))
            keys.append(key.encode("utf-8", "surrogateescape"))
            flags.append(DUPLICATE_KEY if key in previous_keys else 0)
            previous_keys.add(key)
            last_key, kinds_of_sample = key, set()
        kind = extensions.setdefault(extension.lower(), len(extensions))
        if kind in kinds_of_sample:
            flags[-1] |= DUPLICATE_MEMBER
        kinds_of_sample.add(kind)
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
    """Return a digest of four blocks spread over the file.

    With size and modification time it detects a file that was replaced.
    """
    hasher = hashlib.blake2b(str(size).encode(), digest_size=16)
    for i in range(4):
        hasher.update(os.pread(fd, 4096, max(0, size - 4096) * i // 3))
    return hasher.hexdigest()


# ---- the saved index -------------------------------------------------------------------------------------------------


def _index_paths(path: str, cache: ShardCache) -> list[Path]:
    """Return the paths where the index of a shard may be saved, preferred first."""
    return [Path(f"{path}.idx"), Path(f"{cache.cached_path(os.path.abspath(path), 'index')}.idx")]


def indexed_count(path: str, cache: ShardCache) -> int | None:
    """Return the number of samples of a local shard from its saved index; None where none matches."""
    meta, _ = _find_saved(path, cache)
    return None if meta is None else meta.count


def _load_saved(path: str, cache: ShardCache) -> ShardIndex | None:
    """Load the saved index of a shard; None where there is none, or none that matches the shard."""
    meta, index_path = _find_saved(path, cache)
    if meta is None:
        return None
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _fingerprint(fd, meta.size) != meta.fingerprint:
            log.warning(one_safe_line(f"{index_path} is outdated, the shard has changed since: indexing it again"))
            return None
    finally:
        os.close(fd)
    try:
        with _open_saved(index_path, meta.size) as stored:
            shard_index = ShardIndex(
                path, meta.size, meta.mtime_ns, meta.fingerprint, meta.extensions, **{name: stored[name] for name in _ARRAYS}
            )
            _check_index(shard_index, meta)
            return shard_index
    except Exception as error:
        _warn_unusable(index_path, error)
        return None


@dataclass(frozen=True)
class _Meta:
    """What a saved index says of its shard."""

    count: int
    size: int
    mtime_ns: int
    fingerprint: str
    extensions: list[str]


def _parse_meta(stored: Any) -> _Meta | None:
    """Return the metadata of a saved index, None for one of another version. Raises ValueError where it is damaged."""
    values = parse_json_object(stored["meta"].tobytes())
    if values.pop("version", None) != _VERSION:
        return None
    if {name: type(value) for name, value in values.items()} != {"extensions": list} | {
        "count": int, "size": int, "mtime_ns": int, "fingerprint": str,
    }:  # fmt: skip
        raise ValueError("its metadata is not that of an index")
    meta = _Meta(**values)
    if not all(isinstance(name, str) for name in meta.extensions) or len({*meta.extensions}) < len(meta.extensions):
        raise ValueError("its extensions are not names, or one is there twice")
    if stored["flags"].shape != (meta.count,):
        raise ValueError("its metadata does not fit its content")
    return meta


@contextmanager
def _open_saved(path: Path, size: int) -> Iterator[Any]:
    """Open a saved index of a shard of `size` bytes. Raises ValueError for content that could not be that of its index."""
    most = 4 * size + (1 << 20)  # each member has 512 bytes in the shard, and far fewer here
    with open_ordinary(path, most) as file, np.load(file, allow_pickle=False) as stored:
        if any(entry.file_size > most for entry in stored.zip.infolist()):
            raise ValueError("it is compressed")
        yield stored


def _check_index(index: ShardIndex, meta: _Meta) -> None:
    """Raise ValueError for arrays that do not fit one another or the shard."""
    n, m = meta.count, len(index.members)
    shapes = {"starts": (n + 1,), "members": (m, 3), "flags": (n,), "key_ends": (n + 1,), "key_bytes": (len(index.key_bytes),)}
    for name, shape in shapes.items():
        values = getattr(index, name)
        kind = np.uint8 if name in ("flags", "key_bytes") else np.int64
        if values.shape != shape or values.dtype != kind:
            raise ValueError(f"its {name} have another shape or type")
    for ends, total in ((index.starts, m), (index.key_ends, len(index.key_bytes))):
        if ends[0] != 0 or ends[-1] != total or (np.diff(ends) < 0).any():
            raise ValueError("its samples do not follow one another")
    kinds, offsets, lengths = index.members.T
    if m and not (
        kinds.min() >= 0
        and kinds.max() < len(meta.extensions)
        and offsets.min() >= 0
        and lengths.min() >= 0
        and lengths.max() <= meta.size
        and (offsets <= meta.size - lengths).all()
        and (np.diff(offsets) >= lengths[:-1]).all()
    ):
        raise ValueError("its members do not lie in the shard")


def _find_saved(path: str, cache: ShardCache) -> tuple[_Meta | None, Path]:
    """Return (metadata, path) of the saved index of the same size and time; (None, Path()) without."""
    stat = os.stat(path)
    for index_path in _index_paths(path, cache):
        try:
            with _open_saved(index_path, stat.st_size) as stored:
                meta = _parse_meta(stored)
            if meta is None:
                continue
            if (meta.size, meta.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
                return meta, index_path
            log.warning(one_safe_line(f"{index_path} is outdated, the shard has changed since: indexing it again"))
        except FileNotFoundError:
            continue
        except Exception as error:  # whatever numpy raises for a damaged index file: the index is rebuilt
            _warn_unusable(index_path, error)
    return None, Path()


def _warn_unusable(path: Path, error: Exception) -> None:
    log.warning(one_safe_line(f"{path} cannot be used ({error}): indexing the shard again"))


def _save(shard_index: ShardIndex, cache: ShardCache) -> None:
    """Save an index beside the shard or in the cache folder, or not where neither can be written."""
    meta = {
        "version": _VERSION,
        "count": shard_index.count,
        "size": shard_index.size,
        "mtime_ns": shard_index.mtime_ns,
        "fingerprint": shard_index.fingerprint,
        "extensions": shard_index.extensions,
    }
    arrays = {name: getattr(shard_index, name) for name in _ARRAYS}
    for index_path in _index_paths(shard_index.path, cache):
        try:
            index_path.parent.mkdir(parents=True, exist_ok=True)
            with replace_atomically(index_path) as partial, open(partial, "wb") as out:
                np.savez(out, meta=np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8), **arrays)
            return
        except OSError as error:
            log.debug("cannot save the index %s: %s", index_path, error)
