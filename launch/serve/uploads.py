"""The file of a form, and those uploaded lately, in memory: the page shows them, and questions can be asked about them."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

from pretrain.errors import UserError

MAX_UPLOAD = 64 << 20
"""Most bytes of an uploaded file."""
MAX_BYTES = 256 << 20
"""Bytes of all that are kept; the oldest are forgotten first."""


@dataclass(frozen=True)
class Upload:
    """The file of a form."""

    content: bytes = b""
    field: str = ""
    """The name under which it was sent; empty = there is none."""

    def check(self, name: str) -> None:
        """Refuse a form without a file, and files that are empty or too large. name: of the file. Raises UserError."""
        if not self.field:
            raise UserError("the form holds no file: add one")
        if not self.content:
            raise UserError(f"{name} is empty: choose another file")
        if len(self.content) > MAX_UPLOAD:
            raise UserError(f"{name} has more than {MAX_UPLOAD >> 20} MB, which is the most that can be uploaded")


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
