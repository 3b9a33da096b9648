"""Files that were uploaded lately, in memory, so that the page can show them and questions can be asked about them."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

MAX_BYTES = 256 << 20
"""Bytes of all of them together; the oldest are forgotten first."""


class Uploads:
    """The latest uploads by the hash of their content."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._images: OrderedDict[str, tuple[bytes, bytes]] = OrderedDict()

    def put(self, data: bytes, thumbnail: bytes) -> str:
        """Keep an image or a sound, and return its name."""
        name = hashlib.sha256(data).hexdigest()[:32]
        self._images[name] = (data, thumbnail)
        self._images.move_to_end(name)
        while len(self._images) > 1 and sum(len(a) + len(b) for a, b in self._images.values()) > self._max_bytes:
            self._images.popitem(last=False)
        return name

    def get(self, name: str) -> tuple[bytes, bytes] | None:
        """Return a file and its thumbnail; None where it is not there, or no longer."""
        return self._images.get(name)
