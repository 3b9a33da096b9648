"""The local cache of remote shards, which are fetched completely before they are read.

Several processes may request the same shard at once: one fetches it, the others wait. A cached shard is always complete: its
archive is verified before it gets its name. A shard that a process is about to open is locked, and no other process removes it.
"""

from __future__ import annotations

import base64
import errno
import fcntl
import hashlib
import io
import os
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from pretrain.data.shards.tar import DamagedTarError, read_members
from pretrain.errors import UserError
from pretrain.printable import HIDDEN
from pretrain.runtime.files import partial_path

T = TypeVar("T")

RETRY_SECONDS = (0.2, 1.0, 5.0)
"""Seconds to wait before each retry after an input/output error; after the last retry the run stops."""

FETCH_SECONDS = 1800.0
"""Default limit on the time that one fetch of a shard may take, however slowly its bytes arrive."""

MAX_FETCH_SECONDS = 1e6
"""The longest limit that can be set: larger numbers overflow the clock of threads."""

_IDLE_SECONDS = 60.0
_URL_CHARACTERS = "%/:@!$&'()*+,;=~[]"
_SMALL_FILE_SECONDS = 60.0
_SMALL_FILE_BYTES = 1 << 26
_PIECE = 1 << 20

_PERMANENT_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def is_remote(path: str) -> bool:
    """Return whether a shard is a url (or a command) rather than a local file."""
    return "://" in path or path.startswith("pipe:")


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
            status = getattr(error, "code", None)  # of an HTTP response; retrying does not help a 4xx, except 429
            is_permanent = isinstance(error, _PERMANENT_ERRORS) or (
                isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)
            )
            if is_permanent or retries == len(RETRY_SECONDS):
                attempts = f", tried {retries + 1} times" if retries else ""
                raise UserError(f"cannot read {what}: {error}{attempts}") from error
            time.sleep(RETRY_SECONDS[retries])
            retries += 1


@dataclass(frozen=True)
class ShardCache:
    """Local folder of fetched shards, and of indices that cannot be written beside their shard.

    Args:
        folder: the folder; None = clipfuse's folder in the user's cache (XDG_CACHE_HOME, or ~/.cache).
        commands: allow `pipe:` urls, which run a shell command, and GOPEN_REWRITE, which rewrites urls.
        gib: GiB that fetched shards may take; above it, the least recently used are removed; 0 = no limit. While shards are
            being fetched, the folder may hold one more for each process.
        seconds: time that one fetch may take.
    """

    folder: str | None = None
    commands: bool = False
    gib: float = 0.0
    seconds: float = FETCH_SECONDS

    @property
    def path(self) -> Path:
        """The folder of the cache, which need not exist yet."""
        if self.folder is not None:
            return Path(self.folder).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clipfuse"

    def cached_path(self, name: str, kind: str) -> Path:
        """Return the path for data of one kind ("shards", "index") about a shard.

        The name is hashed; its end stays readable, without a query, which may hold a token.
        """
        digest = hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()
        end = name.partition("?")[0] if is_remote(name) and not name.startswith("pipe:") else name
        end = end.rstrip("/").rsplit("/", 1)[-1].rsplit("@", 1)[-1]
        return self.path / kind / f"{digest}-{end[-80:]}"

    def fetch(self, shard: str) -> str:
        """Return the local file of a shard: itself, or its cached copy, fetched first where missing.

        With a limit, another process may remove the copy at any time: `hold` keeps it.

        Raises:
            UserError: a command that is not allowed, a url that cannot be opened, or a fetch that takes too long.
            OSError: the shard cannot be fetched.
        """
        with self.hold(shard) as file:
            return file

    @contextmanager
    def hold(self, shard: str) -> Iterator[str]:
        """Yield the local file of a shard, fetched where missing, which no process removes inside the `with` block.

        Raises the errors of `fetch`.
        """
        if not is_remote(shard):
            yield shard
            return
        self.check_allowed(shard)
        target = self.cached_path(shard, "shards")
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = self._lock_fetched(shard, target)
        try:
            with suppress(OSError):  # the access time orders eviction; the index is matched by the modification time
                os.utime(target, ns=(time.time_ns(), target.stat().st_mtime_ns))
            yield str(target)
        finally:
            if lock is not None:
                os.close(lock)

    def _lock_fetched(self, shard: str, target: Path) -> int | None:
        """Return a descriptor with a shared lock on a shard, which is fetched first where missing.

        None where the shard is there and its folder is read-only: this process cannot make a lock file.
        """
        while True:
            try:
                lock = _open_lock(target)
            except OSError as error:
                if _is_read_only(error) and target.exists():
                    return None
                raise
            try:
                fcntl.flock(lock, fcntl.LOCK_SH)
                if not target.exists():
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    if _is_current(lock, target) and not target.exists():
                        _remove_stale_partials(target.parent, target)
                        _download(shard, target, self.seconds)
                        self._evict(target)
                    # Going back to a shared lock releases the lock for a moment, in which the shard may be removed.
                    fcntl.flock(lock, fcntl.LOCK_SH)
                if _is_current(lock, target) and target.exists():
                    return lock
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)

    def mark_damaged(self, shard: str) -> None:
        """Remove the cached copy of a remote shard that is damaged or outdated: the next `hold` fetches it again."""
        if is_remote(shard):
            self.cached_path(shard, "shards").unlink(missing_ok=True)

    def check_allowed(self, shard: str) -> None:
        """Raise UserError for a url that runs a command, unless `commands` allows it."""
        if not is_remote(shard):
            return
        if HIDDEN in shard:
            raise UserError(
                f"{shard!r} was saved without its password or token: name the shards again, as you did for the first command"
            )
        if self.commands:
            return
        if shard.startswith("pipe:"):
            raise UserError(f"{shard!r} would run a shell command: set data.commands=true if that is what you want")
        if os.environ.get("GOPEN_REWRITE"):
            raise UserError("GOPEN_REWRITE is set and would rewrite urls: unset it, or set data.commands=true")

    def _evict(self, fetched: Path) -> None:
        """Remove the least recently used shards while all take more than `gib`; not `fetched`, nor one about to be opened."""
        if not self.gib:
            return
        lock = _open_lock(fetched.parent / ".evict")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two processes would each remove the whole excess
            shards = []
            for file in fetched.parent.iterdir():
                if file.name.endswith((".lock", ".idx", ".partial")):
                    continue
                with suppress(FileNotFoundError):
                    stat = file.stat()
                    shards.append((stat.st_atime_ns, stat.st_size, file))
            excess = sum(size for _, size, _ in shards) - self.gib * 2**30
            for _, size, shard in sorted(shards):
                if excess <= 0:
                    break
                if shard != fetched and _remove_unused(shard):
                    excess -= size
        finally:
            os.close(lock)


# ---- files of the cache folder ---------------------------------------------------------------------------------------


def _open_lock(target: Path) -> int:
    """Open the lock file of a cached shard, made where missing, and return its descriptor.

    All users may write a new one. An existing one that this user cannot write is opened for reading, which a lock permits.
    """
    path = f"{target}.lock"
    while True:
        try:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)  # over NFS, an exclusive lock needs a file open for writing
        except OSError as error:
            if _is_read_only(error):
                with suppress(FileNotFoundError):  # removed since
                    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            elif not isinstance(error, FileNotFoundError):
                raise
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            continue
        os.fchmod(lock, 0o666)  # whatever the umask
        return lock


def _is_read_only(error: OSError) -> bool:
    """Return whether an error means that this process may not write there."""
    return isinstance(error, PermissionError) or error.errno == errno.EROFS


def _is_current(lock: int, target: Path) -> bool:
    """Return whether a lock file is still the one by that name: eviction removes it together with the shard."""
    try:
        return os.path.samestat(os.fstat(lock), os.stat(f"{target}.lock"))
    except FileNotFoundError:
        return False


def _remove_unused(target: Path) -> bool:
    """Remove a cached shard, its index and its lock file, unless a process holds it; return whether it was removed.

    Processes that have it open can still read it.
    """
    try:
        lock = _open_lock(target)
    except PermissionError:  # a shard of another user
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_current(lock, target):
            return False
        for file in (target, Path(f"{target}.idx"), Path(f"{target}.lock")):
            file.unlink(missing_ok=True)
    except (BlockingIOError, PermissionError):
        return False
    finally:
        os.close(lock)
    return True


def _remove_stale_partials(folder: Path, locked: Path) -> None:
    """Remove what killed fetches left: partial files of `locked`, whose lock this process holds, or of shards without lock."""
    for partial in folder.glob(".*.partial"):
        name = partial.name.removeprefix(".").removesuffix(".partial").rpartition(".")[0]
        target = folder / name.removesuffix(".idx")
        if target == locked:
            partial.unlink(missing_ok=True)
            continue
        try:
            lock = _open_lock(target)
        except PermissionError:  # a shard of another user
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_current(lock, target):
                partial.unlink(missing_ok=True)
                if not target.exists():
                    Path(f"{target}.lock").unlink(missing_ok=True)
        except (BlockingIOError, PermissionError):  # it is being fetched or opened, or is another user's
            continue
        finally:
            os.close(lock)


# ---- fetching --------------------------------------------------------------------------------------------------------


def _download(url: str, target: Path, seconds: float) -> None:
    """Download a url into a file, which gets its name only when it is a complete archive.

    Raises UserError after `seconds`, or for a url that cannot be opened; OSError for all else that retrying may help.
    """
    partial = partial_path(target)
    try:
        with open(partial, "wb+") as out:
            _Transfer(url, out).run(seconds)
            out.flush()
            try:
                read_members(out.fileno(), "what was fetched")
            except DamagedTarError as error:
                raise OSError(str(error)) from error
        partial.replace(target)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


class _Transfer:
    """Copies a url into an open file, in a thread of its own that can be abandoned.

    Reads that wait for a server end by a timeout, but not those to which a byte comes now and then.
    """

    def __init__(self, url: str, out: IO[bytes], most_bytes: int | None = None) -> None:
        self.url, self.out, self.most_bytes = url, out, most_bytes
        self.copied = 0
        self._abandoned = False
        self._commands: list[subprocess.Popen[bytes]] = []
        self._error: Exception | None = None

    def run(self, seconds: float) -> None:
        """Copy all. Raises UserError after `seconds`, or for a url that cannot be opened, else OSError."""
        thread = threading.Thread(target=self._copy_all, name="fetch", daemon=True)
        thread.start()
        try:
            thread.join(seconds)
        finally:  # also where a signal ends the wait
            self._abandoned = True
            for command in self._commands if thread.is_alive() else ():
                command.kill()
        if thread.is_alive():
            raise UserError(
                f"cannot read {self.url}: after {seconds:,.0f} seconds only {self.copied:,} bytes had come; "
                "data.fetch_seconds sets how long a fetch may take"
            )
        if isinstance(self._error, OSError | UserError):
            raise self._error
        if self._error is not None:  # a server that does not follow the protocol, for example: worth another try
            raise OSError(f"{type(self._error).__name__}: {self._error}") from self._error

    def _copy_all(self) -> None:
        """Copy until the end; the body of the thread, whose error `run` raises."""
        try:
            with _open_url(self.url, self._commands) as source:
                read = _find_read(source)
                while not self._abandoned and (piece := read(_PIECE)):
                    if self.most_bytes is not None and self.copied + len(piece) > self.most_bytes:
                        raise OSError(f"more than {self.most_bytes:,} bytes")
                    self.out.write(piece)
                    self.copied += len(piece)
                missing = getattr(source, "length", None)  # of an HTTP response: bytes not received yet
                if missing:
                    raise OSError(f"the connection ended {missing:,} bytes early")
        except Exception as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()  # it holds the connection
            self._error = error


def _find_read(source: Any) -> Callable[[int], bytes]:
    """Return the function of a stream that returns what has come, where `read` would wait for all that was asked for."""
    stream = getattr(source, "stream", source)  # webdataset's pipes wrap one
    read: Callable[[int], bytes] = getattr(stream, "read1", None) or source.read
    return read


def _build_request(url: str) -> urllib.request.Request:
    """Build the request for a url: user name and password become a header, which no other host gets by a redirect.

    Raises UserError for a url that is not valid.
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
    from webdataset.gopen import gopen, gopen_schemes  # reads object stores with their command-line tools; slow to import

    scheme = url.partition(":")[0]
    if scheme not in gopen_schemes:
        schemes = ", ".join(sorted(set(gopen_schemes) - {"__default__"}))
        hint = f"; a command can read it: 'pipe:aws s3 cp {url} -' with data.commands=true" if scheme == "s3" else ""
        raise UserError(f"{url}: cannot open urls of scheme {scheme}; valid schemes are {schemes}{hint}")
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


def read_small_file(url: str) -> bytes | None:
    """Return the content (at most 64 MiB) of a small file beside a remote shard; None where it cannot be had."""
    if not url.startswith(("http://", "https://", "file://")):
        return None
    out = io.BytesIO()
    try:
        _Transfer(url, out, _SMALL_FILE_BYTES).run(_SMALL_FILE_SECONDS)
    except (OSError, UserError):
        return None
    return out.getvalue()
