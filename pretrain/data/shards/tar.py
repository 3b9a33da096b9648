"""Scanning of tar headers: the byte range of each regular member, and whether the archive is complete.

Reads ustar, GNU long names and pax headers, as Python's tarfile does, but several times faster; nothing is ever extracted.
Unlike most readers it verifies every header's checksum and requires a valid end of archive. It therefore detects a damaged
header, a hole of zeros, and a file cut short, even between two members.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pretrain.errors import UserError

BLOCK = 512
_ZEROS = bytes(BLOCK)
_CHUNK = 1 << 20  # bytes per read of headers: keeps reads few on a network disk, whatever the members' sizes
_BATCH = 4096  # headers whose checksums are verified together
_MAX_PADDING = 1 << 20  # zeros allowed after the end marker; archivers pad to records of 10 KiB
_MAX_EXTENSION = 1 << 20  # bytes of a long name or a pax header

_REGULAR = b"07\0"
_NO_CONTENT = b"123456"  # links, devices, directories, fifos
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}


class DamagedTarError(UserError):
    """A file is not a complete tar archive; the message states the file, the byte offset and the damage."""


class Members(NamedTuple):
    """The regular members, in file order: names, and offset and length of each content in bytes."""

    names: list[str]
    offsets: list[int]
    lengths: list[int]


class _DamageAt(Exception):  # noqa: N818
    """Damage found at a byte offset; a wrong checksum in an earlier header takes precedence in the report."""

    def __init__(self, offset: int, damage: str) -> None:
        self.offset, self.damage = offset, damage


def read_members(fd: int, path: str) -> Members:
    """Return the regular members of an open tar file.

    Args:
        fd: file descriptor; its position is not used or changed.
        path: name of the file in error messages.

    Raises:
        DamagedTarError: the file is not a tar archive, compressed, damaged or cut short.
        OSError: the file cannot be read.
    """
    return scan_members(lambda length, at: os.pread(fd, length, at), os.fstat(fd).st_size, path, _CHUNK)


def scan_members(read: Callable[[int, int], bytes], size: int, path: str, chunk: int) -> Members:
    """Return the regular members of a tar file of which any bytes can be read.

    Args:
        read: read(length, at) returns `length` bytes at the offset `at`, or fewer at the end of the file.
        size: size of the file in bytes.
        path: name of the file in error messages.
        chunk: bytes of one read of headers.

    Raises:
        DamagedTarError: the file is not a tar archive, compressed, damaged or cut short.
    """
    return _TarScanner(read, size, path, chunk).run()


class _TarScanner:
    """One pass over the headers of a tar file."""

    def __init__(self, read: Callable[[int, int], bytes], size: int, path: str, chunk_size: int) -> None:
        self.read, self.size, self.path, self.chunk_size = read, size, path, chunk_size
        self.chunk, self.chunk_offset = b"", 0
        self.unverified: list[bytes] = []
        self.unverified_offsets: list[int] = []
        self.members = Members([], [], [])

    def run(self) -> Members:
        """Return the members. Raises DamagedTarError."""
        try:
            self._scan_headers()
        except _DamageAt as error:
            self._verify()  # raises where an earlier header is damaged, which is then the cause
            raise self._build_error(error.offset, error.damage) from None
        self._verify()
        return self.members

    def _scan_headers(self) -> None:
        """Collect the regular members up to the end of the archive."""
        names, offsets, lengths = self.members
        long_name: str | None = None
        long_size: int | None = None
        at = 0
        while True:
            header = self._read_block(at)
            if header == _ZEROS:
                return self._check_end(at)
            self.unverified.append(header)
            self.unverified_offsets.append(at)
            if len(self.unverified) == _BATCH or at == 0:
                self._verify()
            kind, length, content = header[156:157], _parse_size(header[124:136], at), at + BLOCK
            if kind in b"LxX":
                extension = self._read_extension(at, content, length)
                if kind == b"L":
                    long_name = extension.partition(b"\0")[0].decode("utf-8", "surrogateescape")
                else:
                    path, size = _parse_pax(extension, at)
                    long_name, long_size = path or long_name, long_size if size is None else size
            elif kind == b"S":
                raise _DamageAt(at, "a sparse file, which shards cannot hold")
            elif kind not in b"Kg":
                name = _parse_name(header) if long_name is None else long_name
                length = length if long_size is None else long_size
                long_name = long_size = None
                if kind in _REGULAR and not (kind == b"\0" and name.endswith("/")):  # V7 tar writes directories this way
                    if content + length > self.size:
                        raise _DamageAt(at, f"member {name!r} is cut short: it should end at byte {content + length:,}")
                    names.append(name)
                    offsets.append(content)
                    lengths.append(length)
                elif kind in _NO_CONTENT or kind in _REGULAR:
                    length = 0
            at = content + (length + BLOCK - 1) // BLOCK * BLOCK

    def _read_block(self, at: int) -> bytes:
        """Return the 512 bytes at an offset."""
        start = at - self.chunk_offset
        if start + BLOCK > len(self.chunk):
            self.chunk, self.chunk_offset, start = self.read(self.chunk_size, at), at, 0
        block = self.chunk[start : start + BLOCK]
        if len(block) < BLOCK:
            damage = "it ends without an end-of-archive marker" if at >= self.size else "it ends in the middle of a header"
            raise _DamageAt(at, f"{damage}, so it was cut short or is still being written")
        return block

    def _read_extension(self, at: int, start: int, length: int) -> bytes:
        """Return the content of an extended header (a long name or pax records)."""
        if length > _MAX_EXTENSION:
            raise _DamageAt(at, f"an extended header of {length:,} bytes")
        cached = start - self.chunk_offset
        data = self.chunk[cached : cached + length] if 0 <= cached <= len(self.chunk) - length else self.read(length, start)
        if len(data) < length:
            raise _DamageAt(at, "it ends in the middle of an extended header")
        return data

    def _check_end(self, at: int) -> None:
        """Check that only a little zero padding follows the end marker: anything else is lost members."""
        if self.size - at > _MAX_PADDING:
            raise _DamageAt(at, f"{self.size - at:,} bytes follow the block of zeros that should end it")
        cached = at - self.chunk_offset
        end = self.chunk_offset + len(self.chunk)
        rest = self.chunk[cached:] if end >= self.size else self.read(self.size - at, at)
        if rest.count(0) < len(rest):
            raise _DamageAt(at, "a block of zeros, and data after it")

    def _verify(self) -> None:
        """Verify the checksums of the headers read so far, of unsigned or (old archivers) signed bytes."""
        headers = np.frombuffer(b"".join(self.unverified), dtype=np.uint8).reshape(-1, BLOCK)
        stored = np.array([_parse_octal(header[148:156]) for header in self.unverified])
        for kind in (np.uint8, np.int8):
            values = headers.view(kind)
            sums = values.sum(axis=1, dtype=np.int64) - values[:, 148:156].sum(axis=1, dtype=np.int64) + 8 * ord(" ")
            stored = np.where(sums == stored, -2, stored)
        wrong = np.flatnonzero(stored != -2)
        if len(wrong):
            raise self._build_error(self.unverified_offsets[wrong[0]], "the header is damaged (its checksum is wrong)")
        self.unverified.clear()
        self.unverified_offsets.clear()

    def _build_error(self, at: int, damage: str) -> DamagedTarError:
        """Return the error that describes damage at an offset, or says that the file is not a plain tar file."""
        if self.size == 0:
            return DamagedTarError(f"{self.path} is empty (0 bytes), not a tar file")
        if at == 0 and not self.members.names:
            start = self.read(8, 0)
            compressions = [name for magic, name in _COMPRESSED.items() if start.startswith(magic)]
            if compressions:
                return DamagedTarError(
                    f"{self.path} is {compressions[0]}-compressed: shards must be plain tar files, decompress it first"
                )
            if self.size < BLOCK or "checksum" in damage:
                return DamagedTarError(f"{self.path} is not a tar file")
        before = [name for name, offset in zip(self.members.names, self.members.offsets, strict=True) if offset <= at]
        after = f", after member {before[-1]!r}" if before else ""
        return DamagedTarError(f"{self.path} is damaged at byte {at:,} of {self.size:,}{after}: {damage}")


def _parse_octal(field: bytes) -> int:
    """Return an octal number padded with spaces and NULs; -1 for anything else."""
    digits = field.partition(b"\0")[0].strip()
    return int(digits or b"0", 8) if not digits.strip(b"01234567") else -1


def _parse_size(field: bytes, at: int) -> int:
    """Return a size, written in octal or in GNU's base 256 with the top bit set."""
    value = int.from_bytes(field, "big") & (1 << 88) - 1 if field[0] == 0x80 else _parse_octal(field)
    if not 0 <= value < 1 << 62:
        raise _DamageAt(at, "the header gives no valid size")
    return value


def _parse_decimal_size(value: bytes, at: int) -> int:
    """Return a size in decimal digits, of which only the last 19 may differ from 0; int() refuses thousands of digits."""
    digits = value.lstrip(b"0") or value[-1:]
    size = int(digits) if digits.isdigit() and len(digits) <= 19 else 1 << 62
    if size >= 1 << 62:
        raise _DamageAt(at, "the header gives no valid size")
    return size


def _parse_name(header: bytes) -> str:
    """Return the name of a member from its ustar or V7 header."""
    name = header[:100].partition(b"\0")[0]
    if header[345] and header[257:263] == b"ustar\0":  # not in GNU's own format, which keeps times there
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _parse_pax(data: bytes, at: int) -> tuple[str | None, int | None]:
    """Return (path, size) from a pax header; None for one that it does not contain.

    Its records are `LENGTH key=value` and a newline.
    """
    path, size, start = None, None, 0
    while start < len(data) and data[start]:
        match = re.compile(rb"(\d{1,20}) ([^=]+)=").match(data, start)
        end = start + int(match[1]) if match else 0
        if not match or not match.end() < end <= len(data):
            raise _DamageAt(at, "the extended header is damaged")
        key, value = match[2], data[match.end() : end - 1]
        if key == b"path":
            path = value.decode("utf-8", "surrogateescape")
        elif key == b"size":
            size = _parse_decimal_size(value, at)
        elif key.startswith(b"GNU.sparse"):
            raise _DamageAt(at, "a sparse file, which shards cannot hold")
        start = end
    return path, size
