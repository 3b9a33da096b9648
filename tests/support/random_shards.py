"""Shards whose images are random bytes, for tests of how shards are fetched."""

from __future__ import annotations

import io
import random
import tarfile


def build_shard(number: int, samples: int, size: int) -> bytes:
    """Return a tar of samples with a caption and an image of `size` bytes each, which is none; a function of the arguments."""
    out = io.BytesIO()
    rng = random.Random(number)
    with tarfile.open(fileobj=out, mode="w") as tar:
        for i in range(samples):
            for extension, content in (("jpg", rng.randbytes(size)), ("txt", f"caption {number} {i}".encode())):
                info = tarfile.TarInfo(f"{i:04d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return out.getvalue()
