"""Digests of the keys of samples, by which stored embeddings are found. Imports no torch."""

from __future__ import annotations

import hashlib


def digest(key: str, caption_id: int | None = None) -> int:
    """Return the digest by which an image, or a caption of a sample, is found: 64 bits."""
    name = key.encode() if caption_id is None else key.encode() + b"\0" + caption_id.to_bytes(8, "big", signed=True)
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")
