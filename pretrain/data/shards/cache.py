"""Shards from elsewhere: fetched whole into a folder of this machine, then read there like any other.

Several processes may ask for the same shard at once: one fetches it, the others wait. A shard is there complete or not at all.
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
"""Pauses before an input/output error is tried again; after the last the run stops."""

_PERMANENT_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def is_remote(path: str) -> bool:
    """Whether a shard is a url (or a command) rather than a file."""
    return "://" in path or path.startswith("pipe:")


def retry_io(action: Callable[[], T], what: str) -> T:
    """action(), tried again on input/output errors. Raises UserError where that does not help."""
    tries = 0
    while True:
        try:
            return action()
        except OSError as error:
            status = getattr(error, "code", None)  # of an HTTP answer; 4xx will not get better
            hopeless = isinstance(error, _PERMANENT_ERRORS) or (
                isinstance(status, int) and 400 <= status < 500 and status != 429
            )
            if hopeless or tries == len(RETRY_SECONDS):
                again = f", tried {tries + 1} times" if tries else ""
                raise UserError(f"cannot read {what}: {error}{again}") from error
            time.sleep(RETRY_SECONDS[tries])
            tries += 1


@dataclass(frozen=True)
class ShardCache:
    """Where this machine keeps what it fetched, and indices that cannot lie beside their shard.

    Args:
        folder: None for clipfuse's folder in the user's cache (XDG_CACHE_HOME, or ~/.cache).
        commands: allow `pipe:` urls, which run a shell command, and GOPEN_REWRITE, which rewrites urls.
        gib: remove the shards used longest ago when the fetched ones take more than this; 0 = never.
    """

    folder: str | None = None
    commands: bool = False
    gib: float = 0.0

    @property
    def path(self) -> Path:
        """The folder; it need not exist yet."""
        if self.folder is not None:
            return Path(self.folder).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clipfuse"

    def cached_path(self, name: str, kind: str) -> Path:
        """Where something about the shard `name` is kept; the name's end stays readable."""
        digest = hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()
        return self.path / kind / f"{digest}-{name.rstrip('/').rsplit('/', 1)[-1][-80:]}"

    def fetch(self, shard: str) -> str:
        """The file of a shard: itself, or its copy, fetched now if it must be.

        Raises:
            UserError: a command or another kind of url that is not allowed or not known.
            OSError: it cannot be fetched.
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
                    self._make_room(target.parent)
                    _download(shard, target)
        with suppress(OSError):  # remember when it was last used; the time of change identifies it to its index
            os.utime(target, ns=(time.time_ns(), target.stat().st_mtime_ns))
        return str(target)

    def check_allowed(self, shard: str) -> None:
        """Raises UserError for a url that runs a command, unless those are allowed."""
        if self.commands or not is_remote(shard):
            return
        if shard.startswith("pipe:"):
            raise UserError(f"{shard!r} would run a shell command: set data.commands=true if that is what you want")
        if os.environ.get("GOPEN_REWRITE"):
            raise UserError("GOPEN_REWRITE is set and would rewrite urls: unset it, or set data.commands=true")

    def _make_room(self, folder: Path) -> None:
        if not self.gib:
            return
        shards = sorted((f.stat().st_atime, f.stat().st_size, f) for f in folder.iterdir() if f.suffix == ".tar")
        excess = sum(size for _, size, _ in shards) - self.gib * 2**30
        for _, size, shard in shards:
            if excess <= 0:
                break
            for file in (shard, Path(f"{shard}.idx"), Path(f"{shard}.lock")):
                file.unlink(missing_ok=True)  # those who have it open go on reading
            excess -= size


def _download(url: str, target: Path) -> None:
    """The whole of a url into a file, which appears only when it is complete."""
    with replace_atomically(target) as partial, _open_url(url) as source, open(partial, "wb") as out:
        shutil.copyfileobj(source, out, 1 << 20)
        expected = getattr(source, "length", None)  # an HTTP answer: bytes still missing
        if expected:
            raise OSError(f"the connection ended {expected:,} bytes early")


def _open_url(url: str) -> IO[bytes]:
    if url.startswith(("http://", "https://", "file://")):
        answer: IO[bytes] = urllib.request.urlopen(url, timeout=60)
        return answer
    from webdataset.gopen import gopen, gopen_schemes  # knows object stores by their command-line tools; slow to import

    scheme = url.partition(":")[0]
    if scheme not in gopen_schemes:
        raise UserError(
            f"{url}: no way is known to open {scheme} urls; known are {', '.join(sorted(set(gopen_schemes) - {'__default__'}))}"
        )
    opened: IO[bytes] = gopen(url)
    return opened


def read_small_file(url: str) -> bytes | None:
    """The content of a small file beside a remote shard; None if there is none."""
    if not url.startswith(("http://", "https://", "file://")):
        return None
    try:
        with _open_url(url) as source:
            return source.read(1 << 26)
    except urllib.error.URLError:
        return None
