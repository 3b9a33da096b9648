"""Packing tars anew: other shard sizes, smaller pictures; further members of a sample come along."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pretrain.data import BadSample
from pretrain.data.decode import EXTENSIONS
from pretrain.data.pack.writer import Item, Job
from pretrain.data.shards.index import load_index
from pretrain.data.shards.paths import count_samples
from pretrain.data.shards.reader import ShardReader
from pretrain.errors import UserError


@dataclass
class TarJob:
    """Consecutive samples, perhaps of several tars."""

    spans: list[tuple[str, int, int]]
    """(tar, first sample, end)"""

    def __len__(self) -> int:
        return sum(end - start for _, start, end in self.spans)

    def __getstate__(self) -> dict[str, Any]:
        return {"spans": self.spans}

    @cached_property
    def _reader(self) -> ShardReader:
        return ShardReader([path for path, _, _ in self.spans])

    @cached_property
    def _keys(self) -> list[tuple[str, str]]:
        """(key in its tar, key in the shard), the same unless another sample before had it."""
        found: list[tuple[str, str]] = []
        used: set[str] = set()
        for path, start, end in self.spans:
            where = load_index(path)
            for sample in range(start, end):
                key = where.key(sample)
                choices = (key, f"{where.name}-{key}", f"{where.name}-{key}-{len(found)}")
                found.append((f"{where.name}/{key}", next(choice for choice in choices if choice not in used)))
                used.add(found[-1][1])
        return found

    def name(self, i: int) -> str:
        """How a person finds the sample."""
        return self._keys[i][0]

    def key(self, i: int, shard: int) -> str:
        """KEY in the shard."""
        return self._keys[i][1]

    def load(self, i: int) -> Item:
        """Reads it. Raises BadSample."""
        for shard, (_, start, end) in enumerate(self.spans):
            if i < end - start:
                members = self._reader.read(shard, start + i).members
                break
            i -= end - start
        extension = next((e for e in EXTENSIONS if e in members), None)
        if extension is None:
            raise BadSample("no image", f"members: {', '.join(sorted(members))}")
        if "txt" not in members and "json" not in members:
            raise BadSample("no caption", f"members: {', '.join(sorted(members))}")
        return Item(members.pop(extension), others=members)


@dataclass
class Tars:
    """Shards that exist already; further members of a sample come along."""

    paths: list[str]

    def fingerprint(self) -> str:
        """Of the names, sizes and times of the files."""
        digest = hashlib.blake2b(digest_size=16)
        for path in self.paths:
            status = os.stat(path) if os.path.exists(path) else None
            digest.update(f"{path}\0{status and (status.st_size, status.st_mtime_ns)}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    @cached_property
    def _counts(self) -> list[int]:
        return count_samples(self.paths)

    def count(self) -> int:
        """Raises UserError for a damaged tar."""
        total = sum(self._counts)
        if not total:
            raise UserError(f"{self.paths[0]}{' and the others' if len(self.paths) > 1 else ''}: there are no samples")
        return total

    def jobs(self, shard_size: int) -> Iterator[Job]:
        """Samples in order, across the borders of tars."""
        spans: list[tuple[str, int, int]] = []
        room = shard_size
        for path, count in zip(self.paths, self._counts, strict=True):
            start = 0
            while start < count:
                end = min(count, start + room)
                spans.append((path, start, end))
                room, start = room - (end - start), end
                if not room:
                    yield TarJob(spans)
                    spans, room = [], shard_size
        if spans:
            yield TarJob(spans)
