"""The space of images that were replaced or removed, given back: in an index, and in the token features beside it."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.search import places
from finetune.search.token_store import TokenStore, is_store

WASTEFUL = 0.5
"""Share of all rows above which indexing compacts by itself."""


@dataclass
class Freed:
    """Rows whose space was given back."""

    images: int
    tokens: int
    """Rows of token features."""

    def __str__(self) -> str:
        return (
            f"compacted: {self.images:,} rows of embeddings and {self.tokens:,} of token features that were replaced or removed"
        )


def compact(place: str, backend: str | None, least: float) -> Freed:
    """Compact an index and its token features, each where the share of dead rows is above `least`. Raises UserError."""
    freed = Freed(0, 0)
    if places.choose_backend(place, backend) == "exact":  # Milvus compacts by itself
        with places.open_index(place, backend, is_writable=True) as index:
            freed.images = index.compact(least)
    folder = places.find_token_folder(place)
    if folder is not None and is_store(folder):
        with TokenStore(folder) as store:
            freed.tokens = store.compact(least)
    return freed
