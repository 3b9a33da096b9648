"""The files of an index of exact.py: their names, what commits.txt says of them, how they are written, and compacted.

Compaction writes the rows that are left into files of the next generation (vectors.1.f32 after vectors.f32), then replaces
commits.txt, whose lines name the generation. So a process that is killed leaves the old state or the new one.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pretrain.errors import UserError
from pretrain.runtime.files import read_bytes

COMMITS = "commits.txt"
KINDS = ("vectors", "thumbnails", "rows")
_SUFFIXES = {"vectors": "f32", "thumbnails": "bin", "rows": "arrow"}
_ROWS = 4096
"""Rows that are copied at a time."""


def name_file(kind: str, generation: int) -> str:
    """Return the name of one of KINDS in a generation, which counts from 0."""
    return f"{kind}.{generation}.{_SUFFIXES[kind]}" if generation else f"{kind}.{_SUFFIXES[kind]}"


def encode_commit(record: dict[str, Any]) -> bytes:
    """Return the line of commits.txt of a change."""
    encoded = json.dumps(record).encode()
    return b"%08x %s\n" % (zlib.crc32(encoded), encoded)


class Commits:
    """What commits.txt says: how much of each file counts, which rows were removed, and the generation of the files."""

    def __init__(self, folder: Path, place: str) -> None:
        """Read commits.txt of a folder; place: how messages name the index. Raises UserError where a line is damaged."""
        self.folder = folder
        self.ends = dict.fromkeys(KINDS, 0)
        """Bytes of each file that count."""
        self.batch_ends: list[int] = []
        """Bytes of the rows at which each batch of them ends."""
        self.removed: list[NDArray[np.int64]] = []
        self.generation = 0
        lines = read_bytes(folder / COMMITS, most=1 << 32).split(b"\n")[:-1]  # the rest was not written to its end
        for number, line in enumerate(lines, start=1):
            checksum, _, encoded = line.partition(b" ")
            if checksum != b"%08x" % zlib.crc32(encoded):
                raise UserError(f"{place}/{COMMITS} is damaged in line {number}: restore it, or index the samples again")
            self._apply(json.loads(encoded))
        self._length = sum(len(line) + 1 for line in lines)

    @property
    def state(self) -> str:
        """A name of this state, which no other state of the index has."""
        return f"{self.generation}-{self._length}" if self.generation else str(self._length)

    def path_of(self, kind: str) -> Path:
        """Return the path of one of KINDS."""
        return self.folder / name_file(kind, self.generation)

    def append(self, additions: dict[str, bytes], removed: list[int]) -> None:
        """Append to the files, by kind, then to commits.txt. Raises OSError; nothing has changed then."""
        record: dict[str, Any] = {name: self.ends[name] + len(additions.get(name, b"")) for name in KINDS}
        record |= {"removed": removed, "generation": self.generation}
        line = encode_commit(record)
        for name, content in additions.items():
            write_at(self.path_of(name), self.ends[name], content)
        write_at(self.folder / COMMITS, self._length, line)
        self._apply(record)
        self._length += len(line)

    def _apply(self, commit: dict[str, Any]) -> None:
        for name in KINDS:
            self.ends[name] = commit[name]
        self.generation = commit.get("generation", 0)
        if commit["rows"] > (self.batch_ends or [0])[-1]:
            self.batch_ends.append(commit["rows"])
        self.removed.append(np.array(commit["removed"], dtype=np.int64))


def write_at(path: Path, offset: int, content: bytes) -> None:
    """Write at a position, cut off what follows, and wait until it has reached the disk. Raises OSError."""
    with path.open("r+b", buffering=0) as file:
        file.truncate(offset)
        file.seek(offset)
        view = memoryview(content)
        while view:
            view = view[file.write(view) :]
        os.fsync(file.fileno())


def write_rows(
    folder: Path, generation: int, rows: NDArray[np.int64], vectors: NDArray[np.float32], thumbnails: Any, table: pa.Table
) -> bytes:
    """Write some rows into files of a generation, and return the commits.txt that names them. Raises OSError.

    Args:
        folder: of the index.
        generation: whose files are not in use.
        rows: (m,) which rows are copied, in order.
        vectors: (n, D), of all rows.
        thumbnails: the bytes of all thumbnails.
        table: the other columns, n rows.
    """
    ends = dict.fromkeys(KINDS, 0)
    lines = []
    files = {kind: (folder / name_file(kind, generation)).open("wb") for kind in KINDS}
    try:
        for begin in range(0, max(len(rows), 1), _ROWS):
            part = rows[begin : begin + _ROWS]
            values = table.take(part)
            offsets, sizes = (values[f"thumbnail_{name}"].to_numpy() for name in ("offset", "size"))
            pictures = b"".join(bytes(thumbnails[o : o + s]) for o, s in zip(offsets.tolist(), sizes.tolist(), strict=True))
            moved = pa.array(ends["thumbnails"] + np.cumsum(np.r_[0, sizes])[:-1].astype(np.int64), pa.int64())
            place = values.schema.get_field_index("thumbnail_offset")
            batch = values.set_column(place, values.schema.field(place), moved).combine_chunks().to_batches()
            contents = {
                "vectors": np.ascontiguousarray(vectors[part]).tobytes(),
                "thumbnails": pictures,
                "rows": b"".join(piece.serialize().to_pybytes() for piece in batch),
            }
            for kind, content in contents.items():
                files[kind].write(content)
                ends[kind] += len(content)
            lines.append(encode_commit({**ends, "removed": [], "generation": generation}))
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    finally:
        for file in files.values():
            file.close()
    return b"".join(lines)


def remove_others(folder: Path, generation: int) -> None:
    """Remove the files of all generations but one; what a killed process left, too."""
    names = {name_file(kind, generation) for kind in KINDS}
    for kind in KINDS:
        for path in folder.glob(f"{kind}*.{_SUFFIXES[kind]}"):
            if path.name not in names:
                path.unlink(missing_ok=True)


def to_indices(rows: NDArray[np.int64]) -> pa.Array:
    """Wrap row numbers for `take`. pa.array, which `take` calls, would import pandas where it is installed."""
    return pa.Array.from_buffers(pa.int64(), len(rows), [None, pa.py_buffer(rows)])
