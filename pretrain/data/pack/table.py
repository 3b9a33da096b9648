"""Packs tables that name images or contain them. Rows that name the same image become one sample with several captions.

A table may come from an untrusted source, so the paths in it must stay below its folder unless the user allows otherwise.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.data import BadSample
from pretrain.data.caption_statistics import find_oddities
from pretrain.data.captions import normalize_whitespace
from pretrain.data.pack import table_readers
from pretrain.data.pack.folder import read_file_inside
from pretrain.data.pack.grouping import RowGroups, identify_image, is_image_content
from pretrain.data.pack.writer import ShardJob, SourceSample, describe_caption_field
from pretrain.errors import ConfigError, UserError, closest
from pretrain.printable import format_count

_MAX_EXAMPLES = 3  # rows shown for each reason

_LISTS = ("questions", "objects")
"""Columns that hold lists. Text tables write them as JSON."""


class TableRow(NamedTuple):
    """The rows of one image."""

    number: int
    """Number of its first row, from 1."""
    base: str
    """The folder that its path is relative to."""
    rows: list[dict[str, Any]]
    """Values by column. The first row has the image."""


@dataclass
class TableJob:
    """The images of one shard."""

    images: list[TableRow]
    image_column: str
    caption_column: str
    outside: bool
    lists_captions: bool
    """Whether the json of every sample lists its captions, because some images of the table have several rows."""
    first: int

    def __len__(self) -> int:
        return len(self.images)

    def describe(self, i: int) -> str:
        """Return how the user finds sample `i` in the source."""
        value = self.images[i].rows[0].get(self.image_column)
        path = value.get("path") if isinstance(value, dict) else value
        suffix = f": {_to_text(path)}" if isinstance(path, str | bytes) and 0 < len(path) < 300 else ""
        return f"row {self.images[i].number}{suffix}"

    def get_key(self, i: int, shard: int) -> str:
        """Return the KEY of sample `i` in the shard."""
        return f"{self.first + i:08d}"

    def load(self, i: int) -> SourceSample:
        """Read sample `i`. Raises BadSample."""
        _, base, rows = self.images[i]
        if table_readers.UNREADABLE in rows[0]:
            raise BadSample("row unreadable", str(rows[0][table_readers.UNREADABLE]))
        captions: list[str] = []
        unusable: list[BadSample] = []
        for value in self._list_captions(rows):
            try:
                captions.append(self._read_caption(value))
            except BadSample as bad:
                unusable.append(bad)
        if not captions:
            raise unusable[0]
        if len(set(captions)) == 1:  # a table with a row for each object of an image repeats its caption
            captions = captions[:1]
        image, source = self._read_image(rows[0].get(self.image_column), base)
        metadata: dict[str, Any] = {"source": source} if source else {}
        columns, has_conflict = _merge_columns(rows, (self.image_column, self.caption_column))
        metadata |= columns
        return SourceSample(
            image,
            captions,
            metadata,
            dropped=[bad.reason for bad in unusable],
            odd=[oddity for caption in captions for oddity in find_oddities(caption)],
            has_label_conflict=has_conflict,
            lists_captions=self.lists_captions,
        )

    def _list_captions(self, rows: list[dict[str, Any]]) -> Iterator[Any]:
        """Yield the value of each caption; None for a row without one."""
        for row in rows:
            value = row.get(self.caption_column)
            if isinstance(value, list) and value:
                yield from value
            else:
                yield None if value == [] else value

    def _read_caption(self, value: Any) -> str:
        """Return a caption with whitespace normalized. Raises BadSample for one that is missing, empty, or no text."""
        if _is_missing(value):
            raise BadSample("no caption", f"{self.caption_column} is {'NaN' if isinstance(value, float) else 'empty'}")
        if isinstance(value, bool) or not isinstance(value, str | bytes | int | float):
            raise BadSample("caption not text", f"{self.caption_column} is {str(value)[:100]}")
        try:
            text = normalize_whitespace(value.decode("utf-8") if isinstance(value, bytes) else str(value))
        except UnicodeDecodeError as error:
            raise BadSample("caption not UTF-8", str(error)) from error
        if not text:
            raise BadSample("empty caption", f"{self.caption_column} is empty")
        return text

    def _read_image(self, value: Any, base: str) -> tuple[bytes, str]:
        """Return (content of the image, its path or "").

        The value is a path below the table's folder `base`, or the image itself, as parquet files may contain it.
        """
        if isinstance(value, dict):  # as the `datasets` library stores images: {"bytes": ..., "path": ...}
            content = value.get("bytes")
            path = value.get("path")
            return (content, _to_text(path) if path else "") if content else self._read_image(path, base)
        if is_image_content(value):
            return value, ""
        text = _to_text(value).strip() if value is not None else ""
        if not text:
            raise BadSample("no image", f"{self.image_column} is empty")
        if "://" in text[:12]:
            raise BadSample("a url, not a file", "download the images first, for example with img2dataset")
        path = os.path.normpath(os.path.join(base, os.path.expanduser(text) if self.outside else text))
        if not self.outside and not path.startswith(base.rstrip("/") + "/"):
            raise BadSample("path outside the table's folder", "--outside allows it")
        return read_file_inside(Path(path), None if self.outside else base), text


def _merge_columns(rows: list[dict[str, Any]], omitted: tuple[str, ...]) -> tuple[dict[str, Any], bool]:
    """Return (further columns of the rows of one image, whether the rows have different labels).

    A value that all rows share stays as it is. Lists of questions and objects are joined, and the first label is used. Other
    values become a list, with None where a row has none.
    """
    merged: dict[str, Any] = {}
    has_conflict = False
    for name in dict.fromkeys(name for row in rows for name in row if name not in omitted):
        values = [None if _is_missing(value) else value for value in (_parse_column(name, row.get(name)) for row in rows)]
        if all(value == values[0] for value in values[1:]):
            merged[name] = values[0]
        elif name in _LISTS and all(value is None or isinstance(value, list) for value in values):
            joined = (item for value in values for item in value or [])
            merged[name] = list({json.dumps(item, sort_keys=True, default=str): item for item in joined}.values())
        elif name == "label":
            labels = [value for value in values if value not in (None, "", b"")]
            merged[name] = labels[0] if labels else None
            has_conflict = any(label != labels[0] for label in labels)
        else:
            merged[name] = values
    return merged, has_conflict


def _is_missing(value: Any) -> bool:
    """Whether a table holds no value: null, or the NaN that pandas writes in its place."""
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _to_text(value: Any) -> str:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


def _parse_column(name: str, value: Any) -> Any:
    """Return the value of a further column.

    Text tables hold JSON in the columns `questions` and `objects`, and an integer in `label`.
    """
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    if name in _LISTS and isinstance(text, str):
        try:
            return json.loads(text) if text.strip() else None
        except (ValueError, RecursionError) as error:
            raise BadSample(f"{name} not json", str(error)) from error
    return int(text) if name == "label" and isinstance(text, str) and re.fullmatch(r"-?\d{1,18}", text) else text


@dataclass
class TableSource:
    """Rows of one or several CSV, TSV, JSON-lines, Parquet or annotation files, in order; rows of one image are one sample."""

    paths: list[Path]
    image_column: str
    caption_column: str
    outside: bool
    separator: str | None = None
    """Between the values of CSV and TSV files; None = detect it."""
    image_root: Path | None = None
    """The folder that paths of images are relative to; None = the folder of the table."""
    splits: tuple[str, ...] = ()
    """Splits to read from annotation files that have splits; () = all."""
    rejected: dict[str, list[str]] = field(default_factory=dict, init=False)
    """By reason, the text of the first few rows that cannot be read; set by `count`."""
    rejected_counts: Counter[str] = field(default_factory=Counter, init=False)
    """Number of such rows by reason; set by `count`."""

    def __post_init__(self) -> None:
        wanted = (self.image_column, self.caption_column)
        self._tables: list[table_readers.Table] = []
        self._bases: list[str] = []
        for path in self.paths:
            with table_readers.naming_errors(path):
                table = table_readers.open_table(path, self.separator, tuple(map(str.strip, wanted)), self.splits)
            if table.layout:
                self.image_column, self.caption_column = map(str.strip, wanted)
            if table.annotations:
                base = self.image_root or table.annotations.find_root(self.outside)
            else:
                base = self.image_root or path.parent
                self._check_columns(table)
                if self.splits:
                    raise ConfigError(f"--split {','.join(self.splits)}: {path} has no splits")
            self._tables.append(table)
            self._bases.append(os.path.abspath(base))

    def _check_columns(self, table: table_readers.Table) -> None:
        """Raise ConfigError if the columns of images and captions are absent or not unique."""
        columns = table.columns
        separated = ""
        if table.layout:
            by = f"separated by {table.layout.separator_name}, " if len(columns) > 1 else ""
            separated = f" (its first line is read as names, {by}--separator names another separator)"
        for column, option in ((self.image_column, "--image-column"), (self.caption_column, "--caption-column")):
            if column not in columns:
                names = ", ".join(columns[:30]) + (f" and {len(columns) - 30} more" if len(columns) > 30 else "")
                raise ConfigError(
                    f"{table.path}: no column {column!r}{closest(column, columns)}; "
                    f"it has {names or 'none'}: name it with {option}{separated}"
                )
            if columns.count(column) > 1:
                raise ConfigError(f"{table.path}: two columns are called {column!r}")

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
        """Return the number of images.

        Tables are read to the end, so that a damaged one is detected before anything is written.
        """
        if not self._groups.count:
            names = ", ".join(map(str, self.paths))
            if self.rejected:
                reason, examples = next(iter(self.rejected.items()))
                raise UserError(
                    f"{names}: no row can be read; {self.rejected_counts[reason]:,} have the problem: {reason}: {examples[0]}"
                )
            raise UserError(f"{names}: there are no rows")
        return self._groups.count

    def get_notes(self) -> list[str]:
        """Return lines for the user about what the tables hold."""
        notes = [note for table in self._tables if table.annotations for note in table.annotations.notes]
        if self._groups.repeats:
            notes.append(
                f"{format_count(self._groups.rows, 'row')} name {format_count(self._groups.count, 'image')}: "
                "rows of one image are one sample with several captions"
            )
        if self._lists_captions:
            notes.append(describe_caption_field(self.caption_column))
        return notes

    @property
    def _lists_captions(self) -> bool:
        return self._groups.repeats or any(table.annotations for table in self._tables)

    @cached_property
    def _groups(self) -> RowGroups:
        """Which rows name the same image; computing it reads all tables."""
        return RowGroups(self._identify_images())

    def _identify_images(self) -> Iterator[bytes | None]:
        for table, base in zip(self._tables, self._bases, strict=True):
            image_column = "image" if table.annotations else self.image_column
            with table_readers.naming_errors(table.path):
                for value in table.iterate_images(image_column, self._note_rejected):
                    yield identify_image(value, base)

    def _note_rejected(self, reason: str, row: str) -> None:
        self.rejected_counts[reason] += 1
        examples = self.rejected.setdefault(reason, [])
        if len(examples) < _MAX_EXAMPLES:
            examples.append(row)

    def _iterate_rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (folder that its path is relative to, values by column) of each row that can be read."""
        for table, base in zip(self._tables, self._bases, strict=True):
            with table_readers.naming_errors(table.path):
                for row in table.iterate_rows(self.image_column, _ignore_rejected):
                    if table.annotations:
                        row = {self.image_column: row["image"], self.caption_column: row["caption"], **row}
                        for name in {"image", "caption"} - {self.image_column, self.caption_column}:
                            del row[name]
                    yield base, row

    def iterate_jobs(self, shard_size: int) -> Iterator[ShardJob]:
        """Yield a job for each shard. Raises UserError for a file that cannot be read."""
        first = 0
        chunk: list[TableRow] = []
        for i, rows in self._groups.iterate_groups(self._iterate_rows, self.image_column):
            chunk.append(TableRow(i + 1, rows[0][0], [values for _, values in rows]))
            if len(chunk) == shard_size:
                yield self._build_job(chunk, first)
                first, chunk = first + len(chunk), []
        if chunk:
            yield self._build_job(chunk, first)

    def _build_job(self, images: list[TableRow], first: int) -> TableJob:
        return TableJob(images, self.image_column, self.caption_column, self.outside, self._lists_captions, first)


def _ignore_rejected(reason: str, row: str) -> None:
    """Rows that cannot be read were counted when the table was read first."""
