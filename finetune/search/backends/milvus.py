"""The backend `milvus`: Milvus Lite in a folder NAME.db of its own, or a Milvus server or cluster by its address.

    catalog.db                               Milvus Lite, which one process at a time may open
    http://localhost:19530/catalog           a server and the name of a collection there; https:// likewise
    https://user:password@host/catalog       or its token in the environment variable MILVUS_TOKEN

An image is an entity with its key as the primary key. Thumbnails are base64, because Milvus has no type for bytes. The
description is a property of the collection, because Milvus Lite drops the collection's own description. Only MilvusClient is
used: the older interface of pymilvus is to go. Words of captions are searched by Milvus's own BM25.

Milvus Lite compares every vector (FLAT); servers choose their index (AUTOINDEX).
"""

from __future__ import annotations

import base64
import fcntl
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np

from finetune.search import captions
from finetune.search.fields import TEXT_BYTES, Kind
from finetune.search.filters import to_milvus
from finetune.search.vector_index import (
    KEY_BYTES,
    MAX_K,
    Description,
    Hit,
    IndexedItem,
    NoIndexError,
    VectorIndex,
    Vectors,
)
from pretrain.data.filter_expression import Filter
from pretrain.errors import ConfigError, UserError
from pretrain.printable import hide_secrets

COLLECTION = "images"
"""The collection in a folder, and on a server whose address names none."""
PROPERTY = "clipfuse"
"""The property of the collection that holds the description."""
TOKEN_VARIABLE = "MILVUS_TOKEN"
WORDS = "caption_words"
"""The column that Milvus fills with the words of the captions, for BM25."""
_BATCH = 500
"""Entities of a request, at most: below the 64 MB that a server accepts."""
_SECONDS = 10.0
"""Time in which a server must answer the first request."""
_TYPES: dict[Kind, str] = {"float": "DOUBLE", "int": "INT64", "bool": "BOOL", "str": "VARCHAR"}


def is_server(place: str) -> bool:
    """Return whether a place is the address of a server."""
    return place.startswith(("http://", "https://"))


class MilvusIndex(VectorIndex):
    """A collection of Milvus."""

    def __init__(self, place: str) -> None:
        """Open the index at `place`. Raises UserError: it is not there, another process holds it, or no server answers."""
        self._open(place)
        try:
            with self._errors():
                if not self._client.has_collection(self._collection):
                    raise NoIndexError(self._name)
                collection = self._client.describe_collection(self._collection)
            properties = collection.get("properties") or {}
            self._has_words = any(column["name"] == WORDS for column in collection["fields"])
            super().__init__(self._name, Description.from_json(properties.get(PROPERTY, "null"), self._name))
            self._columns = _name_columns(self.description)
            with self._errors():
                self._client.load_collection(self._collection)
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, place: str, description: Description) -> MilvusIndex:
        """Make an empty index and open it. Raises UserError, also where there is an index already."""
        index = cls.__new__(cls)
        index._open(place, is_new=True)
        try:
            with index._errors():
                if index._client.has_collection(index._collection):
                    raise UserError(f"{index._name} exists already")
                index._create_collection(description)
        finally:
            index.close()
        return cls(place)

    def _open(self, place: str, is_new: bool = False) -> None:
        self._name = hide_secrets(place)
        self._collection = COLLECTION
        options: dict[str, Any] = {"uri": place}
        if is_server(place):
            options = _parse_address(place)
            self._collection = options.pop("collection")
        else:
            _check_folder(Path(place), is_new)
        try:
            from pymilvus import MilvusClient

            if not is_server(place):
                import milvus_lite  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"{self._name} needs {error.name}: `pip install 'clipfuse[search]'`, or give a name without .db for an index "
                "without Milvus"
            ) from error
        logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it logs each error that it raises, with a traceback
        with self._errors():
            self._client = MilvusClient(**options)

    def close(self) -> None:
        client = getattr(self, "_client", None)
        if client is not None:
            client.close()
            del self._client
            _release_folder(self._name)

    def remove(self) -> None:
        with self._errors():
            self._client.drop_collection(self._collection)
            others = self._client.list_collections()
        self.close()
        if not is_server(self._name) and not others:
            try:
                shutil.rmtree(self._name)
            except OSError as error:
                raise UserError(f"cannot remove {self._name}: {error.strerror or error}") from error

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Raise the errors of Milvus as UserError."""
        from pymilvus.exceptions import MilvusException

        try:
            yield
        except MilvusException as error:
            message = " ".join(str(error.message).split())
            raise UserError(f"{self._name}: Milvus says: {message[:500]}") from error

    def _create_collection(self, description: Description) -> None:
        from pymilvus import DataType, Function, FunctionType

        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("key", DataType.VARCHAR, is_primary=True, max_length=KEY_BYTES)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=description.dim)
        for name in ("source", "caption", "thumbnail"):
            schema.add_field(name, DataType.VARCHAR, max_length=TEXT_BYTES, enable_analyzer=name == "caption")
        schema.add_field(WORDS, DataType.SPARSE_FLOAT_VECTOR)
        schema.add_function(Function("bm25", FunctionType.BM25, input_field_names=["caption"], output_field_names=[WORDS]))
        for name in ("offset", "size"):
            schema.add_field(name, DataType.INT64)
        columns = _name_columns(description)
        for item in description.fields:
            limit = {"max_length": TEXT_BYTES} if item.kind == "str" else {}
            schema.add_field(columns[item.name], getattr(DataType, _TYPES[item.kind]), nullable=True, **limit)
        parameters = self._client.prepare_index_params()
        kind = "AUTOINDEX" if is_server(self._name) else "FLAT"
        parameters.add_index("vector", index_type=kind, metric_type="COSINE")
        bm25 = {"bm25_k1": captions.K1, "bm25_b": captions.B}
        parameters.add_index(WORDS, index_type="SPARSE_INVERTED_INDEX", metric_type="BM25", params=bm25)
        self._client.create_collection(
            self._collection,
            schema=schema,
            index_params=parameters,
            properties={PROPERTY: description.to_json()},
            consistency_level="Strong",
        )

    # -----------------------------------------------------------------------------------------------------------------
    # The contract

    def _upsert(self, items: list[IndexedItem], vectors: Vectors) -> None:
        entities = []
        for item, vector in zip(items, vectors, strict=True):
            entity = {
                "key": item.key,
                "vector": vector,
                "source": item.source,
                "caption": item.caption,
                "thumbnail": base64.b64encode(item.thumbnail).decode(),
                "offset": item.offset,
                "size": item.size,
            }
            entity |= {self._columns[entry.name]: item.fields.get(entry.name) for entry in self.description.fields}
            entities.append(entity)
        with self._errors():
            for begin in range(0, len(entities), _BATCH):
                self._client.upsert(self._collection, entities[begin : begin + _BATCH])

    def _delete(self, keys: list[str]) -> None:
        with self._errors():
            for begin in range(0, len(keys), _BATCH):
                self._client.delete(self._collection, ids=keys[begin : begin + _BATCH])

    def _delete_matching(self, condition: Filter) -> int:
        count = self._count(condition)
        if count:
            with self._errors():
                self._client.delete(self._collection, filter=to_milvus(condition, self._columns))
        return count

    def _search(self, queries: Vectors, k: int, condition: Filter | None) -> list[list[Hit]]:
        with self._errors():
            results = self._client.search(
                self._collection,
                data=list(queries),
                anns_field="vector",
                limit=k,
                filter=to_milvus(condition, self._columns) if condition is not None else "",
                output_fields=self._output(),
            )
        return [
            [Hit(self._to_item(hit["entity"] | {"key": hit["key"]}), float(hit["distance"])) for hit in hits]
            for hits in results
        ]

    def _search_captions(self, text: str, k: int, condition: Filter | None) -> list[Hit]:
        if not self._has_words:
            raise UserError(f"{self._name} was made by a version without --hybrid: index the samples again into another --db")
        with self._errors():
            hits = self._client.search(
                self._collection,
                data=[text],
                anns_field=WORDS,
                limit=k,
                filter=to_milvus(condition, self._columns) if condition is not None else "",
                output_fields=self._output(),
                search_params={"metric_type": "BM25"},
            )[0]
        # Milvus Lite gives scores below 0, and servers above it.
        return [Hit(self._to_item(hit["entity"] | {"key": hit["key"]}), abs(float(hit["distance"]))) for hit in hits]

    def _get(self, keys: list[str]) -> list[IndexedItem | None]:
        found: dict[str, IndexedItem] = {}
        with self._errors():
            for begin in range(0, len(keys), _BATCH):
                ids, columns = keys[begin : begin + _BATCH], [*self._output(), "thumbnail", "vector"]
                for entity in self._client.get(self._collection, ids=ids, output_fields=columns):
                    found[entity["key"]] = self._to_item(entity)
        return [found.get(key) for key in keys]

    def _count(self, condition: Filter | None) -> int:
        expression = to_milvus(condition, self._columns) if condition is not None else ""
        with self._errors():
            return int(self._client.query(self._collection, filter=expression, output_fields=["count(*)"])[0]["count(*)"])

    def _list_values(self, name: str, most: int) -> list[str]:
        column = self._columns[name]
        with self._errors():
            rows = self._client.query(self._collection, filter="", output_fields=[column], limit=MAX_K)
        counts = Counter(row[column] for row in rows if row.get(column) is not None)
        return [] if len(counts) > most else sorted(counts, key=lambda value: (-counts[value], value))

    def _output(self) -> list[str]:
        return ["key", "source", "caption", "offset", "size", *(self._columns[item.name] for item in self.description.fields)]

    def _to_item(self, entity: dict[str, Any]) -> IndexedItem:
        item = IndexedItem(entity["key"], entity["source"], entity["offset"], entity["size"], entity["caption"])
        item.fields = {entry.name: entity.get(self._columns[entry.name]) for entry in self.description.fields}
        item.thumbnail = base64.b64decode(entity.get("thumbnail", ""))
        if "vector" in entity:
            item.vector = np.asarray(entity["vector"], dtype=np.float32)
        return item


# ---------------------------------------------------------------------------------------------------------------------
# Places


def _parse_address(place: str) -> dict[str, Any]:
    """Return the arguments of MilvusClient for an address, and the `collection`. Raises ConfigError."""
    try:
        parts = urlsplit(place)
        address = f"{parts.scheme}://{parts.hostname}:{parts.port or (443 if parts.scheme == 'https' else 19530)}"
    except ValueError as error:
        raise ConfigError(f"{place} is no address: {error}") from error
    names = [name for name in parts.path.split("/") if name]
    if not parts.hostname or len(names) > 2 or any(not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) for name in names):
        raise ConfigError(
            f"{place}: write http(s)://HOST:PORT/COLLECTION or http(s)://HOST:PORT/DATABASE/COLLECTION; names hold letters, "
            "digits and _"
        )
    token = os.environ.get(TOKEN_VARIABLE, "")
    if parts.username:
        token = unquote(parts.username) + (f":{unquote(parts.password)}" if parts.password else "")
    return {
        "uri": address,
        "token": token,
        "db_name": names[0] if len(names) == 2 else "",
        "timeout": _SECONDS,
        "collection": names[-1] if names else COLLECTION,
    }


def _check_folder(path: Path, is_new: bool) -> None:
    """Raise UserError for a folder that Milvus Lite could not open; its own error names no reason."""
    if path.suffix != ".db":
        raise ConfigError(f"{path}: a folder of Milvus Lite needs a name that ends in .db")
    if is_new and not path.parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.parent}")
    if not is_new and not path.exists():
        raise NoIndexError(str(path))
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file, not a folder of Milvus Lite")
    if is_new and path.exists() and any(path.iterdir()) and not (path / "LOCK").exists():
        raise UserError(f"{path} exists and holds other files; choose another --db")
    try:
        with (path / "LOCK").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return
    except BlockingIOError:
        raise UserError(
            f"{path} is open in another process, and Milvus Lite allows one at a time (it locks {path}/LOCK); close it first"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be opened: {error.strerror or error}") from error


def _release_folder(place: str) -> None:
    """Stop the server of Milvus Lite in this process, which releases the folder's lock."""
    if not is_server(place):
        from milvus_lite.server_manager import server_manager_instance

        server_manager_instance.release_server(place)


def _name_columns(description: Description) -> dict[str, str]:
    """Return the column of each field: those of the samples begin with f_, so that they are no word of Milvus."""
    columns = {name: name for name in ("key", "source", "caption")}
    for item in description.fields:
        column = "f_" + re.sub(r"\W", "_", item.name, flags=re.ASCII)
        while column in columns.values():
            column += "_"
        columns[item.name] = column
    return columns
