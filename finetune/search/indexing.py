"""Images or sounds into an index: encode what it lacks, with captions, fields, thumbnails and where each lies.

    index_items(load_model("runs/first"), open_sources(["shards"], "--data"), "catalog", IndexOptions(), device) -> Summary

Images whose key and location the index has are not encoded again, so that the same command goes on after it was stopped or
killed, and adds only what is new. What is said of images holds for sounds.

Legend: b = images of a batch, D = width of the shared space.
"""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from finetune.search.fields import TEXT_BYTES, fits, read_fields
from finetune.search.item_sources import ItemSource, Location
from finetune.search.modalities import find_content, preview, select_named
from finetune.search.opening import IndexOptions, open_for
from finetune.search.vector_index import Description, IndexedItem, VectorIndex, Vectors, is_key
from pretrain.checkpoints.loading import LoadedModel
from pretrain.data import BadSample
from pretrain.data.captions import TXT, read_captions
from pretrain.data.sample_json import read_fields as read_json_fields
from pretrain.embedding.encoder import eval_mode
from pretrain.errors import UserError
from pretrain.printable import format_count, get_noun

_AHEAD = 3
"""Batches that are read and decoded while one is encoded."""


@dataclass
class Summary:
    """What the command did, and what the index holds now."""

    place: str
    images: int
    """Images in the index."""
    added: int
    """Images that this command encoded."""
    left_out: dict[str, int]
    """Images that could not be used, by reason."""
    unfit: dict[str, int]
    """Values of fields that were of another kind, by field: null in the index."""
    dim: int
    seconds: float
    modality: str = "image"

    def __str__(self) -> str:
        noun = get_noun(self.modality)
        line = f"{self.place}: {format_count(self.images, noun)} of {self.dim} numbers each; {self.added:,} added"
        line += f" in {self.seconds:,.1f} s, {self.added / self.seconds:,.1f} {noun}s/s" if self.added else "; nothing to do"
        if self.left_out:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in Counter(self.left_out).most_common(5))
            line += f"; {sum(self.left_out.values()):,} left out ({reasons})"
        if self.unfit:
            line += "; null because of their kind: " + ", ".join(f"{count:,} of {name}" for name, count in self.unfit.items())
        return line


@dataclass
class _Batch:
    """Images that are read and decoded."""

    rows: list[IndexedItem] = field(default_factory=list)
    inputs: list[torch.Tensor] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    unfit: Counter[str] = field(default_factory=Counter)


def index_items(
    loaded: LoadedModel,
    source: ItemSource,
    place: str,
    options: IndexOptions,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Summary:
    """Encode the images that an index lacks, and add them.

    Args:
        loaded: the model, which is moved to the device.
        source: the images.
        place: of the index; made where there is none.
        options: see IndexOptions.
        device: where the tower runs.
        progress: called with images done and images in all.

    Raises:
        UserError: the index has another model or other fields; a key is there from another source; a place cannot be written;
            or no image can be used.
    """
    caption = options.caption or (loaded.decoders["text"].caption if "text" in loaded.decoders else TXT)
    begin, added, done = time.perf_counter(), 0, 0
    left_out: Counter[str] = Counter()
    unfit: Counter[str] = Counter()
    loaded.model.to(device)
    with open_for(place, loaded, options) as index, eval_mode(loaded.model):
        description = index.describe()
        reader = _Reader(source, loaded.decoders[description.modality], description, caption)
        batches = reader.stream(_find_missing(source, index, options))
        for size, batch in batches:
            if batch is not None:
                if batch.rows:
                    index.upsert(batch.rows, _encode(loaded, description.modality, batch.inputs, device)[:, : description.dim])
                added += len(batch.rows)
                left_out += batch.left_out
                unfit += batch.unfit
            done += size
            progress(done, len(source))
        seconds = round(time.perf_counter() - begin, 3)
        total = index.count()
        if not total:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in left_out.most_common(5))
            samples = format_count(len(source), "sample")
            raise UserError(f"of {samples} none has a usable {description.noun} ({reasons}), so nothing was written")
        return Summary(index.place, total, added, dict(left_out), dict(unfit), description.dim, seconds, description.modality)


@torch.inference_mode()
def _encode(loaded: LoadedModel, modality: str, inputs: Sequence[torch.Tensor], device: torch.device) -> Vectors:
    """Encode b images (3, H, W) uint8, or sounds (S,) int16, to (b, D) of unit length."""
    features = loaded.model.encode(modality, torch.stack(list(inputs)).to(device))
    return np.asarray(F.normalize(features.float(), dim=-1).cpu().numpy())


Missing = list[tuple[int, str, Location]]
"""Number in the source, key and location of each image of a batch that is to be encoded."""


def _find_missing(source: ItemSource, index: VectorIndex, options: IndexOptions) -> Iterator[tuple[int, Missing]]:
    """Yield, batch by batch, the number of images and those of them that the index lacks. Raises UserError."""
    prefix = f"{options.name}/" if options.name else ""
    for begin in range(0, len(source), options.batch_size):
        numbers = range(begin, min(begin + options.batch_size, len(source)))
        located = [(i, prefix + key, location) for i in numbers for key, location in [source.locate(i)]]
        yield len(numbers), select_missing(index, located, options.replace)


def select_missing(index: VectorIndex, located: Missing, replace: bool) -> Missing:
    """Return the images that an index lacks, or has from another place of the same source; with `replace` all.

    Raises UserError where the index has a key from another source.
    """
    if replace:
        return located
    present = index.get([key for _, key, _ in located if is_key(key)])
    by_key = {item.key: item for item in present if item is not None}
    missing: Missing = []
    for i, key, location in located:
        item = by_key.get(key)
        if item is not None and item.source and location.source and item.source != location.source:
            raise UserError(
                f"{index.place} has {key} from {item.source} already, not from {location.source}: --name NAME adds "
                f"these {index.describe().noun}s beside those, --replace replaces them"
            )
        if item is None or (location.source and (item.source, item.offset, item.size) != tuple(location)):
            missing.append((i, key, location))
    return missing


class _Reader:
    """Reads and decodes batches in threads, some ahead of the one that is encoded: decoders release Python's lock."""

    def __init__(self, source: ItemSource, decoder: Any, description: Description, caption: str) -> None:
        self.source, self.decoder, self.description, self.caption = source, decoder, description, caption
        self._threads = max(2, min(16, len(os.sched_getaffinity(0))))

    def stream(self, batches: Iterator[tuple[int, Missing]]) -> Iterator[tuple[int, _Batch | None]]:
        """Yield the batches in order; None for those without missing images. Raises UserError."""
        waiting: deque[tuple[int, Future[_Batch] | None]] = deque()
        with ThreadPoolExecutor(1) as reading, ThreadPoolExecutor(self._threads) as self._decoding:
            try:
                for size, missing in batches:
                    waiting.append((size, reading.submit(self._read, missing) if missing else None))
                    if len(waiting) > _AHEAD:
                        size, batch = waiting.popleft()
                        yield size, batch.result() if batch is not None else None
                for size, batch in waiting:
                    yield size, batch.result() if batch is not None else None
            finally:
                reading.shutdown(cancel_futures=True)

    def _read(self, missing: Missing) -> _Batch:
        """Read one after the other, which shards need, and decode in parallel."""
        batch = _Batch()
        decoded = []
        for i, key, location in missing:
            try:
                if not is_key(key) or not fits(location.source):
                    raise BadSample("name too long, or not UTF-8")
                decoded.append(self._decoding.submit(self._decode, self.source.read(i), key, location))
            except BadSample as bad:
                batch.left_out[bad.reason] += 1
        for future in decoded:
            try:
                row, item, unfit = future.result()
            except BadSample as bad:
                batch.left_out[bad.reason] += 1
                continue
            batch.rows.append(row)
            batch.inputs.append(item)
            batch.unfit.update(unfit)
        return batch

    def _decode(self, members: dict[str, bytes], key: str, location: Location) -> tuple[IndexedItem, torch.Tensor, list[str]]:
        modality = self.description.modality
        content = find_content(members, modality)
        if content is None:
            raise BadSample(f"no {self.description.noun}")
        item = self.decoder.decode_eval(content)
        row, unfit = build_row(key, location, members, self.description, self.caption)
        row.thumbnail, values = preview(content, modality)
        row.fields |= values
        return row, item, unfit


def build_row(
    key: str, location: Location, members: dict[str, bytes], description: Description, caption: str
) -> tuple[IndexedItem, list[str]]:
    """Return the row of an image, without thumbnail and OWN_FIELDS, and the names of fields with values of another kind.

    An image without a caption, or without a readable json, has none in the index.
    """
    try:
        captions = read_captions(members, caption)
    except BadSample:
        captions = []
    try:
        values = read_json_fields(members)
    except BadSample:
        values = {}
    kept, unfit = read_fields(select_named(description.fields, description.modality), values)
    return IndexedItem(key, *location, caption=join_captions(captions), fields=kept), unfit


def join_captions(captions: Sequence[str]) -> str:
    """Return captions on lines of their own, as many bytes of them as an index can hold."""
    return "\n".join(captions).encode("utf-8", "replace")[:TEXT_BYTES].decode("utf-8", "ignore")
