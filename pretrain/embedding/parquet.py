"""Embeddings in Parquet files: the columns, a thread that writes them, and how they are read.

    key             "shard/KEY"
    image           D numbers (fixed-size list), L2-normalized; audio: likewise, where the model has such a tower
    text            likewise for the caption; for `captions`, which come from a json field, a list of such embeddings
    caption         as encoded: white space normalized
    json            the sample's json as text
    image_tokens    if requested: N x C numbers, one list a token; text_tokens: those of the caption's own tokens

What a sample lacks is null, where the run was trained on such samples (data.incomplete=keep); else it has no row.

A file is written under a hidden name, a row group at a time, flushed to disk, and renamed: it is complete or not there. Its
footer says which samples it covers, which of them were skipped and why, and which model made the embeddings.

Legend: b = samples of a batch, m = their captions, D = width of the shared space, N = tokens, C = their width.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pretrain.embedding.encoder import EncodedBatch
from pretrain.errors import UserError
from pretrain.runtime.entrypoint import hold_stop_signals
from pretrain.runtime.files import flush, partial_path

FOOTER = b"clipfuse"
"""The key, in a Parquet file's metadata, of the footer that this module writes."""
ROW_GROUP_BYTES = 1 << 25
"""Bytes of a row group: what a process holds in memory at most, besides a few batches."""
_AHEAD = 4  # batches that may wait for the thread


@dataclass(frozen=True)
class Layout:
    """The columns of an embedding folder's files."""

    modalities: tuple[str, ...]
    dim: int
    """D."""
    dtype: str
    """float16 or float32."""
    has_caption_lists: bool
    """A sample has a list of captions, not one."""
    tokens: dict[str, int] = field(default_factory=dict)
    """C of the modalities whose tokens are written."""

    @property
    def vectors(self) -> list[str]:
        """The names of the columns that hold numbers."""
        return [*self.modalities, *(f"{name}_tokens" for name in self.tokens)]

    def schema(self) -> pa.Schema:
        """Return the schema: the columns, in order."""
        number = pa.type_for_alias(self.dtype)
        embedding = pa.list_(number, self.dim)
        columns: dict[str, pa.DataType] = {"key": pa.string()}
        for name in self.modalities:
            columns[name] = pa.list_(embedding) if name == "text" and self.has_caption_lists else embedding
        if "text" in self.modalities:
            columns |= {"captions": pa.list_(pa.string())} if self.has_caption_lists else {"caption": pa.string()}
        columns["json"] = pa.string()
        columns |= {f"{name}_tokens": pa.list_(pa.list_(number, width)) for name, width in self.tokens.items()}
        return pa.schema([pa.field(name, kind) for name, kind in columns.items()])

    def to_table(self, batch: EncodedBatch) -> pa.Table:
        """Convert a batch to a table of these columns. Raises UserError for numbers that are not finite."""
        counts = [len(captions) for captions in batch.captions]
        columns: dict[str, pa.Array] = {"key": pa.array(batch.keys)}
        is_null = {name: ~present.numpy() for name, present in batch.present.items() if not present.all()}
        for name in self.modalities:
            _check_finite(batch.embeddings[name], f"{name} embeddings", self.dtype, batch.keys)
            if name == "text" and self.has_caption_lists:
                columns[name] = _to_lists(_to_vectors(batch.embeddings[name]), counts, is_null.get(name))
            else:
                columns[name] = _to_vectors(batch.embeddings[name], is_null.get(name))
        if "text" in self.modalities:
            texts = [_to_valid_unicode(text) for captions in batch.captions for text in captions]
            if self.has_caption_lists:
                columns["captions"] = _to_lists(pa.array(texts, pa.string()), counts, is_null.get("text"))
            else:
                columns["caption"] = pa.array(texts, pa.string(), mask=is_null.get("text"))
        columns["json"] = pa.array([json.dumps(values) if values else None for values in batch.json], pa.string())
        for name in self.tokens:
            states, mask = batch.tokens[name].states, batch.tokens[name].mask
            _check_finite(states, f"{name} token features", self.dtype, batch.keys)
            columns[f"{name}_tokens"] = _to_lists(_to_vectors(states[mask]), mask.sum(dim=1).tolist(), is_null.get(name))
        schema = self.schema()
        return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)


def _to_vectors(rows: Tensor, is_null: np.ndarray | None = None) -> pa.FixedSizeListArray:
    """Return the rows (n, D) as n lists of fixed size, without copying; null where `is_null` (n,) says so."""
    mask = None if is_null is None else pa.array(is_null)
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.contiguous().view(-1).numpy()), rows.shape[1], mask=mask)


def _to_lists(items: pa.Array, counts: Sequence[int], is_null: np.ndarray | None = None) -> pa.ListArray:
    """Divide the items into n consecutive lists of the given lengths; null where `is_null` (n,) says so."""
    if is_null is None:
        return pa.ListArray.from_arrays(pa.array(np.cumsum([0, *counts]), pa.int32()), items)
    items = items.filter(pa.array(np.repeat(~is_null, counts)))
    offsets = pa.array(np.cumsum([0, *np.where(is_null, 0, counts)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, items, mask=pa.array(is_null))


def _to_valid_unicode(text: str) -> str:
    """Replace lone surrogates, which json may hold but no Unicode encoding can represent."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _check_finite(rows: Tensor, content: str, dtype: str, keys: list[str]) -> None:
    """Raise UserError if a number is not finite; `content` says what the rows are."""
    if not torch.isfinite(rows).all():
        hint = "; --dtype float32 may hold them" if dtype == "float16" and content.endswith("features") else ""
        raise UserError(f"{content} are not finite in the batch of samples {keys[0]} to {keys[-1]}{hint}")


# ---------------------------------------------------------------------------------------------------------------------
# Writing


class Writer:
    """Writes files, one after the other, in a thread.

    Batches are converted and compressed while the next ones are encoded.

    Args:
        folder: where the files go.
        layout: their columns.
        about: entries of every footer (model, ...).
    """

    def __init__(self, folder: Path, layout: Layout, about: Mapping[str, Any]) -> None:
        self.folder, self.layout, self.about = folder, layout, about
        self._queue: queue.Queue[tuple[str, EncodedBatch | None, dict[str, Any] | None] | None] = queue.Queue(_AHEAD)
        self._error: BaseException | None = None
        self._file: _File | None = None
        self._thread = threading.Thread(target=self._run, name="parquet", daemon=True)
        self._thread.start()

    def put(self, name: str, batch: EncodedBatch | None, footer: dict[str, Any] | None = None) -> None:
        """Add a batch to the file `name`; with a `footer`, finish the file.

        Blocks while too many batches wait.

        Raises the error of an earlier write: OSError where the disk is full, or UserError.
        """
        with hold_stop_signals():
            self._queue.put((name, batch, footer))
        if self._error is not None:
            raise self._error

    def close(self, abandon: bool = False) -> None:
        """Wait until all is written, and raise the error of a write.

        abandon: drop the unfinished file and raise nothing.
        """
        if abandon:
            self._error = self._error or UserError("abandoned")
        with hold_stop_signals():
            self._queue.put(None)
            self._thread.join()
            if self._file is not None:
                self._file.discard()
        if self._error is not None and not abandon:
            raise self._error

    def _run(self) -> None:
        """Write what is put into the queue, until None comes; the body of the thread."""
        while (job := self._queue.get()) is not None:
            if self._error is not None:
                continue  # empty the queue, so that `put` does not block for ever
            name, batch, footer = job
            try:
                self._file = self._file or _File(self.folder, name, self.layout.schema())
                if batch is not None:
                    self._file.add(self.layout.to_table(batch))
                if footer is not None:
                    self._file.finish({**self.about, **footer})
                    self._file = None
            except BaseException as error:
                self._error = error


class _File:
    """A file that is being written under its hidden name."""

    def __init__(self, folder: Path, name: str, schema: pa.Schema) -> None:
        self.final, self.partial = folder / name, partial_path(folder / name)
        self._writer = pq.ParquetWriter(
            str(self.partial), schema, compression=_choose_codecs(schema), use_dictionary=False, write_statistics=["key"]
        )
        self._buffer: list[pa.Table] = []
        self._rows = 0

    def add(self, table: pa.Table) -> None:
        """Add rows; write a row group once ROW_GROUP_BYTES have come together."""
        self._buffer.append(table)
        self._rows += len(table)
        if sum(buffered.nbytes for buffered in self._buffer) >= ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._buffer:
            table = pa.concat_tables(self._buffer)
            self._writer.write_table(table, row_group_size=len(table))
            self._buffer = []

    def finish(self, footer: dict[str, Any]) -> None:
        """Write the remaining rows and the footer, flush the file to disk, and give it its name."""
        self._flush()
        encoded = json.dumps({**footer, "rows": self._rows})
        self._writer.add_key_value_metadata({FOOTER: encoded.encode()})
        self._writer.close()
        flush(self.partial)
        self.partial.replace(self.final)

    def discard(self) -> None:
        """Remove the file."""
        with suppress(OSError):  # closing writes a footer, for which there may be no room
            self._writer.close()
        self.partial.unlink(missing_ok=True)


def _choose_codecs(schema: pa.Schema) -> dict[str, str]:
    """Choose the compression of each column: zstd for text; none for embeddings, which do not compress.

    Parquet names the column of a list's elements NAME.list.element.
    """
    codecs = {}
    for name, kind in zip(schema.names, schema.types, strict=True):
        while pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
            name, kind = f"{name}.list.element", kind.value_type
        codecs[name] = "zstd" if pa.types.is_string(kind) else "none"
    return codecs


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_footer(path: Path) -> dict[str, Any] | None:
    """Return the footer of a finished file, or None.

    None means that the file is missing, incomplete or not written by `Writer`.
    """
    try:
        encoded = (pq.read_metadata(path).metadata or {}).get(FOOTER)
        footer = json.loads(encoded) if encoded else None
    except (OSError, ValueError, pa.ArrowException):
        return None
    return footer if isinstance(footer, dict) else None


def to_numpy(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Return a column of fixed-size lists as an array (n, D) that owns its memory. Raises UserError where one is null."""
    rows, has_row = to_rows(column)
    if not has_row.all():
        raise UserError(f"{(~has_row).sum():,} of {len(rows):,} samples have no such embedding: they lack what it is of")
    return rows


def to_rows(column: pa.ChunkedArray | pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return a column of fixed-size lists as an array (n, D) that owns its memory, and which of them are not null (n,).

    Null becomes zeros.
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    flat = np.array(array.flatten().to_numpy(zero_copy_only=False))  # without those that are null
    rows = flat.reshape(len(array) - array.null_count, array.type.list_size)
    if not array.null_count:
        return rows, np.ones(len(array), dtype=bool)
    has_row = np.asarray(array.is_valid())
    filled = np.zeros((len(array), array.type.list_size), dtype=rows.dtype)
    filled[has_row] = rows
    return filled, has_row


def may_have_null(path: Path, name: str) -> bool:
    """Return whether a row of the column `name`, of fixed-size lists, may be null, without reading it: null is one value."""
    metadata, width = pq.read_metadata(path), pq.read_schema(path).field(name).type.list_size
    column = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path.split(".")[0] == name)
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    return width == 1 or any(group.column(column).num_values < group.num_rows * width for group in groups)
