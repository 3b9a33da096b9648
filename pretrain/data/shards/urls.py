"""Urls of shards: which are remote, requests over HTTP, and streams of whole files from servers and commands."""

from __future__ import annotations

import base64
import subprocess
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import IO, Any, cast

from pretrain.data.shards.stores import STORES
from pretrain.errors import UserError

IDLE_SECONDS = 60.0
"""How long a request over HTTP waits for the next bytes."""

_URL_CHARACTERS = "%/:@!$&'()*+,;=~[]"


def is_remote(path: str) -> bool:
    """Return whether a shard is a url (or a command) rather than a local file."""
    return "://" in path or path.startswith("pipe:")


def is_http(url: str) -> bool:
    """Return whether a url is read over HTTP."""
    return url.startswith(("http://", "https://"))


def find_read(source: Any) -> Callable[[int], bytes]:
    """Return the function of a stream that returns what has come, where `read` would wait for all that was asked for."""
    stream = getattr(source, "stream", source)  # webdataset's pipes wrap one
    read: Callable[[int], bytes] = getattr(stream, "read1", None) or source.read
    return read


def build_request(url: str, byte_range: tuple[int, int] | None = None) -> urllib.request.Request:
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


def open_url(url: str, commands: list[subprocess.Popen[bytes]]) -> AbstractContextManager[IO[bytes]]:
    """Open a url for reading.

    commands: gets the process of a command, so that another thread can end it. Raises UserError for an unknown scheme.
    """
    if url.startswith(("http://", "https://", "file://")):
        response: IO[bytes] = urllib.request.urlopen(build_request(url), timeout=IDLE_SECONDS)
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
