"""Token features of the images of an index, kept beside it, so that a re-ranker does not encode images again.

    PLACE.tokens/
      model.json     which model made them, their shape, and how far the grid was pooled
      rows.bin       one row of fixed size for each image: tokens (float16), their mask, the embedding (float32)
                     after the N-th compaction rows.N.bin, where N is the user_version of keys.db
      keys.db        SQLite: the row of each key, and where its image lay

Rows are only appended: written and flushed first, then committed in keys.db. So a process can be killed at any moment, and
what was committed stays. Rows of images that were replaced keep their bytes until `compact` writes the others into a new file,
which a transaction of keys.db puts in the place of the old one. Fetching maps the rows into memory.

An image's features count only where its location is still that in the index, and VectorIndex.upsert forgets those of what it
replaces.

Shapes: b = images, N = tokens of an image, C = width of a token, D = width of the re-ranker's shared space.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from finetune.search.item_sources import Location
from pretrain.errors import ConfigError, UserError
from pretrain.runtime.files import flush, read_bytes, write_text
from pretrain.towers import TokenSequence

FORMAT = "clipfuse tokens 1"
_MODEL, _ROWS, _KEYS = "model.json", "rows.bin", "keys.db"
_NUMBERED = re.compile(r"rows\.\d+\.bin")
_COPIED = 256
"""Rows that are copied at a time."""
_SECONDS = 30.0
"""Time to wait for another process that writes into keys.db."""


class ItemTokens(NamedTuple):
    """What the re-ranker reads of b images or sounds."""

    tokens: TokenSequence
    embedding: Tensor
    """(b, D), of unit length."""


@dataclass(frozen=True)
class Layout:
    """Which features a folder holds."""

    fingerprint: str
    """Of all that the features depend on, see reranking.fingerprint_features."""
    run: str
    step: int
    pool: int
    """Side of the squares of cells that were averaged; 1 = none."""
    tokens: int
    """N."""
    width: int
    """C."""
    dim: int
    """D."""
    grid: tuple[int, int] | None

    def __str__(self) -> str:
        return f"{self.run} (step {self.step}, {self.fingerprint[:8]}), pooled by {self.pool}"

    @property
    def row(self) -> np.dtype[Any]:
        """The type of a row of rows.bin."""
        return np.dtype(
            [("states", "<f2", (self.tokens, self.width)), ("mask", "?", (self.tokens,)), ("embedding", "<f4", (self.dim,))]
        )


def is_store(folder: Path) -> bool:
    """Return whether a folder holds token features."""
    return (folder / _MODEL).is_file()


def forget(folder: Path, keys: Sequence[str]) -> None:
    """Forget the features of images, if the folder holds any. Raises UserError."""
    if is_store(folder):
        with TokenStore(folder) as store:
            store.remove(keys)


class TokenStore:
    """The token features in a folder."""

    def __init__(self, folder: Path) -> None:
        """Open them. Raises UserError where they are damaged."""
        self.folder = folder
        try:
            values = json.loads(read_bytes(folder / _MODEL))
            is_valid = values.pop("format") == FORMAT
            grid = values.pop("grid")
            self.layout = Layout(**values, grid=(int(grid[0]), int(grid[1])) if grid else None)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(f"{folder}/{_MODEL} is damaged: {error}; delete {folder} to make it anew") from error
        if not is_valid:
            raise UserError(f"{folder} is not of {FORMAT}; delete it to make it anew")
        self._mapped: NDArray[Any] = np.zeros(0, self.layout.row)
        self._mapped_generation = 0
        with self._errors():
            self._keys = _connect(folder / _KEYS)

    @classmethod
    def create(cls, folder: Path, layout: Layout) -> TokenStore:
        """Make an empty folder of features. Raises UserError, also where it holds other files."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.iterdir()):
                if path.name.split("-")[0] not in (_ROWS, _KEYS) and not _NUMBERED.fullmatch(path.name):
                    raise UserError(f"{folder} exists and holds other files ({path.name}); move them away")
                path.unlink()
            (folder / _ROWS).write_bytes(b"")
            keys = sqlite3.connect(folder / _KEYS)
            with keys:
                keys.execute("CREATE TABLE length (rows INTEGER NOT NULL)")
                keys.execute("INSERT INTO length VALUES (0)")
                keys.execute(
                    "CREATE TABLE images (key TEXT PRIMARY KEY, source TEXT, begin INTEGER, size INTEGER, row INTEGER)"
                    " WITHOUT ROWID"
                )
            keys.close()
            write_text(folder / _MODEL, json.dumps({"format": FORMAT, **asdict(layout)}), sync=True)
            flush(folder)
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"cannot write into {folder}: {getattr(error, 'strerror', None) or error}") from error
        return cls(folder)

    def close(self) -> None:
        """Release the files."""
        self._keys.close()

    def __enter__(self) -> TokenStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check(self, fingerprint: str, run: str, pool: int) -> None:
        """Raise ConfigError where the folder holds features of another model, or pooled otherwise."""
        if (fingerprint, pool) != (self.layout.fingerprint, self.layout.pool):
            raise ConfigError(
                f"{self.folder} holds token features of {self.layout}; these would be of {run} ({fingerprint[:8]}), pooled by "
                f"{pool}: delete the folder to make them anew"
            )

    def count(self) -> int:
        """Return the number of images with features."""
        with self._errors():
            return int(self._keys.execute("SELECT count(*) FROM images").fetchone()[0])

    def describe_size(self) -> str:
        """Return how many features there are, and how large they are."""
        with self._errors():
            size, layout = self._path_of(self._read_state()[0]).stat().st_size, self.layout
        return f"{layout.tokens} x {layout.width} numbers each, {size / 1e6:,.1f} MB in {self.folder.name}"

    def put(self, keys: Sequence[str], locations: Sequence[Location], items: ItemTokens) -> None:
        """Add the features of images, or replace them. Raises UserError; what was there before stays then."""
        rows = np.zeros(len(keys), self.layout.row)
        rows["states"], rows["mask"] = items.tokens.states.cpu().half().numpy(), items.tokens.mask.cpu().numpy()
        rows["embedding"] = items.embedding.float().cpu().numpy()
        if not np.isfinite(rows["states"]).all():
            raise UserError(f"{self.layout.run}: token features are not finite in float16, so that they cannot be kept")
        with self._errors(), self._keys:
            self._keys.execute("BEGIN IMMEDIATE")
            generation, first = self._read_state()
            with self._path_of(generation).open("r+b", buffering=0) as file:
                file.truncate(first * self.layout.row.itemsize)
                file.seek(0, os.SEEK_END)
                view = memoryview(rows.tobytes())
                while view:
                    view = view[file.write(view) :]
                os.fsync(file.fileno())
            values = [(key, *location, first + i) for i, (key, location) in enumerate(zip(keys, locations, strict=True))]
            self._keys.executemany("INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?, ?)", values)
            self._keys.execute("UPDATE length SET rows = ?", (first + len(rows),))

    def remove(self, keys: Sequence[str]) -> None:
        """Forget the features of images. Raises UserError."""
        with self._errors(), self._keys:
            self._keys.executemany("DELETE FROM images WHERE key = ?", [(key,) for key in keys])

    def find(self, keys: Sequence[str], locations: Sequence[Location]) -> list[int | None]:
        """Return the row of each image; None where there is none from this location. Raises UserError."""
        rows: list[int | None] = []
        with self._errors(), self._keys:
            self._keys.execute("BEGIN")  # rows and the file that they are of belong together
            for key, location in zip(keys, locations, strict=True):
                found = self._keys.execute("SELECT source, begin, size, row FROM images WHERE key = ?", (key,)).fetchone()
                rows.append(int(found[3]) if found is not None and found[:3] == tuple(location) else None)
            generation, length = self._read_state()
            if generation != self._mapped_generation or max((row for row in rows if row is not None), default=-1) >= len(
                self._mapped
            ):
                self._map(generation, length)
        return rows

    def compact(self, least: float = 0.0) -> int:
        """Give back the space of rows that no image has; return how many they were. Raises UserError; all stays then.

        least: share of all rows above which it is done. Other processes may read; those that found rows before keep theirs.
        """
        with self._errors(), self._keys:
            self._keys.execute("BEGIN IMMEDIATE")
            generation, length = self._read_state()
            items = self._keys.execute("SELECT key, row FROM images ORDER BY row").fetchall()
            alive = [int(row) for _, row in items]
            dead = length - len(alive)
            if dead > least * length:
                self._map(generation, length)
                with self._path_of(generation + 1).open("wb") as file:
                    for begin in range(0, len(alive), _COPIED):
                        file.write(self._mapped[alive[begin : begin + _COPIED]].tobytes())
                    file.flush()
                    os.fsync(file.fileno())
                flush(self.folder)
                moves = [(row, key) for row, (key, _) in enumerate(items)]
                self._keys.executemany("UPDATE images SET row = ? WHERE key = ?", moves)
                self._keys.execute("UPDATE length SET rows = ?", (len(alive),))
                self._keys.execute(f"PRAGMA user_version = {generation + 1}")
                generation += 1
            else:
                dead = 0
        with self._errors():
            for path in self.folder.iterdir():
                if (path.name == _ROWS or _NUMBERED.fullmatch(path.name)) and path != self._path_of(generation):
                    path.unlink(missing_ok=True)
        return dead

    def _read_state(self) -> tuple[int, int]:
        """Return how often the rows were compacted, and how many there are."""
        generation = int(self._keys.execute("PRAGMA user_version").fetchone()[0])
        return generation, int(self._keys.execute("SELECT rows FROM length").fetchone()[0])

    def _path_of(self, generation: int) -> Path:
        return self.folder / (f"rows.{generation}.bin" if generation else _ROWS)

    def read(self, rows: Sequence[int]) -> ItemTokens:
        """Return the features in these rows, tokens in float32. Raises UserError."""
        values = self._mapped[list(rows)]
        states = torch.from_numpy(np.array(values["states"], order="C")).float()
        mask = torch.from_numpy(np.array(values["mask"], order="C"))
        embedding = torch.from_numpy(np.array(values["embedding"], order="C"))
        return ItemTokens(TokenSequence(states, mask, self.layout.grid, states[:, 0]), embedding)

    def _map(self, generation: int, length: int) -> None:
        """Map the rows of a generation."""
        path, size = self._path_of(generation), length * self.layout.row.itemsize
        if path.stat().st_size < size:
            raise UserError(
                f"{path} has {path.stat().st_size:,} bytes, and {size:,} were written: delete {self.folder} to make it anew"
            )
        self._mapped = np.memmap(path, self.layout.row, "r", shape=(length,)) if length else np.zeros(0, self.layout.row)
        self._mapped_generation = generation

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            if "full" in str(error) or "I/O" in str(error) or "locked" in str(error):
                raise UserError(self._explain(str(error))) from error
            raise UserError(f"{self.folder}/{_KEYS} is damaged: {error}; delete {self.folder} to make it anew") from error
        except OSError as error:
            raise UserError(self._explain(error.strerror or str(error))) from error

    def _explain(self, reason: str) -> str:
        return f"cannot write into {self.folder}: {reason}; what was there before stays, and the same command goes on"


def _connect(path: Path) -> sqlite3.Connection:
    """Open an existing database; pages are served from several threads, one at a time."""
    return sqlite3.connect(path.absolute().as_uri() + "?mode=rw", uri=True, timeout=_SECONDS, check_same_thread=False)


def pool_tokens(tokens: TokenSequence, side: int) -> TokenSequence:
    """Return the means of squares of `side` x `side` cells of the grid; those at its edges may be smaller.

    (b, H W, C) -> (b, ceil(H / side) ceil(W / side), C). Raises ConfigError for tokens without a grid.
    """
    if side == 1:
        return tokens
    if tokens.grid is None:
        raise ConfigError("--pool needs a tower whose tokens are a grid")
    cells = tokens.states.transpose(1, 2).unflatten(2, tokens.grid)  # (b, C, H, W)
    weights = tokens.mask[:, None].unflatten(2, tokens.grid).to(cells.dtype)
    sums = F.avg_pool2d(cells * weights, side, ceil_mode=True, count_include_pad=False)
    shares = F.avg_pool2d(weights, side, ceil_mode=True, count_include_pad=False)
    states = (sums / shares.clamp(min=1e-6)).flatten(2).transpose(1, 2)
    height, width = shares.shape[2:]
    return TokenSequence(states, shares.flatten(1) > 0, (height, width), tokens.pooled)
