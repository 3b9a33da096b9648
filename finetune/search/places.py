"""From the name of a place to its index: a folder, a folder of Milvus Lite (NAME.db), or the address of a Milvus server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from finetune.search.backends import exact, milvus
from finetune.search.backends.exact import ExactIndex
from finetune.search.backends.milvus import MilvusIndex
from finetune.search.vector_index import Description, VectorIndex
from pretrain.errors import UserError

Backend = Literal["exact", "milvus"]


def choose_backend(place: str, backend: str | None = None) -> str:
    """Return the backend of a place: of an index that is there its own, else what is asked for, else what the name says."""
    if not milvus.is_server(place) and exact.is_exact(Path(place)):
        return "exact"
    return backend or ("milvus" if milvus.is_server(place) or place.endswith(".db") else "exact")


def create_index(place: str, description: Description, backend: str | None = None) -> VectorIndex:
    """Make an empty index and open it for writing. Raises UserError."""
    is_exact = choose_backend(place, backend) == "exact"
    index: VectorIndex = ExactIndex.create(place, description) if is_exact else MilvusIndex.create(place, description)
    index.token_folder, index.is_new = find_token_folder(place), True
    return index


def open_index(place: str, backend: str | None = None, is_writable: bool = False) -> VectorIndex:
    """Open an index.

    Raises NoIndexError where there is none, and UserError where it is damaged or its server does not answer.
    """
    is_exact = choose_backend(place, backend) == "exact"
    index: VectorIndex = ExactIndex(place, is_writable) if is_exact else MilvusIndex(place)
    index.token_folder = find_token_folder(place)
    return index


def check_not_empty(index: VectorIndex) -> None:
    """Raise UserError where an index holds nothing to search."""
    if not index.count():
        noun = index.describe().noun
        raise UserError(f"{index.place} is empty: `clipfuse index RUN --data SHARDS --db {index.place}` adds {noun}s")


def find_token_folder(place: str) -> Path | None:
    """Return the folder of the token features of an index, see token_store.py; None for an index on a server."""
    if milvus.is_server(place):
        return None
    path = Path(os.path.abspath(place))
    return path.with_name(path.name + ".tokens")
