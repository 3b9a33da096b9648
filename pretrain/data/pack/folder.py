"""Packs a folder of images, sounds or both, whose captions are in files next to them or in their paths."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.data import BadSample
from pretrain.data.audio_files import AUDIO_EXTENSIONS
from pretrain.data.caption_statistics import SEVERAL_LINES, find_oddities
from pretrain.data.captions import TXT, TXT_LINES, count_lines, normalize_whitespace, read_captions
from pretrain.data.pack.writer import ShardJob, SourceSample, describe_caption_field
from pretrain.data.shards.reader import MAX_TEXT_BYTES
from pretrain.errors import UserError
from pretrain.printable import format_count

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
"""Extensions of the files in a folder that are images. Their content, not the extension, decides how they are read."""

MAX_FILE_BYTES = 1 << 28
"""Larger files (above 256 MiB) are neither images nor captions."""


def read_file(path: Path, limit: int = MAX_FILE_BYTES) -> bytes:
    """Return the content of a file of at most `limit` bytes.

    Raises:
        BadSample: there is no such regular file, it is too large, or it may not be read.
        OSError: any other failure.
    """
    try:
        # not blocking, because opening a pipe would wait for its writer
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadSample("no such file", f"{path} is not a regular file")
            if status.st_size > limit:
                raise BadSample("file too large", f"{path} has {status.st_size:,} bytes, more than {limit:,}")
            return file.read()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise BadSample("no such file", str(path)) from error
    except PermissionError as error:
        raise BadSample("no permission to read the file", str(path)) from error
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            raise
        raise BadSample("no such file", f"{str(path)[:200]}: {error.strerror}") from error
    except ValueError as error:  # a NUL character in the name
        raise BadSample("no such file", repr(str(path))) from error


def read_file_inside(path: Path, root: str | None, limit: int = MAX_FILE_BYTES) -> bytes:
    """Return the content of a file as `read_file` does, unless a link leads out of the folder `root`.

    Args:
        path: a file below `root`.
        root: a folder; None = links may lead anywhere.
        limit: bytes that the file may have.

    Raises:
        BadSample: a link leads out of the folder, or the file cannot be read.
        OSError: any other failure.
    """
    if root is not None and not _is_inside(path, root):
        raise BadSample("link that leads out of the folder", f"{path}; --outside allows it")
    return read_file(path, limit)


def _is_inside(path: Path, root: str) -> bool:
    """Whether a path is below a folder after all links in both are followed."""
    try:
        return os.path.realpath(path).startswith(os.path.realpath(root).rstrip("/") + "/")
    except ValueError:  # a NUL character in the name, which `read_file` reports
        return True


def _find_beside(file: Path, extension: str) -> Path:
    """Return the file of an image or a sound with another extension, in lower or upper case: NAME.TXT beside NAME.JPG."""
    path = file.with_suffix(f".{extension}")
    if os.path.lexists(path):
        return path
    spellings = map("".join, itertools.product(*zip(extension.upper(), extension, strict=True)))
    choices = [file.with_suffix(f".{spelling}") for spelling in spellings]
    return next((choice for choice in choices if os.path.lexists(choice)), path)


def build_caption(path: str) -> str:
    """Return the words of a path below the folder, without words of digits only.

    shoes/red_sneaker-3.jpg gives "shoes red sneaker".
    """
    words = re.split(r"[\s/\\_.+-]+", path.rpartition(".")[0])
    return normalize_whitespace(" ".join(word for word in words if word and not word.isdigit()))


@dataclass
class FolderJob:
    """The samples of one shard."""

    root: Path
    paths: list[str]
    """The image of each sample, or its sound where it has no image."""
    sounds: list[str]
    """The sound of each sample; "" = none."""
    caption_from: str
    outside: bool
    first: int

    def __len__(self) -> int:
        return len(self.paths)

    def describe(self, i: int) -> str:
        """Return how the user finds sample `i` in the source."""
        return self.paths[i]

    def get_key(self, i: int, shard: int) -> str:
        """Return the KEY of sample `i` in the shard."""
        return f"{self.first + i:08d}"

    def load(self, i: int) -> SourceSample:
        """Read sample `i`. Raises BadSample."""
        path = self.root / self.paths[i]
        root = None if self.outside else str(self.root)
        text = b""
        if self.caption_from == "path":
            texts = [build_caption(self.paths[i])]
            if not texts[0]:
                raise BadSample("empty caption", "the path contains no word")
        else:
            try:
                text = read_file_inside(_find_beside(path, "txt"), root, MAX_TEXT_BYTES)
                texts = read_captions({"txt": text}, TXT_LINES if self.caption_from == "lines" else TXT)
            except BadSample as bad:
                raise BadSample("no caption", bad.detail) if bad.reason == "no such file" else bad from bad
        metadata: dict[str, Any] = {"source": self.paths[i]}
        json_path = _find_beside(path, "json")
        if json_path.exists():
            try:
                content = json.loads(read_file_inside(json_path, root, MAX_TEXT_BYTES))
            except (ValueError, RecursionError) as error:
                raise BadSample("json unreadable", f"{json_path}: {error}") from error
            if isinstance(content, dict):
                metadata |= content
        odd = [oddity for caption in texts for oddity in find_oddities(caption)]
        if self.caption_from == "txt" and count_lines(text) > 1:
            odd.append(SEVERAL_LINES)
        image = None if self.paths[i] == self.sounds[i] else read_file_inside(path, root)
        sound = read_file_inside(self.root / self.sounds[i], root) if self.sounds[i] else None
        return SourceSample(image, texts, metadata, odd=odd, lists_captions=self.caption_from == "lines", sound=sound)


class _Entry(NamedTuple):
    """A file below the folder."""

    path: str
    status: os.stat_result | None
    """None for a broken link."""
    is_sample: bool
    """Whether it is an image, or a sound without an image of the same name."""
    sound: str
    """The sound of the sample; "" = none."""


@dataclass
class FolderSource:
    """All images below a folder, sorted by path, with captions next to them or in their paths.

    A sound of the same name belongs to an image. Sounds without an image are samples of their own.
    """

    root: Path
    caption_from: str
    excluded: Path
    """The folder of the shards, which is skipped if it is inside `root`."""
    outside: bool = False
    """Whether links that lead out of `root` are followed."""
    caption_column: str = "caption"
    """The field of the json that lists the captions if each line of a file is one."""
    links: list[str] = field(default_factory=list, init=False)
    """Links to folders that were not followed because they lead out of `root`; set by `count`."""
    _lead_all_out: bool = field(default=False, init=False)
    """Whether every image is behind a link out of `root` that is not followed; set by `_scan`."""

    def iterate_jobs(self, shard_size: int) -> Iterator[ShardJob]:
        """Yield a job for each shard. Raises UserError for a folder that cannot be read."""
        first, chunk = 0, list[_Entry]()
        for entry in self._walk():
            if entry.is_sample:
                chunk.append(entry)
            if len(chunk) == shard_size:
                yield self._build_job(chunk, first)
                first, chunk = first + len(chunk), []
        if chunk:
            yield self._build_job(chunk, first)

    def _build_job(self, samples: list[_Entry], first: int) -> FolderJob:
        paths, sounds = [entry.path for entry in samples], [entry.sound for entry in samples]
        return FolderJob(self.root, paths, sounds, self.caption_from, self.outside, first)

    def list_files(self) -> list[tuple[str, str]]:
        """Return the paths of the image and of the sound of each sample, "" for what it lacks. Raises UserError."""
        samples = [entry for entry in self._walk() if entry.is_sample]
        return [("" if entry.path == entry.sound else entry.path, entry.sound) for entry in samples]

    def compute_fingerprint(self) -> str:
        """Return a digest of the names, sizes and times of all image, sound, caption and json files."""
        return self._scan[0]

    def count(self) -> int:
        """Return the number of samples. Raises UserError if there is nothing to pack."""
        _, images, sounds, texts = self._scan
        samples = images + sounds
        links = f"; {self.links[0]} is a link that leads out of it, --outside follows it" if self.links else ""
        if not samples:
            ends = ", ".join(f".{e}" for e in (*IMAGE_EXTENSIONS, *AUDIO_EXTENSIONS))
            raise UserError(f"{self.root} holds no images and no sounds: no file in it ends in {ends}{links}")
        content = " and ".join(format_count(n, kind) for n, kind in ((images, "image"), (sounds, "sound")) if n)
        if self.caption_from != "path" and not texts:
            raise UserError(
                f"{self.root} holds {content} and no .txt: put NAME.txt next to NAME.{'jpg' if images else 'wav'}, "
                "or use --caption-from path to take captions from the paths"
            )
        if self._lead_all_out:
            are = "is a link that leads" if samples == 1 else "are links that lead"
            raise UserError(f"{self.root}: its {content} {are} out of the folder: --outside follows links")
        return samples

    def get_notes(self) -> list[str]:
        """Return lines for the user about what the folder holds."""
        notes = [describe_caption_field(self.caption_column)] if self.caption_from == "lines" else []
        if self.links:
            names = ", ".join(self.links[:3]) + (", ..." if len(self.links) > 3 else "")
            notes.append(f"links to folders outside {self.root} are not followed ({names}): --outside follows them")
        return notes

    @cached_property
    def _scan(self) -> tuple[str, int, int, int]:
        """(digest, number of images, number of sounds without an image, number of caption files)"""
        digest, images, sounds, texts = hashlib.blake2b(digest_size=16), 0, 0, 0
        self.links = []
        self._lead_all_out = not self.outside
        for path, status, is_sample, _ in self._walk():
            extension = _get_extension(path)
            if is_sample:
                images += extension in IMAGE_EXTENSIONS
                sounds += extension in AUDIO_EXTENSIONS
                self._lead_all_out = self._lead_all_out and not _is_inside(self.root / path, str(self.root))
            texts += extension == "txt"
            if extension in (*IMAGE_EXTENSIONS, *AUDIO_EXTENSIONS, "txt", "json"):
                version = status and (status.st_size, status.st_mtime_ns)
                digest.update(f"{path}\0{version}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest(), images, sounds, texts

    def _walk(self, folder: str = "", ancestors: tuple[Path, ...] = ()) -> Iterator[_Entry]:
        """Yield each file below the root, sorted by path, without hidden ones.

        Links to folders are followed unless they lead to a folder above, or out of the
        root where that is not allowed.
        """
        directory = self.root / folder
        ancestors = (*ancestors, directory.resolve())
        try:
            with os.scandir(directory) as entries:
                visible = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
        except OSError as error:
            raise UserError(f"cannot read the folder {directory}: {error.strerror}") from error
        images, sounds = _find_stems([entry.name for entry in visible if not entry.is_dir()])
        for entry in visible:
            path = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir():
                if not self.outside and entry.is_symlink() and not _is_inside(Path(entry.path), str(self.root)):
                    self.links.append(path)
                elif Path(entry.path).resolve() not in (self.excluded, *ancestors):
                    yield from self._walk(path, ancestors)
            else:
                stem = entry.name.rpartition(".")[0]
                sound = sounds.get(stem, "")
                is_image = _get_extension(path) in IMAGE_EXTENSIONS
                is_sample = is_image or (sound == entry.name and stem not in images)
                status = entry.stat() if entry.is_file() else None
                yield _Entry(path, status, is_sample, f"{folder}/{sound}" if folder and sound else sound)


def _find_stems(names: list[str]) -> tuple[set[str], dict[str, str]]:
    """Return the names of images without their extensions, and the sound of each name: the first in AUDIO_EXTENSIONS."""
    images: set[str] = set()
    found: dict[str, dict[str, str]] = {}
    for name in names:
        stem, extension = name.rpartition(".")[0], _get_extension(name)
        if extension in IMAGE_EXTENSIONS:
            images.add(stem)
        elif extension in AUDIO_EXTENSIONS:
            found.setdefault(stem, {}).setdefault(extension, name)
    return images, {stem: files[min(files, key=AUDIO_EXTENSIONS.index)] for stem, files in found.items()}


def _get_extension(path: str) -> str:
    return path.rpartition(".")[2].lower()
