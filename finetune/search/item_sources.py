"""Where the images or sounds of an index come from: shards, and folders of files. Keys are unique over all of a command.

sources = open_sources(["shards", "photos/"], "--data")
key, location = sources.locate(0); members = sources.read(0)    {"jpg": bytes, "txt": bytes, "json": bytes}

read_content(location)    the bytes of an image again, from its file or its place in the shard
"""

from __future__ import annotations

import bisect
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from finetune.search.fields import MODALITIES
from finetune.search.modalities import MEMBERS
from pretrain.data.config import count_samples_once
from pretrain.data.pack.folder import FolderSource as FolderScan
from pretrain.data.pack.folder import read_file_inside
from pretrain.data.shards.cache import ShardCache
from pretrain.data.shards.index import ShardIndex, load_index
from pretrain.data.shards.names import find_new_names, name_shard
from pretrain.data.shards.paths import expand_shards
from pretrain.data.shards.ranges import NoRangesError, open_ranges
from pretrain.data.shards.reader import MAX_MEMBER_BYTES, MAX_TEXT_BYTES, ShardReader
from pretrain.data.shards.retries import retry_io
from pretrain.data.shards.urls import is_remote
from pretrain.errors import UserError
from pretrain.printable import format_count, get_noun, hide_secrets


class Location(NamedTuple):
    """Where the bytes of an image or a sound are."""

    source: str
    """Absolute path of the file or shard, or the shard's url without its secrets."""
    offset: int
    """First byte in the shard; -1 where the file is the image or the sound."""
    size: int


class ItemSource(Protocol):
    """Images, or sounds, by number, from 0. Not thread-safe, but `locate` may run while another thread reads."""

    def __len__(self) -> int: ...

    def locate(self, i: int) -> tuple[str, Location]:
        """Return the key and the location of an image, without reading it. Raises UserError."""
        ...

    def read(self, i: int) -> dict[str, bytes]:
        """Return an image and what is beside it, by extension. Raises BadSample, UserError."""
        ...


def open_sources(data: Sequence[str], where: str, modality: str = "image") -> ItemSource:
    """Open shards (globs, folders, urls) and folders of files.

    Args:
        data: what names them.
        where: the option that names them, for messages.
        modality: image or audio, which `locate` gives the location of.

    Raises:
        ConfigError: nothing is there.
        UserError: it cannot be read, or holds no sample.
    """
    folders = [place for place in data if Path(place).is_dir() and not any(Path(place).glob("*.tar"))]
    patterns = [place for place in data if place not in folders]
    names = [name_shard(os.path.abspath(folder)) for folder in folders]
    new_names = find_new_names([os.path.abspath(folder) for folder in folders])
    sources: list[ItemSource] = []
    if patterns:
        sources.append(ShardSource(expand_shards(patterns, where), where, modality))
    sources += [FolderSource(Path(folder), new_names.get(i, names[i]), modality) for i, folder in enumerate(folders)]
    joined = sources[0] if len(sources) == 1 else Sources(sources)
    if not len(joined):
        raise UserError(f"{where} {' '.join(data)} holds no samples")
    return joined


class Sources:
    """Several sources, one after the other."""

    def __init__(self, sources: Sequence[ItemSource]) -> None:
        self._sources = sources
        self._ends = list(itertools.accumulate(map(len, sources)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def locate(self, i: int) -> tuple[str, Location]:
        source, number = self._find(i)
        return source.locate(number)

    def read(self, i: int) -> dict[str, bytes]:
        source, number = self._find(i)
        return source.read(number)

    def _find(self, i: int) -> tuple[ItemSource, int]:
        source = bisect.bisect_right(self._ends, i)
        return self._sources[source], i - (self._ends[source - 1] if source else 0)


class ShardSource:
    """The samples of shards; keys are shard/KEY, as those of `clipfuse embed` are."""

    def __init__(self, paths: Sequence[str], where: str, modality: str = "image") -> None:
        """paths: shards, patterns expanded. Raises UserError where they cannot be read."""
        self._extensions = MEMBERS[modality]
        counts = count_samples_once(list(paths), ShardCache(), where)
        self._paths, self._ends = paths, list(itertools.accumulate(counts))
        self._reader = ShardReader(paths, ShardCache(), counts, max_open=8)
        self._names = find_new_names(paths)
        self._index: tuple[int, ShardIndex] | None = None

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _find(self, i: int) -> tuple[int, int]:
        shard = bisect.bisect_right(self._ends, i)
        return shard, i - (self._ends[shard - 1] if shard else 0)

    def locate(self, i: int) -> tuple[str, Location]:
        shard, sample = self._find(i)
        if self._index is None or self._index[0] != shard:
            self._index = shard, retry_io(lambda: load_index(self._paths[shard]), self._paths[shard])
        index, path = self._index[1], self._paths[shard]
        rows = index.members[index.starts[sample] : index.starts[sample + 1]].tolist()
        members = {index.extensions[kind]: (offset, length) for kind, offset, length in rows}
        offset, length = next((members[name] for name in self._extensions if name in members), (0, 0))
        key = f"{self._names.get(shard) or index.name}/{index.key(sample)}"
        return key, Location(hide_secrets(path) if is_remote(path) else os.path.abspath(path), offset, length)

    def read(self, i: int) -> dict[str, bytes]:
        return self._reader.read(*self._find(i)).members


class FolderSource:
    """The image or sound files of a folder at any depth, with NAME.txt and NAME.json beside NAME.jpg where there are any.

    Keys are FOLDER/path, with the extension.
    """

    def __init__(self, root: Path, name: str, modality: str = "image") -> None:
        """name: FOLDER in the keys. Raises UserError: the folder holds no such files, or cannot be read."""
        self.root, self.name = root, name
        scan = FolderScan(root, caption_from="path", excluded=Path(os.devnull))
        total = scan.count()  # raises where there is none
        files = [sound if modality == "audio" else image for image, sound in scan.list_files()]
        self._paths = [path for path in files if path]
        if not self._paths:
            other = next(name for name in MODALITIES if name != modality)
            raise UserError(f"{root} holds no {get_noun(modality)}s, only {format_count(total, get_noun(other))}")

    def __len__(self) -> int:
        return len(self._paths)

    def locate(self, i: int) -> tuple[str, Location]:
        path = self.root / self._paths[i]
        try:
            size = path.stat().st_size
        except OSError:
            size = 0  # reading says why
        return f"{self.name}/{self._paths[i]}", Location(os.path.abspath(path), -1, size)

    def read(self, i: int) -> dict[str, bytes]:
        path = self.root / self._paths[i]
        members = {path.suffix[1:].lower(): read_file_inside(path, str(self.root))}
        for extension in ("txt", "json"):
            for beside in (path.with_suffix(f".{extension}"), path.with_suffix(f".{extension.upper()}")):
                if beside.is_file():
                    members.setdefault(extension, read_file_inside(beside, str(self.root), MAX_TEXT_BYTES))
        return members


# ---------------------------------------------------------------------------------------------------------------------
# Images and sounds again


def read_content(location: Location) -> bytes:
    """Return the bytes of an image or a sound from where it lies.

    Raises UserError where it is not there, or has changed its size.
    """
    source, offset, size = location
    if not source:
        raise UserError("it is not known where the file lies: index it with --images SHARDS")
    if is_remote(source):
        return retry_io(lambda: _read_remote(source, offset, size), source)
    try:
        with open(source, "rb") as file:
            file.seek(max(offset, 0))
            content = file.read(size if offset >= 0 else MAX_MEMBER_BYTES)
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror or error}; index its samples again") from error
    if offset >= 0 and len(content) < size:
        raise UserError(f"{source} ends at byte {os.path.getsize(source):,}: it has changed; index its samples again")
    return content


def _read_remote(url: str, offset: int, size: int) -> bytes:
    try:
        return open_ranges(url, 0).read(offset, offset + size)
    except NoRangesError:
        with ShardCache().hold(url) as path, open(path, "rb") as file:
            return os.pread(file.fileno(), size, offset)
