"""Embedding folders laid out in the order of other samples: what `clipfuse data filter` maps into memory.

    OUT/vectors.npy      (n, D) the image embeddings, of unit length, float16 or as in the files; zeros where there is none
    OUT/similarity.npy   (n,) float32, the cosine of image and caption, of several captions the best; NaN where there is none

The files are read once, some thousand rows at a time; rows are found by the digest of their key.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pretrain.data.key_digests import digest
from pretrain.embedding.parquet import read_footer, to_rows
from pretrain.embedding.teachers import ROWS, Teacher, find_embeddings
from pretrain.errors import ConfigError, UserError


class Aligned(NamedTuple):
    """Embeddings of n samples, as memory maps."""

    vectors: np.ndarray
    similarity: np.ndarray
    has_vector: np.ndarray
    """(n,) bool."""


class EmbeddingSource:
    """One or more embedding folders of the same model.

    Args:
        folders: that `clipfuse embed` wrote, or of any Parquet files with the columns `key` and `image`.
        option: that names them, for messages.
        needs_similarity: whether captions must have embeddings, too.

    Raises:
        ConfigError: a folder is not complete, holds no image embeddings, or those of another model than the first.
    """

    def __init__(self, folders: Sequence[str], option: str, needs_similarity: bool) -> None:
        self.option = option
        self.folders: list[Teacher] = [find_embeddings(folder, f"{option} {folder}") for folder in folders]
        self.models = sorted({model for folder in self.folders for model in self._check(folder, needs_similarity)})
        if len(self.models) > 1:
            raise ConfigError(f"{option} {' '.join(folders)}: they hold embeddings of {len(self.models)} models, not of one")
        self.has_text = all("text" in folder.widths for folder in self.folders)

    def _check(self, folder: Teacher, needs_similarity: bool) -> set[str]:
        """Return the models that a folder's files name. Raises ConfigError."""
        first = self.folders[0]
        for modality in ("image", *(["text"] if needs_similarity else [])):
            if modality not in folder.widths:
                kinds = " and ".join(folder.widths)
                hint = "; --similarity and --keep-best compare images and captions" if modality == "text" else ""
                raise ConfigError(f"{self.option} {folder.folder} holds embeddings of {kinds} only, none of {modality}{hint}")
        if folder.widths["image"] != first.widths["image"]:
            raise ConfigError(
                f"{self.option}: embeddings of {folder.folder} have {folder.widths['image']} numbers, those of {first.folder} "
                f"{first.widths['image']}: they are of two models"
            )
        return {str((read_footer(path) or {}).get("model", "")) for path in folder.files}

    def describe(self) -> dict[str, Any]:
        """Return the model and the files, by which a filtered folder is resumed or refused."""
        return {"model": self.models, "folders": [folder.about()["files"] for folder in self.folders]}

    def write(self, keys: np.ndarray, out: Path, progress: Callable[[int, int], None]) -> None:
        """Write the embeddings of samples into the folder `out`, which is complete or not there.

        Args:
            keys: (n,) uint64, digests of the samples' keys.
            out: the folder.
            progress: called with (files done, files in all).

        Raises:
            UserError: a file is damaged.
            OSError: the folder cannot be written.
        """
        partial = out.with_name(f".{out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        order = np.argsort(keys, kind="stable")
        sorted_keys = keys[order]
        kind = np.float16 if all(path_kind == "halffloat" for path_kind in self._kinds()) else np.float32
        shape = (len(keys), self.folders[0].widths["image"])
        vectors = np.lib.format.open_memmap(partial / "vectors.npy", mode="w+", dtype=kind, shape=shape)
        similarity = np.full(len(keys), np.nan, dtype=np.float32)
        paths = [path for folder in self.folders for path in folder.files]
        for number, path in enumerate(paths, start=1):
            try:
                for names, images, cosines in self._read(path):
                    digests = np.array([digest(name) for name in names], dtype=np.uint64)
                    at = np.minimum(np.searchsorted(sorted_keys, digests), len(keys) - 1)
                    is_there = sorted_keys[at] == digests
                    rows = order[at[is_there]]
                    vectors[rows] = images[is_there]
                    similarity[rows] = cosines[is_there]
            except (ValueError, TypeError, pa.ArrowException) as error:
                raise UserError(f"{self.option}: {path} is damaged: {' '.join(str(error).split())[:200]}") from error
            progress(number, len(paths))
        vectors.flush()
        np.save(partial / "similarity.npy", similarity)
        partial.rename(out)

    def _kinds(self) -> Iterator[str]:
        for folder in self.folders:
            for path in folder.files:
                yield str(pq.read_schema(path).field("image").type.value_type)

    def _read(self, path: Path) -> Iterator[tuple[list[str], np.ndarray, np.ndarray]]:
        """Yield keys, image embeddings (b, D) float32 of unit length, and cosines with the best caption (b,)."""
        columns = ["key", "image", *(["text"] if self.has_text else [])]
        for batch in pq.ParquetFile(path).iter_batches(ROWS, columns=columns):
            images, has_image = to_rows(batch.column("image"))
            images = _normalize(images)
            cosines = np.full(len(images), np.nan, dtype=np.float32)
            if self.has_text:
                text = batch.column("text")
                counts = np.asarray(text.is_valid()).astype(np.int64)
                if not pa.types.is_fixed_size_list(text.type):  # a list of embeddings for each sample
                    counts = text.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
                    text = text.flatten()
                owners = np.repeat(np.arange(len(images)), counts)
                texts, _ = to_rows(text.drop_null())
                products = np.einsum("bd,bd->b", images[owners], _normalize(texts))
                best = np.full(len(images), -np.inf, dtype=np.float32)
                np.maximum.at(best, owners, products)
                cosines = np.where(np.isfinite(best) & has_image, best, np.nan).astype(np.float32)
            yield batch.column("key").to_pylist(), images, cosines


def load_aligned(folder: Path) -> Aligned:
    """Open what EmbeddingSource.write wrote. Raises OSError, ValueError."""
    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    has_vector = np.empty(len(vectors), dtype=bool)
    for start in range(0, len(vectors), ROWS):
        has_vector[start : start + ROWS] = (vectors[start : start + ROWS] != 0).any(axis=1)
    return Aligned(vectors, np.load(folder / "similarity.npy"), has_vector)


def _normalize(rows: np.ndarray) -> np.ndarray:
    """Return rows of unit length in float32; zeros for those with a number that is not finite, as if they had no embedding."""
    rows = rows.astype(np.float32)
    rows = np.where(np.isfinite(rows).all(axis=1, keepdims=True), rows, 0)
    lengths: np.ndarray = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(lengths, 1e-12))
