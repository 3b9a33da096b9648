"""Embeddings of a whole collection: any number of shards, processes and interruptions, each sample exactly once.

    _manifest.json             whose embeddings, of which data, in which files; complete or not
    00000-train-0000.parquet   of one shard, of a part of a large one, or of several small ones: see parquet.py

The samples are cut into parts once, when the collection is begun; a part is a file. Processes take parts from a common
counter, so that a slow one holds up nobody, and write each under a hidden name until it is whole. What a kill leaves behind
is whole files: the same command does the rest, on any number of processes. A batch never crosses a part, so that a file is
the same whoever wrote it and when.

embed_files.py does the work; here is what a collection is: its parts, its manifest, its folder.
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

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pretrain.checkpoints.loading import LoadedModel
from pretrain.embedding import parquet
from pretrain.embedding.split import EmbeddedSplit
from pretrain.errors import UserError
from pretrain.runtime.files import write_json

FORMAT = "clipfuse embeddings 1"
MANIFEST = "_manifest.json"
"""Readers of Parquet folders pass over names that begin with an underscore."""


@dataclass(frozen=True)
class WorkUnit:
    """The samples of one file."""

    file: str
    ranges: tuple[tuple[int, int, int], ...]
    """(shard, first sample, end) each."""

    @property
    def samples(self) -> int:
        """How many."""
        return sum(end - first for _, first, end in self.ranges)


def build_work_units(names: list[str], numbers: list[int], most: int) -> list[WorkUnit]:
    """Shards and their counts -> parts of at most `most` samples: small shards together, large ones in equal pieces."""
    ranges: list[list[tuple[int, int, int]]] = []
    room = 0
    for shard, count in enumerate(numbers):
        pieces = -(-count // most)
        for i in range(pieces):
            piece = (shard, count * i // pieces, count * (i + 1) // pieces)
            if pieces == 1 and count <= room:
                ranges[-1].append(piece)
                room -= count
            else:
                ranges.append([piece])
                room = most - count if pieces == 1 else 0
    stems = [re.sub(r"[^\w.-]", "_", names[each[0][0]].removesuffix(".tar"))[:80] for each in ranges]
    return [WorkUnit(f"{i:05d}-{stem}.parquet", tuple(each)) for i, (each, stem) in enumerate(zip(ranges, stems, strict=True))]


# ---------------------------------------------------------------------------------------------------------------------
# Whose embeddings, of what


def fingerprint_model(loaded: LoadedModel) -> str:
    """A name for all that an embedding depends on: weights, architecture, preprocessing, tokenizer."""
    said = hashlib.sha256()
    for name, tensor in sorted([*loaded.model.state_dict().items(), *loaded.model.named_buffers()]):
        flat = tensor.detach().cpu().contiguous().view(-1)
        said.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        said.update(flat.view(torch.uint8).numpy())
    incidental = {"tokenizer", "name", "pretrained", "trainable_blocks", "checkpointing", "patch_dropout", "groups"}
    for modality in loaded.model.towers:
        config = getattr(loaded.config, modality, None) or loaded.config.others.get(modality)
        plain = {k: v for k, v in asdict(config).items() if k not in incidental} if config is not None else {}
        said.update(json.dumps([modality, plain], sort_keys=True, default=str).encode())
    if "text" in loaded.decoders:
        ids, mask = loaded.decoders["text"].encode(["", "A red cup, left of 12 boxes; naïve Ωμέγα 猫 🐈.", "word " * 1000])
        said.update(json.dumps([ids.tolist(), mask.tolist()]).encode())
    return said.hexdigest()[:32]


def fingerprint_json(value: Any) -> str:
    """A name for plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _differs(old: dict[str, Any], new: dict[str, Any], out: Path) -> str | None:
    """Why a collection cannot be gone on with, in words."""
    if old.get("format") != FORMAT:
        return f"{out}/{MANIFEST} is not of {FORMAT}; choose another --out"
    if old["model"]["fingerprint"] != new["model"]["fingerprint"]:
        whose = [f"{m['from']} (step {m['step']}, {m['fingerprint'][:8]})" for m in (old["model"], new["model"])]
        return f"{out} holds embeddings of another model, {whose[0]}; this one is {whose[1]}: give it its own --out"
    if old["data"]["fingerprint"] != new["data"]["fingerprint"]:
        sizes = [f"{d['samples']:,} samples in {d['shards']:,} shards" for d in (old["data"], new["data"])]
        return f"{out} holds embeddings of other data, {sizes[0]}; these are {sizes[1]}: give them their own --out"
    for key, was in old["settings"].items():
        if was != new["settings"].get(key):
            now = new["settings"].get(key) or "its default"
            return f"{out} was begun with {key} {was or 'left at its default'}, now it is {now}; choose another --out"
    return None


@dataclass
class EmbeddingPlan:
    """What is to be done."""

    parts: list[WorkUnit]
    todo: list[int]
    """Parts without a file."""
    there: int
    """Samples of the others."""


class EmbeddingFolder:
    """The collection's folder, locked by one command at a time. Rank 0 only."""

    def __init__(self, out: Path) -> None:
        self.path = out
        self._lock: IO[str] | None = None

    def open(self, new: dict[str, Any], names: list[str], numbers: list[int]) -> EmbeddingPlan:
        """Takes the lock, compares or writes the manifest, clears what a kill left half written. Raises UserError."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a+")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.path} is being written by another clipfuse embed; choose another --out") from None
        except OSError as error:
            raise UserError(f"cannot write into {self.path}: {error.strerror or error}; choose another --out") from error
        others = [path.name for path in self.path.iterdir() if not path.name.startswith(".")]
        if MANIFEST in others:
            old = read_manifest(self.path)
            if problem := _differs(old, new, self.path):
                raise UserError(problem)
            new["per_file"] = old["per_file"]
        elif others:
            raise UserError(f"{self.path} exists and holds other files ({others[0]}); choose another --out")
        plan = EmbeddingPlan(build_work_units(names, numbers, new["per_file"]), [], 0)
        new["files"] = [
            {"file": part.file, "samples": [[names[shard], first, end] for shard, first, end in part.ranges]}
            for part in plan.parts
        ]
        for left in self.path.glob(".*.partial"):
            left.unlink()
        for i, footer in enumerate(self.footers(plan.parts)):
            if footer is None:
                plan.todo.append(i)
                continue
            if footer["model"] != new["model"]["fingerprint"]:
                raise UserError(f"{self.path / plan.parts[i].file} holds embeddings of another model; choose another --out")
            plan.there += plan.parts[i].samples
        if plan.todo:
            write_json(self.path / MANIFEST, new)
        return plan

    def footers(self, parts: list[WorkUnit]) -> list[dict[str, Any] | None]:
        """What the files say of themselves; None for those that are not there, or not whole."""
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(parquet.read_footer, [self.path / part.file for part in parts]))

    def seal(self, new: dict[str, Any], parts: list[WorkUnit]) -> tuple[int, Counter[str]]:
        """Rows and left-out samples of all files, written into the manifest as complete. Raises UserError."""
        found = [footer for footer in self.footers(parts) if footer is not None]
        if len(found) < len(parts):
            missing = len(parts) - len(found)
            raise UserError(f"{missing} of {len(parts)} files in {self.path} are missing; the same command writes them")
        rows, bad = sum(footer["rows"] for footer in found), sum((Counter(footer["bad"]) for footer in found), Counter())
        for entry, footer in zip(new["files"], found, strict=True):
            entry["rows"] = footer["rows"]
        write_json(self.path / MANIFEST, {**new, "complete": True, "rows": rows, "left_out": dict(bad)})
        return rows, bad

    def close(self) -> None:
        """Gives the lock back."""
        if self._lock is not None:
            self._lock.close()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a collection. Raises UserError."""
    try:
        found: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / MANIFEST} cannot be read: {error}") from error
    return found


def is_embedding_folder(where: Any) -> bool:
    """Whether this names a folder of embeddings rather than shards."""
    return isinstance(where, str | Path) and (Path(where) / MANIFEST).is_file()


def load(folder: str | Path, loaded: LoadedModel | None = None, label: str = "label") -> EmbeddedSplit:
    """A complete collection of pictures and captions in memory, its rows in the order of the shards.

    Args:
        loaded: refuses the embeddings of any other model.
        label: field of the json with a sample's class.

    Raises:
        UserError: it is not complete, has no pictures, or is another model's.
    """
    path = Path(folder)
    manifest = read_manifest(path)
    if manifest.get("format") != FORMAT or not manifest["complete"]:
        raise UserError(f"{path} is not a complete collection; the clipfuse embed that began it goes on with it")
    if loaded is not None and fingerprint_model(loaded) != manifest["model"]["fingerprint"]:
        raise UserError(
            f"{path} holds embeddings of {manifest['model']['from']} (step {manifest['model']['step']}), "
            f"not of {loaded.folder} (step {loaded.step})"
        )
    tables = [pq.read_table(path / entry["file"]) for entry in manifest["files"]]
    if not tables or "image" not in tables[0].column_names:
        raise UserError(f"{path} holds no embeddings of pictures")
    table = pa.concat_tables(tables)
    image = torch.from_numpy(parquet.to_numpy(table["image"])).float()
    own: list[list[str]] = [[]] * len(table)
    text = torch.zeros(0, image.shape[1])
    if "text" in table.column_names:
        several = "captions" in table.column_names
        own = table["captions"].to_pylist() if several else [[caption] for caption in table["caption"].to_pylist()]
        vectors = table["text"].combine_chunks()
        text = torch.from_numpy(parquet.to_numpy(vectors.flatten() if several else vectors)).float()
    notes = [json.loads(each) if each else {} for each in table["json"].to_pylist()]
    return EmbeddedSplit(
        image=image,
        text=text,
        image_index=torch.tensor([i for i, captions in enumerate(own) for _ in captions], dtype=torch.int64),
        pooled=torch.zeros(len(image), 0),
        keys=table["key"].to_pylist(),
        captions=[caption for captions in own for caption in captions],
        labels=[note.get(label) for note in notes],
    )
