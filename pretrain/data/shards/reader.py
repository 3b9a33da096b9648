"""Random access to the samples of shards, by byte range."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Any

from pretrain.data import BadSample
from pretrain.data.shards.cache import ShardCache
from pretrain.data.shards.index import DUPLICATE_KEY, DUPLICATE_MEMBER, ShardIndex, check_recorded_count, load_index
from pretrain.data.shards.names import find_new_names, name_shard
from pretrain.data.shards.paths import RawSample
from pretrain.data.shards.retries import retry_io
from pretrain.errors import UserError

MAX_MEMBER_BYTES = 1 << 28
"""Default limit on one member of a sample (256 MiB): anything larger is not an image or a caption."""

MAX_TEXT_BYTES = 1 << 22
"""Limit on a caption, a label or a json (4 MiB): parsing and tokenizing take a hundred times its size in memory."""

TEXT_EXTENSIONS = ("txt", "json", "cls")
"""Extensions of members that hold text; of syn.json, what follows the last dot."""

_MAX_GAP = 16384  # reading up to this many unneeded bytes is cheaper than a second read


class ShardReader:
    """Random access to the samples of many shards. Not thread-safe.

    The most recently used shards stay open.

    Args:
        paths: shards, as `expand_shards` returns them; shard numbers are positions in it.
        cache: where fetched shards and indices are kept; None = the default cache.
        counts: expected number of samples of each shard; a shard with another number is refused. None = no check.
        max_open: shards held open.
        max_bytes: a sample with a larger member is a bad sample; text is limited to MAX_TEXT_BYTES, too.
    """

    def __init__(
        self,
        paths: Sequence[str],
        cache: ShardCache | None = None,
        counts: Sequence[int] | None = None,
        max_open: int = 64,
        max_bytes: int = MAX_MEMBER_BYTES,
    ) -> None:
        self.paths, self.cache, self.counts = paths, cache or ShardCache(), counts
        self.max_open, self.max_bytes = max_open, max_bytes
        self._new_names = find_new_names(paths)
        self._open: OrderedDict[int, tuple[int, ShardIndex]] = (
            OrderedDict()
        )  # shard -> (file descriptor, index), least recently used first

    def read(self, shard: int, sample: int, extensions: Collection[str] | None = None) -> RawSample:
        """Read a sample with all its members, or only those of the given extensions that it has.

        Raises:
            BadSample: its key or one of its extensions occurs twice, or one of its members is too large.
            UserError: the shard is damaged, has changed, or cannot be read even after retries.
        """
        fd, shard_index = self._open_shard(shard)
        raw = RawSample(self._build_key(shard, shard_index, sample))
        if shard_index.flags[sample] & DUPLICATE_MEMBER:
            raise BadSample("duplicate member", raw.key)
        if shard_index.flags[sample]:
            if sample in shard_index.apart:
                raise BadSample("members apart", self.explain_apart(shard, sample))
            raise BadSample("duplicate key", raw.key)
        names = shard_index.extensions
        rows: list[list[int]] = shard_index.members[shard_index.starts[sample] : shard_index.starts[sample + 1]].tolist()
        if extensions is not None:
            rows = [row for row in rows if names[row[0]] in extensions]
        if not rows:
            return raw
        needed = 0
        for kind, _, length in rows:
            needed += length
            limit = min(self.max_bytes, MAX_TEXT_BYTES) if names[kind].rpartition(".")[2] in TEXT_EXTENSIONS else self.max_bytes
            if length > limit:
                raise BadSample("member too large", f"{names[kind]} of {length:,} bytes, more than {limit:,}")
        first = rows[0][1]
        span = rows[-1][1] + rows[-1][2] - first
        if span - needed <= _MAX_GAP:
            content = self._read_bytes(shard, fd, first, span)
            for kind, offset, length in rows:
                raw.members[names[kind]] = content[offset - first : offset - first + length]
        else:
            for kind, offset, length in rows:
                raw.members[names[kind]] = self._read_bytes(shard, fd, offset, length)
        return raw

    def key(self, shard: int, sample: int) -> str:
        """Return the key "shard/KEY" of a sample; shards of the same name get the names of their folders, too."""
        _, shard_index = self._open_shard(shard)
        return self._build_key(shard, shard_index, sample)

    def _build_key(self, shard: int, shard_index: ShardIndex, sample: int) -> str:
        return f"{self._new_names.get(shard) or shard_index.name}/{shard_index.key(sample)}"

    def stem(self, shard: int, sample: int) -> str:
        """Return the KEY of a sample as the names of its members begin: bytes that are not UTF-8 are surrogates."""
        _, shard_index = self._open_shard(shard)
        ends = shard_index.key_ends[sample : sample + 2]
        return shard_index.key_bytes[ends[0] : ends[1]].tobytes().decode("utf-8", "surrogateescape")

    def name(self, shard: int) -> str:
        """Return the name of a shard in keys, without opening it."""
        return self._new_names.get(shard) or name_shard(self.paths[shard])

    def is_repeated(self, shard: int, sample: int) -> bool:
        """Return whether an earlier sample of the shard has the same KEY, and this one is no part of it."""
        _, shard_index = self._open_shard(shard)
        return bool(shard_index.flags[sample] & DUPLICATE_KEY) and sample not in shard_index.apart

    def count(self, shard: int) -> int:
        """Return the number of samples of a shard."""
        return self._open_shard(shard)[1].count

    def explain_apart(self, shard: int, sample: int) -> str:
        """Return what is wrong with a sample whose members lie apart in the tar, or "" where they do not."""
        _, shard_index = self._open_shard(shard)
        if sample not in shard_index.apart:
            return ""
        kinds = ", ".join(f".{kind}" for kind in shard_index.kinds(sample))
        return (
            f"{kinds} of {shard_index.key(sample)} and its other members do not follow one another in the tar: "
            "pack it again with `clipfuse data pack`, or with tar --sort=name"
        )

    def extensions(self, shard: int, sample: int) -> list[str]:
        """Return the extensions of the members of a sample, without reading them."""
        _, shard_index = self._open_shard(shard)
        return shard_index.kinds(sample)

    def close(self) -> None:
        """Close all open files; reading opens them again."""
        while self._open:
            os.close(self._open.popitem()[1][0])

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}  # file descriptors are not valid in another process

    def _open_shard(self, shard: int) -> tuple[int, ShardIndex]:
        """Return (file descriptor, index) of a shard, opening it where needed. Raises UserError."""
        opened = self._open.get(shard)
        if opened is not None:
            self._open.move_to_end(shard)
            return opened
        path = self.paths[shard]

        def open_file() -> tuple[int, ShardIndex]:
            with self.cache.hold(path) as file:  # until it is open, no other process may remove it
                shard_index = load_index(path, self.cache, file, check_count=self.counts is None)
                return os.open(shard_index.path, os.O_RDONLY | os.O_CLOEXEC), shard_index

        opened = retry_io(open_file, path)
        expected, count = None if self.counts is None else self.counts[shard], opened[1].count
        if expected is not None and expected != count:
            os.close(opened[0])
            self.cache.mark_damaged(path)  # the copy may be an outdated one
            check_recorded_count(path, count)
            raise UserError(f"{path} holds {count:,} samples, but held {expected:,} when the run began: it has changed since")
        self._open[shard] = opened
        if len(self._open) > self.max_open:
            os.close(self._open.popitem(last=False)[1][0])
        return opened

    def _read_bytes(self, shard: int, fd: int, offset: int, length: int) -> bytes:
        """Read `length` bytes at `offset`, retrying after errors. Raises UserError."""
        try:
            content = os.pread(fd, length, offset)
        except OSError:
            content = retry_io(lambda: self._reopen_and_read(shard, offset, length), self.paths[shard])
        if len(content) < length:
            content = retry_io(lambda: self._read_fully(shard, offset, length), self.paths[shard])
        return content

    def _reopen_and_read(self, shard: int, offset: int, length: int) -> bytes:
        """Read after reopening the file: after an error on a network disk the descriptor may be stale."""
        opened = self._open.pop(shard, None)
        if opened:
            os.close(opened[0])
        return os.pread(self._open_shard(shard)[0], length, offset)

    def _read_fully(self, shard: int, offset: int, length: int) -> bytes:
        """Read in several calls, after one returned too few bytes. Raises UserError for a shrunken file."""
        fd, chunks, num_read = self._open_shard(shard)[0], [], 0
        while num_read < length:
            chunk = os.pread(fd, length - num_read, offset + num_read)
            if not chunk:
                raise UserError(
                    f"{self.paths[shard]} ends at byte {os.fstat(fd).st_size:,}, before the end of one of its samples: "
                    "it has changed"
                )
            chunks.append(chunk)
            num_read += len(chunk)
        return b"".join(chunks)
