"""Packing a table that names pictures, or holds them.

What is in a table was written by others: its pictures must lie below its folder unless the user says otherwise.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.data import BadSample
from pretrain.data.captions import normalize_whitespace
from pretrain.data.pack import table_readers
from pretrain.data.pack.folder import read_file
from pretrain.data.pack.writer import Item, Job
from pretrain.errors import ConfigError, UserError, closest


@dataclass
class TableJob:
    """Rows of one shard."""

    rows: list[tuple[str, dict[str, Any]]]
    """Folder of the table, and values by column."""
    image_column: str
    caption_column: str
    outside: bool
    first: int

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, i: int) -> str:
        """How a person finds the sample."""
        value = self.rows[i][1].get(self.image_column)
        named = value.get("path") if isinstance(value, dict) else value
        path = f": {_text(named)}" if isinstance(named, str | bytes) and 0 < len(named) < 300 else ""
        return f"row {self.first + i + 1}{path}"

    def key(self, i: int, shard: int) -> str:
        """KEY in the shard."""
        return f"{self.first + i:08d}"

    def load(self, i: int) -> Item:
        """Reads it. Raises BadSample."""
        base, values = self.rows[i]
        row = dict(values)
        if table_readers.BROKEN in row:
            raise BadSample("row unreadable", str(row[table_readers.BROKEN]))
        picture, texts = row.pop(self.image_column, None), self._captions(row.pop(self.caption_column, None))
        image, source = self._image(picture, base)
        notes = {"source": source} if source else {}
        for name, value in row.items():
            notes[name] = _structured(name, value)
        return Item(image, texts, notes)

    def _captions(self, value: Any) -> list[str]:
        if value is None:
            raise BadSample("no caption", f"{self.caption_column} is empty")
        given = value if isinstance(value, list) else [value]
        try:
            texts = [v.decode("utf-8") if isinstance(v, bytes) else str(v) for v in given if v is not None]
        except UnicodeDecodeError as error:
            raise BadSample("caption not UTF-8", str(error)) from error
        cleaned = [text for text in map(normalize_whitespace, texts) if text]
        if not cleaned:
            raise BadSample("empty caption", f"{self.caption_column} is empty")
        return cleaned

    def _image(self, value: Any, base: str) -> tuple[bytes, str]:
        """(content, path or ""): a path below the table's folder, or the picture itself, as parquet files may hold it."""
        if isinstance(value, dict):  # the `datasets` library: {"bytes": ..., "path": ...}
            inner = value.get("bytes")
            named = value.get("path")
            return (inner, _text(named) if named else "") if inner else self._image(named, base)
        if isinstance(value, bytes) and (b"\0" in value[:64] or len(value) > 4096):
            return value, ""
        text = _text(value).strip() if value is not None else ""
        if not text:
            raise BadSample("no image", f"{self.image_column} is empty")
        if "://" in text[:12]:
            raise BadSample("a url, not a file", "download the pictures first, for example with img2dataset")
        path = os.path.normpath(os.path.join(base, os.path.expanduser(text) if self.outside else text))
        if not self.outside and not path.startswith(base.rstrip("/") + "/"):
            raise BadSample("path outside the table's folder", "--outside allows it")
        return read_file(Path(path)), text


def _text(value: Any) -> str:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


def _structured(name: str, value: Any) -> Any:
    """The value of a further column. In tables of text the contract's structured fields are written as json."""
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    if name in ("questions", "objects") and isinstance(text, str):
        try:
            return json.loads(text) if text.strip() else None
        except (ValueError, RecursionError) as error:
            raise BadSample(f"{name} not json", str(error)) from error
    return int(text) if name == "label" and isinstance(text, str) and re.fullmatch(r"-?\d{1,18}", text) else text


@dataclass
class Table:
    """Rows of one or several CSV, TSV, JSON-lines or Parquet files, in order."""

    paths: list[Path]
    image_column: str
    caption_column: str
    outside: bool
    uneven: int = field(default=0, init=False)
    """Rows left out because they have too few or too many values; `count` finds them."""
    uneven_rows: list[str] = field(default_factory=list, init=False)
    """The first few of them."""

    def __post_init__(self) -> None:
        for path in self.paths:
            with table_readers.reading(path):
                found = table_readers.columns(path)
            for column, option in ((self.image_column, "--image-column"), (self.caption_column, "--caption-column")):
                if column not in found:
                    has = ", ".join(found[:30]) + (f" and {len(found) - 30} more" if len(found) > 30 else "")
                    raise ConfigError(
                        f"{path}: no column {column!r}{closest(column, found)}; it has {has or 'none'}: name it with {option}"
                    )
                if found.count(column) > 1:
                    raise ConfigError(f"{path}: two columns are called {column!r}")

    def fingerprint(self) -> str:
        """Of the names, sizes, times, and both ends of the files."""
        digest = hashlib.blake2b(digest_size=16)
        for path in self.paths:
            status = path.stat()
            digest.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
            with open(path, "rb") as file:
                digest.update(file.read(1 << 16))
                file.seek(max(0, status.st_size - (1 << 16)))
                digest.update(file.read())
        return digest.hexdigest()

    def count(self) -> int:
        """Rows; one pass over text tables, so that a damaged one is found before anything is written."""
        total, self.uneven = 0, 0
        for path in self.paths:
            with table_readers.reading(path):
                total += table_readers.count(path, self.image_column, self._note_uneven)
        if not total:
            raise UserError(f"{', '.join(map(str, self.paths))}: there are no rows")
        return total

    def _note_uneven(self, row: str) -> None:
        self.uneven += 1
        if self.uneven <= 3:
            self.uneven_rows.append(row)

    def jobs(self, shard_size: int) -> Iterator[Job]:
        """Raises UserError for a file that cannot be read."""
        first = 0
        chunk: list[tuple[str, dict[str, Any]]] = []
        for path in self.paths:
            base = os.path.abspath(path.parent)
            with table_readers.reading(path):
                for row in table_readers.rows(path):
                    chunk.append((base, row))
                    if len(chunk) == shard_size:
                        yield TableJob(chunk, self.image_column, self.caption_column, self.outside, first)
                        first, chunk = first + len(chunk), []
        if chunk:
            yield TableJob(chunk, self.image_column, self.caption_column, self.outside, first)
