"""Reads the samples of a table: the image, the sound and the captions of its rows, and further columns.

A table may come from an untrusted source, so the paths in it must stay below its folder unless the user allows otherwise.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.data import BadSample
from pretrain.data.caption_statistics import find_oddities
from pretrain.data.captions import normalize_whitespace
from pretrain.data.pack import table_readers
from pretrain.data.pack.folder import read_file_inside
from pretrain.data.pack.grouping import is_image_content
from pretrain.data.pack.writer import SourceSample

_LISTS = ("questions", "objects")
"""Columns that hold lists. Text tables write them as JSON."""


class TableRow(NamedTuple):
    """The rows of one image."""

    number: int
    """Number of its first row, from 1."""
    base: str
    """The folder that its path is relative to."""
    rows: list[dict[str, Any]]
    """Values by column. The first row has the image."""


@dataclass
class TableJob:
    """The images of one shard."""

    images: list[TableRow]
    image_column: str
    caption_column: str
    outside: bool
    lists_captions: bool
    """Whether the json of every sample lists its captions, because some images of the table have several rows."""
    first: int
    audio_column: str = ""
    """Of sounds. The name of a column that no table has is ""."""

    def __len__(self) -> int:
        return len(self.images)

    def describe(self, i: int) -> str:
        """Return how the user finds sample `i` in the source."""
        row = self.images[i].rows[0]
        value = next((row[name] for name in (self.image_column, self.audio_column) if row.get(name)), None)
        path = value.get("path") if isinstance(value, dict) else value
        suffix = f": {to_text(path)}" if isinstance(path, str | bytes) and 0 < len(path) < 300 else ""
        return f"row {self.images[i].number}{suffix}"

    def get_key(self, i: int, shard: int) -> str:
        """Return the KEY of sample `i` in the shard."""
        return f"{self.first + i:08d}"

    def load(self, i: int) -> SourceSample:
        """Read sample `i`. Raises BadSample."""
        _, base, rows = self.images[i]
        if table_readers.UNREADABLE in rows[0]:
            raise BadSample("row unreadable", str(rows[0][table_readers.UNREADABLE]))
        captions: list[str] = []
        unusable: list[BadSample] = []
        for value in self._list_captions(rows):
            try:
                captions.append(self._read_caption(value))
            except BadSample as bad:
                unusable.append(bad)
        if not captions:
            raise unusable[0]
        if len(set(captions)) == 1:  # a table with a row for each object of an image repeats its caption
            captions = captions[:1]
        image, image_source = self._read_file(self.image_column, rows[0].get(self.image_column), base)
        sound, sound_source = self._read_file(self.audio_column, rows[0].get(self.audio_column), base)
        if image is None and sound is None:
            empty = [name for name in (self.image_column, self.audio_column) if name]
            raise BadSample(
                "no image" if self.image_column else "audio missing",
                f"{' and '.join(empty)} {'is' if len(empty) == 1 else 'are'} empty",
            )
        metadata: dict[str, Any] = {"source": image_source or sound_source} if image_source or sound_source else {}
        if image_source and sound_source:
            metadata["audio_source"] = sound_source
        columns, has_conflict = merge_columns(rows, (self.image_column, self.audio_column, self.caption_column))
        metadata |= columns
        return SourceSample(
            image,
            captions,
            metadata,
            dropped=[bad.reason for bad in unusable],
            odd=[oddity for caption in captions for oddity in find_oddities(caption)],
            has_label_conflict=has_conflict,
            lists_captions=self.lists_captions,
            sound=sound,
        )

    def _list_captions(self, rows: list[dict[str, Any]]) -> Iterator[Any]:
        """Yield the value of each caption; None for a row without one."""
        for row in rows:
            value = row.get(self.caption_column)
            if isinstance(value, list) and value:
                yield from value
            else:
                yield None if value == [] else value

    def _read_caption(self, value: Any) -> str:
        """Return a caption with whitespace normalized. Raises BadSample for one that is missing, empty, or no text."""
        if _is_missing(value):
            raise BadSample("no caption", f"{self.caption_column} is {'NaN' if isinstance(value, float) else 'empty'}")
        if isinstance(value, bool) or not isinstance(value, str | bytes | int | float):
            raise BadSample("caption not text", f"{self.caption_column} is {str(value)[:100]}")
        try:
            text = normalize_whitespace(value.decode("utf-8") if isinstance(value, bytes) else str(value))
        except UnicodeDecodeError as error:
            raise BadSample("caption not UTF-8", str(error)) from error
        if not text:
            raise BadSample("empty caption", f"{self.caption_column} is empty")
        return text

    def _read_file(self, column: str, value: Any, base: str) -> tuple[bytes | None, str]:
        """Return (content of the image or sound, its path or ""), or (None, "") where the row has none.

        The value is a path below the table's folder `base`, or the content itself, as parquet files may contain it.
        """
        if isinstance(value, dict):  # as the `datasets` library stores images and sounds: {"bytes": ..., "path": ...}
            content = value.get("bytes")
            path = value.get("path")
            return (content, to_text(path) if path else "") if content else self._read_file(column, path, base)
        if is_image_content(value):
            return value, ""
        text = "" if _is_missing(value) else to_text(value).strip()
        if not text:
            return None, ""
        if "://" in text[:12]:
            what = "images first, for example with img2dataset" if column == self.image_column else "sounds first"
            raise BadSample("a url, not a file", f"download the {what}")
        path = os.path.normpath(os.path.join(base, os.path.expanduser(text) if self.outside else text))
        if not self.outside and not path.startswith(base.rstrip("/") + "/"):
            raise BadSample("path outside the table's folder", "--outside allows it")
        return read_file_inside(Path(path), None if self.outside else base), text


def merge_columns(rows: list[dict[str, Any]], omitted: tuple[str, ...]) -> tuple[dict[str, Any], bool]:
    """Return (further columns of the rows of one image, whether the rows have different labels).

    A value that all rows share stays as it is. Lists of questions and objects are joined, and the first label is used. Other
    values become a list, with None where a row has none.
    """
    merged: dict[str, Any] = {}
    has_conflict = False
    for name in dict.fromkeys(name for row in rows for name in row if name not in omitted):
        values = [None if _is_missing(value) else value for value in (_parse_column(name, row.get(name)) for row in rows)]
        if all(value == values[0] for value in values[1:]):
            merged[name] = values[0]
        elif name in _LISTS and all(value is None or isinstance(value, list) for value in values):
            joined = (item for value in values for item in value or [])
            merged[name] = list({json.dumps(item, sort_keys=True, default=str): item for item in joined}.values())
        elif name == "label":
            labels = [value for value in values if value not in (None, "", b"")]
            merged[name] = labels[0] if labels else None
            has_conflict = any(label != labels[0] for label in labels)
        else:
            merged[name] = values
    return merged, has_conflict


def _is_missing(value: Any) -> bool:
    """Whether a table holds no value: null, or the NaN that pandas writes in its place."""
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def to_text(value: Any) -> str:
    """Return the value of a column as text; bytes that are no UTF-8 as in names of files."""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


def _parse_column(name: str, value: Any) -> Any:
    """Return the value of a further column.

    Text tables hold JSON in the columns `questions` and `objects`, and an integer in `label`.
    """
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    if name in _LISTS and isinstance(text, str):
        try:
            return json.loads(text) if text.strip() else None
        except (ValueError, RecursionError) as error:
            raise BadSample(f"{name} not json", str(error)) from error
    return int(text) if name == "label" and isinstance(text, str) and re.fullmatch(r"-?\d{1,18}", text) else text
