"""Opens a source to pack: a folder of images, tables, or tars. Each yields one job per shard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from pretrain.data.pack.folder import FolderSource
from pretrain.data.pack.table import TableSource
from pretrain.data.pack.table_readers import TABLE_EXTENSIONS
from pretrain.data.pack.tars import TarSource
from pretrain.data.pack.writer import ShardJob
from pretrain.data.shards.paths import expand_shards
from pretrain.errors import ConfigError


class PackSource(Protocol):
    """A source of samples to pack."""

    def compute_fingerprint(self) -> str:
        """Return a digest that changes when the source changes."""
        ...

    def count(self) -> int:
        """Return the number of samples, including those that cannot be used."""
        ...

    def iterate_jobs(self, shard_size: int) -> Iterator[ShardJob]:
        """Yield the samples in order, `shard_size` per job."""
        ...


def open_source(
    source: str, image_column: str, caption_column: str, caption_from: str, outside: bool, excluded: Path
) -> PackSource:
    """Open a source, whose kind follows from its name.

    Args:
        excluded: a folder that is not searched for images, because the shards go there.
    Raises:
        ConfigError: the name is of no kind that can be packed.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        entries = sorted(path.iterdir())
        if any(p.suffix == ".tar" for p in entries):
            return TarSource(expand_shards(str(path), "SOURCE"))
        tables = [p for p in entries if p.suffix == ".parquet"]
        return (
            TableSource(tables, image_column, caption_column, outside) if tables else FolderSource(path, caption_from, excluded)
        )
    extension = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if extension == "tar":
        return TarSource(expand_shards(source, "SOURCE"))
    tables = [path] if path.is_file() else [Path(p) for p in expand_shards(source, "SOURCE")]
    if extension not in TABLE_EXTENSIONS:
        choices = ", ".join(f".{name}" for name in TABLE_EXTENSIONS)
        raise ConfigError(f"SOURCE={source}: give a folder of images, a table ({choices}), or tars (.tar)")
    return TableSource(tables, image_column, caption_column, outside)
