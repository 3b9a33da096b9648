"""Reads arrays of a .npz of unknown origin: nothing is unpickled, and no more is unpacked than MAX_BYTES.

Legend: n = rows, D = width.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib

import numpy as np

from pretrain.data import BadSample

MAX_BYTES = 1 << 24
"""Limit on a .npz, and on each of its arrays (16 MiB): 36 embeddings of 1536 numbers take 216 KiB."""

REASON = "teacher embeddings unreadable"

_PLAIN = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # what NumPy writes; others take any amount of memory to unpack
_ENCRYPTED = 1  # flag of a zip entry
_DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, OSError, RuntimeError, NotImplementedError)


def read_matrices(data: bytes, names: tuple[str, ...]) -> list[np.ndarray]:
    """Return the arrays of these names in a .npz, each (n, D) float32 and finite.

    Raises:
        BadSample: one is missing, damaged, too large, of another shape or type, or holds a number that is not finite.
    """
    if len(data) > MAX_BYTES:
        raise BadSample(REASON, f"KEY.npz of {len(data):,} bytes, more than {MAX_BYTES:,}")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            contents = [_read_entry(archive, name) for name in names]
        return [_to_matrix(content, name) for content, name in zip(contents, names, strict=True)]
    except _DAMAGE as error:
        raise BadSample(REASON, f"{type(error).__name__}: {' '.join(str(error).split())[:150]}") from error


def _read_entry(archive: zipfile.ZipFile, name: str) -> bytes:
    """Return the unpacked .npy of an array. Raises BadSample, and others for a damaged archive."""
    try:
        entry = archive.getinfo(f"{name}.npy")
    except KeyError:
        raise BadSample("no teacher embeddings", f"KEY.npz has no array {name}") from None
    if entry.file_size > MAX_BYTES:
        raise BadSample(REASON, f"{name} of {entry.file_size:,} bytes, more than {MAX_BYTES:,}")
    if entry.compress_type not in _PLAIN or entry.flag_bits & _ENCRYPTED:
        raise BadSample(REASON, f"{name} is compressed in a way that NumPy does not write")
    with archive.open(entry) as file:
        return file.read(entry.file_size)  # the size may be a lie: without a limit all would be unpacked before it is noticed


def _to_matrix(content: bytes, name: str) -> np.ndarray:
    """Return the array of a .npy as (n, D) float32. Raises BadSample, ValueError."""
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read_header is None:
        raise BadSample(REASON, f"{name} has version {version} of the format of NumPy")
    shape, is_fortran, dtype = read_header(file)
    if dtype.kind != "f" or dtype.itemsize > 8:  # not objects above all, which would be unpickled
        raise BadSample(REASON, f"{name} holds {dtype}, not floating-point numbers of 16, 32 or 64 bits")
    if len(shape) != 2 or min(shape) < 1:
        raise BadSample(REASON, f"{name} has the shape {shape}, not (embeddings, numbers)")
    rest = content[file.tell() :]
    if len(rest) != shape[0] * shape[1] * dtype.itemsize:
        raise BadSample(REASON, f"{name} has the shape {shape} and {len(rest):,} bytes")
    with np.errstate(over="ignore"):
        matrix = np.frombuffer(rest, dtype).reshape(shape, order="F" if is_fortran else "C").astype(np.float32, order="C")
    if not np.isfinite(matrix).all():
        raise BadSample("teacher embeddings not finite", f"{name} holds a NaN or an infinity")
    return matrix
