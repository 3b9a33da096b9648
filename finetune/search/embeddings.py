"""What `clipfuse embed` wrote, into an index: nothing is encoded again.

    index_embeddings(load_model("runs/first"), Path("embeddings"), open_sources(["shards"], "--images"), "catalog", options)

The files hold neither images nor sounds. `--images` names the shards that were embedded, for thumbnails and re-ranking.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from finetune.search.fields import MODALITIES, read_fields
from finetune.search.indexing import Summary, join_captions, select_missing
from finetune.search.item_sources import ItemSource, Location
from finetune.search.modalities import OWN_FIELDS, find_content, preview, select_named
from finetune.search.opening import IndexOptions, open_for
from finetune.search.vector_index import IndexedItem
from pretrain.checkpoints.loading import LoadedModel
from pretrain.data import BadSample
from pretrain.embedding import dataset
from pretrain.embedding.parquet import to_numpy
from pretrain.errors import UserError
from pretrain.runtime.files import parse_json_object

_UNKNOWN = Location("", -1, 0)


def index_embeddings(
    loaded: LoadedModel,
    folder: Path,
    items: ItemSource | None,
    place: str,
    options: IndexOptions,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Summary:
    """Add the embeddings of a folder that an index lacks.

    Args:
        loaded: the model that made them.
        folder: what `clipfuse embed` wrote, complete.
        items: the shards that were embedded; None = the index does not know where its items lie.
        place: of the index; made where there is none.
        options: see IndexOptions.
        progress: called with images done and images in all.

    Raises:
        UserError: the folder is incomplete, damaged, or of another model; and what index_items raises.
    """
    begin, added, done, lacking = time.perf_counter(), 0, 0, 0
    unfit: Counter[str] = Counter()
    prefix = f"{options.name}/" if options.name else ""
    manifest = dataset.read_manifest(folder)
    if manifest.get("format") != dataset.FORMAT or not manifest["complete"]:
        raise UserError(f"{folder} is not complete; the clipfuse embed command that began it finishes it")
    numbers = {items.locate(i)[0]: i for i in range(len(items))} if items is not None else {}
    with open_for(place, loaded, options) as index:
        if manifest["model"]["fingerprint"] != index.describe().model["fingerprint"]:
            raise UserError(f"{folder} holds embeddings of {manifest['model']['from']}, not of {loaded.folder}")
        description = index.describe()
        named = select_named(description.fields, description.modality)
        unknown = {item.name: None for item in OWN_FIELDS[description.modality]}
        for table in _read_tables(folder, manifest, options.batch_size, description.modality):
            size, table = len(table), table.filter(table[description.modality].is_valid())
            lacking += size - len(table)
            located = []
            keys = table["key"].to_pylist()
            for i, key in enumerate(keys):
                location = items.locate(numbers[key])[1] if items is not None and key in numbers else _UNKNOWN
                located.append((i, prefix + key, location))
            missing = select_missing(index, located, options.replace)
            rows = []
            for i, key, location in missing:
                encoded = table["json"][i].as_py()
                values, names = read_fields(named, parse_json_object(encoded.encode()) if encoded else {})
                row = IndexedItem(key, *location, caption=join_captions(_read_captions(table, i)), fields=values | unknown)
                if items is not None and keys[i] in numbers:
                    row.thumbnail, own = _preview(items, numbers[keys[i]], description.modality)
                    row.fields |= own
                rows.append(row)
                unfit.update(names)
            if rows:
                vectors = to_numpy(table[description.modality])[[i for i, _, _ in missing], : description.dim]
                index.upsert(rows, vectors.astype("float32"))
            added, done = added + len(rows), done + size
            progress(done, manifest["data"]["samples"])
        seconds = round(time.perf_counter() - begin, 3)
        total = index.count()
        if not total:
            raise UserError(f"{folder} holds no {description.modality} embeddings")
        left_out = {f"no {description.noun}": lacking} if lacking else {}
        return Summary(index.place, total, added, left_out, dict(unfit), description.dim, seconds, description.modality)


def find_only_modality(folder: Path) -> str:
    """Return what a folder alone holds embeddings of (`embed --only`), where an index can hold it; "" otherwise."""
    only = str(dataset.read_manifest(folder).get("settings", {}).get("only", ""))
    return only if only in MODALITIES else ""


def _read_tables(folder: Path, manifest: dict[str, Any], size: int, modality: str) -> Iterator[pa.Table]:
    """Yield tables of at most `size` rows. Raises UserError."""
    for entry in manifest["files"]:
        try:
            with pq.ParquetFile(folder / entry["file"]) as file:
                if modality not in file.schema_arrow.names:
                    raise UserError(f"{folder} holds no {modality} embeddings")
                columns = [name for name in ("key", modality, "caption", "captions", "json") if name in file.schema_arrow.names]
                for batch in file.iter_batches(size, columns=columns):
                    yield pa.Table.from_batches([batch])
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{folder / entry['file']} cannot be read: {error}") from error


def _read_captions(table: pa.Table, i: int) -> list[str]:
    if "captions" in table.column_names:
        return list(table["captions"][i].as_py() or [])
    caption = table["caption"][i].as_py() if "caption" in table.column_names else None
    return [] if caption is None else [caption]


def _preview(items: ItemSource, number: int, modality: str) -> tuple[bytes, dict[str, Any]]:
    """Return a small JPEG and values of OWN_FIELDS; none where the image or sound cannot be decoded.

    Raises UserError where its shard cannot be read.
    """
    try:
        content = find_content(items.read(number), modality)
        return (b"", {}) if content is None else preview(content, modality)
    except BadSample:
        return b"", {}
