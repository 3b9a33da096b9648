"""The files of an index of exact.py: their names, how they are written, and how they are compacted.

Compaction writes the rows that are left into files of the next generation (vectors.1.f32 after vectors.f32), then replaces
commits.txt, whose lines name the generation. So a process that is killed leaves the old state or the new one.

The rounded copy is like the other files, but that it may end before the last row, or be missing: it is made from `vectors`.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from finetune.search.rounded import Rounded, round_rows
from pretrain.errors import UserError
from pretrain.runtime.files import flush, read_bytes

COMMITS = "commits.txt"
KINDS = ("vectors", "thumbnails", "rows")
ROUNDED = "rounded"
"""The copy of the vectors in bfloat16."""
_SUFFIXES = {"vectors": "f32", "thumbnails": "bin", "rows": "arrow", ROUNDED: "bf16"}
_ROWS = 4096
"""Rows that are copied at a time."""
_WORTHWHILE = 1 << 26
"""Bytes of vectors from which there is a rounded copy: fewer lie in the processor's caches, and nothing is gained."""


def name_file(kind: str, generation: int) -> str:
    """Return the name of one of KINDS, or of the rounded copy, in a generation, which counts from 0."""
    return f"{kind}.{generation}.{_SUFFIXES[kind]}" if generation else f"{kind}.{_SUFFIXES[kind]}"


def encode_commit(record: dict[str, Any]) -> bytes:
    """Return the line of commits.txt of a change."""
    encoded = json.dumps(record).encode()
    return b"%08x %s\n" % (zlib.crc32(encoded), encoded)


def read_commits(folder: Path) -> tuple[list[dict[str, Any]], tuple[int, int]]:
    """Return what all complete lines of commits.txt say, and their length and checksum. Raises UserError for damaged ones."""
    content = read_bytes(folder / COMMITS, most=1 << 32)
    records = []
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):  # what follows was not written to its end
        checksum, _, encoded = line.partition(b" ")
        if checksum != b"%08x" % zlib.crc32(encoded):
            raise UserError(f"{folder}/{COMMITS} is damaged in line {number}: restore it, or index the images again")
        records.append(json.loads(encoded))
    return records, measure_commits(content)


def measure_commits(content: bytes) -> tuple[int, int]:
    """Return the length of all complete lines of commits.txt, and their checksum."""
    length = content.rfind(b"\n") + 1
    return length, zlib.crc32(content[:length])


def acquire_lock(folder: Path) -> IO[str]:
    """Return an open file whose lock this process has, so that it alone writes. Raises UserError."""
    try:
        lock = (folder / ".lock").open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise
    except BlockingIOError:
        raise UserError(f"{folder} is being written by another process; wait for it, or choose another --db") from None
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror or error}") from error
    return lock


def map_file(path: Path, length: int) -> Any:
    """Map the first bytes of a file into memory. Raises OSError, and UserError where it is shorter."""
    if path.stat().st_size < length:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes, and {length:,} were written: it is damaged")
    with path.open("rb") as opened:
        return mmap.mmap(opened.fileno(), length, access=mmap.ACCESS_READ) if length else b""


def map_rounded(path: Path, length: int, shape: tuple[int, ...]) -> Rounded | None:
    """Map the rounded copy (n, D), whose length was written; None where it lacks rows. Raises OSError, and UserError."""
    mapped = map_file(path, length) if length else b""
    return np.frombuffer(mapped, np.uint16).reshape(shape) if length and length == 2 * np.prod(shape) else None


def write_at(path: Path, offset: int, content: bytes) -> None:
    """Write at a position, cut off what follows, and wait until it has reached the disk. Raises OSError."""
    with path.open("r+b", buffering=0) as file:
        file.truncate(offset)
        file.seek(offset)
        view = memoryview(content)
        while view:
            view = view[file.write(view) :]
        os.fsync(file.fileno())


def is_worthwhile(vectors: int) -> bool:
    """Return whether so many bytes of vectors should have a rounded copy."""
    return vectors >= _WORTHWHILE


def extend_rounded(path: Path, rounded: int, vectors: NDArray[np.float32]) -> int:
    """Write what a rounded copy of some bytes lacks to its end, wait for the disk, and return its bytes. Raises OSError."""
    create(path)
    with path.open("r+b") as file:
        file.truncate(rounded)
        file.seek(rounded)
        for begin in range(rounded // 2 // vectors.shape[1], len(vectors), _ROWS):
            file.write(round_rows(vectors[begin : begin + _ROWS]).tobytes())
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def create(path: Path) -> None:
    """Make an empty file, unless there is one, whose name reaches the disk. Raises OSError."""
    if not path.exists():
        path.touch()
        flush(path.parent)


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
    kinds = (*KINDS, ROUNDED) if is_worthwhile(len(rows) * vectors[:1].nbytes) else KINDS
    ends = dict.fromkeys(kinds, 0)
    lines = []
    files = {kind: (folder / name_file(kind, generation)).open("wb") for kind in kinds}
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
                ROUNDED: round_rows(vectors[part]).tobytes() if ROUNDED in kinds else b"",
                "vectors": np.ascontiguousarray(vectors[part]).tobytes(),
                "thumbnails": pictures,
                "rows": b"".join(piece.serialize().to_pybytes() for piece in batch),
            }
            for kind in kinds:
                files[kind].write(contents[kind])
                ends[kind] += len(contents[kind])
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
    names = {name_file(kind, generation) for kind in _SUFFIXES}
    for kind in _SUFFIXES:
        for path in folder.glob(f"{kind}*.{_SUFFIXES[kind]}"):
            if path.name not in names:
                path.unlink(missing_ok=True)


def to_indices(rows: NDArray[np.int64]) -> pa.Array:
    """Wrap row numbers for `take`. pa.array, which `take` calls, would import pandas where it is installed."""
    return pa.Array.from_buffers(pa.int64(), len(rows), [None, pa.py_buffer(rows)])
