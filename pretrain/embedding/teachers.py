"""Embedding folders as teachers (data.teachers): checked, and turned once into arrays that training maps into memory.

    FOLDER/_teacher/    what pretrain/data/teachers.py reads; about.json says of which files it was made

A folder is one that `clipfuse embed` wrote, or any folder of Parquet files with a column `key` ("shard/KEY"), and `image`, or
`text` and `caption`. The arrays take as much room as the vectors in the files; they are made anew when a file has changed.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pretrain.data.captions import caption_id
from pretrain.data.key_digests import digest
from pretrain.data.teacher_settings import parse_teachers
from pretrain.data.teachers import MODALITIES, TeacherReader
from pretrain.embedding.dataset import FORMAT, MANIFEST, read_manifest
from pretrain.embedding.parquet import may_have_null
from pretrain.errors import ConfigError, UserError
from pretrain.runtime import distributed
from pretrain.runtime.agree import on_all, on_main
from pretrain.runtime.console import log_info

ARRAYS = "_teacher"
ROWS = 1 << 14
"""Rows of a Parquet file that are converted at a time."""


class Teacher(NamedTuple):
    """An embedding folder that can be a teacher."""

    folder: Path
    files: list[Path]
    widths: dict[str, int]
    """Numbers of an embedding, by modality."""

    def about(self) -> dict[str, Any]:
        """Return what the arrays depend on: names, sizes and times of the files."""
        stats = [(path.name, path.stat()) for path in self.files]
        return {"format": 1, "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]}


def find_teachers(value: Any) -> list[Teacher]:
    """Return the teachers that data.teachers names. Nothing is written. Raises ConfigError for a folder that cannot be one."""
    return [find_embeddings(folder, f"data.teachers={folder}") for folder in parse_teachers(value)]


def find_embeddings(name: str, label: str) -> Teacher:
    """Return the complete embedding folder `name`. Raises ConfigError, whose message begins with `label`, where it is none."""
    folder = Path(name)
    if not folder.is_dir():
        raise ConfigError(f"{label}: there is no such folder; `clipfuse embed RUN --data SHARDS --out DIR` writes one")
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        if manifest.get("format") != FORMAT or not manifest["complete"]:
            raise ConfigError(f"{label} is not complete; the clipfuse embed command that began it finishes it")
        files = [folder / entry["file"] for entry in manifest["files"]]
    else:
        files = sorted(path for path in folder.glob("*.parquet") if not path.name.startswith((".", "_")))
    if not files:
        raise ConfigError(f"{label} holds no embeddings; `clipfuse embed RUN --data SHARDS --out DIR` writes a folder")
    widths: dict[str, int] | None = None
    for path in files:
        file_widths = _read_widths(path, label)
        if widths is not None and file_widths != widths:
            raise ConfigError(f"{label}: {path.name} holds {_describe(file_widths)}, {files[0].name} {_describe(widths)}")
        widths = file_widths
    assert widths is not None
    if not widths:
        raise ConfigError(f"{label}: {files[0].name} has no column `image`, nor `text` beside `caption`")
    if len(set(widths.values())) > 1:
        raise ConfigError(
            f"{label} holds {_describe(widths)}: images and texts of a teacher are compared, so both need as many "
            "numbers; make a folder for each"
        )
    return Teacher(folder, files, widths)


def _describe(widths: dict[str, int]) -> str:
    return " and ".join(f"{name} embeddings of {width} numbers" for name, width in widths.items()) or "no embeddings"


def _read_widths(path: Path, label: str) -> dict[str, int]:
    """Return the numbers of an embedding by modality, from the schema of a file. Raises ConfigError."""
    try:
        schema = pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{label}: {path} cannot be read: {' '.join(str(error).split())[:200]}") from error
    if "key" not in schema.names:
        raise ConfigError(f"{label}: {path} has no column `key`, only {', '.join(schema.names)[:100]}")
    widths = {}
    for modality in MODALITIES:
        has_captions = "captions" in schema.names or "caption" in schema.names
        if modality not in schema.names or (modality == "text" and not has_captions):
            continue
        kind = schema.field(modality).type
        if modality == "text" and "captions" in schema.names:
            kind = kind.value_type
        if not pa.types.is_fixed_size_list(kind) or not pa.types.is_floating(kind.value_type):
            raise ConfigError(f"{label}: the column `{modality}` of {path} is {kind}, not lists of fixed size of numbers")
        widths[modality] = kind.list_size
    return widths


# ---------------------------------------------------------------------------------------------------------------------
# Arrays


def build_readers(teachers: list[Teacher]) -> list[TeacherReader]:
    """Return readers of the arrays, which `write_arrays` must have made before the first embedding is looked up."""
    return [TeacherReader(teacher.folder / ARRAYS, list(teacher.widths)) for teacher in teachers]


def prepare(teachers: list[Teacher]) -> None:
    """Make the arrays of teachers that have none; on nodes with a folder of their own, too. Collective. Raises UserError."""

    def write() -> None:
        for teacher in teachers:
            write_arrays(teacher)

    on_main(write)
    on_all(lambda: write() if distributed.local_rank() == 0 else None)


def write_arrays(teacher: Teacher) -> None:
    """Make the arrays of a teacher, unless they are there and its files have not changed since. Raises UserError."""
    final, partial = teacher.folder / ARRAYS, teacher.folder / f".{ARRAYS}.partial"
    try:
        if _is_current(final, teacher):
            return
        with (teacher.folder / f".{ARRAYS}.lock").open("a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another node, or another run
            if _is_current(final, teacher):
                return
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            for modality in teacher.widths:
                _write_modality(partial, teacher, modality)
            (partial / "about.json").write_text(json.dumps(teacher.about()))
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
    except (OSError, ValueError, TypeError, KeyError, pa.ArrowException) as error:
        message = getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"data.teachers={teacher.folder}: its arrays cannot be written into {final}: {message}") from error
    log_info(f"data.teachers={teacher.folder}: embeddings written as arrays into {final}")


def _is_current(final: Path, teacher: Teacher) -> bool:
    """Return whether the arrays are those of the teacher's files."""
    try:
        return bool(json.loads((final / "about.json").read_text()) == teacher.about())
    except (FileNotFoundError, ValueError):
        return False


def _write_modality(folder: Path, teacher: Teacher, modality: str) -> None:
    """Write the three arrays of a modality. Raises OSError, and others for damaged files."""
    digests = np.array([value for path in teacher.files for value in _read_digests(path, modality)], dtype=np.uint64)
    if len(digests) == 0:
        raise ValueError(f"no {modality} embeddings")
    order = np.argsort(digests, kind="stable")
    np.save(folder / f"{modality}-keys.npy", digests[order])
    np.save(folder / f"{modality}-rows.npy", order.astype(np.int64))
    vectors, start = None, 0
    for path in teacher.files:
        for rows in _read_vectors(path, modality):
            if vectors is None:
                shape = (len(digests), teacher.widths[modality])
                vectors = np.lib.format.open_memmap(folder / f"{modality}.npy", mode="w+", dtype=rows.dtype, shape=shape)
            vectors[start : start + len(rows)] = rows
            start += len(rows)
    if start != len(digests) or vectors is None:
        raise ValueError(f"{len(digests):,} keys and {start:,} {modality} embeddings")
    vectors.flush()


def _read_digests(path: Path, modality: str) -> Iterator[int]:
    """Yield the digest of each embedding of a file, in order."""
    names = pq.read_schema(path).names
    column = "key" if modality == "image" else "captions" if "captions" in names else "caption"
    columns = list(dict.fromkeys(["key", column]))
    if column != "captions" and may_have_null(path, modality):
        columns.append(modality)
    for batch in pq.ParquetFile(path).iter_batches(ROWS, columns=columns):
        if modality in columns:
            batch = batch.filter(batch.column(modality).is_valid())
        keys = batch.column("key").to_pylist()
        if modality == "image":
            yield from map(digest, keys)
            continue
        for key, captions in zip(keys, batch.column(column).to_pylist(), strict=True):
            for caption in captions if isinstance(captions, list) else [] if captions is None else [captions]:
                yield digest(key, caption_id(caption))


def _read_vectors(path: Path, modality: str) -> Iterator[np.ndarray]:
    """Yield the embeddings of a file, in order: (n, D). Those that are null are left out: their samples have none."""
    for batch in pq.ParquetFile(path).iter_batches(ROWS, columns=[modality]):
        column = batch.column(0)
        if not pa.types.is_fixed_size_list(column.type):  # a list of them for each sample
            column = column.flatten()
        column = column.drop_null()
        flat = column.flatten().to_numpy(zero_copy_only=False)
        yield flat.reshape(len(column), column.type.list_size)
