"""The backend `exact`: a folder of files, searched by comparing every vector. No server, and no approximation.

    index.json         the description
    vectors.f32        (n, D) float32, row by row
    thumbnails.bin     the JPEGs, one after the other
    rows.arrow         keys, places, captions and fields: record batches of Arrow, one after the other
    captions-1.N/      words of the captions when commits.txt has N bytes, for BM25: made by the first search that asks
    commits.txt        one line for each change: how long the files above are by then, and which rows it removed

After a compaction the files have a number: vectors.1.f32 and so on, see exact_files.py.

Rows are only ever appended, then a line is added to commits.txt, each flushed to disk. What lies behind the last complete
line does not count: the next change overwrites it. So a process can be killed at any moment, and readers see whole changes
only. An image that is replaced is a new row, and the old one is listed as removed, until `compact` writes the rest anew.

One process writes at a time; any number read, each the state that it opened.

Legend: n = rows, those removed included; D = width of an embedding; q = queries.
"""

from __future__ import annotations

import fcntl
import mmap
import shutil
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from finetune.search.backends import exact_files
from finetune.search.backends.exact_files import COMMITS, KINDS, Commits
from finetune.search.backends.nearest import find_nearest
from finetune.search.captions import CaptionIndex
from finetune.search.fields import Kind
from finetune.search.filters import to_mask
from finetune.search.vector_index import Description, Hit, IndexedItem, NoIndexError, VectorIndex, Vectors
from pretrain.data.filter_expression import Filter
from pretrain.errors import UserError
from pretrain.runtime.files import flush, read_bytes, write_text

DESCRIPTION, LOCK = "index.json", ".lock"
_CAPTIONS = "captions-1."
"""Begins the name of the folder of the captions' words; the length of commits.txt follows, which is that of a state."""
_ARROW: dict[Kind, pa.DataType] = {"float": pa.float64(), "int": pa.int64(), "bool": pa.bool_(), "str": pa.string()}


def is_exact(place: Path) -> bool:
    """Return whether a folder is an index of this backend."""
    return (place / DESCRIPTION).is_file() and (place / COMMITS).is_file()


class ExactIndex(VectorIndex):
    """An index in a folder of its own."""

    def __init__(self, place: str, is_writable: bool = False) -> None:
        """Open the folder `place`. Raises NoIndexError, and UserError where it is damaged or another process writes it."""
        self.path = Path(place)
        if not is_exact(self.path):
            raise NoIndexError(place)
        text = read_bytes(self.path / DESCRIPTION).decode("utf-8", "replace")
        super().__init__(place, Description.from_json(text, place))
        self._lock: IO[str] | None = None
        if is_writable:
            self._acquire_lock()
        self._schema = pa.schema(
            [pa.field(name, pa.string()) for name in ("key", "source", "caption")]
            + [pa.field("offset", pa.int64()), pa.field("size", pa.int64())]
            + [pa.field("thumbnail_offset", pa.int64()), pa.field("thumbnail_size", pa.int64())]
            + [pa.field(f"field {item.name}", _ARROW[item.kind]) for item in self.description.fields]
        )
        self._row_of_key: dict[str, int] | None = None
        """Of the rows that are there; built when it is first needed, then kept up to date."""
        self._is_mapped = False
        self._captions: CaptionIndex | None = None
        """Of the images that are there and have a caption; built when it is first needed, again after each change."""
        self._open_state()
        if is_writable:
            exact_files.remove_others(self.path, self._commits.generation)

    def _open_state(self) -> None:
        """Read the commits and map their files; once more where another process compacted them in between."""
        for attempt in range(10):
            self._commits = Commits(self.path, self.place)
            self._row_of_key, self._captions, self._is_mapped = None, None, False
            try:
                return self._map_files()
            except FileNotFoundError as error:
                if attempt == 9:
                    raise UserError(f"{error.filename} is missing: {self.place} is damaged; index the samples again") from error

    @classmethod
    def create(cls, place: str, description: Description) -> ExactIndex:
        """Make an empty index in a new or empty folder, and open it for writing. Raises UserError."""
        path = Path(place)
        try:
            path.mkdir(parents=True, exist_ok=True)
            names = [exact_files.name_file(kind, 0) for kind in KINDS]
            others = [entry.name for entry in path.iterdir() if entry.name not in (DESCRIPTION, LOCK, *names)]
            if others:
                raise UserError(f"{place} exists and holds other files ({others[0]}); choose another --db")
            for name in names:
                (path / name).write_bytes(b"")
            write_text(path / DESCRIPTION, description.to_json(), sync=True)
            write_text(path / COMMITS, "", sync=True)  # it makes the folder an index
            flush(path)
        except OSError as error:
            raise UserError(f"cannot write into {place}: {error.strerror or error}") from error
        return cls(place, is_writable=True)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def remove(self) -> None:
        try:
            for path in (self.path / DESCRIPTION, self.path / COMMITS, *map(self._commits.path_of, KINDS), self.path / LOCK):
                path.unlink(missing_ok=True)
            if not any(self.path.iterdir()):
                self.path.rmdir()
        except OSError as error:
            raise UserError(f"cannot remove {self.place}: {error.strerror or error}") from error
        finally:
            self.close()

    def _acquire_lock(self) -> None:
        try:
            self._lock = (self.path / LOCK).open("a+")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise UserError(f"{self.place} is being written by another process; wait for it, or choose another --db") from None
        except OSError as error:
            raise UserError(f"cannot write into {self.place}: {error.strerror or error}") from error

    # -----------------------------------------------------------------------------------------------------------------
    # Files

    def _commit(self, additions: dict[str, bytes], removed: list[int]) -> None:
        """Append to the files, and commit. Raises UserError; nothing has changed then."""
        if self._lock is None:
            raise UserError(f"{self.place} is open for reading only")
        try:
            self._commits.append(additions, removed)
        except OSError as error:
            raise self._explain(error) from error
        self._is_mapped, self._captions = False, None

    def _explain(self, error: OSError) -> UserError:
        reason = error.strerror or error
        return UserError(f"cannot write into {self.place}: {reason}; what was there before stays, and the same command goes on")

    def _map_files(self) -> None:
        """Map the files up to the last commit into memory, unless they are. Raises UserError where one is shorter."""
        if self._is_mapped:
            return
        maps: dict[str, Any] = {}
        for name in KINDS:
            length, path = self._commits.ends[name], self._commits.path_of(name)
            if path.stat().st_size < length:
                raise UserError(f"{path} has {path.stat().st_size:,} bytes, and {length:,} were written: it is damaged")
            with path.open("rb") as opened:
                maps[name] = mmap.mmap(opened.fileno(), length, access=mmap.ACCESS_READ) if length else b""
        vectors = np.frombuffer(maps["vectors"], dtype=np.float32) if self._commits.ends["vectors"] else np.zeros(0, np.float32)
        self._vectors: Vectors = vectors.reshape(-1, self.description.dim)
        self._thumbnails: Any = maps["thumbnails"]
        buffer, begin, batches = pa.py_buffer(maps["rows"]), 0, []
        for end in self._commits.batch_ends:
            batches.append(pa.ipc.read_record_batch(buffer.slice(begin, end - begin), self._schema))
            begin = end
        self._table = pa.Table.from_batches(batches, self._schema)
        if len(self._table) != len(self._vectors):
            raise UserError(f"{self.place} is damaged: {len(self._table):,} rows and {len(self._vectors):,} vectors")
        self._alive = np.ones(len(self._vectors), dtype=np.bool_)
        for removed in self._commits.removed:
            self._alive[removed] = False
        self._is_mapped = True

    def compact(self, least: float = 0.0) -> int:
        if self._lock is None:
            raise UserError(f"{self.place} is open for reading only")
        self._map_files()
        alive, generation = np.flatnonzero(self._alive), self._commits.generation + 1
        dead = len(self._alive) - len(alive)
        if dead <= least * len(self._alive):
            return 0
        try:
            commits = exact_files.write_rows(self.path, generation, alive, self._vectors, self._thumbnails, self._table)
            flush(self.path)
            write_text(self.path / COMMITS, commits.decode(), sync=True)  # from here on the new files count
        except OSError as error:
            raise self._explain(error) from error
        self._open_state()
        exact_files.remove_others(self.path, self._commits.generation)
        return dead

    # -----------------------------------------------------------------------------------------------------------------
    # The contract

    def _upsert(self, items: list[IndexedItem], vectors: Vectors) -> None:
        rows = self._find_rows()
        removed = [rows[item.key] for item in items if item.key in rows]
        sizes = [len(item.thumbnail) for item in items]
        offsets = self._commits.ends["thumbnails"] + np.cumsum([0, *sizes])[:-1]
        columns: list[Any] = [[getattr(item, name) for item in items] for name in ("key", "source", "caption")]
        columns += [[item.offset for item in items], [item.size for item in items], offsets, sizes]
        columns += [[item.fields.get(entry.name) for item in items] for entry in self.description.fields]
        arrays = [pa.array(column, kind) for column, kind in zip(columns, self._schema.types, strict=True)]
        batch = pa.RecordBatch.from_arrays(arrays, schema=self._schema)
        self._commit(
            {
                "vectors": vectors.tobytes(),
                "thumbnails": b"".join(item.thumbnail for item in items),
                "rows": batch.serialize().to_pybytes(),
            },
            removed,
        )
        first = self._commits.ends["vectors"] // vectors[0].nbytes - len(items)
        rows.update((item.key, first + i) for i, item in enumerate(items))

    def _delete(self, keys: list[str]) -> None:
        rows = self._find_rows()
        self._commit({}, [rows[key] for key in keys])
        for key in keys:
            del rows[key]

    def _delete_matching(self, condition: Filter) -> int:
        rows = np.flatnonzero(self._match(condition)).tolist()
        if rows:
            self._commit({}, rows)
            self._row_of_key = None
        return len(rows)

    def _search(self, queries: Vectors, k: int, condition: Filter | None) -> list[list[Hit]]:
        mask = self._match(condition)
        rows, scores = find_nearest(queries, self._vectors, mask, k)
        items = self._read_items(np.unique(rows))
        return [
            [Hit(items[row], score) for row, score in zip(rows_of_query, scores_of_query, strict=True)]
            for rows_of_query, scores_of_query in zip(rows.tolist(), scores.tolist(), strict=True)
        ]

    def _search_captions(self, text: str, k: int, condition: Filter | None) -> list[Hit]:
        mask = self._match(condition)
        if self._captions is None:
            self._captions = self._load_captions()
        scores = np.where(mask[self._captioned], self._captions.score(text), 0)
        least = np.partition(scores, -k)[-k] if k < len(scores) else 0.0
        best = np.flatnonzero((scores > 0) & (scores >= least))
        best = best[np.argsort(-scores[best], kind="stable")][:k]  # of equal ones, the lower row comes first
        items = self._read_items(self._captioned[best])
        return [Hit(items[int(self._captioned[i])], float(scores[i])) for i in best.tolist()]

    def _load_captions(self) -> CaptionIndex:
        """Return the index of the captions of this state: from its folder, or made and kept there for the next process."""
        from pretrain.runtime.console import log_info  # which imports torch: an index is opened without

        column = self._table["caption"]
        self._captioned = np.flatnonzero(self._alive & pc.not_equal(column, "").to_numpy())
        folder = self.path / f"{_CAPTIONS}{self._commits.state}"
        try:
            return CaptionIndex.load(folder, len(self._captioned))
        except (OSError, ValueError, KeyError, RecursionError) as error:
            if folder.exists():
                log_info(f"{folder} cannot be used, and is made anew: {error}")
        captions = CaptionIndex(column.take(self._captioned).to_pylist())
        try:
            for old in self.path.glob(f"{_CAPTIONS}*"):
                shutil.rmtree(old, ignore_errors=True)
            captions.save(folder)
        except OSError as error:
            log_info(f"{folder} cannot be written, so that each process indexes the captions: {error.strerror or error}")
        return captions

    def _get(self, keys: list[str]) -> list[IndexedItem | None]:
        rows_of_keys = self._find_rows()
        rows = [rows_of_keys[key] for key in keys if key in rows_of_keys]
        items = self._read_items(np.array(rows, dtype=np.int64), with_thumbnails=True)
        return [items[rows_of_keys[key]] if key in rows_of_keys else None for key in keys]

    def _count(self, condition: Filter | None) -> int:
        return int(self._match(condition).sum())

    def _list_values(self, name: str, most: int) -> list[str]:
        self._map_files()
        counts = self._table[f"field {name}"].filter(pa.array(self._alive)).drop_null().value_counts()
        if len(counts) > most:
            return []
        return [item["values"] for item in sorted(counts.to_pylist(), key=lambda item: (-item["counts"], item["values"]))]

    # -----------------------------------------------------------------------------------------------------------------
    # Rows

    def _find_rows(self) -> dict[str, int]:
        """Return the row of each key."""
        if self._row_of_key is None:
            self._map_files()
            rows = np.flatnonzero(self._alive)
            self._row_of_key = dict(
                zip(self._table["key"].take(exact_files.to_indices(rows)).to_pylist(), rows.tolist(), strict=True)
            )
        return self._row_of_key

    def _match(self, condition: Filter | None) -> NDArray[np.bool_]:
        """Return (n,) which rows are there and match."""
        self._map_files()
        if condition is None:
            return self._alive
        names = ["key", "source", "caption", *(f"field {item.name}" for item in self.description.fields)]
        table = self._table.select(names).rename_columns([name.removeprefix("field ") for name in names])
        return self._alive & to_mask(condition, table)

    def _read_items(self, rows: NDArray[np.int64], with_thumbnails: bool = False) -> dict[int, IndexedItem]:
        """Return the images in these rows; with_thumbnails: with their vectors, too."""
        items: dict[int, IndexedItem] = {}
        if not len(rows):
            return items
        self._map_files()
        for row, values in zip(rows.tolist(), self._table.take(exact_files.to_indices(rows)).to_pylist(), strict=True):
            item = IndexedItem(values["key"], values["source"], values["offset"], values["size"], values["caption"])
            item.fields = {entry.name: values[f"field {entry.name}"] for entry in self.description.fields}
            if with_thumbnails:
                begin = values["thumbnail_offset"]
                item.thumbnail = bytes(self._thumbnails[begin : begin + values["thumbnail_size"]])
                item.vector = self._vectors[row].copy()
            items[row] = item
        return items
