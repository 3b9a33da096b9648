"""Sources to pack, and packed shards as webdataset reads them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander


def make_image(seed: int, width: int = 40, height: int = 30, form: str = "JPEG", **options: Any) -> bytes:
    """Return an encoded image of smooth random colors."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    out = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).save(out, form, **options)
    return out.getvalue()


def read_shards(out: Path, prefix: str = "shard") -> dict[str, dict[str, bytes]]:
    """Return the members of each "shard/KEY", as webdataset reads them."""
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted(out.glob(f"{prefix}-*.tar")):
        with open(path, "rb") as file:  # a WebDataset would leave the file open
            for sample in group_by_keys(tar_file_expander([{"url": str(path), "stream": file}])):
                if "__key__" in sample:
                    samples[f"{path.stem}/{sample['__key__']}"] = {k: v for k, v in sample.items() if not k.startswith("__")}
    return samples
