"""The local cache of remote shards, which are fetched completely before they are read.

Several processes may request the same shard at once: one fetches it, the others wait. A cached shard is always complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from pretrain.errors import UserError
from pretrain.runtime.files import replace_atomically

T = TypeVar("T")

RETRY_SECONDS = (0.2, 1.0, 5.0)
"""Seconds to wait before each retry after an input/output error; after the last retry the run stops."""

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
                isinstance(status, int) and 400 <= status < 500 and status != 429
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
        gib: GiB that fetched shards may take; above it, the least recently used are removed; 0 = no limit.
    """

    folder: str | None = None
    commands: bool = False
    gib: float = 0.0

    @property
    def path(self) -> Path:
        """The folder of the cache, which need not exist yet."""
        if self.folder is not None:
            return Path(self.folder).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clipfuse"

    def cached_path(self, name: str, kind: str) -> Path:
        """Return the path for data of one kind ("shards", "index") about a shard.

        The name is hashed; its end stays readable.
        """
        digest = hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()
        return self.path / kind / f"{digest}-{name.rstrip('/').rsplit('/', 1)[-1][-80:]}"

    def fetch(self, shard: str) -> str:
        """Return the local file of a shard: itself, or its cached copy, fetched first where missing.

        Raises:
            UserError: a command that is not allowed, or a url of an unknown scheme.
            OSError: the shard cannot be fetched.
        """
        if not is_remote(shard):
            return shard
        self.check_allowed(shard)
        target = self.cached_path(shard, "shards")
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(f"{target}.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not target.exists():
                    self._evict(target.parent)
                    _download(shard, target)
        with suppress(
            OSError
        ):  # the access time orders eviction; the modification time is kept, because the index is matched by it
            os.utime(target, ns=(time.time_ns(), target.stat().st_mtime_ns))
        return str(target)

    def check_allowed(self, shard: str) -> None:
        """Raise UserError for a url that runs a command, unless `commands` allows it."""
        if self.commands or not is_remote(shard):
            return
        if shard.startswith("pipe:"):
            raise UserError(f"{shard!r} would run a shell command: set data.commands=true if that is what you want")
        if os.environ.get("GOPEN_REWRITE"):
            raise UserError("GOPEN_REWRITE is set and would rewrite urls: unset it, or set data.commands=true")

    def _evict(self, folder: Path) -> None:
        """Remove the least recently used shards while all shards in `folder` take more than `gib`."""
        if not self.gib:
            return
        shards = sorted((f.stat().st_atime, f.stat().st_size, f) for f in folder.iterdir() if f.suffix == ".tar")
        excess = sum(size for _, size, _ in shards) - self.gib * 2**30
        for _, size, shard in shards:
            if excess <= 0:
                break
            for file in (shard, Path(f"{shard}.idx"), Path(f"{shard}.lock")):
                file.unlink(missing_ok=True)  # processes that have it open can still read it
            excess -= size


def _download(url: str, target: Path) -> None:
    """Download a url into a file, which appears only when it is complete."""
    with replace_atomically(target) as partial, _open_url(url) as source, open(partial, "wb") as out:
        shutil.copyfileobj(source, out, 1 << 20)
        expected = getattr(source, "length", None)  # of an HTTP response: bytes not received yet
        if expected:
            raise OSError(f"the connection ended {expected:,} bytes early")


def _open_url(url: str) -> IO[bytes]:
    """Open a url for reading. Raises UserError for an unknown scheme."""
    if url.startswith(("http://", "https://", "file://")):
        response: IO[bytes] = urllib.request.urlopen(url, timeout=60)
        return response
    from webdataset.gopen import gopen, gopen_schemes  # reads object stores with their command-line tools; slow to import

    scheme = url.partition(":")[0]
    if scheme not in gopen_schemes:
        schemes = ", ".join(sorted(set(gopen_schemes) - {"__default__"}))
        raise UserError(f"{url}: cannot open urls of scheme {scheme}; valid schemes are {schemes}")
    stream: IO[bytes] = gopen(url)
    return stream


def read_small_file(url: str) -> bytes | None:
    """Return the content (at most 64 MiB) of a small file beside a remote shard; None if there is none."""
    if not url.startswith(("http://", "https://", "file://")):
        return None
    try:
        with _open_url(url) as source:
            return source.read(1 << 26)
    except urllib.error.URLError:
        return None
