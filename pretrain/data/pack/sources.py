"""What can be packed, told by its name: a folder of pictures, tables, tars. Each is cut into jobs, one a shard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from pretrain.data.pack.folder import Folder
from pretrain.data.pack.table import Table
from pretrain.data.pack.table_readers import KINDS
from pretrain.data.pack.tars import Tars
from pretrain.data.pack.writer import Job
from pretrain.data.shards.paths import expand_shards
from pretrain.errors import ConfigError


class PackSource(Protocol):
    """Something to pack."""

    def fingerprint(self) -> str:
        """Changes when the source does."""
        ...

    def count(self) -> int:
        """Samples in it, good and bad."""
        ...

    def jobs(self, shard_size: int) -> Iterator[Job]:
        """Its samples in order, `shard_size` a job."""
        ...


def open_source(
    source: str, image_column: str, caption_column: str, caption_from: str, outside: bool, leave_out: Path
) -> PackSource:
    """The kind of source is told by its name. Raises ConfigError with the choices."""
    path = Path(source).expanduser()
    if path.is_dir():
        inside = sorted(path.iterdir())
        if any(p.suffix == ".tar" for p in inside):
            return Tars(expand_shards(str(path), "SOURCE"))
        tables = [p for p in inside if p.suffix == ".parquet"]
        return Table(tables, image_column, caption_column, outside) if tables else Folder(path, caption_from, leave_out)
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if kind == "tar":
        return Tars(expand_shards(source, "SOURCE"))
    found = [path] if path.is_file() else [Path(p) for p in expand_shards(source, "SOURCE")]
    if kind not in KINDS:
        choices = ", ".join(f".{table}" for table in KINDS)
        raise ConfigError(f"SOURCE={source}: give a folder of pictures, a table ({choices}), or tars (.tar)")
    return Table(found, image_column, caption_column, outside)
