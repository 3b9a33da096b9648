"""Packs existing tars again, with another shard size or smaller images. All members are kept."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pretrain.data import BadSample
from pretrain.data.decode import EXTENSIONS
from pretrain.data.pack.writer import ShardJob, SourceSample
from pretrain.data.shards.index import load_index
from pretrain.data.shards.paths import count_samples
from pretrain.data.shards.reader import ShardReader
from pretrain.errors import UserError


@dataclass
class TarJob:
    """The samples of one shard: consecutive samples of one or more tars."""

    spans: list[tuple[str, int, int]]
    """(tar, first sample, end) of each tar. `end` is not included."""

    def __len__(self) -> int:
        return sum(end - start for _, start, end in self.spans)

    def __getstate__(self) -> dict[str, Any]:
        return {"spans": self.spans}

    @cached_property
    def _reader(self) -> ShardReader:
        return ShardReader([path for path, _, _ in self.spans])

    @cached_property
    def _keys(self) -> list[tuple[str, str]]:
        """(source tar/key, key in the shard) of each sample.

        The key stays the same unless an earlier sample of the shard has it.
        """
        keys: list[tuple[str, str]] = []
        used: set[str] = set()
        for path, start, end in self.spans:
            source = load_index(path)
            for sample in range(start, end):
                key = source.key(sample)
                choices = (key, f"{source.name}-{key}", f"{source.name}-{key}-{len(keys)}")
                keys.append((f"{source.name}/{key}", next(choice for choice in choices if choice not in used)))
                used.add(keys[-1][1])
        return keys

    def describe(self, i: int) -> str:
        """Return how the user finds sample `i` in the source."""
        return self._keys[i][0]

    def get_key(self, i: int, shard: int) -> str:
        """Return the KEY of sample `i` in the shard."""
        return self._keys[i][1]

    def load(self, i: int) -> SourceSample:
        """Read sample `i`. Raises BadSample."""
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
        return SourceSample(members.pop(extension), members=members)


@dataclass
class TarSource:
    """Existing shards, packed with all members of each sample."""

    paths: list[str]

    def compute_fingerprint(self) -> str:
        """Return a digest of the paths, sizes and times of the files."""
        digest = hashlib.blake2b(digest_size=16)
        for path in self.paths:
            status = os.stat(path) if os.path.exists(path) else None
            digest.update(f"{path}\0{status and (status.st_size, status.st_mtime_ns)}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    @cached_property
    def _counts(self) -> list[int]:
        return count_samples(self.paths)

    def count(self) -> int:
        """Return the number of samples. Raises UserError for a damaged tar, or if there are none."""
        total = sum(self._counts)
        if not total:
            raise UserError(f"{self.paths[0]}{' and the other tars' if len(self.paths) > 1 else ''}: there are no samples")
        return total

    def iterate_jobs(self, shard_size: int) -> Iterator[ShardJob]:
        """Yield a job for each shard; it may span several tars."""
        spans: list[tuple[str, int, int]] = []
        free = shard_size
        for path, count in zip(self.paths, self._counts, strict=True):
            start = 0
            while start < count:
                end = min(count, start + free)
                spans.append((path, start, end))
                free, start = free - (end - start), end
                if not free:
                    yield TarJob(spans)
                    spans, free = [], shard_size
        if spans:
            yield TarJob(spans)
