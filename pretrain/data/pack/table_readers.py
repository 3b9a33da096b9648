"""Reads CSV, TSV, JSON-lines and Parquet files of any length in bounded memory, and annotation files as a whole."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from pretrain.data.pack.annotations import Annotations, read_annotations
from pretrain.data.pack.delimited import Layout, OnReject, read_layout, read_rows
from pretrain.errors import UserError

TABLE_EXTENSIONS = ("csv", "tsv", "txt", "jsonl", "ndjson", "json", "parquet")
"""Extensions of tables. All but parquet may be followed by .gz."""

UNREADABLE = "\0broken"
"""The only key of a row that cannot be read; its value is the reason."""


@contextmanager
def naming_errors(path: Path) -> Iterator[None]:
    """Turn errors of reading a table into a UserError of one line that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
        raise UserError(f"{path} cannot be read as {get_format(path)}: {reason}") from error


def get_format(path: Path) -> str:
    """Return "csv", "tsv", "txt", "jsonl" or "parquet", from the name of the file."""
    extension = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    return "jsonl" if extension in ("ndjson", "json") else extension


@dataclass(frozen=True)
class Table:
    """A table whose columns are known. Its rows are read from the file each time."""

    path: Path
    columns: list[str]
    """Names in order. For JSON lines they are those of the first hundred rows."""
    layout: Layout | None = None
    """Of a CSV or TSV file."""
    annotations: Annotations | None = None
    """Of COCO's or Karpathy's annotation file; its columns are called image and caption."""

    def iterate_rows(self, image_column: str, on_reject: OnReject) -> Iterator[dict[str, Any]]:
        """Yield each row as a dictionary, or as {UNREADABLE: reason} if it cannot be read.

        Args:
            image_column: the column that names images, or else sounds.
            on_reject: called with (reason, text) of each row of a CSV or TSV file that is left out.
        """
        if self.annotations:
            yield from self.annotations.rows
        elif self.layout:
            for values in read_rows(self.path, self.layout, image_column, on_reject):
                yield dict(zip(self.layout.columns, values, strict=True))
        elif get_format(self.path) == "parquet":
            yield from _read_parquet(self.path, None)
        else:
            yield from _read_json_lines(self.path)

    def iterate_files(self, file_columns: Sequence[str], on_reject: OnReject) -> Iterator[list[Any]]:
        """Yield the values of the columns of files of each row that `iterate_rows` yields; None where a row has none."""
        if get_format(self.path) == "parquet":
            rows = _read_parquet(self.path, list(file_columns))
        else:
            rows = self.iterate_rows(file_columns[0], on_reject)
        for row in rows:
            yield [row.get(column) for column in file_columns]


def open_table(path: Path, separator: str | None, wanted: tuple[str, ...], splits: tuple[str, ...]) -> Table:
    """Open a table.

    Args:
        path: the file.
        separator: of the values of a CSV or TSV file; None = detect it.
        wanted: the columns that are going to be read.
        splits: names of the splits of an annotation file; () = all.

    Raises:
        UserError: it is not a table.
    """
    if get_format(path) == "parquet":
        return Table(path, list(pa.parquet.read_schema(path).names))
    if get_format(path) != "jsonl":
        layout = read_layout(path, separator, wanted)
        return Table(path, layout.columns, layout)
    annotations = read_annotations(path, splits)
    if annotations:
        return Table(path, ["image", "caption"], annotations=annotations)
    names: dict[str, None] = {}
    for i, row in enumerate(_read_json_lines(path)):
        if i == 100:
            break
        names |= dict.fromkeys(row)
    return Table(path, [name for name in names if name != UNREADABLE])


def _read_parquet(path: Path, columns: list[str] | None) -> Iterator[dict[str, Any]]:
    with pa.parquet.ParquetFile(
        path, pre_buffer=False, buffer_size=1 << 20
    ) as file:  # reads less than a whole row group at once
        for batch in file.iter_batches(batch_size=256, columns=columns):
            yield from batch.to_pylist()


def _read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with _open_lines(path) as lines:
        for line in lines:
            if line.strip():
                yield _parse_json_row(line)


def _parse_json_row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.removeprefix(codecs.BOM_UTF8))
    except (ValueError, RecursionError) as error:
        return {UNREADABLE: f"not json: {error}"}
    return row if isinstance(row, dict) else {UNREADABLE: f"not an object but {type(row).__name__}"}


@contextmanager
def _open_lines(path: Path) -> Iterator[Iterable[bytes]]:
    """Open a JSON-lines file for reading its lines. Raises UserError for a file that is one array."""
    with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as opened:
        start = opened.read(64).removeprefix(codecs.BOM_UTF8).lstrip()
        if start.startswith(b"["):
            raise UserError(f"{path} is one json array: write one object per line (for example with jq -c '.[]')")
        opened.seek(0)
        yield opened
