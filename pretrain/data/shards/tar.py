"""Walks the headers of a tar file: where each regular member lies, and whether the archive is whole.

Reads ustar, GNU long names and pax headers, as Python's tarfile does, several times faster; nothing is ever extracted.
Unlike most readers it takes nothing on trust: every header's checksum is verified, and an archive must end the way archives
end, so that a damaged header, a hole of zeros or a file cut short (even between two members) is found and named.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

import numpy as np

from pretrain.errors import UserError

BLOCK = 512
_ZEROS = bytes(BLOCK)
_CHUNK = 1 << 20  # headers are read through a window of this size: few reads on a network disk, whatever the members' sizes
_BATCH = 4096  # headers whose checksums are verified at once
_MAX_PADDING = 1 << 20  # zeros allowed after the end marker; archivers pad to records of 10 KiB
_MAX_EXTENSION = 1 << 20  # bytes of a long name or a pax header

_REGULAR = b"07\0"
_NO_CONTENT = b"123456"  # links, devices, directories, fifos
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}


class DamagedTarError(UserError):
    """The file is not a whole tar archive; the message says which file, at which byte, and what was found."""


class Members(NamedTuple):
    """The regular members of an archive, in file order: names, and the byte range of each one's content."""

    names: list[str]
    offsets: list[int]
    lengths: list[int]


class _DamageAt(Exception):  # noqa: N818
    """What is wrong at a byte; verified headers before it take precedence in the report."""

    def __init__(self, at: int, what: str) -> None:
        self.at, self.what = at, what


def read_members(fd: int, path: str) -> Members:
    """The regular members of an open tar file.

    Args:
        fd: file descriptor, read by position only.
        path: how the file is called in errors.

    Raises:
        DamagedTarError: not a tar, compressed, damaged, or cut short.
        OSError: the file cannot be read.
    """
    return _TarScanner(fd, path).run()


class _TarScanner:
    def __init__(self, fd: int, path: str) -> None:
        self.fd, self.path = fd, path
        self.size = os.fstat(fd).st_size
        self.chunk, self.chunk_at = b"", 0
        self.unverified: list[bytes] = []
        self.unverified_at: list[int] = []
        self.members = Members([], [], [])

    def run(self) -> Members:
        try:
            self._headers()
        except _DamageAt as broken:
            self._verify()  # an earlier header that is damaged is the cause of what was found here
            raise self._damaged(broken.at, broken.what) from None
        self._verify()
        return self.members

    def _headers(self) -> None:
        names, offsets, lengths = self.members
        long_name: str | None = None
        long_size: int | None = None
        at = 0
        while True:
            header = self._block(at)
            if header == _ZEROS:
                return self._end(at)
            self.unverified.append(header)
            self.unverified_at.append(at)
            if len(self.unverified) == _BATCH or at == 0:
                self._verify()
            kind, length, content = header[156:157], _parse_size(header[124:136], at), at + BLOCK
            if kind in b"LxX":
                extension = self._extension(at, content, length)
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
                if kind in _REGULAR and not (kind == b"\0" and name.endswith("/")):  # so V7 wrote directories
                    if content + length > self.size:
                        raise _DamageAt(at, f"member {name!r} is cut short: it should end at byte {content + length:,}")
                    names.append(name)
                    offsets.append(content)
                    lengths.append(length)
                elif kind in _NO_CONTENT or kind in _REGULAR:
                    length = 0
            at = content + (length + BLOCK - 1) // BLOCK * BLOCK

    def _block(self, at: int) -> bytes:
        """The 512 bytes at a position."""
        start = at - self.chunk_at
        if start + BLOCK > len(self.chunk):
            self.chunk, self.chunk_at, start = os.pread(self.fd, _CHUNK, at), at, 0
        block = self.chunk[start : start + BLOCK]
        if len(block) < BLOCK:
            what = "it ends without an end-of-archive marker" if at >= self.size else "it ends in the middle of a header"
            raise _DamageAt(at, f"{what}, so it was cut short or is still being written")
        return block

    def _extension(self, at: int, start: int, length: int) -> bytes:
        if length > _MAX_EXTENSION:
            raise _DamageAt(at, f"an extended header of {length:,} bytes")
        data = os.pread(self.fd, length, start)
        if len(data) < length:
            raise _DamageAt(at, "it ends in the middle of an extended header")
        return data

    def _end(self, at: int) -> None:
        """After the marker only a little padding may follow: more, or anything else, was once members."""
        if self.size - at > _MAX_PADDING:
            raise _DamageAt(at, f"{self.size - at:,} bytes follow the block of zeros that should end it")
        rest = os.pread(self.fd, self.size - at, at)
        if rest.count(0) < len(rest):
            raise _DamageAt(at, "a block of zeros, and data after it")

    def _verify(self) -> None:
        """Checks the checksums of the headers read so far, as unsigned or (old archivers) signed bytes."""
        headers = np.frombuffer(b"".join(self.unverified), dtype=np.uint8).reshape(-1, BLOCK)
        stored = np.array([_parse_octal(header[148:156]) for header in self.unverified])
        for kind in (np.uint8, np.int8):
            values = headers.view(kind)
            sums = values.sum(axis=1, dtype=np.int64) - values[:, 148:156].sum(axis=1, dtype=np.int64) + 8 * ord(" ")
            stored = np.where(sums == stored, -2, stored)
        wrong = np.flatnonzero(stored != -2)
        if len(wrong):
            raise self._damaged(self.unverified_at[wrong[0]], "the header is damaged (its checksum is wrong)")
        self.unverified.clear()
        self.unverified_at.clear()

    def _damaged(self, at: int, what: str) -> DamagedTarError:
        if self.size == 0:
            return DamagedTarError(f"{self.path} is empty (0 bytes), not a tar file")
        if at == 0 and not self.members.names:
            start = os.pread(self.fd, 8, 0)
            packed = [name for magic, name in _COMPRESSED.items() if start.startswith(magic)]
            if packed:
                return DamagedTarError(f"{self.path} is {packed[0]}-compressed: shards are plain tar files, unpack it first")
            if self.size < BLOCK or "checksum" in what:
                return DamagedTarError(f"{self.path} is not a tar file")
        before = [name for name, offset in zip(self.members.names, self.members.offsets, strict=True) if offset <= at]
        after = f", after member {before[-1]!r}" if before else ""
        return DamagedTarError(f"{self.path} is damaged at byte {at:,} of {self.size:,}{after}: {what}")


def _parse_octal(field: bytes) -> int:
    """An octal number padded with spaces and NULs; -1 if it is none."""
    digits = field.partition(b"\0")[0].strip()
    return int(digits or b"0", 8) if not digits.strip(b"01234567") else -1


def _parse_size(field: bytes, at: int) -> int:
    """A size: octal, or GNU's base 256 with the top bit set."""
    value = int.from_bytes(field, "big") & (1 << 88) - 1 if field[0] == 0x80 else _parse_octal(field)
    if not 0 <= value < 1 << 62:
        raise _DamageAt(at, "the header gives no valid size")
    return value


def _parse_name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    if header[345] and header[257:263] == b"ustar\0":  # GNU's own format keeps times there
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _parse_pax(data: bytes, at: int) -> tuple[str | None, int | None]:
    """(path, size) of a pax header: records of `LENGTH key=value` and a newline."""
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
            size = _parse_size(b"%o" % int(value) if value.isdigit() else b"?", at)
        elif key.startswith(b"GNU.sparse"):
            raise _DamageAt(at, "a sparse file, which shards cannot hold")
        start = end
    return path, size
