"""Reads any sample of any shard, by byte range."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Any

from pretrain.data import BadSample
from pretrain.data.shards.cache import ShardCache, retry_io
from pretrain.data.shards.index import DUPLICATE_MEMBER, ShardIndex, load_index
from pretrain.data.shards.paths import RawSample
from pretrain.errors import UserError

MAX_MEMBER_BYTES = 1 << 28
"""Default cap on one member of a sample (256 MiB): anything larger is no picture or caption."""

_MAX_GAP = 16384  # bytes read for nothing that are cheaper than another read


class ShardReader:
    """Random access to the samples of many shards, of which the `keep` used last are open. Not for several threads at once.

    Args:
        paths: shards, as `shards.expand` gives them; numbered in this order.
        cache: where fetched shards and indices go.
        counts: samples that each shard is said to have; one that turns out to have another number is refused.
        keep: shards held open.
        max_bytes: members larger than this make a sample a bad one.
    """

    def __init__(
        self,
        paths: Sequence[str],
        cache: ShardCache | None = None,
        counts: Sequence[int] | None = None,
        keep: int = 64,
        max_bytes: int = MAX_MEMBER_BYTES,
    ) -> None:
        self.paths, self.cache, self.counts = paths, cache or ShardCache(), counts
        self.keep, self.max_bytes = keep, max_bytes
        self._open: OrderedDict[int, tuple[int, ShardIndex]] = OrderedDict()  # file descriptor, index

    def read(self, shard: int, sample: int, extensions: Collection[str] | None = None) -> RawSample:
        """A sample with all its members, or only those with certain extensions (as far as it has them).

        Raises:
            BadSample: the shard has it twice, has two members of the same name in it, or a member that is too large.
            UserError: the shard is damaged, has changed, or cannot be read even after some patience.
        """
        fd, where = self._shard(shard)
        raw = RawSample(f"{where.name}/{where.key(sample)}")
        if where.flags[sample]:
            raise BadSample("duplicate member" if where.flags[sample] & DUPLICATE_MEMBER else "duplicate key", raw.key)
        names = where.extensions
        rows: list[list[int]] = where.members[where.starts[sample] : where.starts[sample + 1]].tolist()
        if extensions is not None:
            rows = [row for row in rows if names[row[0]] in extensions]
        if not rows:
            return raw
        wanted = 0
        for kind, _, length in rows:
            wanted += length
            if length > self.max_bytes:
                raise BadSample("member too large", f"{names[kind]} of {length:,} bytes, at most {self.max_bytes:,}")
        first = rows[0][1]
        span = rows[-1][1] + rows[-1][2] - first
        if span - wanted <= _MAX_GAP:
            content = self._bytes(shard, fd, first, span)
            for kind, offset, length in rows:
                raw.members[names[kind]] = content[offset - first : offset - first + length]
        else:
            for kind, offset, length in rows:
                raw.members[names[kind]] = self._bytes(shard, fd, offset, length)
        return raw

    def key(self, shard: int, sample: int) -> str:
        """ "shard/KEY" of a sample."""
        _, where = self._shard(shard)
        return f"{where.name}/{where.key(sample)}"

    def extensions(self, shard: int, sample: int) -> list[str]:
        """What a sample has, without reading it."""
        _, where = self._shard(shard)
        return [where.extensions[kind] for kind in where.members[where.starts[sample] : where.starts[sample + 1], 0]]

    def close(self) -> None:
        """Closes what is open; reading opens it again."""
        while self._open:
            os.close(self._open.popitem()[1][0])

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}  # descriptors mean nothing in another process

    def _shard(self, shard: int) -> tuple[int, ShardIndex]:
        opened = self._open.get(shard)
        if opened is not None:
            self._open.move_to_end(shard)
            return opened
        path = self.paths[shard]

        def open_it() -> tuple[int, ShardIndex]:
            where = load_index(path, self.cache)
            return os.open(where.path, os.O_RDONLY | os.O_CLOEXEC), where

        opened = retry_io(open_it, path)
        said, found = None if self.counts is None else self.counts[shard], opened[1].count
        if said is not None and said != found:
            os.close(opened[0])
            raise UserError(f"{path} holds {found:,} samples, but {said:,} when the run began: it was changed since")
        self._open[shard] = opened
        if len(self._open) > self.keep:
            os.close(self._open.popitem(last=False)[1][0])
        return opened

    def _bytes(self, shard: int, fd: int, offset: int, length: int) -> bytes:
        try:
            content = os.pread(fd, length, offset)
        except OSError:
            content = retry_io(lambda: self._reopened_bytes(shard, offset, length), self.paths[shard])
        if len(content) < length:
            content = retry_io(lambda: self._whole(shard, offset, length), self.paths[shard])
        return content

    def _reopened_bytes(self, shard: int, offset: int, length: int) -> bytes:
        """After an error the file is opened anew: a network disk may have forgotten the descriptor."""
        opened = self._open.pop(shard, None)
        if opened:
            os.close(opened[0])
        return os.pread(self._shard(shard)[0], length, offset)

    def _whole(self, shard: int, offset: int, length: int) -> bytes:
        """A read that the system cut in pieces; or one beyond the end of a file that has shrunk."""
        fd, pieces, got = self._shard(shard)[0], [], 0
        while got < length:
            piece = os.pread(fd, length - got, offset + got)
            if not piece:
                raise UserError(
                    f"{self.paths[shard]} ends at byte {os.fstat(fd).st_size:,}, before one of its samples: it has changed"
                )
            pieces.append(piece)
            got += len(piece)
        return b"".join(pieces)
