"""Reads CSV, TSV, JSON-lines and Parquet files of any length in bounded memory."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from pretrain.errors import UserError

TABLE_EXTENSIONS = ("csv", "tsv", "jsonl", "ndjson", "json", "parquet")
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
    """Return "csv", "tsv", "jsonl" or "parquet", from the name of the file."""
    extension = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    return "jsonl" if extension in ("ndjson", "json") else extension


def read_columns(path: Path) -> list[str]:
    """Return the column names in order. For JSON lines they are those of the first hundred rows."""
    if get_format(path) == "parquet":
        return list(pa.parquet.read_schema(path).names)
    if get_format(path) == "jsonl":
        names: dict[str, None] = {}
        for i, row in enumerate(iterate_rows(path)):
            if i == 100:
                break
            names |= dict.fromkeys(row)
        return [name for name in names if name != UNREADABLE]
    with _open_csv(path, None) as reader:
        return list(reader.schema.names)


def count_rows(path: Path, column: str, on_uneven: Callable[[str], None]) -> int:
    """Return the number of rows.

    Of CSV and TSV files it reads `column` to the end and calls `on_uneven` with each row that has too few or too many values.
    """
    if get_format(path) == "parquet":
        return int(pa.parquet.read_metadata(path).num_rows)
    if get_format(path) == "jsonl":
        with _open_lines(path) as file:
            return sum(1 for line in file if line.strip())
    with _open_csv(path, [column], on_uneven) as reader:
        return sum(batch.num_rows for batch in reader)


def iterate_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield each row as a dictionary, or as {UNREADABLE: reason} if it cannot be read."""
    if get_format(path) == "parquet":
        with pa.parquet.ParquetFile(
            path, pre_buffer=False, buffer_size=1 << 20
        ) as file:  # reads less than a whole row group at once
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    elif get_format(path) == "jsonl":
        with _open_lines(path) as lines:
            for line in lines:
                if line.strip():
                    yield _parse_json_row(line)
    else:
        with _open_csv(path, None) as reader:
            for batch in reader:
                for start in range(0, batch.num_rows, 256):  # as Python objects the rows take several times the memory
                    yield from batch.slice(start, 256).to_pylist()


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


def _open_csv(
    path: Path, columns: list[str] | None, on_uneven: Callable[[str], None] | None = None
) -> pa.csv.CSVStreamingReader:
    """Open a CSV or TSV file, with every value as bytes.

    A type inferred from the first rows may be wrong for a later one. Rows with too few or too many values (an unquoted comma in
    a caption) are skipped and passed to `on_uneven`.
    """

    def skip(row: pa.csv.InvalidRow) -> str:
        if on_uneven:
            on_uneven(str(row.text)[:200])
        return "skip"

    parse = pa.csv.ParseOptions(
        delimiter="\t" if get_format(path) == "tsv" else ",", newlines_in_values=True, invalid_row_handler=skip
    )
    read = pa.csv.ReadOptions(block_size=1 << 22, use_threads=False)  # pyarrow reads up to 32 blocks ahead
    names = columns
    if names is None:
        with pa.csv.open_csv(pa.input_stream(str(path), compression="detect"), read, parse) as reader:
            names = reader.schema.names
    convert = pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.binary()), include_columns=columns)
    return pa.csv.open_csv(pa.input_stream(str(path), compression="detect"), read, parse, convert)
