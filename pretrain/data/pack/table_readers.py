"""Tables of text, of any length: columns, count and rows of CSV, TSV, JSON-lines and Parquet files, a piece at a time."""

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

KINDS = ("csv", "tsv", "jsonl", "ndjson", "json", "parquet")
"""Extensions; all but parquet may be followed by .gz."""

BROKEN = "\0broken"
"""A row that cannot be read is {BROKEN: why}."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Errors of reading a table -> one line that names it."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
        raise UserError(f"{path} cannot be read as {kind(path)}: {reason}") from error


def kind(path: Path) -> str:
    """csv, tsv, jsonl or parquet, by the file's name."""
    extension = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    return "jsonl" if extension in ("ndjson", "json") else extension


def columns(path: Path) -> list[str]:
    """Names in order; of JSON lines those of the first hundred rows."""
    if kind(path) == "parquet":
        return list(pa.parquet.read_schema(path).names)
    if kind(path) == "jsonl":
        found: dict[str, None] = {}
        for i, row in enumerate(rows(path)):
            if i == 100:
                break
            found |= dict.fromkeys(row)
        return [name for name in found if name != BROKEN]
    with _csv(path, None) as reader:
        return list(reader.schema.names)


def count(path: Path, column: str, uneven: Callable[[str], None]) -> int:
    """Rows; a pass over files of text, which reads the one column and finds rows of another length."""
    if kind(path) == "parquet":
        return int(pa.parquet.read_metadata(path).num_rows)
    if kind(path) == "jsonl":
        with _lines(path) as file:
            return sum(1 for line in file if line.strip())
    with _csv(path, [column], uneven) as reader:
        return sum(batch.num_rows for batch in reader)


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """One dictionary a row, read in pieces. A row that cannot be read is kept, as {BROKEN: why}."""
    if kind(path) == "parquet":
        with pa.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:  # not whole row groups
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    elif kind(path) == "jsonl":
        with _lines(path) as lines:
            for line in lines:
                if line.strip():
                    yield _json_row(line)
    else:
        with _csv(path, None) as reader:
            for batch in reader:
                for start in range(0, batch.num_rows, 256):  # as Python's objects rows take several times as much
                    yield from batch.slice(start, 256).to_pylist()


def _json_row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.removeprefix(codecs.BOM_UTF8))
    except (ValueError, RecursionError) as error:
        return {BROKEN: f"not json: {error}"}
    return row if isinstance(row, dict) else {BROKEN: f"not an object but {type(row).__name__}"}


@contextmanager
def _lines(path: Path) -> Iterator[Iterable[bytes]]:
    with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as opened:
        start = opened.read(64).removeprefix(codecs.BOM_UTF8).lstrip()
        if start.startswith(b"["):
            raise UserError(f"{path} is one json array: write one object a line (jq -c '.[]' does it)")
        opened.seek(0)
        yield opened


def _csv(path: Path, columns: list[str] | None, uneven: Callable[[str], None] | None = None) -> pa.csv.CSVStreamingReader:
    """Every value as bytes: a type guessed from the first rows may be wrong a million later. Rows with too few or too many
    values (a comma in a caption that is not quoted) are left out, and given to `uneven`."""

    def skip(row: pa.csv.InvalidRow) -> str:
        if uneven:
            uneven(str(row.text)[:200])
        return "skip"

    parse = pa.csv.ParseOptions(
        delimiter="\t" if kind(path) == "tsv" else ",", newlines_in_values=True, invalid_row_handler=skip
    )
    read = pa.csv.ReadOptions(block_size=1 << 22, use_threads=False)  # it reads up to 32 blocks ahead
    names = columns
    if names is None:
        with pa.csv.open_csv(pa.input_stream(str(path), compression="detect"), read, parse) as reader:
            names = reader.schema.names
    convert = pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.binary()), include_columns=columns)
    return pa.csv.open_csv(pa.input_stream(str(path), compression="detect"), read, parse, convert)
