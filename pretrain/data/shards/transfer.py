"""Transfers of remote files: whole shards in parallel parts, single byte ranges, and small files.

http and https urls are read by a client of our own, object stores through `stores.py`, commands and all else as a stream.
"""

from __future__ import annotations

import base64
import http.client
import io
import os
import re
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import IO, Any, Protocol, TypeVar, cast

from pretrain.data.shards import stores
from pretrain.data.shards.stores import STORES, is_store
from pretrain.errors import UserError

T = TypeVar("T")

RETRY_SECONDS = (0.2, 1.0, 5.0)
"""Seconds to wait before each retry after an input/output error; after the last retry the run stops."""

FETCH_SECONDS = 1800.0
"""Default limit on the time that one fetch of a shard may take, however slowly its bytes arrive."""

MAX_FETCH_SECONDS = 1e6
"""The longest limit that can be set: larger numbers overflow the clock of threads."""

CONNECTIONS = 8
"""Default number of parallel requests of one fetch: one connection to an object store gives 50 to 100 MB/s."""

PART_BYTES = 8 << 20
"""Bytes of a part of a shard, which one request fetches: the transfer takes several times longer than the wait for it."""

_IDLE_SECONDS = 60.0
_URL_CHARACTERS = "%/:@!$&'()*+,;=~[]"
_SMALL_FILE_SECONDS = 60.0
_SMALL_FILE_BYTES = 1 << 26
_PIECE = 1 << 20

_CHANGED = "it changed while it was being read"
_PERMANENT_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def is_remote(path: str) -> bool:
    """Return whether a shard is a url (or a command) rather than a local file."""
    return "://" in path or path.startswith("pipe:")


def is_http(url: str) -> bool:
    """Return whether a url is read over HTTP."""
    return url.startswith(("http://", "https://"))


def is_permanent(error: Exception) -> bool:
    """Return whether trying again does not help after an error: a 4xx of HTTP, for example, except 408, 425 and 429."""
    status = getattr(error, "code", None)
    return isinstance(error, (*_PERMANENT_ERRORS, UserError)) or (
        isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)
    )


def retry_io(action: Callable[[], T], what: str) -> T:
    """Return action(), retried after input/output errors.

    Args:
        action: the operation.
        what: what is read, for the error message.

    Raises:
        UserError: the error is permanent, or the last retry failed.
    """
    retries = 0
    while True:
        try:
            return action()
        except OSError as error:
            if is_permanent(error) or retries == len(RETRY_SECONDS):
                attempts = f", tried {retries + 1} times" if retries else ""
                hint = "; its token may have expired" if getattr(error, "code", None) in (401, 403) else ""
                raise UserError(f"cannot read {what}: {error}{hint}{attempts}") from error
            time.sleep(RETRY_SECONDS[retries])
            retries += 1


def retry_part(action: Callable[[], T], is_abandoned: Callable[[], bool] = lambda: False) -> T:
    """Return action(), which reads a part of a file, tried up to two times more: the other parts need not come again."""
    for seconds in RETRY_SECONDS[:2]:
        try:
            return action()
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()  # it holds the connection
            if is_permanent(error) or is_abandoned():
                raise
            time.sleep(seconds)
    return action()


# ---- byte ranges -----------------------------------------------------------------------------------------------------


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
            with _open_range(self.url, start, end, self._version) as (response, version):
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
def _open_range(url: str, start: int, end: int, expected: tuple[int, str] | None) -> Iterator[tuple[Any, tuple[int, str]]]:
    """Request the bytes [start, end) of a file over HTTP; yield the response, and size and version tag of the file.

    Raises:
        NoRangesError: the response is not that range.
        OSError: it cannot be had, or size or tag are not those `expected`.
    """
    with urllib.request.urlopen(_build_request(url, (start, end)), timeout=_IDLE_SECONDS) as response:
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


# ---- whole files -----------------------------------------------------------------------------------------------------


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
            with _open_url(self.url, self._commands) as source:
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
            response = urllib.request.urlopen(_build_request(self.url, (0, PART_BYTES)), timeout=_IDLE_SECONDS)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code != 416:  # the answer to a range of an empty file
                raise
            response = urllib.request.urlopen(_build_request(self.url), timeout=_IDLE_SECONDS)
        with response:
            if response.status != 206:
                return self._copy_stream(response)
            version = parse_range(response, 0, PART_BYTES)
            self._check_size(version[0])
            is_whole = self._copy_first_part(response, min(PART_BYTES, version[0]))

        def read(start: int, end: int) -> Iterator[bytes]:
            try:
                with _open_range(self.url, start, end, version) as (part, _):
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
        read = _find_read(source)
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
    for seconds in (*RETRY_SECONDS, None):
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


# ---- streams ---------------------------------------------------------------------------------------------------------


def _find_read(source: Any) -> Callable[[int], bytes]:
    """Return the function of a stream that returns what has come, where `read` would wait for all that was asked for."""
    stream = getattr(source, "stream", source)  # webdataset's pipes wrap one
    read: Callable[[int], bytes] = getattr(stream, "read1", None) or source.read
    return read


def _build_request(url: str, byte_range: tuple[int, int] | None = None) -> urllib.request.Request:
    """Build the request for a url: user name and password become a header, which no other host gets by a redirect.

    byte_range: first byte, and the one after the last. Raises UserError for a url that is not valid.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        userinfo, at, host = parts.netloc.rpartition("@")
        host.encode("idna")
        _ = parts.port
        if parts.scheme != "file" and not parts.hostname:
            raise ValueError("it names no host")
    except ValueError as error:
        raise UserError(f"{url} is not a valid url: {error}") from error
    path = urllib.parse.quote(parts.path, safe=_URL_CHARACTERS)
    query = urllib.parse.quote(parts.query, safe=_URL_CHARACTERS + "?")
    request = urllib.request.Request(urllib.parse.urlunsplit((parts.scheme, host, path, query, "")))
    if byte_range is not None:
        request.add_header("Range", f"bytes={byte_range[0]}-{byte_range[1] - 1}")
    if at:
        encoded = base64.b64encode(urllib.parse.unquote(userinfo).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {encoded}")
    return request


def _open_url(url: str, commands: list[subprocess.Popen[bytes]]) -> AbstractContextManager[IO[bytes]]:
    """Open a url for reading.

    commands: gets the process of a command, so that another thread can end it. Raises UserError for an unknown scheme.
    """
    if url.startswith(("http://", "https://", "file://")):
        response: IO[bytes] = urllib.request.urlopen(_build_request(url), timeout=_IDLE_SECONDS)
        return response
    if url.startswith("pipe:"):
        return _run_command(url.removeprefix("pipe:"), commands)
    from webdataset.gopen import gopen, gopen_schemes  # sftp and others, by command-line tools; slow to import

    scheme = url.partition(":")[0]
    if scheme not in gopen_schemes:
        schemes = ", ".join(sorted({*gopen_schemes, *STORES} - {"__default__"}))
        raise UserError(f"{url}: cannot open urls of scheme {scheme}; valid schemes are {schemes}")
    stream: Any = gopen(url)
    commands.append(stream.proc)
    return cast(AbstractContextManager[IO[bytes]], stream)


@contextmanager
def _run_command(command: str, commands: list[subprocess.Popen[bytes]]) -> Iterator[IO[bytes]]:
    """Run a shell command and give its output as a stream.

    Raises:
        OSError: at the end of the block, where the command failed.
        UserError: there is no such command.
    """
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, stderr=errors) as run,
    ):
        assert run.stdout is not None
        commands.append(run)
        try:
            yield run.stdout
        except BaseException:
            run.kill()
            raise
        code = run.wait()
        errors.seek(0)
        lines = errors.read().decode("utf-8", "replace").strip().splitlines()
    if code:
        reason = f"the command ended with exit code {code}" + (f": {lines[-1][:300]}" if lines else "")
        if code in (126, 127):  # the shell does not find the command: trying again does not help
            raise UserError(f"cannot read pipe:{command}: {reason}")
        raise OSError(reason)
