"""The embedding folder: files with the embeddings of a data set, and a manifest that lists them.

    _manifest.json             the model, the data, the settings and the files; whether all are complete
    00000-train-0000.parquet   the samples of one shard, of a slice of a large one, or of several small ones: see parquet.py

The samples are divided into work units once, when the folder is created; each work unit becomes one file. Processes take
work units from a shared counter, so that a slow process delays no other. A file is written under a hidden name until it is
complete, so that a killed job leaves complete files only. The same command then does the rest, on any number of processes.
A batch never crosses a work unit: a file has the same content whichever process wrote it, and when.

job.py does the work; this module knows the work units, the manifest and the folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pretrain.checkpoints.loading import LoadedModel
from pretrain.embedding import parquet
from pretrain.embedding.split import EmbeddedSplit, read_languages
from pretrain.errors import UserError
from pretrain.runtime.files import parse_json_object, read_json_object, write_json

FORMAT = "clipfuse embeddings 1"
LOCK = ".lock"
"""Held by the command that writes the folder."""
MANIFEST = "_manifest.json"
"""Readers of Parquet folders skip names that begin with an underscore."""


@dataclass(frozen=True)
class WorkUnit:
    """The samples of one file."""

    file: str
    ranges: tuple[tuple[int, int, int], ...]
    """(shard, first sample, end) for each shard that the file covers, in order."""

    @property
    def samples(self) -> int:
        """The number of samples."""
        return sum(end - first for _, first, end in self.ranges)


def build_work_units(names: list[str], counts: list[int], limit: int) -> list[WorkUnit]:
    """Divide shards into work units: small shards together, large ones into slices of equal size.

    Args:
        names: the file name of each shard.
        counts: the number of samples of each shard.
        limit: the most samples that a work unit may have.
    """
    ranges: list[list[tuple[int, int, int]]] = []
    free = 0  # samples that the last work unit may still take
    for shard, count in enumerate(counts):
        slices = -(-count // limit)
        for i in range(slices):
            bounds = (shard, count * i // slices, count * (i + 1) // slices)
            if slices == 1 and count <= free:
                ranges[-1].append(bounds)
                free -= count
            else:
                ranges.append([bounds])
                free = limit - count if slices == 1 else 0
    stems = [re.sub(r"[^\w.-]", "_", names[unit[0][0]].removesuffix(".tar"))[:80] for unit in ranges]
    return [WorkUnit(f"{i:05d}-{stem}.parquet", tuple(unit)) for i, (unit, stem) in enumerate(zip(ranges, stems, strict=True))]


# ---------------------------------------------------------------------------------------------------------------------
# Identity of model and data


def fingerprint_model(loaded: LoadedModel) -> str:
    """Return a hash of all that an embedding depends on: weights, architecture, preprocessing, tokenizer."""
    sha256 = hashlib.sha256()
    # BatchNorm's statistics are in both: a dict has each name once, and sorting never compares two tensors.
    tensors = {**dict(loaded.model.named_buffers()), **loaded.model.state_dict()}
    for name, tensor in sorted(tensors.items(), key=lambda item: item[0]):
        flat = tensor.detach().cpu().contiguous().view(-1)
        sha256.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha256.update(flat.view(torch.uint8).numpy())
    incidental = {
        "tokenizer", "name", "pretrained", "weights", "trainable_blocks", "checkpointing", "patch_dropout", "groups",
        "static_groups", "group_shapes",
    }  # fmt: skip
    for modality in loaded.model.towers:
        config = getattr(loaded.config, modality, None) or loaded.config.others.get(modality)
        relevant = {k: v for k, v in asdict(config).items() if k not in incidental} if config is not None else {}
        if relevant.get("resize") != "pad":
            relevant.pop("pad_color", None)  # of borders that there are not
        if relevant.get("stride") is None:
            relevant.pop("stride", None)  # indexes of models that had no such setting stay valid
        sha256.update(json.dumps([modality, relevant], sort_keys=True, default=str).encode())
    if "text" in loaded.decoders:
        ids, mask = loaded.decoders["text"].encode(["", "A red cup, left of 12 boxes; naïve Ωμέγα 猫 🐈.", "word " * 1000])
        sha256.update(json.dumps([ids.tolist(), mask.tolist()]).encode())
    return sha256.hexdigest()[:32]


def fingerprint_json(value: Any) -> str:
    """Return a hash of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _find_difference(old: dict[str, Any], new: dict[str, Any], out: Path) -> str | None:
    """Return why a job with the manifest `new` cannot continue a folder with `old`; None if it can."""
    if old.get("format") != FORMAT:
        return f"{out}/{MANIFEST} is not of {FORMAT}; choose another --out"
    if old["model"]["fingerprint"] != new["model"]["fingerprint"]:
        models = [f"{m['from']} (step {m['step']}, {m['fingerprint'][:8]})" for m in (old["model"], new["model"])]
        return f"{out} holds embeddings of another model, {models[0]}; this one is {models[1]}: give it its own --out"
    if old["data"]["fingerprint"] != new["data"]["fingerprint"]:
        sizes = [f"{d['samples']:,} samples in {d['shards']:,} shards" for d in (old["data"], new["data"])]
        return f"{out} holds embeddings of other data, {sizes[0]}; these are {sizes[1]}: give them their own --out"
    if not old["complete"] and old["data"].get("keys", "file names") != new["data"]["keys"]:
        return f"{out} was begun by a version that wrote other keys for these shards; choose another --out"
    for key, before in {"incomplete": "", **old["settings"]}.items():
        if before != new["settings"].get(key):
            now = new["settings"].get(key) or "its default"
            return f"{out} was begun with {key} {before or 'left at its default'}, now it is {now}; choose another --out"
    return None


@dataclass
class EmbeddingPlan:
    """Which files an embedding folder has, and which of them are still to be written."""

    units: list[WorkUnit]
    pending: list[int]
    """Indices of the work units that have no file yet."""
    samples_done: int
    """Samples of the other work units."""


class EmbeddingFolder:
    """The folder on disk, locked by one command at a time. Rank 0 only."""

    def __init__(self, out: Path) -> None:
        self.path = out
        self._lock: IO[str] | None = None

    def open(self, new: dict[str, Any], names: list[str], counts: list[int]) -> EmbeddingPlan:
        """Lock the folder, compare or write its manifest, and remove unfinished files of a killed job.

        Args:
            new: the manifest of this job; gets the folder's `per_file` if there is one, and `files`.
            names: the file name of each shard.
            counts: the number of samples of each shard.

        Raises:
            UserError: another command is writing the folder, it cannot be written, or it holds other files or the
                embeddings of another model, of other data or with other settings.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / LOCK).open("a+")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.path} is being written by another clipfuse embed; choose another --out") from None
        except OSError as error:
            raise UserError(f"cannot write into {self.path}: {error.strerror or error}; choose another --out") from error
        others = [path.name for path in self.path.iterdir() if not path.name.startswith(".")]
        if MANIFEST in others:
            old = read_manifest(self.path)
            if difference := _find_difference(old, new, self.path):
                raise UserError(difference)
            new["per_file"] = old["per_file"]
        elif others:
            raise UserError(f"{self.path} exists and holds other files ({others[0]}); choose another --out")
        plan = EmbeddingPlan(build_work_units(names, counts, new["per_file"]), [], 0)
        new["files"] = [
            {"file": unit.file, "samples": [[names[shard], first, end] for shard, first, end in unit.ranges]}
            for unit in plan.units
        ]
        for unfinished in self.path.glob(".*.partial"):
            unfinished.unlink()
        for i, footer in enumerate(self.read_footers(plan.units)):
            if footer is None:
                plan.pending.append(i)
                continue
            if footer["model"] != new["model"]["fingerprint"]:
                raise UserError(f"{self.path / plan.units[i].file} holds embeddings of another model; choose another --out")
            plan.samples_done += plan.units[i].samples
        if plan.pending:
            write_json(self.path / MANIFEST, new)
        return plan

    def read_footers(self, units: list[WorkUnit]) -> list[dict[str, Any] | None]:
        """Return the footer of each work unit's file; None where the file is missing or incomplete."""
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(parquet.read_footer, [self.path / unit.file for unit in units]))

    def seal(self, new: dict[str, Any], units: list[WorkUnit]) -> tuple[int, Counter[str], Counter[str]]:
        """Mark the folder as complete; return its rows, the samples skipped by reason, and the rows that lack a modality.

        A folder without a row is not marked. Raises UserError where a file is missing.
        """
        footers = [footer for footer in self.read_footers(units) if footer is not None]
        if len(footers) < len(units):
            missing = len(units) - len(footers)
            raise UserError(f"{missing} of {len(units)} files in {self.path} are missing; the same command writes them")
        rows, bad = sum(footer["rows"] for footer in footers), sum((Counter(footer["bad"]) for footer in footers), Counter())
        lacks: Counter[str] = sum((Counter(footer.get("missing", {})) for footer in footers), Counter())
        for entry, footer in zip(new["files"], footers, strict=True):
            entry["rows"] = footer["rows"]
        counts = {"rows": rows, "left_out": dict(bad), **({"missing": dict(lacks)} if lacks else {})}
        if rows:
            write_json(self.path / MANIFEST, {**new, "complete": True, **counts})
        return rows, bad, lacks

    def remove(self, units: list[WorkUnit]) -> None:
        """Remove the folder, where it holds nothing but the files of this job. Raises UserError where that is impossible."""
        try:
            for name in (*(unit.file for unit in units), MANIFEST, LOCK):
                (self.path / name).unlink(missing_ok=True)
            if not any(self.path.iterdir()):
                self.path.rmdir()
        except OSError as error:
            raise UserError(f"cannot remove {self.path}, which holds no embedding: {error.strerror or error}") from error

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of an embedding folder. Raises UserError where it cannot be read."""
    try:
        manifest = read_json_object(folder / MANIFEST)
        if manifest.get("format") == FORMAT:
            _check_manifest(manifest)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / MANIFEST} cannot be read: {error}") from error
    return manifest


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Raise ValueError for a manifest with entries of other types than EmbeddingFolder writes."""
    kinds: dict[str, dict[str, type]] = {
        "": {"complete": bool, "model": dict, "data": dict, "settings": dict, "per_file": int, "files": list},
        "model": {"fingerprint": str, "from": str, "step": int},
        "data": {"fingerprint": str, "samples": int, "shards": int},
    }
    for section, types in kinds.items():
        values = manifest[section] if section else manifest
        for name, kind in types.items():
            if type(values.get(name)) is not kind:
                raise ValueError(f"its {section or 'manifest'} has no valid {name}")
    if manifest["per_file"] < 1:
        raise ValueError(f"its per_file is {manifest['per_file']}")
    for entry in manifest["files"]:
        file = entry.get("file") if isinstance(entry, dict) else None
        if not isinstance(file, str) or not re.fullmatch(r"[\w-][\w.-]{0,250}", file):
            raise ValueError(f"it lists {file!r:.80}, which is no file of an embedding folder")


def is_embedding_folder(where: Any) -> bool:
    """Return whether `where` names an embedding folder rather than shards."""
    return isinstance(where, str | Path) and (Path(where) / MANIFEST).is_file()


def load(
    folder: str | Path, loaded: LoadedModel | None = None, label: str = "label", language: str | None = None
) -> EmbeddedSplit:
    """Load the embeddings of a complete embedding folder, in the order of the shards.

    Samples with embeddings of fewer than two modalities are left out, which no pair of modalities is measured on.

    Args:
        folder: the embedding folder.
        loaded: the model that must have made the embeddings; None accepts those of any model.
        label: field of the json with a sample's class.
        language: field of the json with the language of its captions; None = not requested.

    Raises:
        UserError: the folder is incomplete, lacks embeddings of images or of another modality of `loaded`, or holds those of
            another model.
    """
    path = Path(folder)
    manifest = read_manifest(path)
    if manifest.get("format") != FORMAT or not manifest["complete"]:
        raise UserError(f"{path} is not a complete embedding folder; the clipfuse embed command that began it finishes it")
    if loaded is not None and fingerprint_model(loaded) != manifest["model"]["fingerprint"]:
        raise UserError(
            f"{path} holds embeddings of {manifest['model']['from']} (step {manifest['model']['step']}), "
            f"not of {loaded.folder} (step {loaded.step})"
        )
    try:
        modalities = ["image"] if loaded is None else list(loaded.model.towers)
        return _read_tables(path, manifest, label, language, modalities)
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RuntimeError, pa.ArrowException) as error:
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())[:300] or type(error).__name__}") from error


def _read_tables(
    path: Path, manifest: dict[str, Any], label: str, language: str | None, modalities: list[str]
) -> EmbeddedSplit:
    """Return the content of all files. Raises UserError without embeddings of a modality, and many errors for damaged files."""
    tables = [pq.read_table(path / entry["file"]) for entry in manifest["files"]]
    names = [name for name in modalities if name != "text"]
    for name in names:
        if not tables or name not in tables[0].column_names:
            raise UserError(f"{path} holds no {name} embeddings")
    table = pa.concat_tables(tables)
    has = {name: np.asarray(table[name].is_valid()) for name in modalities if name in table.column_names}
    if not all(values.all() for values in has.values()):
        is_kept = np.sum(list(has.values()), axis=0) >= min(2, len(has))
        table, has = table.filter(pa.array(is_kept)), {name: values[is_kept] for name, values in has.items()}
    embeddings = {name: torch.from_numpy(parquet.to_rows(table[name])[0]).float() for name in names}
    width = next(iter(embeddings.values())).shape[1]
    captions: list[list[str]] = [[]] * len(table)
    text = torch.zeros(0, width)
    if "text" in table.column_names:
        has_lists = "captions" in table.column_names
        values = table["captions" if has_lists else "caption"].to_pylist()
        captions = [[] if value is None else value if has_lists else [value] for value in values]
        vectors = table["text"].combine_chunks().drop_null()
        text = torch.from_numpy(parquet.to_numpy(vectors.flatten() if has_lists else vectors)).float()
    if sum(map(len, captions)) != len(text) or (len(text) and text.shape[1] != width):
        raise ValueError(f"it holds {sum(map(len, captions)):,} captions and {len(text):,} embeddings of texts")
    metadata = [parse_json_object(encoded.encode()) if encoded else {} for encoded in table["json"].to_pylist()]
    return EmbeddedSplit(
        embeddings=embeddings,
        text=text,
        image_index=torch.tensor([i for i, texts in enumerate(captions) for _ in texts], dtype=torch.int64),
        pooled=torch.zeros(len(table), 0),
        keys=table["key"].to_pylist(),
        captions=[caption for texts in captions for caption in texts],
        labels=[values.get(label) for values in metadata],
        languages=[
            code
            for values, texts in zip(metadata, captions, strict=True)
            for code in read_languages(values, language or "", len(texts))
        ]
        if language is not None
        else [],
        present={name: values.tolist() for name, values in has.items()} if not all(map(np.all, has.values())) else {},
    )
