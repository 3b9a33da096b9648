"""Stored embeddings of teachers (data.teachers), read by key from memory-mapped arrays beside the samples.

A teacher is a folder of arrays, which pretrain/embedding/teachers.py makes of what `clipfuse embed` wrote:

    image.npy       (n, D), in the order of the embedding folder
    image-keys.npy  (n,) uint64, sorted digests of the samples' keys; image-rows.npy: the row in image.npy of each
    text*.npy       likewise for captions: the digests are of a sample's key and a caption's hash

Nothing is held in memory but what is looked up. Legend: b = samples, k = captions of a sample, D = width of a teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.data.batch import Batch
from pretrain.data.key_digests import digest
from pretrain.data.shards.paths import RawSample

TARGET = "teachers"
"""Name of the targets, by number of the teacher: image (b, D), text (b, D) or (b, k, D), and image_mask and text_mask, bool,
whether there is an embedding."""
MODALITIES = ("image", "text")


class TeacherReader:
    """The embeddings of one teacher.

    Args:
        folder: of the arrays; they are opened when the first embedding is looked up.
        modalities: those that the teacher has.
    """

    def __init__(self, folder: Path, modalities: Sequence[str]) -> None:
        self.folder, self.modalities = folder, tuple(modalities)
        self._arrays: dict[str, tuple[Any, Any, Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_arrays": {}}  # a memory map would be sent as its content

    def _open(self, modality: str) -> tuple[Any, Any, Any]:
        if modality not in self._arrays:
            names = (modality, f"{modality}-keys", f"{modality}-rows")
            vectors, keys, rows = (np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in names)
            self._arrays[modality] = vectors, keys, rows
        return self._arrays[modality]

    def look_up(self, modality: str, digests: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return embeddings (n, D) float32 and whether there is one (n,) bool; zeros where there is none."""
        vectors, keys, rows = self._open(modality)
        wanted = np.array(digests, dtype=np.uint64)
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        is_there = np.asarray(keys[at] == wanted)
        embeddings = np.zeros((len(wanted), vectors.shape[1]), dtype=np.float32)
        embeddings[is_there] = vectors[rows[at[is_there]]]
        return torch.from_numpy(embeddings), torch.from_numpy(is_there)


class TeacherDecoder:
    """A decoder that gives targets only: the teachers' embeddings of each image and of the captions that were drawn."""

    def __init__(self, teachers: Sequence[TeacherReader]) -> None:
        self.teachers = list(teachers)

    def __call__(self, sample: RawSample, rng: np.random.Generator, train: bool) -> None:
        """Return nothing: embeddings are looked up for a whole batch, once its captions are drawn."""

    def collate(self, items: list[None]) -> None:
        """Return None: embeddings are targets, not inputs."""

    def targets(self, items: list[None]) -> dict[str, Any]:
        """Return nothing; see `complete`."""
        return {}

    def complete(self, batch: Batch, items: Mapping[str, list[Any]]) -> None:
        """Add the embeddings to the targets of a batch."""
        ids: Tensor | None = batch.targets.get("caption_id")
        batch.targets[TARGET] = {str(i): self._embeddings(teacher, batch.keys, ids) for i, teacher in enumerate(self.teachers)}

    def _embeddings(self, teacher: TeacherReader, keys: list[str], ids: Tensor | None) -> dict[str, Tensor]:
        embeddings: dict[str, Tensor] = {}
        if "image" in teacher.modalities:
            embeddings["image"], embeddings["image_mask"] = teacher.look_up("image", [digest(key) for key in keys])
        if "text" in teacher.modalities and ids is not None:
            rows = ids.view(len(keys), -1).tolist()
            digests = [digest(key, caption) for key, captions in zip(keys, rows, strict=True) for caption in captions]
            vectors, is_there = teacher.look_up("text", digests)
            embeddings |= {"text": vectors.view(*ids.shape, -1), "text_mask": is_there.view(ids.shape)}
        return embeddings


def count_numbers(batch: Batch) -> int:
    """Return the numbers of an embedding of all teachers of images together."""
    return sum(embeddings["image"].shape[1] for embeddings in batch.targets[TARGET].values())


def count_covered(batch: Batch) -> dict[str, tuple[int, int]]:
    """Return for each modality that a teacher has (embeddings found, looked up), over all teachers."""
    counts: dict[str, tuple[int, int]] = {}
    for embeddings in batch.targets[TARGET].values():
        for modality in MODALITIES:
            mask = embeddings.get(f"{modality}_mask")
            if mask is not None:
                found, total = counts.get(modality, (0, 0))
                counts[modality] = found + int(mask.sum()), total + mask.numel()
    return counts
