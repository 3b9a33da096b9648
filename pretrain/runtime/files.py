"""Files that appear whole or not at all: written under a hidden name, then renamed.

A killed process leaves at most a hidden `.NAME.PID.partial` beside the file that it was writing. May import nothing of the
project.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

_UMASK = os.umask(0o077)
os.umask(_UMASK)  # it can only be read by setting it, which belongs where no thread has started yet


def partial_path(path: Path) -> Path:
    """The hidden name under which this process writes `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


@contextmanager
def replace_atomically(path: Path, sync: bool = False) -> Iterator[Path]:
    """Yield a path to write to, which takes the name `path` if the block succeeds and is removed if it fails.

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


def write_text(path: Path, text: str, sync: bool = False) -> None:
    """Replace a file's content by `text`, in UTF-8, atomically. Raises OSError."""
    with replace_atomically(path, sync) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Replace a file's content by `value` as JSON, atomically. Raises OSError."""
    write_text(path, json.dumps(value, indent=1))


def flush(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, have reached the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_weights(path: Path, weights: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write one safetensors file, with the permissions of any new file. Raises OSError or SafetensorError."""
    save_file({name: value.contiguous() for name, value in weights.items()}, path, metadata)
    apply_umask(path)


def apply_umask(path: Path) -> None:
    """Give a file the permissions of any new file: safetensors writes for its owner alone."""
    path.chmod(0o666 & ~_UMASK)
