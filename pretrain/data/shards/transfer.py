"""Transfers of remote files: whole shards in parallel parts, and small files.

http and https urls are read by a client of our own, object stores through `stores.py`, commands and all else as a stream.
"""

from __future__ import annotations

import http.client
import io
import os
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from typing import IO, Any, TypeVar, cast

from pretrain.data.shards import retries, stores, urls
from pretrain.data.shards.ranges import NoRangesError, StoreRanges, open_range, parse_range
from pretrain.data.shards.retries import is_permanent, retry_part
from pretrain.data.shards.stores import is_store
from pretrain.data.shards.urls import build_request, find_read, is_http, open_url
from pretrain.errors import UserError

T = TypeVar("T")

FETCH_SECONDS = 1800.0
"""Default limit on the time that one fetch of a shard may take, however slowly its bytes arrive."""

MAX_FETCH_SECONDS = 1e6
"""The longest limit that can be set: larger numbers overflow the clock of threads."""

CONNECTIONS = 8
"""Default number of parallel requests of one fetch: one connection to an object store gives 50 to 100 MB/s."""

PART_BYTES = 8 << 20
"""Bytes of a part of a shard, which one request fetches: the transfer takes several times longer than the wait for it."""

_SMALL_FILE_SECONDS = 60.0
_SMALL_FILE_BYTES = 1 << 26
_PIECE = 1 << 20


def run_limited(work: Callable[[], T], seconds: float, describe: Callable[[], str]) -> T:
    """Return work(), which runs in a thread that is abandoned after `seconds`.

    Reads that wait for a server end by a timeout, but not those to which a byte comes now and then.

    Args:
        work: the operation.
        seconds: the limit.
        describe: returns the message of the error.

    Raises:
        UserError: the limit is over, or `work` raised it.
        OSError: `work` raised any other exception: a server that does not follow the protocol is worth another try.
    """
    outcome: list[Any] = [None, None]

    def run() -> None:
        try:
            outcome[0] = work()
        except Exception as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()  # it holds the connection
            outcome[1] = error

    thread = threading.Thread(target=run, name="fetch", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise UserError(describe())
    value, error = outcome
    if isinstance(error, OSError | UserError | NoRangesError):
        raise error
    if error is not None:
        raise OSError(f"{type(error).__name__}: {error}") from error
    return cast(T, value)


class Transfer:
    """Copies a remote file into an open one, in threads that can be abandoned.

    Args:
        url: what is copied.
        out: an empty file, open for writing; of the operating system for objects in stores, and with several connections.
        most_bytes: the largest size; None = no limit.
        connections: parallel requests.
    """

    def __init__(self, url: str, out: IO[bytes], most_bytes: int | None = None, connections: int = 1) -> None:
        self.url, self.out, self.most_bytes, self.connections = url, out, most_bytes, connections
        self.copied = 0
        self.info: stores.ObjectInfo | None = None
        """What the object store states of the object, after `run`."""
        self._abandoned = False
        self._commands: list[subprocess.Popen[bytes]] = []
        self._errors: list[Exception] = []

    def run(self, seconds: float) -> None:
        """Copy all. Raises UserError after `seconds`, or for a url that cannot be opened, else OSError."""
        try:
            run_limited(self._copy_all, seconds, lambda: describe_timeout(self.url, seconds, self.copied))
        except NoRangesError as error:  # to a later request
            raise OSError(str(error)) from error
        finally:  # also where a signal ends the wait
            self._abandoned = True
            for command in self._commands:
                if command.poll() is None:
                    command.kill()

    def _copy_all(self) -> None:
        """Copy until the end."""
        if is_store(self.url):
            ranges = StoreRanges(self.url)
            self._check_size(ranges.size)
            self._copy_parts(0, ranges.size, lambda start, end: iter([ranges.read(start, end)]))
            ranges.check_unchanged()
            self.info = ranges.info
        elif is_http(self.url) and self.connections > 1:
            self._copy_http()
        else:
            with open_url(self.url, self._commands) as source:
                self._copy_stream(source)

    def _copy_stream(self, source: Any) -> None:
        """Copy a stream until its end."""
        for piece in self._iterate_pieces(source):
            self.out.write(piece)
        missing = getattr(source, "length", None)  # of an HTTP response: bytes not received yet
        if missing:
            raise OSError(f"the connection ended {missing:,} bytes early")

    def _copy_http(self) -> None:
        """Copy the first part, and where the server has answered with a range, the others in parallel."""
        try:
            response = urllib.request.urlopen(build_request(self.url, (0, PART_BYTES)), timeout=urls.IDLE_SECONDS)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code != 416:  # the answer to a range of an empty file
                raise
            response = urllib.request.urlopen(build_request(self.url), timeout=urls.IDLE_SECONDS)
        with response:
            if response.status != 206:
                return self._copy_stream(response)
            version = parse_range(response, 0, PART_BYTES)
            self._check_size(version[0])
            is_whole = self._copy_first_part(response, min(PART_BYTES, version[0]))

        def read(start: int, end: int) -> Iterator[bytes]:
            try:
                with open_range(self.url, start, end, version) as (part, _):
                    yield from self._iterate_pieces(part)
            except NoRangesError as error:  # it has sent one before: another try may help
                raise OSError(str(error)) from error

        self._copy_parts(PART_BYTES if is_whole else 0, version[0], read)

    def _copy_first_part(self, source: Any, length: int) -> bool:
        """Copy the first part of a file; return whether it came whole, else it is requested again as any other part."""
        try:
            self._copy_stream(source)
        except (OSError, http.client.HTTPException):
            if self._abandoned:
                raise
        self.out.flush()
        if self.copied == length:
            return True
        os.truncate(self.out.fileno(), 0)
        return False

    def _copy_parts(self, begin: int, size: int, read: Callable[[int, int], Iterator[bytes]]) -> None:
        """Copy the bytes [begin, size) in parts, several at once; read(start, end) yields the bytes of a part."""
        parts = deque((start, min(start + PART_BYTES, size)) for start in range(begin, size, PART_BYTES))
        if self.connections == 1 or len(parts) < 2:
            for start, end in parts:
                self._copy_part(start, end, read)
            return

        def copy() -> None:
            try:
                while not self._abandoned and not self._errors:
                    try:
                        start, end = parts.popleft()
                    except IndexError:
                        return
                    self._copy_part(start, end, read)
            except Exception as error:
                self._errors.append(error)

        threads = [
            threading.Thread(target=copy, name="fetch part", daemon=True) for _ in range(min(self.connections, len(parts)))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._errors:
            raise self._errors[0]

    def _copy_part(self, start: int, end: int, read: Callable[[int, int], Iterator[bytes]]) -> None:
        """Copy one part, tried again by itself after an error."""

        def copy() -> None:
            at = start
            for piece in read(start, end):
                if at + len(piece) > end:
                    raise OSError(f"more than the {end - start:,} bytes that were asked for")
                at = self._write_at(piece, at)
            if at < end:
                raise OSError(f"the connection ended {end - at:,} bytes early")

        retry_part(copy, lambda: self._abandoned)

    def _write_at(self, piece: bytes, at: int) -> int:
        """Write at an offset, and return the offset of its end."""
        written = 0
        while written < len(piece):
            written += os.pwrite(self.out.fileno(), piece[written:], at + written)
        if is_store(self.url):
            self.copied += len(piece)
        return at + len(piece)

    def _iterate_pieces(self, source: Any) -> Iterator[bytes]:
        """Yield what comes from a stream, until it ends or the transfer is abandoned."""
        read = find_read(source)
        while not self._abandoned and (piece := read(_PIECE)):
            self._check_size(self.copied + len(piece))
            self.copied += len(piece)
            yield piece

    def _check_size(self, size: int) -> None:
        """Raise OSError for more bytes than may come."""
        if self.most_bytes is not None and size > self.most_bytes:
            raise OSError(f"more than {self.most_bytes:,} bytes")


def describe_timeout(url: str, seconds: float, copied: int) -> str:
    """Return the message for a transfer that took too long."""
    return (
        f"cannot read {url}: after {seconds:,.0f} seconds only {copied:,} bytes had come; "
        "data.fetch_seconds sets how long a fetch may take"
    )


def read_small_file(url: str) -> bytes | None:
    """Return the content (at most 64 MiB) of a small file beside a remote shard; None where it cannot be had."""
    if not is_store(url) and not url.startswith(("http://", "https://", "file://")):
        return None
    for seconds in (*retries.RETRY_SECONDS, None):
        try:
            if is_store(url):
                return run_limited(
                    lambda: stores.read_start(url, _SMALL_FILE_BYTES), _SMALL_FILE_SECONDS, lambda: "it takes too long"
                )
            out = io.BytesIO()
            Transfer(url, out, _SMALL_FILE_BYTES).run(_SMALL_FILE_SECONDS)
            return out.getvalue()
        except (OSError, UserError) as error:
            if seconds is None or is_permanent(error):
                return None
            time.sleep(seconds)
    return None
