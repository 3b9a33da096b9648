"""The local cache of remote shards, which are fetched completely before they are read.

Several processes may request the same shard at once: one fetches it, the others wait. A cached shard is always complete: its
archive is verified before it gets its name. A shard that a process is about to open is locked, and no other process removes it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pretrain.data.shards.counts import Record, find_manifest_record
from pretrain.data.shards.tar import DamagedTarError, read_members
from pretrain.data.shards.transfer import CONNECTIONS, FETCH_SECONDS, Transfer
from pretrain.data.shards.urls import is_remote
from pretrain.errors import UserError
from pretrain.printable import HIDDEN
from pretrain.runtime.files import partial_path

_PIECE = 1 << 20
_SPARE_BYTES = 5 << 30  # of a disk that stay free: other programs need some
_SPARE_SHARE = 0.05


@dataclass(frozen=True)
class ShardCache:
    """Local folder of fetched shards, and of indices that cannot be written beside their shard.

    Args:
        folder: the folder; None = clipfuse's folder in the user's cache (XDG_CACHE_HOME, or ~/.cache).
        commands: allow `pipe:` urls, which run a shell command, and GOPEN_REWRITE, which rewrites urls.
        gib: GiB that fetched shards may take; above it, the least recently used are removed; 0 = what the disk holds, of which
            5 GiB or a twentieth stay free. While shards are being fetched, the folder may hold one more for each process.
        seconds: time that one fetch may take.
        connections: parallel requests of one fetch, where the server sends parts of files.
        stage: copy local shards to the folder, too: those on a network file system, which are then read once.
        check_records: compare what is fetched with the size and digest in the manifest beside the shard.
    """

    folder: str | None = None
    commands: bool = False
    gib: float = 0.0
    seconds: float = FETCH_SECONDS
    connections: int = CONNECTIONS
    stage: bool = False
    check_records: bool = True

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

    def is_fetched(self, shard: str) -> bool:
        """Return whether a shard is read from a copy in the cache."""
        return self.stage or is_remote(shard)

    def _find_target(self, shard: str) -> Path:
        """Return the path of a shard's copy; another one when a local file has changed."""
        if is_remote(shard):
            return self.cached_path(shard, "shards")
        path = os.path.abspath(shard)
        stat = os.stat(path)
        return self.cached_path(f"{stat.st_size}-{stat.st_mtime_ns}-{path}", "shards")

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
        if not self.is_fetched(shard):
            yield shard
            return
        self.check_allowed(shard)
        target = self._find_target(shard)
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
                        self._download(shard, target)
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
        """Remove the cached copy of a shard that is damaged or outdated: the next `hold` fetches it again."""
        if self.is_fetched(shard):
            self._find_target(shard).unlink(missing_ok=True)

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

    def _download(self, shard: str, target: Path) -> None:
        """Fetch a shard into a file, which gets its name only when it is a complete archive, and what its records say.

        Raises UserError after `seconds`, or for a url that cannot be opened; OSError for all else that retrying may help.
        """
        partial = partial_path(target)
        try:
            with open(partial, "wb+") as out:
                record = find_manifest_record(shard) if self.check_records else Record()
                if is_remote(shard):
                    transfer = Transfer(shard, out, connections=self.connections)
                    transfer.run(self.seconds)
                    out.flush()
                    if transfer.info is not None and transfer.info.digest is not None:
                        _check_stored_digest(shard, out, *transfer.info.digest)
                else:
                    with open(shard, "rb") as source:
                        shutil.copyfileobj(source, out, _PIECE)
                    out.flush()
                size = os.fstat(out.fileno()).st_size
                if record.size is not None and size != record.size:
                    raise OSError(f"{size:,} bytes came, but {record.file} says {record.size:,}")
                if record.digest and digest_file(out, "blake2b") != record.digest:
                    raise OSError(f"its bytes are not those that {record.file} names: they were damaged, or it is outdated")
                try:
                    read_members(out.fileno(), "what was fetched")
                except DamagedTarError as error:
                    raise OSError(str(error)) from error
            partial.replace(target)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    def _evict(self, fetched: Path) -> None:
        """Remove the least recently used shards while they take too much; not `fetched`, nor one about to be opened."""
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
            if self.gib:
                excess = sum(size for _, size, _ in shards) - self.gib * 2**30
            else:
                disk = shutil.disk_usage(fetched.parent)
                excess = min(_SPARE_BYTES, _SPARE_SHARE * disk.total) - disk.free
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


# ---- verifying what was fetched --------------------------------------------------------------------------------------

_wrong_etags: dict[str, str] = {}
"""MD5 of the last copy of an object whose ETag is another."""

_keyed_buckets: set[str] = set()
"""Buckets whose ETags are not MD5."""


def digest_file(file: IO[bytes], algorithm: str) -> str:
    """Return the digest of a whole file in hexadecimal; blake2b has 16 bytes."""
    hasher = hashlib.blake2b(digest_size=16) if algorithm == "blake2b" else hashlib.new(algorithm, usedforsecurity=False)
    file.seek(0)
    while piece := file.read(_PIECE):
        hasher.update(piece)
    return hasher.hexdigest()


def _check_stored_digest(shard: str, file: IO[bytes], algorithm: str, expected: str) -> None:
    """Raise OSError for content whose digest is not the one that its store states.

    An ETag of S3 is the MD5 of the object, unless a key of KMS encrypts it. So an object that comes twice with the same other
    digest is taken for what the store holds.
    """
    bucket = "/".join(shard.split("/", 3)[:3])
    if algorithm == "etag" and bucket in _keyed_buckets:
        return
    digest = digest_file(file, "md5" if algorithm == "etag" else algorithm)
    if digest == expected:
        return
    if algorithm == "etag":
        last, _wrong_etags[shard] = _wrong_etags.get(shard), digest
        if last == digest:
            _keyed_buckets.add(bucket)
            return
    raise OSError(f"its digest is {digest}, but the store says {expected}: it was damaged on the way")
