"""Finds the rows of a table that name the same image and the same sound, in a few bytes per row."""

from __future__ import annotations

import hashlib
import posixpath
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from pretrain.errors import UserError

Row = tuple[str, dict[str, Any]]
"""(folder that the paths of the row are relative to, values by column)"""


def is_image_content(value: Any) -> bool:
    """Whether the value of a column of images or sounds is an encoded file, not a path."""
    return isinstance(value, bytes) and (b"\0" in value[:64] or len(value) > 4096)


def identify_image(value: Any, base: str) -> bytes | None:
    """Return bytes that are equal for rows with the same image, or None for a row without an image.

    Args:
        value: of the image column: a path, an encoded image, or {"bytes": ..., "path": ...}.
        base: the folder that paths are relative to.
    """
    if isinstance(value, dict):
        content = value.get("bytes")
        return content if isinstance(content, bytes) and content else identify_image(value.get("path"), base)
    if is_image_content(value):
        return bytes(value)
    if not isinstance(value, str | bytes):
        return None
    text = (value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value).strip()
    return f"{base}\0{posixpath.normpath(text)}".encode("utf-8", "surrogatepass") if text else None


def identify_files(values: Sequence[Any], base: str) -> bytes | None:
    """Return bytes that are equal for rows with the same image and the same sound, or None for a row with neither.

    Args:
        values: of the columns of images and of sounds, or of the one that the table has.
        base: the folder that paths are relative to.
    """
    identities = [identify_image(value, base) for value in values]
    if not any(identities[1:]):
        return identities[0] if identities else None
    return b"".join(b"%d\0%s" % (len(identity or b""), identity or b"") for identity in identities)


class RowGroups:
    """Which rows belong to the same image. Rows without an image are groups of one row.

    Args:
        images: for each row, what `identify_image` returns.
    """

    def __init__(self, images: Iterator[bytes | None]) -> None:
        digests = array("Q")
        for i, image in enumerate(images):
            content = b"\1" + image if image is not None else b"\0%d" % i
            digests.append(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little"))
        self.rows = len(digests)
        hashes = np.frombuffer(digests, np.uint64) if digests else np.zeros(0, np.uint64)
        _, self._first, group_of_row, self._sizes = np.unique(
            hashes, return_index=True, return_inverse=True, return_counts=True
        )
        self.count = len(self._sizes)
        """Number of images."""
        if self.repeats:
            last = np.zeros(self.count, np.int64)
            np.maximum.at(last, group_of_row, np.arange(self.rows))
            self._group_of_row = group_of_row
            self._is_adjacent = last - self._first + 1 == self._sizes

    @property
    def repeats(self) -> bool:
        """Whether an image occurs in several rows."""
        return self.count < self.rows

    def iterate_groups(self, read: Callable[[], Iterator[Row]], file_columns: Sequence[str]) -> Iterator[tuple[int, list[Row]]]:
        """Yield (number of its first row, its rows) of each image, in the order of their first rows.

        Rows that are apart from the first one of their image are held in memory, without their files.

        Args:
            read: returns an iterator over all rows.
            file_columns: those of the image and the sound, which only the first row of a group keeps.
        """
        if not self.repeats:
            yield from ((i, [row]) for i, row in enumerate(read()))
            return
        apart = self._collect_apart(read, file_columns)
        rows = enumerate(read())
        for i, row in rows:
            if i >= self.rows:
                raise UserError("the table has changed while it was read: run the command again")
            group = int(self._group_of_row[i])
            if i != self._first[group]:
                continue
            if self._is_adjacent[group]:
                others = [other for _, other in islice(rows, int(self._sizes[group]) - 1)]
            else:
                others = apart.pop(group, [])
            yield i, [row, *others]

    def _collect_apart(self, read: Callable[[], Iterator[Row]], file_columns: Sequence[str]) -> dict[int, list[Row]]:
        """Return the further rows of the images whose rows are not adjacent, by group."""
        apart: dict[int, list[Row]] = defaultdict(list)
        if not self._is_adjacent.all():
            for i, (base, values) in zip(range(self.rows), read(), strict=False):
                group = int(self._group_of_row[i])
                if not self._is_adjacent[group] and i != self._first[group]:
                    apart[group].append((base, {name: value for name, value in values.items() if name not in file_columns}))
        return apart
