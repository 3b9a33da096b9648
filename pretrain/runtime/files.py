"""Write files atomically: under a hidden name, then renamed. A reader sees a complete file or none.

A killed process leaves at most a hidden `.NAME.PID.partial` next to the file that it was writing. Imports nothing of the
project.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from torch import Tensor

_UMASK = os.umask(0o077)
os.umask(_UMASK)  # reading the umask means setting it, which is safe only here, before any thread starts


def partial_path(path: Path) -> Path:
    """Return the hidden path under which this process writes `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


@contextmanager
def replace_atomically(path: Path, sync: bool = False) -> Iterator[Path]:
    """Yield a temporary path, which is renamed to `path` if the block succeeds, and removed if it fails.

    sync: flush the content to the disk before the rename. Raises OSError where the disk is full or cannot be written.
    """
    partial = partial_path(path)
    try:
        yield partial
        if sync:
            flush(partial)
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def open_ordinary(path: Path, most: int) -> BinaryIO:
    """Open a file that others may have written, of at most `most` bytes, for reading.

    Raises OSError where it cannot be read, is larger, or is no ordinary file: a named pipe would never end.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except ValueError as error:  # a NUL in the name
        raise FileNotFoundError(errno.ENOENT, str(error), str(path)) from error
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not an ordinary file", str(path))
        if status.st_size > most:
            raise OSError(errno.EFBIG, f"it has {status.st_size:,} bytes, more than {most:,}", str(path))
        return open(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_bytes(path: Path, most: int = 1 << 26) -> bytes:
    """Return the content of a file that others may have written. Raises OSError as open_ordinary does."""
    with open_ordinary(path, most) as file:
        return file.read(most)


def read_json_object(path: Path, most: int = 1 << 26) -> dict[str, Any]:
    """Return the object in a JSON file that others may have written.

    Raises OSError as read_bytes does, and ValueError where the file holds no JSON object.
    """
    return parse_json_object(read_bytes(path, most))


def parse_json_object(data: bytes) -> dict[str, Any]:
    """Return the object that JSON text holds. Raises ValueError where it holds none."""
    try:
        value = json.loads(data)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not an object")
    return value


def write_text(path: Path, text: str, sync: bool = False) -> None:
    """Write `text` to a file in UTF-8, atomically. Raises OSError."""
    with replace_atomically(path, sync) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` to a file as JSON, atomically. Raises OSError."""
    write_text(path, json.dumps(value, indent=1))


def overwrite_json(path: Path, value: Any) -> None:
    """Write `value` into an existing file as JSON, in place: a full disk has room for that. Raises OSError."""
    text = json.dumps(value, indent=1)
    with path.open("r+", encoding="utf-8") as file:
        file.write(text)
        file.truncate()


def flush(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, have reached the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_weights(path: Path, weights: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Save weights as one safetensors file. Raises OSError or SafetensorError."""
    from safetensors.torch import save_file  # imports torch, which packing does without

    save_file({name: value.contiguous() for name, value in weights.items()}, path, metadata)
    apply_umask(path)


def save_tensors(path: Path, value: dict[str, Any]) -> None:
    """Save tensors and plain values with torch.save. Raises OSError where the disk is full or cannot be written."""
    import torch  # packing does without

    handled = sys.exception()  # an error that the caller is handling is not the cause of one in here
    try:
        with path.open("wb") as file:
            torch.save(value, file)
    except RuntimeError as error:  # torch's writer, interrupted by an OSError of the file, complains of its own position
        cause = error.__context__
        while cause is not None and cause is not handled and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None or cause is handled:
            raise
        raise cause from error


def apply_umask(path: Path) -> None:
    """Give a file the permissions of any new file: safetensors makes files that only their owner can read."""
    path.chmod(0o666 & ~_UMASK)
