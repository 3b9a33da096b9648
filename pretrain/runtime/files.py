"""Write files atomically: under a hidden name, then renamed. A reader sees a complete file or none.

A killed process leaves at most a hidden `.NAME.PID.partial` next to the file that it was writing. Imports nothing of the
project.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


def write_text(path: Path, text: str, sync: bool = False) -> None:
    """Write `text` to a file in UTF-8, atomically. Raises OSError."""
    with replace_atomically(path, sync) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` to a file as JSON, atomically. Raises OSError."""
    write_text(path, json.dumps(value, indent=1))


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


def apply_umask(path: Path) -> None:
    """Give a file the permissions of any new file: safetensors makes files that only their owner can read."""
    path.chmod(0o666 & ~_UMASK)
