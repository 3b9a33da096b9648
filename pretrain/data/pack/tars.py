"""Packs existing tars again, with another shard size, smaller images, or members that follow one another."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pretrain.data import BadSample
from pretrain.data.audio_files import AUDIO_EXTENSIONS
from pretrain.data.decode import EXTENSIONS
from pretrain.data.members import explain_missing_caption, explain_missing_image
from pretrain.data.pack.writer import ShardJob, SourceSample
from pretrain.data.shards.cache import is_remote
from pretrain.data.shards.index import DUPLICATE_MEMBER, ShardIndex, load_index
from pretrain.data.shards.paths import count_samples, map_in_processes
from pretrain.data.shards.reader import MAX_MEMBER_BYTES, ShardReader
from pretrain.errors import UserError

Sample = tuple[int, ...]
"""Numbers of the index's samples that are one sample: more than one if its members are apart in the tar."""


@dataclass
class TarJob:
    """The samples of one shard: samples of one or more tars, in order."""

    parts: list[tuple[str, list[Sample]]]
    """(tar, samples) of each tar."""

    def __len__(self) -> int:
        return sum(len(samples) for _, samples in self.parts)

    def __getstate__(self) -> dict[str, Any]:
        return {"parts": self.parts}

    @cached_property
    def _reader(self) -> ShardReader:
        return ShardReader([path for path, _ in self.parts])

    @cached_property
    def _keys(self) -> list[tuple[str, str]]:
        """(source tar/key, key in the shard) of each sample.

        The key stays the same unless an earlier sample of the shard has it.
        """
        keys: list[tuple[str, str]] = []
        used: set[str] = set()
        for path, samples in self.parts:
            source = load_index(path)
            for sample in samples:
                key = source.key(sample[0])
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
        for shard, (path, samples) in enumerate(self.parts):
            if i < len(samples):
                sample = samples[i]
                members = self._reader.read(shard, sample[0]).members if len(sample) == 1 else read_apart(path, sample)
                break
            i -= len(samples)
        extension = next((e for e in EXTENSIONS if e in members), None)
        sound = next((e for e in AUDIO_EXTENSIONS if e in members), None)
        if extension is None and sound is None:
            raise BadSample("no image", explain_missing_image(members, EXTENSIONS))
        if not {"txt", "json", "cls"}.intersection(members):
            raise BadSample("no caption", explain_missing_caption(members, "txt"))
        image = members.pop(extension) if extension else None
        return SourceSample(image, members=members, sound=members[sound] if sound else None, sound_extension=sound or "")


def group_samples(shard_index: ShardIndex) -> list[Sample]:
    """Return the samples of a tar, with members of the same key joined where other samples lie between them.

    A tar of all images, then all captions, has each key twice. Samples that repeat an extension are not joined: one of the
    two is a duplicate. The n-th `a.jpg` is joined with the n-th `a.txt`, in a time proportional to the number of members.
    """
    groups: list[list[int]] = []
    groups_of_key: dict[str, list[int]] = {}
    first_without: dict[tuple[str, int], int] = {}
    """(key, extension) -> place in groups_of_key[key] from which on no group has this extension."""
    starts, kinds = shard_index.starts.tolist(), shard_index.members[:, 0].tolist()
    is_duplicate = (shard_index.flags & DUPLICATE_MEMBER).astype(bool).tolist()
    for i, key in enumerate(shard_index.keys):
        extensions = kinds[starts[i] : starts[i + 1]]
        candidates = groups_of_key.setdefault(key, [])
        position = max(first_without.get((key, extension), 0) for extension in extensions)
        if is_duplicate[i]:
            position = len(candidates)
        if position == len(candidates):
            candidates.append(len(groups))
            groups.append([])
        groups[candidates[position]].append(i)
        for extension in extensions:
            first_without[key, extension] = position + 1
    return [tuple(group) for group in groups]


def _find_apart(path: str) -> list[Sample]:
    """Return the samples of a tar if some of them may be apart; [] if none is."""
    shard_index = load_index(path)
    return group_samples(shard_index) if shard_index.flags.any() else []


def read_apart(path: str, sample: Sample) -> dict[str, bytes]:
    """Return the members of a sample that are apart in the tar, by extension.

    Raises:
        BadSample: a member occurs twice or is too large.
        OSError: the tar cannot be read.
    """
    shard_index = load_index(path)
    members: dict[str, bytes] = {}
    with open(shard_index.path, "rb") as file:
        for i in sample:
            if shard_index.flags[i] & DUPLICATE_MEMBER:
                raise BadSample("duplicate member", f"{shard_index.name}/{shard_index.key(i)}")
            for kind, offset, length in shard_index.members[shard_index.starts[i] : shard_index.starts[i + 1]].tolist():
                name = shard_index.extensions[kind]
                if length > MAX_MEMBER_BYTES:
                    raise BadSample("member too large", f"{name} of {length:,} bytes, more than {MAX_MEMBER_BYTES:,}")
                file.seek(offset)
                members[name] = file.read(length)
    return members


@dataclass
class TarSource:
    """Existing shards, packed with all members of each sample."""

    paths: list[str]
    joined: int = field(default=0, init=False)
    """Number of samples whose members were apart; set by `count`."""

    def compute_fingerprint(self) -> str:
        """Return a digest of the paths, sizes and times of the files."""
        digest = hashlib.blake2b(digest_size=16)
        for path in self.paths:
            status = os.stat(path) if os.path.exists(path) else None
            digest.update(f"{path}\0{status and (status.st_size, status.st_mtime_ns)}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    @cached_property
    def _samples(self) -> list[list[Sample] | range]:
        """The samples of each tar: their numbers where no member is apart. Members of remote tars are not joined."""
        counts = count_samples(self.paths)  # indexes them in parallel, and names those that are damaged
        samples: list[list[Sample] | range] = [range(count) for count in counts]
        local = [i for i, path in enumerate(self.paths) if not is_remote(path)]
        grouped = map_in_processes(_find_apart, [self.paths[i] for i in local], None)
        for i, groups in zip(local, grouped, strict=True):
            if groups:
                samples[i] = groups
                self.joined += sum(len(sample) > 1 for sample in groups)
        return samples

    def count(self) -> int:
        """Return the number of samples. Raises UserError for a damaged tar, or if there are none."""
        total = sum(map(len, self._samples))
        if not total:
            raise UserError(f"{self.paths[0]}{' and the other tars' if len(self.paths) > 1 else ''}: there are no samples")
        return total

    def get_notes(self) -> list[str]:
        """Return lines for the user about what the tars hold."""
        if not self.joined:
            return []
        samples = "sample has" if self.joined == 1 else "samples have"
        return [f"{self.joined:,} {samples} members that do not follow one another in the tar: they are joined"]

    def iterate_jobs(self, shard_size: int) -> Iterator[ShardJob]:
        """Yield a job for each shard; it may span several tars."""
        parts: list[tuple[str, list[Sample]]] = []
        free = shard_size
        for path, samples in zip(self.paths, self._samples, strict=True):
            start = 0
            while start < len(samples):
                chunk = [s if isinstance(s, tuple) else (s,) for s in samples[start : start + free]]
                parts.append((path, chunk))
                free, start = free - len(chunk), start + len(chunk)
                if not free:
                    yield TarJob(parts)
                    parts, free = [], shard_size
        if parts:
            yield TarJob(parts)
