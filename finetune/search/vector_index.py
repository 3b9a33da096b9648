"""VectorIndex: what every index of images can do, whichever backend holds it.

A row is an image: its key, where it lies, its caption, chosen fields, a thumbnail, and its embedding of unit length. In an
index of sounds a row is a sound, and what is said of images holds for sounds. Backends implement the methods that begin with
an underscore. What they are given has been checked here: vectors are finite and of the index's width, keys are texts, fields
have the index's types, and filters name existing fields.

Shapes: n = images, q = queries, D = width of the shared space.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from finetune.search.fields import BUILT_IN, MODALITIES, TEXT_BYTES, Field, Kind, fits, has_kind
from finetune.search.filters import FieldKinds, bind
from pretrain.data.filter_expression import Filter
from pretrain.data.filter_parser import parse_filter
from pretrain.errors import ConfigError, UserError
from pretrain.printable import get_noun

Vectors = NDArray[np.float32]

FORMAT = "clipfuse index 1"
MAX_K = 16384
"""Most results of a query: a limit of Milvus."""
KEY_BYTES = 1024
"""Most bytes of a key."""


class NoIndexError(ConfigError):
    """There is no index at a place."""

    def __init__(self, place: str) -> None:
        super().__init__(f"{place} is no index; `clipfuse index RUN --data SHARDS --db {place}` makes one")


@dataclass
class IndexedItem:
    """A row of an index: an image, or a sound in an index of sounds."""

    key: str
    """Unique in the index."""
    source: str
    """Path of the image's file, or path or url of its shard; "" where it is not known."""
    offset: int
    """Byte of the shard at which the image begins; -1 where the file is the image."""
    size: int
    """Bytes of the image."""
    caption: str = ""
    """Several captions stand on lines of their own."""
    fields: dict[str, Any] = field(default_factory=dict)
    """By name; None where the sample has none."""
    thumbnail: bytes = b""
    """A small JPEG; empty in what `search` returns."""
    vector: Vectors | None = None
    """(D,) of unit length, in what `get` returns."""

    @property
    def caption_line(self) -> str:
        """The captions on one line, as people read them."""
        return self.caption.replace("\n", " / ")


@dataclass(frozen=True)
class Hit:
    """An item that a query found, with the cosine of the two embeddings, or the BM25 score of its caption."""

    item: IndexedItem
    score: float


@dataclass(frozen=True)
class Description:
    """What an index was made with, which is stored in it."""

    dim: int
    """D."""
    model: dict[str, Any]
    """`fingerprint`, `from`, `step`, and what else says which model it is; see indexing.describe_model."""
    fields: tuple[Field, ...] = ()
    modality: str = "image"
    """What the rows are, one of MODALITIES: the tower that made the embeddings."""

    def to_json(self) -> str:
        """Return the description as JSON text."""
        return json.dumps({"format": FORMAT, **asdict(self)})

    @classmethod
    def from_json(cls, text: str, where: str) -> Description:
        """Parse what `to_json` returned. Raises UserError; `where` names the index."""
        try:
            values = json.loads(text)
            fields = tuple(Field(str(item["name"]), item["kind"]) for item in values["fields"])
            parsed = cls(int(values["dim"]), dict(values["model"]), fields, values.get("modality", "image"))
            is_valid = values["format"] == FORMAT and all(item.kind in get_args(Kind) for item in fields)
            is_valid = is_valid and parsed.modality in MODALITIES
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(f"{where} is no index of clipfuse, or its description is damaged: {error}") from error
        if not is_valid:
            raise UserError(f"{where} is not of {FORMAT}: index the samples again with this version")
        return parsed

    @property
    def noun(self) -> str:
        """What messages call a row."""
        return get_noun(self.modality)

    @property
    def kinds(self) -> FieldKinds:
        """The kind of each field that a filter may use."""
        return {**BUILT_IN, **{item.name: item.kind for item in self.fields}}


class VectorIndex(ABC):
    """An index of images. Made by places.create_index and places.open_index; a context manager that closes it."""

    def __init__(self, place: str, description: Description) -> None:
        """place: how messages name the index."""
        self.place, self.description = place, description
        self.token_folder: Path | None = None
        """Where token features for re-ranking are kept, if there are any; None = nowhere. Set by places.py."""
        self.is_new = False
        """Whether this object has made the index. Set by places.py."""

    # -----------------------------------------------------------------------------------------------------------------
    # What users of an index call

    def describe(self) -> Description:
        """Return what the index was made with."""
        return self.description

    def upsert(self, items: Sequence[IndexedItem], vectors: Vectors) -> None:
        """Add images with their embeddings (n, D); those whose key the index has are replaced.

        When it returns, a crash of the process loses nothing of it. Of a key that is there twice, the last one counts.

        Raises:
            UserError: vectors that are not finite, all zero or of another width; fields of other types; texts that are too
                long; or a place that cannot be written.
        """
        vectors = self._check_vectors(vectors, [item.key for item in items])
        for item in items:
            self._check_item(item)
        last = {item.key: i for i, item in enumerate(items)}
        rows = sorted(last.values())
        if rows:
            if self.token_folder is not None and self.token_folder.is_dir():
                from finetune.search import token_store  # imports torch

                token_store.forget(self.token_folder, list(last))
            self._upsert([items[i] for i in rows], vectors[rows])

    def delete(self, keys: Sequence[str] | None = None, filter: str | Filter | None = None) -> int:
        """Remove images by their keys, or all that a filter matches; return how many there were. Raises UserError."""
        if (keys is None) == (filter is None):
            raise UserError("delete needs keys or a filter")
        if filter is not None:
            bound = self._bind(filter)
            assert bound is not None
            return self._delete_matching(bound)
        present = [item.key for item in self.get(list(dict.fromkeys(keys or ()))) if item is not None]
        if present:
            self._delete(present)
        return len(present)

    def search(self, queries: Vectors, k: int, filter: str | Filter | None = None) -> list[list[Hit]]:
        """Return the k most similar images of each query (q, D), best first, without their thumbnails.

        There are fewer than k where the index, or what the filter leaves of it, is smaller.

        Raises:
            UserError: queries that are not finite, all zero or of another width; k out of range; a filter that is none.
        """
        if not 1 <= k <= MAX_K:
            raise ConfigError(f"k={k} must be from 1 to {MAX_K:,}")
        queries = self._check_vectors(queries, [f"query {i}" for i in range(len(queries))])
        return self._search(queries, k, self._bind(filter)) if len(queries) else []

    def search_captions(self, text: str, k: int, filter: str | Filter | None = None) -> list[Hit]:
        """Return the k images whose captions match a text best by BM25, best first, see captions.py.

        Their scores are those of BM25, above 0. Images whose captions hold no word of the text are left out.

        Raises:
            UserError: k out of range; a filter that is none; an index that was made without words of captions.
        """
        if not 1 <= k <= MAX_K:
            raise ConfigError(f"k={k} must be from 1 to {MAX_K:,}")
        return self._search_captions(text, k, self._bind(filter)) if text.strip() else []

    def get(self, keys: Sequence[str]) -> list[IndexedItem | None]:
        """Return the images of these keys, with thumbnails and vectors; None for keys that the index does not have."""
        return self._get(list(keys)) if keys else []

    def count(self, filter: str | Filter | None = None) -> int:
        """Return the number of images, or of those that a filter matches. Raises UserError."""
        return self._count(self._bind(filter))

    def list_values(self, name: str, most: int) -> list[str]:
        """Return the values of a text field, the most frequent first; [] where there are more than `most`.

        Backends on a server look at the first MAX_K images only.
        """
        return self._list_values(name, most)

    def compact(self, least: float = 0.0) -> int:
        """Give back the space of rows that were replaced or removed; return how many they were.

        Nothing is done where their share of all rows is not above `least`. A crash loses nothing. Milvus does so by itself.
        """
        return 0

    @abstractmethod
    def close(self) -> None:
        """Release files, locks and connections."""

    @abstractmethod
    def remove(self) -> None:
        """Close the index and remove it, with what it holds. Raises UserError."""

    def __enter__(self) -> VectorIndex:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -----------------------------------------------------------------------------------------------------------------
    # What a backend implements

    @abstractmethod
    def _upsert(self, items: list[IndexedItem], vectors: Vectors) -> None:
        """As `upsert`; keys are unique."""

    @abstractmethod
    def _delete(self, keys: list[str]) -> None:
        """Remove images, all of which are there."""

    @abstractmethod
    def _delete_matching(self, condition: Filter) -> int:
        """Remove the images for which a condition is true; return how many there were."""

    @abstractmethod
    def _search(self, queries: Vectors, k: int, condition: Filter | None) -> list[list[Hit]]:
        """As `search`."""

    @abstractmethod
    def _search_captions(self, text: str, k: int, condition: Filter | None) -> list[Hit]:
        """As `search_captions`; the text is not blank."""

    @abstractmethod
    def _get(self, keys: list[str]) -> list[IndexedItem | None]:
        """As `get`."""

    @abstractmethod
    def _count(self, condition: Filter | None) -> int:
        """As `count`."""

    @abstractmethod
    def _list_values(self, name: str, most: int) -> list[str]:
        """As `list_values`; the field is there and holds texts."""

    # -----------------------------------------------------------------------------------------------------------------
    # Checks

    def _bind(self, condition: str | Filter | None) -> Filter | None:
        if condition is None:
            return None
        parsed = parse_filter(condition, "--filter") if isinstance(condition, str) else condition
        return bind(parsed, self.description.kinds, "--filter")

    def _check_vectors(self, vectors: Vectors, names: Sequence[str]) -> Vectors:
        """Return the vectors in unit length. Raises UserError, with the name of the first vector that is wrong."""
        array = np.ascontiguousarray(vectors, dtype=np.float32)
        if array.shape != (len(names), self.description.dim):
            raise UserError(
                f"{self.place} holds embeddings of {self.description.dim} numbers; "
                f"{len(names)} of shape {array.shape} do not fit"
            )
        with np.errstate(over="ignore", invalid="ignore"):
            norms = np.linalg.norm(array.astype(np.float64), axis=1, keepdims=True)
        wrong = ~(np.isfinite(norms) & (norms > 0))[:, 0]
        if wrong.any():
            problem = "is all zero" if norms[wrong.argmax(), 0] == 0 else "is not finite"
            raise UserError(f"the embedding of {names[int(wrong.argmax())]} {problem}")
        return np.asarray(array / norms, dtype=np.float32)

    def _check_item(self, item: IndexedItem) -> None:
        """Raise UserError for an image that a backend could not hold."""
        if not is_key(item.key):
            raise UserError(f"the key {item.key[:60]!r} must have 1 to {KEY_BYTES:,} bytes of UTF-8")
        texts = {"key": item.key, "source": item.source, "caption": item.caption}
        kinds = self.description.kinds
        for name, value in {**texts, **item.fields}.items():
            if name not in kinds:
                raise UserError(f"{self.place} has no field {name!r}, which {item.key} has")
            if value is not None and not has_kind(value, kinds[name]):
                raise UserError(f"{name}={value!r:.60} of {item.key} is no {kinds[name]}")
            if isinstance(value, str) and not fits(value):
                raise UserError(f"{name} of {item.key} is longer than {TEXT_BYTES:,} bytes, or holds a lone surrogate")


def is_key(text: str) -> bool:
    """Return whether a text can be a key."""
    return fits(text) and 0 < len(text.encode()) <= KEY_BYTES
