"""Opens a source to pack: a folder of images and sounds, tables, or tars. Each yields one job per shard."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pretrain.data.pack.folder import FolderSource
from pretrain.data.pack.table import TableSource
from pretrain.data.pack.table_readers import TABLE_EXTENSIONS, get_format
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

    def get_notes(self) -> list[str]:
        """Return lines for the user about what the source holds, after `count`."""
        ...

    def iterate_jobs(self, shard_size: int) -> Iterator[ShardJob]:
        """Yield the samples in order, `shard_size` per job."""
        ...


@dataclass(frozen=True)
class SourceOptions:
    """How a source is read."""

    image_column: str
    """Of tables: the path of the image, or the image itself."""
    caption_column: str
    """Of tables: a text, or a list of texts."""
    caption_from: str
    """Of folders: "txt", "lines" or "path"."""
    outside: bool
    """Whether paths and links may lead out of the folder of the source."""
    separator: str | None = None
    """Of tables of separated values; None = detect it."""
    image_root: Path | None = None
    """Of tables: the folder that paths are relative to; None = the folder of the table."""
    splits: tuple[str, ...] = ()
    """Of annotation files: the splits to read; () = all."""
    audio_column: str = ""
    """Of tables: the path of the sound, or the sound itself; "" = AUDIO_COLUMN, which a table need not have."""


def open_source(source: str, options: SourceOptions, excluded: Path) -> PackSource:
    """Open a source, whose kind follows from its name.

    Args:
        source: a folder, a table or a glob of tables, or tars.
        options: how it is read.
        excluded: a folder that is not searched for images, because the shards go there.

    Raises:
        ConfigError: the name is of no kind that can be packed, or an option has no meaning for its kind.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        entries = sorted(path.iterdir())
        if any(p.suffix == ".tar" for p in entries):
            _refuse_options(source, "a folder of tars", options)
            return TarSource(expand_shards(str(path), "SOURCE"))
        tables = [p for p in entries if p.suffix == ".parquet"]
        if tables:
            return _open_tables(source, tables, options)
        _refuse_options(source, "a folder of images", options)
        return FolderSource(path, options.caption_from, excluded, options.outside, options.caption_column)
    extension = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if extension == "tar":
        _refuse_options(source, "a tar", options)
        return TarSource(expand_shards(source, "SOURCE"))
    tables = [path] if path.is_file() else [Path(p) for p in expand_shards(source, "SOURCE")]
    if extension not in TABLE_EXTENSIONS:
        choices = ", ".join(f".{name}" for name in TABLE_EXTENSIONS)
        raise ConfigError(f"SOURCE={source}: give a folder of images, a table ({choices}), or tars (.tar)")
    return _open_tables(source, tables, options)


def _refuse_options(source: str, kind: str, options: SourceOptions) -> None:
    """Refuse options that have no effect on a kind of source. Raises ConfigError, which names the first.

    kind: "a folder of images", "a tar", "a csv table", ...
    """
    is_table = kind.endswith("table")
    captions = f"; --caption-column {options.caption_column} names the captions of a table" if is_table else ""
    root, column = options.image_root, options.image_column
    for option, is_ignored, meant in (
        (f"--caption-from {options.caption_from}", options.caption_from != "txt" and kind != "a folder of images", "folders"),
        (f"--separator {options.separator}", options.separator is not None and kind not in _DELIMITED, "csv, tsv and txt"),
        (f"--image-root {root}", root is not None and not is_table, "tables"),
        (f"--image-column {column}", column != "image" and not is_table, "tables"),
        (f"--audio-column {options.audio_column}", options.audio_column != "" and not is_table, "tables"),
    ):
        if is_ignored:
            raise ConfigError(f"{option} is for {meant}, and {source} is {kind}{captions if 'caption' in option else ''}")


_DELIMITED = ("a csv table", "a tsv table", "a txt table")


def _open_tables(source: str, paths: list[Path], options: SourceOptions) -> TableSource:
    _refuse_options(source, f"a {get_format(paths[0])} table", options)
    return TableSource(
        paths,
        options.image_column,
        options.caption_column,
        options.outside,
        options.separator,
        options.image_root,
        options.splits,
        options.audio_column,
    )
