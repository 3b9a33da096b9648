"""Byte ranges of remote files, over HTTP and from object stores."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from pretrain.data.shards import stores, urls
from pretrain.data.shards.stores import is_store
from pretrain.data.shards.urls import build_request, is_http

_CHANGED = "it changed while it was being read"


class NoRangesError(Exception):
    """A server sends whole files only."""


class Ranges(Protocol):
    """A remote file that is read by byte range."""

    size: int

    def read(self, start: int, end: int) -> bytes:
        """Return the bytes [start, end). Raises OSError."""


class HttpRanges:
    """A file on an HTTP server that answers requests for byte ranges.

    Args:
        url: its address.
        head: bytes that the first request asks for.

    Raises:
        NoRangesError: the server does not answer such requests.
        OSError: it cannot be read.
    """

    def __init__(self, url: str, head: int) -> None:
        self.url, self.head, self.size = url, b"", 0
        self._version: tuple[int, str] | None = None
        self.head = self.read(0, head)

    def read(self, start: int, end: int) -> bytes:
        """Return the bytes [start, end), or up to the end of the file."""
        if end <= len(self.head):
            return self.head[start:end]
        try:
            with open_range(self.url, start, end, self._version) as (response, version):
                self._version, self.size = version, version[0]
                length = min(end, self.size) - start
                content: bytes = response.read(length)
        except urllib.error.HTTPError as error:
            error.close()  # it holds the connection
            if error.code == 416:
                raise NoRangesError("the server sends no such range") from None
            raise
        if len(content) < length:
            raise OSError(f"the connection ended {length - len(content):,} bytes early")
        return content


def parse_range(response: Any, start: int, end: int) -> tuple[int, str]:
    """Return (size of the whole file, its version tag) from the response to a request for the bytes [start, end).

    Raises:
        NoRangesError: the response is not that range.
    """
    if response.status != 206:
        raise NoRangesError("the server sends whole files only")
    match = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", response.headers.get("Content-Range", "").strip())
    if match is None:
        raise NoRangesError("the server does not say which bytes it sends")
    first, last, size = map(int, match.groups())
    if first != start or last != min(end, size) - 1:
        raise OSError(f"the server sends bytes {first:,} to {last:,}, not those from {start:,} on")
    return size, str(response.headers.get("ETag") or response.headers.get("Last-Modified") or "")


@contextmanager
def open_range(url: str, start: int, end: int, expected: tuple[int, str] | None) -> Iterator[tuple[Any, tuple[int, str]]]:
    """Request the bytes [start, end) of a file over HTTP; yield the response, and size and version tag of the file.

    Raises:
        NoRangesError: the response is not that range.
        OSError: it cannot be had, or size or tag are not those `expected`.
    """
    with urllib.request.urlopen(build_request(url, (start, end)), timeout=urls.IDLE_SECONDS) as response:
        version = parse_range(response, start, end)
        if expected is not None and version != expected:
            raise OSError(_CHANGED)
        yield response, version


class StoreRanges:
    """An object in an object store. Raises FileNotFoundError, other OSErrors, or UserError."""

    def __init__(self, url: str) -> None:
        self.url, self.info = url, stores.find_info(url)
        self.size = self.info.size

    def read(self, start: int, end: int) -> bytes:
        """Return the bytes [start, end), or up to the end of the object."""
        return stores.read_object(self.url, start, min(end, self.size))

    def check_unchanged(self) -> None:
        """Raise OSError where the object is another one by now."""
        if stores.find_info(self.url)[:2] != self.info[:2]:
            raise OSError(_CHANGED)


def open_ranges(url: str, head: int) -> Ranges:
    """Open a remote file for reading byte ranges; `head` bytes of its beginning are about to be read.

    Raises:
        NoRangesError: only the whole file can be read.
        OSError: it cannot be read.
        UserError: it cannot be opened.
    """
    if is_store(url):
        return StoreRanges(url)
    if is_http(url):
        return HttpRanges(url, head)
    raise NoRangesError("only whole files are read by such urls")
