"""Reads tables of separated values of any length: finds their separator, and counts rows that cannot be read.

A value that begins with a quote ends at the next single quote, as in RFC 4180, and may contain separators and line breaks.
People's tables also hold quotes that are part of the text. One that is never closed costs its own line only:

    images/1.jpg,"a quoted, long caption"       two values
    images/2.jpg,"hello" said the man           two values, the second with its quotes
    images/3.jpg,"never closed                  one row that cannot be read; the next line is a row again
"""

from __future__ import annotations

import gzip
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from pretrain.errors import UserError

SEPARATORS = {"comma": ",", "tab": "\t", "semicolon": ";", "bar": "|"}
"""Separators that are detected, by name."""

UNEVEN = "row with too few or too many values"
UNCLOSED = "row with a quote that is not closed"
TOO_LONG = "row too long"

_MAX_LINE = 1 << 24  # bytes; a longer line is not a row of a table
_MAX_RECORD = 1 << 20  # bytes of a row with line breaks: a quote that is open for longer was never closed
_IMAGE_NAME = re.compile(rb"\.(jpe?g|jpe|png|webp|gif|bmp|tiff?)$", re.IGNORECASE)

OnReject = Callable[[str, str], None]
"""Called with (reason, text of the row) for each row that cannot be read."""


@dataclass(frozen=True)
class Layout:
    """How the values of a table are separated, and the names of its columns."""

    separator: str
    columns: list[str]
    spaced: bool
    """Whether a space follows each separator, as in "name| comment"; it is not part of the value."""
    header: int = 1
    """Number of lines before the first row, blank ones not counted."""

    @property
    def separator_name(self) -> str:
        """The separator in words."""
        return next((name for name, text in SEPARATORS.items() if text == self.separator), repr(self.separator))


def read_layout(path: Path, separator: str | None, wanted: tuple[str, ...]) -> Layout:
    """Return the layout of a table from its first line.

    Args:
        path: the table, which may be compressed by gzip.
        separator: the separator; None = the one that gives all wanted columns, or the most columns.
        wanted: columns that are going to be read.

    Raises:
        UserError: the file is empty, or its first line is not UTF-8.
    """
    with _open_binary(path) as file:
        lines = (line for line in _read_lines(file) if line.strip())
        header = next(lines, b"")
        declared = re.fullmatch(r"\ufeff?sep=(.)", header[:20].decode("utf-8", "replace").rstrip("\r\n"))  # a line of Excel
        if declared:
            header, separator = next(lines, b""), separator or declared[1]
    if header.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path} cannot be read as a table: it is UTF-16; save it as UTF-8")
    text = header.decode("utf-8-sig").rstrip("\r\n")
    if not text.strip():
        raise UserError(f"{path} cannot be read as {_get_extension(path)}: it is empty")
    usual = "\t" if _get_extension(path) == "tsv" else ","
    choices = [separator] if separator else [usual, *(s for s in SEPARATORS.values() if s != usual)]
    layouts = [_split_header(text, choice) for choice in choices]
    best = max(layouts, key=lambda layout: (sum(name in layout.columns for name in wanted), len(layout.columns)))
    return replace(best, header=2) if declared else best


def _split_header(text: str, separator: str) -> Layout:
    raw, _ = _Record(text.encode(), separator.encode(), spaced=False).split()
    is_spaced = len(raw) > 1 and all(value.startswith(b" ") for value in raw[1:])
    values, _ = _Record(text.encode(), separator.encode(), is_spaced).split()
    return Layout(separator, [value.decode().strip() for value in values], is_spaced)


def read_rows(path: Path, layout: Layout, image_column: str, on_reject: OnReject) -> Iterator[list[bytes]]:
    """Yield the values of each row, and call `on_reject` for each row that cannot be read.

    Args:
        path: the table, which may be compressed by gzip.
        layout: as `read_layout` returns it.
        image_column: the column that names images; it tells a row from a line of a caption.
        on_reject: called with (reason, text) of a row.
    """
    separator, count = layout.separator.encode(), len(layout.columns)
    image = layout.columns.index(image_column) if image_column in layout.columns else -1
    with _open_binary(path) as file:
        lines = _Lines(_read_lines(file))
        header = layout.header
        for line in lines:
            text = line.rstrip(b"\r\n")
            if not text.strip():
                continue
            if header:
                header -= 1
                continue
            if len(text) > _MAX_LINE:
                on_reject(TOO_LONG, _show(text))
                continue
            if b'"' in text:
                values = _read_quoted(text, lines, layout, image, count)
            else:
                values = text.split(separator)
                if layout.spaced:
                    values = [value.lstrip(b" ") for value in values]
            if values is None:
                on_reject(UNCLOSED, _show(text))
            elif len(values) != count:
                on_reject(UNEVEN, _show(text))
            else:
                yield values


def _read_quoted(text: bytes, lines: _Lines, layout: Layout, image: int, count: int) -> list[bytes] | None:
    """Return the values of a row with quotes, or None if a quote is not closed.

    Lines that were read in search of the closing quote are then given back to `lines`.
    """
    record = _Record(text, layout.separator.encode(), layout.spaced)
    values, is_open = record.split()
    taken: list[bytes] = []
    while is_open:
        line = lines.take()
        if line is None or len(record.text) + len(line) > _MAX_RECORD:
            taken += [] if line is None else [line]
            break
        taken.append(line)
        record.text += b"\n" + line.rstrip(b"\r\n")
        if b'"' in line:
            values, is_open = record.split()
    if not is_open and not taken:
        return values
    if not is_open and not record.is_ambiguous:
        name = values[image] if len(values) == count and image >= 0 else b""
        if not _hold_rows([line.rstrip(b"\r\n") for line in taken], layout, image, count, name):
            return values
    lines.give_back(taken)
    return None


def _hold_rows(lines: list[bytes], layout: Layout, image: int, count: int, first: bytes) -> bool:
    """Whether lines inside quotes that close are rows all the same: the quote was never closed.

    One line with an extension of images is enough. A line of a caption may begin with a number too, as in "2021, a view".
    Names without an extension therefore need two lines or more, and all of them must look like the name of the first row.

    Args:
        lines: those after the first one of the row.
        layout: of the table.
        image: position of the column that names images; -1 = none.
        count: number of columns.
        first: name of the image of the row.
    """
    if image < 0:
        return False
    rows = [line.split(layout.separator.encode()) for line in lines]
    names = [values[image].strip().strip(b'"') if len(values) == count else b"" for values in rows]
    first = first.strip().strip(b'"')
    extension = _get_extension_of_name(first)
    if any(_IMAGE_NAME.search(name) or (extension and _get_extension_of_name(name) == extension) for name in names):
        return True
    return len(names) > 1 and not extension and all(_is_similar(name, first) for name in names)


def _get_extension_of_name(name: bytes) -> bytes:
    extension = re.search(rb"\.\w{1,5}$", name)
    return extension[0].lower() if extension else b""


def _is_similar(name: bytes, other: bytes) -> bool:
    """Whether two names with digits have the same punctuation and length, or for a counter 9 and 10 nearly that length."""
    if not re.fullmatch(rb"\S*\d\S*", other) or re.sub(rb"\w+", b"a", name) != re.sub(rb"\w+", b"a", other):
        return False
    return abs(len(name) - len(other)) <= (not other.startswith(b"0"))


class _Record:
    """A row with quotes, split step by step while lines are added to `text`.

    Args:
        text: the first line.
        separator: of the table.
        spaced: skip spaces at the start of a value.
    """

    def __init__(self, text: bytes, separator: bytes, spaced: bool) -> None:
        self.text = bytearray(text)
        self.separator, self.spaced = separator, spaced
        self.is_ambiguous = False
        """Whether text follows a closing quote on another line than the opening one: the quotes are no pair."""
        self._values: list[bytes] = []
        self._start = 0  # of the value that is being read
        self._scan = -1  # where to look for the closing quote of that value; -1 = it has not begun
        self._first_line = len(text)

    def split(self) -> tuple[list[bytes], bool]:
        """Return (values, whether the last one has a quote that is still open)."""
        text = self.text
        while True:
            if self._scan < 0:
                while self.spaced and text[self._start : self._start + 1] == b" ":
                    self._start += 1
                if text[self._start : self._start + 1] == b'"':
                    self._scan = self._start + 1
            if self._scan >= 0:
                quote = self._find_closing_quote()
                if quote < 0:
                    return self._values, True
                end = quote + 1
                if end < len(text) and not text.startswith(self.separator, end):  # not a quoted value, or not only
                    self.is_ambiguous |= quote > self._first_line
                    end = self._find_separator(end)
                    self._values.append(bytes(text[self._start : end]))  # as it is, with its quotes
                else:
                    self._values.append(bytes(text[self._start + 1 : quote]).replace(b'""', b'"'))
            else:
                end = self._find_separator(self._start)
                self._values.append(bytes(text[self._start : end]))
            self._scan = -1
            if end >= len(text):
                return self._values, False
            self._start = end + len(self.separator)

    def _find_closing_quote(self) -> int:
        """Return the position of the quote that ends the value, or -1. A doubled quote is part of the value."""
        while True:
            quote = self.text.find(b'"', self._scan)
            if quote < 0:
                self._scan = len(self.text)
                return -1
            if self.text[quote + 1 : quote + 2] != b'"':
                return quote
            self._scan = quote + 2

    def _find_separator(self, start: int) -> int:
        position = self.text.find(self.separator, start)
        return len(self.text) if position < 0 else position


class _Lines:
    """Lines of a file, of which some can be given back to be read again."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        self._lines = lines
        self._again: deque[bytes] = deque()

    def __iter__(self) -> Iterator[bytes]:
        while (line := self.take()) is not None:
            yield line

    def take(self) -> bytes | None:
        """Return the next line, or None at the end."""
        return self._again.popleft() if self._again else next(self._lines, None)

    def give_back(self, lines: list[bytes]) -> None:
        """Put lines in front of those that come next."""
        self._again.extendleft(reversed(lines))


def _open_binary(path: Path) -> BinaryIO:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rb")  # type: ignore[return-value]
    return open(path, "rb")


def _read_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield lines, also of files whose lines end in a carriage return only; of a long line only the beginning.

    The beginning of a long line has more than _MAX_LINE bytes.
    """
    start = file.read(1 << 16)
    file.seek(0)
    if b"\r" in start and b"\n" not in start:
        yield from _read_carriage_returns(file)
        return
    while line := file.readline(_MAX_LINE + 2):
        yield line
        while len(line) > _MAX_LINE and not line.endswith(b"\n") and line:
            line = file.readline(_MAX_LINE + 2)


def _read_carriage_returns(file: BinaryIO) -> Iterator[bytes]:
    rest = b""
    while chunk := file.read(1 << 16):
        *lines, rest = (rest + chunk).replace(b"\r\n", b"\r").replace(b"\n", b"\r").split(b"\r")
        yield from lines
        if len(rest) > _MAX_LINE:
            yield rest
            rest = b""
    if rest:
        yield rest


def _get_extension(path: Path) -> str:
    return path.name.lower().removesuffix(".gz").rpartition(".")[2]


def _show(text: bytes) -> str:
    return text[:200].decode("utf-8", "replace")
