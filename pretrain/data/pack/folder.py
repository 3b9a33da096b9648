"""Packing a folder of pictures, whose captions lie beside them or in their paths."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pretrain.data import BadSample
from pretrain.data.captions import normalize_whitespace, read_captions
from pretrain.data.pack.writer import Item, Job
from pretrain.errors import UserError

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
"""Extensions of files that are taken for pictures in a folder; what they hold decides how they are read."""

MAX_FILE_BYTES = 1 << 28
"""Files above 256 MiB are no pictures or captions."""


def read_file(path: Path) -> bytes:
    """A file of bounded size. Raises BadSample where there is none; other troubles are OSErrors."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:  # a pipe would wait
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadSample("no such file", f"{path} is no regular file")
            if status.st_size > MAX_FILE_BYTES:
                raise BadSample("file too large", f"{path} has {status.st_size:,} bytes, more than {MAX_FILE_BYTES:,}")
            return file.read()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise BadSample("no such file", str(path)) from error
    except PermissionError as error:
        raise BadSample("no permission to read the file", str(path)) from error
    except ValueError as error:  # a NUL in the name
        raise BadSample("no such file", repr(str(path))) from error


def path_caption(path: str) -> str:
    """shoes/red_sneaker-3.jpg -> "shoes red sneaker": words of the path below the folder, without those of digits only."""
    words = re.split(r"[\s/\\_.+-]+", path.rpartition(".")[0])
    return normalize_whitespace(" ".join(word for word in words if word and not word.isdigit()))


@dataclass
class FolderJob:
    """Pictures of one shard."""

    root: Path
    paths: list[str]
    caption_from: str
    first: int

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        """How a person finds the sample."""
        return self.paths[i]

    def key(self, i: int, shard: int) -> str:
        """KEY in the shard."""
        return f"{self.first + i:08d}"

    def load(self, i: int) -> Item:
        """Reads it. Raises BadSample."""
        path = self.root / self.paths[i]
        if self.caption_from == "path":
            texts = [path_caption(self.paths[i])]
            if not texts[0]:
                raise BadSample("empty caption", "its path holds no word")
        else:
            try:
                texts = read_captions({"txt": read_file(path.with_suffix(".txt"))})
            except BadSample as bad:
                raise BadSample("no caption", bad.detail) if bad.reason == "no such file" else bad from bad
        notes: dict[str, Any] = {"source": self.paths[i]}
        beside = path.with_suffix(".json")
        if beside.exists():
            try:
                given = json.loads(read_file(beside))
            except (ValueError, RecursionError) as error:
                raise BadSample("json unreadable", f"{beside}: {error}") from error
            if isinstance(given, dict):
                notes |= given
        return Item(read_file(path), texts, notes)


@dataclass
class Folder:
    """Pictures anywhere below a folder, sorted by path; captions beside them or in their paths."""

    root: Path
    caption_from: str
    leave_out: Path
    """Where the shards go, if that is inside."""

    def jobs(self, shard_size: int) -> Iterator[Job]:
        """Raises UserError."""
        first, chunk = 0, []
        for path, _ in self._files():
            if _suffix(path) in PICTURES:
                chunk.append(path)
            if len(chunk) == shard_size:
                yield FolderJob(self.root, chunk, self.caption_from, first)
                first, chunk = first + len(chunk), []
        if chunk:
            yield FolderJob(self.root, chunk, self.caption_from, first)

    def fingerprint(self) -> str:
        """Of names, sizes and times of all pictures, captions and notes."""
        return self._scan[0]

    def count(self) -> int:
        """Raises UserError where there is nothing to pack."""
        _, pictures, texts = self._scan
        if not pictures:
            raise UserError(f"{self.root} holds no pictures: no file in it ends in {', '.join(f'.{e}' for e in PICTURES)}")
        if self.caption_from == "txt" and not texts:
            raise UserError(
                f"{self.root} holds {pictures:,} pictures and no .txt: put NAME.txt beside NAME.jpg, "
                "or use --caption-from path to take captions from the paths"
            )
        return pictures

    @cached_property
    def _scan(self) -> tuple[str, int, int]:
        digest, pictures, texts = hashlib.blake2b(digest_size=16), 0, 0
        for path, status in self._files():
            kind = _suffix(path)
            pictures += kind in PICTURES
            texts += kind == "txt"
            if kind in (*PICTURES, "txt", "json"):
                about = status and (status.st_size, status.st_mtime_ns)
                digest.update(f"{path}\0{about}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest(), pictures, texts

    def _files(self, below: str = "", above: tuple[Path, ...] = ()) -> Iterator[tuple[str, os.stat_result | None]]:
        """Path below the root and status (None: a link to nothing) of each file, sorted, hidden ones left out. Links to
        folders are followed, unless they lead back."""
        here = self.root / below
        above = (*above, here.resolve())
        try:
            with os.scandir(here) as entries:
                found = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
        except OSError as error:
            raise UserError(f"cannot read the folder {here}: {error.strerror}") from error
        for entry in found:
            path = f"{below}/{entry.name}" if below else entry.name
            if entry.is_dir():
                if Path(entry.path).resolve() not in (self.leave_out, *above):
                    yield from self._files(path, above)
            else:
                yield path, entry.stat() if entry.is_file() else None


def _suffix(path: str) -> str:
    return path.rpartition(".")[2].lower()
