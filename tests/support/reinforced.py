"""Shards in DataCompDR's layout, with embeddings that tell which augmentation or caption they are of."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

AUGMENTATIONS, SYNTHETIC, WIDTH = 4, 3, 6


def embedding(key: str, kind: str, place: int, width: int = WIDTH) -> np.ndarray:
    """Return the embedding of an augmentation or of a caption: one that no other has."""
    seed = int.from_bytes(f"{key}/{kind}/{place}".encode(), "big") % 2**32
    return np.random.default_rng(seed).standard_normal(width).astype(np.float16)


def pixels(i: int) -> np.ndarray:
    """Return the image of sample i, of random patches, (h, w, 3) uint8."""
    rng = np.random.default_rng(i)
    patches = rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return np.array(Image.fromarray(patches).resize((60 + i, 50 + i % 7), Image.Resampling.BILINEAR))


def augmentations(i: int) -> list[Any]:
    """Return the stored augmentations of sample i."""
    rng = np.random.default_rng(1000 + i)
    height, width = pixels(i).shape[:2]
    entries = []
    for _ in range(AUGMENTATIONS):
        h, w = (int(rng.integers(side // 4, side + 1)) for side in (height, width))
        box = [int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w]
        operations = [int(n) for n in rng.integers(14, size=2)]
        entries.append([box, [[n, 5.0 if n == 10 else float(np.float32(rng.uniform(0, 0.3)))] for n in operations]])
    return entries


def captions(key: str) -> list[str]:
    """Return the caption of a sample, and its synthetic ones. The first two differ in capitals only."""
    return [f"Photo {key}", f"photo {key}", *(f"scene {k} of {key}" for k in range(SYNTHETIC - 1))]


def to_npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def members(i: int, key: str) -> dict[str, bytes]:
    """Return the members of sample i."""
    file = io.BytesIO()
    Image.fromarray(pixels(i)).save(file, "PNG")
    caption, *synthetic = captions(key)
    return {
        "json": json.dumps({"uid": key, "sha256": "0"}).encode(),
        "npz": to_npz(
            image_emb=np.stack([embedding(key, "image", a) for a in range(AUGMENTATIONS)]),
            text_emb=np.stack([embedding(key, "text", row) for row in range(1 + SYNTHETIC)]),
        ),
        "paug.json": json.dumps({"param_aug": json.dumps(augmentations(i))}).encode(),
        "png": file.getvalue(),
        "syn.json": json.dumps({"syn_text": synthetic}).encode(),
        "txt": caption.encode(),
        "url.txt": b"http://localhost/x.png",
    }


def write_shards(
    folder: Path, samples: int, shards: int = 2, change: Callable[[int, dict[str, bytes]], None] | None = None
) -> list[str]:
    """Write the shards and return the keys of the samples, as a batch has them.

    change: may change the members of sample i.
    """
    folder.mkdir(parents=True, exist_ok=True)
    keys = []
    for s in range(shards):
        with tarfile.open(folder / f"r-{s}.tar", "w") as tar:
            for i in range(s, samples, shards):
                content = members(i, f"{i:04}")
                if change is not None:
                    change(i, content)
                for extension, data in content.items():
                    info = tarfile.TarInfo(f"{i:04}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                keys.append(f"r-{s}/{i:04}")
    return keys
