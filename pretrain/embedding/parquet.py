"""Embeddings in Parquet files: their columns, a thread that writes them in bounded memory, and how they are read back.

    key             "shard/KEY"
    image           D numbers (fixed-size list), L2-normalised
    text            the same of the caption; a list of them, `captions`, where captions come from a json field
    caption         as encoded: white space cleaned
    json            the sample's json as text
    image_tokens    if asked for: N x C numbers, one list a token; text_tokens: those of the caption's own tokens

A file is written under a hidden name, a row group at a time, flushed to disk, and renamed: it is complete or not there. Its
footer says which samples it stands for, which of them were left out and why, and whose embeddings they are.

Legend: b = samples of a batch, m = captions of them, D = width of the space, N = tokens, C = their width.
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
from pretrain.runtime.files import flush, partial_path

FOOTER = b"clipfuse"
"""Key of our part of a file's footer."""
ROW_GROUP_BYTES = 1 << 25
"""A row group is written out when it is this large: what a process holds at most, besides a few batches."""
_AHEAD = 4  # batches that may wait for the thread


@dataclass(frozen=True)
class Layout:
    """The columns of a collection."""

    modalities: tuple[str, ...]
    dim: int
    """D."""
    dtype: str
    """float16 or float32."""
    several: bool
    """Whether a sample has a list of captions."""
    tokens: dict[str, int] = field(default_factory=dict)
    """C of the modalities whose tokens are kept."""

    @property
    def vectors(self) -> list[str]:
        """The columns of numbers."""
        return [*self.modalities, *(f"{name}_tokens" for name in self.tokens)]

    def schema(self) -> pa.Schema:
        """The columns, in order."""
        number = pa.type_for_alias(self.dtype)
        embedding = pa.list_(number, self.dim)
        columns: dict[str, pa.DataType] = {"key": pa.string()}
        for name in self.modalities:
            columns[name] = pa.list_(embedding) if name == "text" and self.several else embedding
        if "text" in self.modalities:
            columns |= {"captions": pa.list_(pa.string())} if self.several else {"caption": pa.string()}
        columns["json"] = pa.string()
        columns |= {f"{name}_tokens": pa.list_(pa.list_(number, width)) for name, width in self.tokens.items()}
        return pa.schema([pa.field(name, kind) for name, kind in columns.items()])

    def table(self, batch: EncodedBatch) -> pa.Table:
        """A batch as columns. Raises UserError for numbers that cannot be stored."""
        counts = [len(own) for own in batch.captions]
        columns: dict[str, pa.Array] = {"key": pa.array(batch.keys)}
        for name in self.modalities:
            _check(batch.rows[name], f"{name} embeddings", self.dtype, batch.keys)
            rows = _vectors(batch.rows[name])
            columns[name] = _lists(rows, counts) if name == "text" and self.several else rows
        if "text" in self.modalities:
            texts = pa.array([_valid(text) for own in batch.captions for text in own], pa.string())
            columns |= {"captions": _lists(texts, counts)} if self.several else {"caption": texts}
        columns["json"] = pa.array([json.dumps(each) if each else None for each in batch.json], pa.string())
        for name in self.tokens:
            states, mask = batch.tokens[name].states, batch.tokens[name].mask
            _check(states, f"{name} token features", self.dtype, batch.keys)
            columns[f"{name}_tokens"] = _lists(_vectors(states[mask]), mask.sum(dim=1).tolist())
        schema = self.schema()
        return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)


def _vectors(rows: Tensor) -> pa.FixedSizeListArray:
    """(n, D) -> n lists, without copying."""
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.contiguous().view(-1).numpy()), rows.shape[1])


def _lists(items: pa.Array, counts: Sequence[int]) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(np.cumsum([0, *counts]), pa.int32()), items)


def _valid(text: str) -> str:
    """A json may hold halves of surrogate pairs, which no encoding of Unicode has."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _check(rows: Tensor, what: str, dtype: str, keys: list[str]) -> None:
    if not torch.isfinite(rows).all():
        why = "; --dtype float32 may hold them" if dtype == "float16" and what.endswith("features") else ""
        raise UserError(f"{what} are not finite in the batch of samples {keys[0]} to {keys[-1]}{why}")


# ---------------------------------------------------------------------------------------------------------------------
# Writing


class Writer:
    """Writes files, one after the other, in a thread: batches are converted and compressed while the next are encoded.

    Args:
        folder: where to.
        layout: the columns.
        about: what every footer says (model, ...).
    """

    def __init__(self, folder: Path, layout: Layout, about: Mapping[str, Any]) -> None:
        self.folder, self.layout, self.about = folder, layout, about
        self._queue: queue.Queue[tuple[str, EncodedBatch | None, dict[str, Any] | None] | None] = queue.Queue(_AHEAD)
        self._error: BaseException | None = None
        self._file: _File | None = None
        self._thread = threading.Thread(target=self._work, name="parquet", daemon=True)
        self._thread.start()

    def put(self, name: str, batch: EncodedBatch | None, footer: dict[str, Any] | None = None) -> None:
        """Adds a batch to the file `name`; with `footer` the file is finished. Waits while too much waits to be written.

        Raises what went wrong before: OSError where the disk is full, UserError.
        """
        self._queue.put((name, batch, footer))
        if self._error is not None:
            raise self._error

    def close(self, abandon: bool = False) -> None:
        """Waits until all is written, and raises what went wrong. abandon: drops the file begun, raises nothing."""
        if abandon:
            self._error = self._error or UserError("abandoned")
        self._queue.put(None)
        self._thread.join()
        if self._file is not None:
            self._file.drop()
        if self._error is not None and not abandon:
            raise self._error

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            if self._error is not None:
                continue  # whoever puts more must not wait for ever
            name, batch, footer = job
            try:
                self._file = self._file or _File(self.folder, name, self.layout.schema())
                if batch is not None:
                    self._file.add(self.layout.table(batch))
                if footer is not None:
                    self._file.finish({**self.about, **footer})
                    self._file = None
            except BaseException as error:
                self._error = error


class _File:
    """One file under its hidden name."""

    def __init__(self, folder: Path, name: str, schema: pa.Schema) -> None:
        self.final, self.partial = folder / name, partial_path(folder / name)
        self._writer = pq.ParquetWriter(
            str(self.partial), schema, compression=_codecs(schema), use_dictionary=False, write_statistics=["key"]
        )
        self._held: list[pa.Table] = []
        self._rows = 0

    def add(self, table: pa.Table) -> None:
        self._held.append(table)
        self._rows += len(table)
        if sum(each.nbytes for each in self._held) >= ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._held:
            table = pa.concat_tables(self._held)
            self._writer.write_table(table, row_group_size=len(table))
            self._held = []

    def finish(self, footer: dict[str, Any]) -> None:
        self._flush()
        said = json.dumps({**footer, "rows": self._rows})
        self._writer.add_key_value_metadata({FOOTER: said.encode()})
        self._writer.close()
        flush(self.partial)
        self.partial.replace(self.final)

    def drop(self) -> None:
        with suppress(OSError):  # closing writes a footer, for which there may be no room
            self._writer.close()
        self.partial.unlink(missing_ok=True)


def _codecs(schema: pa.Schema) -> dict[str, str]:
    """Numbers of trained models do not compress; what people wrote does. Parquet calls a list's numbers NAME.list.element."""
    codecs = {}
    for name, kind in zip(schema.names, schema.types, strict=True):
        while pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
            name, kind = f"{name}.list.element", kind.value_type
        codecs[name] = "zstd" if pa.types.is_string(kind) else "none"
    return codecs


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_footer(path: Path) -> dict[str, Any] | None:
    """What a finished file says of itself; None where it is not whole, or not ours."""
    try:
        said = (pq.read_metadata(path).metadata or {}).get(FOOTER)
        found = json.loads(said) if said else None
    except (OSError, ValueError, pa.ArrowException):
        return None
    return found if isinstance(found, dict) else None


def to_numpy(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """A column of fixed-size lists -> (n, D), in memory of its own."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    flat = np.array(array.flatten().to_numpy(zero_copy_only=False))
    return flat.reshape(len(array), array.type.list_size)
