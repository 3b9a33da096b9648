"""Packs tables that name images, sounds or both, or contain them.

Rows that name the same image and the same sound become one sample with several captions.

A table may come from an untrusted source, so the paths in it must stay below its folder unless the user allows otherwise.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from pretrain.data.audio_files import AUDIO_EXTENSIONS
from pretrain.data.members import UNREAD_SOUNDS
from pretrain.data.pack import table_readers
from pretrain.data.pack.grouping import RowGroups, identify_files, is_image_content
from pretrain.data.pack.table_rows import TableJob, TableRow, to_text
from pretrain.data.pack.writer import ShardJob, describe_caption_field
from pretrain.errors import ConfigError, UserError, closest
from pretrain.printable import format_count

_MAX_EXAMPLES = 3  # rows shown for each reason

AUDIO_COLUMN = "audio"
"""Default name of the column of sounds, which a table need not have. Values that name no sounds are text like any other."""

_PROBED_ROWS, _PROBED_VALUES = 1000, 100  # of a table, to see whether its column of that name names sounds
_SOUNDS = {*AUDIO_EXTENSIONS, *UNREAD_SOUNDS, "oga", "opus", "wave"}


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
    audio_column: str = ""
    """The path of the sound, or the sound itself; "" = AUDIO_COLUMN, where a table has such a column and it names sounds."""
    rejected: dict[str, list[str]] = field(default_factory=dict, init=False)
    """By reason, the text of the first few rows that cannot be read; set by `count`."""
    rejected_counts: Counter[str] = field(default_factory=Counter, init=False)
    """Number of such rows by reason; set by `count`."""

    def __post_init__(self) -> None:
        self._is_named = bool(self.audio_column)
        self._text_example = ""  # of AUDIO_COLUMN, where it is text
        self.audio_column = self.audio_column or AUDIO_COLUMN
        wanted = (self.image_column, self.caption_column, self.audio_column)
        self._tables: list[table_readers.Table] = []
        self._bases: list[str] = []
        for path in self.paths:
            with table_readers.naming_errors(path):
                table = table_readers.open_table(path, self.separator, tuple(map(str.strip, wanted)), self.splits)
            if table.layout:
                self.image_column, self.caption_column, self.audio_column = map(str.strip, wanted)
            if table.annotations:
                base = self.image_root or table.annotations.find_root(self.outside)
            else:
                base = self.image_root or path.parent
                self._check_columns(table)
                if self.splits:
                    raise ConfigError(f"--split {','.join(self.splits)}: {path} has no splits")
            self._tables.append(table)
            self._bases.append(os.path.abspath(base))
        if not self._is_named and self.audio_column != self.image_column:
            self._text_example = self._find_text()
            self._check_text()

    def _check_columns(self, table: table_readers.Table) -> None:
        """Raise ConfigError if the columns of images, or else sounds, and captions are absent or not unique."""
        columns = table.columns
        separated = ""
        if table.layout:
            by = f"separated by {table.layout.separator_name}, " if len(columns) > 1 else ""
            separated = f" (its first line is read as names, {by}--separator names another separator)"
        for column, option, is_needed in (
            (self.audio_column, "--audio-column", self._is_named),
            (self.image_column, "--image-column (or --audio-column)", self.audio_column not in columns),
            (self.caption_column, "--caption-column", True),
        ):
            if column not in columns and is_needed:
                names = ", ".join(columns[:30]) + (f" and {len(columns) - 30} more" if len(columns) > 30 else "")
                raise ConfigError(
                    f"{table.path}: no column {column!r}{closest(column, columns)}; "
                    f"it has {names or 'none'}: name it with {option}{separated}"
                )
            if columns.count(column) > 1:
                raise ConfigError(f"{table.path}: two columns are called {column!r}")

    def _find_text(self) -> str:
        """Return a value of the columns of sounds, where the first values of none of them name a sound; else "".

        Without any value, the column may have some further down.
        """
        example = ""
        for table, base in zip(self._tables, self._bases, strict=True):
            if table.annotations or self.audio_column not in table.columns:
                continue
            with table_readers.naming_errors(table.path):
                rows = islice(table.iterate_files([self.audio_column], _ignore_rejected), _PROBED_ROWS)
                values = [value for (value,) in rows if value not in (None, "", b"")][:_PROBED_VALUES]
            if any(_names_sound(value, base) for value in values):
                return ""
            example = example or " ".join(to_text(values[0]).split())[:40] if values else example
        return example

    def _check_text(self) -> None:
        """Raise ConfigError for a table whose only column of files is text."""
        for table in self._tables:
            if self._text_example and not self._file_columns(table):
                raise ConfigError(
                    f"{table.path}: there is no column {self.image_column!r}, and {AUDIO_COLUMN!r} names no sounds "
                    f"({self._text_example!r}): name the column of files with --image-column or --audio-column"
                )

    def _file_columns(self, table: table_readers.Table) -> list[str]:
        """Return the columns of images and sounds of a table, as many as it has, at least one."""
        if table.annotations:
            return [self.image_column]
        names = (self.image_column, *([] if self._text_example else [self.audio_column]))
        return [column for column in dict.fromkeys(names) if column in table.columns]

    @property
    def has_sounds(self) -> bool:
        """Whether a table has a column of sounds."""
        return self.audio_column != self.image_column and any(
            self.audio_column in self._file_columns(table) for table in self._tables
        )

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
            has_images = any(self.image_column in self._file_columns(table) for table in self._tables)
            noun = "image" if has_images else "sound"
            notes.append(
                f"{format_count(self._groups.rows, 'row')} name {format_count(self._groups.count, noun)}: "
                f"rows of one {noun} are one sample with several captions"
            )
        if self._text_example:
            notes.append(
                f"the column {AUDIO_COLUMN} names no sounds ({self._text_example!r}), so it is kept in the json; "
                f"--audio-column {AUDIO_COLUMN} reads it as paths"
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
            columns = ["image"] if table.annotations else self._file_columns(table)
            with table_readers.naming_errors(table.path):
                for values in table.iterate_files(columns, self._note_rejected):
                    yield identify_files(values, base)

    def _note_rejected(self, reason: str, row: str) -> None:
        self.rejected_counts[reason] += 1
        examples = self.rejected.setdefault(reason, [])
        if len(examples) < _MAX_EXAMPLES:
            examples.append(row)

    def _iterate_rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (folder that its path is relative to, values by column) of each row that can be read."""
        for table, base in zip(self._tables, self._bases, strict=True):
            with table_readers.naming_errors(table.path):
                for row in table.iterate_rows(self._file_columns(table)[0], _ignore_rejected):
                    if table.annotations:
                        row = {self.image_column: row["image"], self.caption_column: row["caption"], **row}
                        for name in {"image", "caption"} - {self.image_column, self.caption_column}:
                            del row[name]
                    yield base, row

    def iterate_jobs(self, shard_size: int) -> Iterator[ShardJob]:
        """Yield a job for each shard. Raises UserError for a file that cannot be read."""
        first = 0
        chunk: list[TableRow] = []
        for i, rows in self._groups.iterate_groups(self._iterate_rows, (self.image_column, self.audio_column)):
            chunk.append(TableRow(i + 1, rows[0][0], [values for _, values in rows]))
            if len(chunk) == shard_size:
                yield self._build_job(chunk, first)
                first, chunk = first + len(chunk), []
        if chunk:
            yield self._build_job(chunk, first)

    def _build_job(self, images: list[TableRow], first: int) -> TableJob:
        has_images = any(self.image_column in self._file_columns(table) for table in self._tables)
        image, audio = self.image_column if has_images else "", self.audio_column if self.has_sounds else ""
        return TableJob(images, image, self.caption_column, self.outside, self._lists_captions, first, audio)


def _names_sound(value: Any, base: str) -> bool:
    """Return whether a value of a table is a sound or names one: by its extension, as a url, or as a file below `base`."""
    if isinstance(value, dict):  # {"bytes": ..., "path": ...}
        return bool(value.get("bytes")) or _names_sound(value.get("path"), base)
    if is_image_content(value):
        return True
    if not isinstance(value, str | bytes):
        return False
    text = to_text(value).strip()
    is_file = text.rpartition(".")[2].lower() in _SOUNDS or "://" in text[:12]
    return is_file or os.path.isfile(os.path.join(base, text))


def _ignore_rejected(reason: str, row: str) -> None:
    """Rows that cannot be read were counted when the table was read first."""
