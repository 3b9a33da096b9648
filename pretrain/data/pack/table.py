"""Packs tables that name images or contain them.

A table may come from an untrusted source, so the paths in it must stay below its folder unless the user allows otherwise.
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
from pretrain.data.pack.writer import ShardJob, SourceSample
from pretrain.errors import ConfigError, UserError, closest


@dataclass
class TableJob:
    """The rows of one shard."""

    rows: list[tuple[str, dict[str, Any]]]
    """(folder of the table, values by column) of each row."""
    image_column: str
    caption_column: str
    outside: bool
    first: int

    def __len__(self) -> int:
        return len(self.rows)

    def describe(self, i: int) -> str:
        """Return how the user finds sample `i` in the source."""
        value = self.rows[i][1].get(self.image_column)
        path = value.get("path") if isinstance(value, dict) else value
        suffix = f": {_to_text(path)}" if isinstance(path, str | bytes) and 0 < len(path) < 300 else ""
        return f"row {self.first + i + 1}{suffix}"

    def get_key(self, i: int, shard: int) -> str:
        """Return the KEY of sample `i` in the shard."""
        return f"{self.first + i:08d}"

    def load(self, i: int) -> SourceSample:
        """Read sample `i`. Raises BadSample."""
        base, values = self.rows[i]
        row = dict(values)
        if table_readers.UNREADABLE in row:
            raise BadSample("row unreadable", str(row[table_readers.UNREADABLE]))
        image_value, texts = row.pop(self.image_column, None), self._read_captions(row.pop(self.caption_column, None))
        image, source = self._read_image(image_value, base)
        metadata = {"source": source} if source else {}
        for name, value in row.items():
            metadata[name] = _parse_column(name, value)
        return SourceSample(image, texts, metadata)

    def _read_captions(self, value: Any) -> list[str]:
        """Return the texts of a value that are not empty, with whitespace normalized. Raises BadSample."""
        if value is None:
            raise BadSample("no caption", f"{self.caption_column} is empty")
        values = value if isinstance(value, list) else [value]
        try:
            texts = [v.decode("utf-8") if isinstance(v, bytes) else str(v) for v in values if v is not None]
        except UnicodeDecodeError as error:
            raise BadSample("caption not UTF-8", str(error)) from error
        captions = [text for text in map(normalize_whitespace, texts) if text]
        if not captions:
            raise BadSample("empty caption", f"{self.caption_column} is empty")
        return captions

    def _read_image(self, value: Any, base: str) -> tuple[bytes, str]:
        """Return (content of the image, its path or "").

        The value is a path below the table's folder `base`, or the image itself, as parquet files may contain it.
        """
        if isinstance(value, dict):  # as the `datasets` library stores images: {"bytes": ..., "path": ...}
            content = value.get("bytes")
            path = value.get("path")
            return (content, _to_text(path) if path else "") if content else self._read_image(path, base)
        if isinstance(value, bytes) and (b"\0" in value[:64] or len(value) > 4096):
            return value, ""
        text = _to_text(value).strip() if value is not None else ""
        if not text:
            raise BadSample("no image", f"{self.image_column} is empty")
        if "://" in text[:12]:
            raise BadSample("a url, not a file", "download the images first, for example with img2dataset")
        path = os.path.normpath(os.path.join(base, os.path.expanduser(text) if self.outside else text))
        if not self.outside and not path.startswith(base.rstrip("/") + "/"):
            raise BadSample("path outside the table's folder", "--outside allows it")
        return read_file(Path(path)), text


def _to_text(value: Any) -> str:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


def _parse_column(name: str, value: Any) -> Any:
    """Return the value of a further column.

    Text tables hold JSON in the columns `questions` and `objects`, and an integer in `label`.
    """
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    if name in ("questions", "objects") and isinstance(text, str):
        try:
            return json.loads(text) if text.strip() else None
        except (ValueError, RecursionError) as error:
            raise BadSample(f"{name} not json", str(error)) from error
    return int(text) if name == "label" and isinstance(text, str) and re.fullmatch(r"-?\d{1,18}", text) else text


@dataclass
class TableSource:
    """Rows of one or several CSV, TSV, JSON-lines or Parquet files, in order."""

    paths: list[Path]
    image_column: str
    caption_column: str
    outside: bool
    uneven: int = field(default=0, init=False)
    """Number of rows that were skipped because they have too few or too many values; set by `count`."""
    uneven_rows: list[str] = field(default_factory=list, init=False)
    """The text of the first few such rows."""

    def __post_init__(self) -> None:
        for path in self.paths:
            with table_readers.naming_errors(path):
                columns = table_readers.read_columns(path)
            for column, option in ((self.image_column, "--image-column"), (self.caption_column, "--caption-column")):
                if column not in columns:
                    names = ", ".join(columns[:30]) + (f" and {len(columns) - 30} more" if len(columns) > 30 else "")
                    raise ConfigError(
                        f"{path}: no column {column!r}{closest(column, columns)}; "
                        f"it has {names or 'none'}: name it with {option}"
                    )
                if columns.count(column) > 1:
                    raise ConfigError(f"{path}: two columns are called {column!r}")

    def compute_fingerprint(self) -> str:
        """Return a digest of the names, sizes and times of the files, and of their first and last 64 KiB."""
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
        """Return the number of rows.

        Text tables are read to the end, so that a damaged one is detected before anything is written.
        """
        total, self.uneven = 0, 0
        for path in self.paths:
            with table_readers.naming_errors(path):
                total += table_readers.count_rows(path, self.image_column, self._note_uneven)
        if not total:
            raise UserError(f"{', '.join(map(str, self.paths))}: there are no rows")
        return total

    def _note_uneven(self, row: str) -> None:
        self.uneven += 1
        if self.uneven <= 3:
            self.uneven_rows.append(row)

    def iterate_jobs(self, shard_size: int) -> Iterator[ShardJob]:
        """Yield a job for each shard. Raises UserError for a file that cannot be read."""
        first = 0
        chunk: list[tuple[str, dict[str, Any]]] = []
        for path in self.paths:
            base = os.path.abspath(path.parent)
            with table_readers.naming_errors(path):
                for row in table_readers.iterate_rows(path):
                    chunk.append((base, row))
                    if len(chunk) == shard_size:
                        yield TableJob(chunk, self.image_column, self.caption_column, self.outside, first)
                        first, chunk = first + len(chunk), []
        if chunk:
            yield TableJob(chunk, self.image_column, self.caption_column, self.outside, first)
