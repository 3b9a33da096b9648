"""data.train=synthetic: noise images, noise as sounds, and random captions, to benchmark all but reading."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from pretrain.data.audio import AudioDecoder
from pretrain.data.shards.paths import RawSample

SHARDS, SAMPLES = 100, 10_000
"""Number of shards of data.train=synthetic, and of samples in each."""

_WORDS = ("red", "blue", "small", "large", "dog", "cat", "car", "house", "boat", "on", "under", "near", "a", "two")


class SyntheticReader:
    """Reader of samples with a random caption; `NoiseDecoder` supplies their images."""

    def __init__(self, caption: str = "txt") -> None:
        self.caption = caption

    def read(self, shard: int, sample: int) -> RawSample:
        """Return a sample with a caption of 5 to 15 words, a function of the two numbers."""
        rng = random.Random(shard * SAMPLES + sample)
        text = " ".join(rng.choices(_WORDS, k=rng.randint(5, 15)))
        return RawSample(self.key(shard, sample), {"txt": text.encode(), "json": json.dumps({self.caption: text}).encode()})

    def key(self, shard: int, sample: int) -> str:
        """Return a key such as "synthetic-0001/00000002"."""
        return f"synthetic-{shard:04d}/{sample:08d}"


def replace_images(decoders: Mapping[str, Any]) -> dict[str, Any]:
    """Return decoders by modality with a NoiseDecoder in place of those of images and sounds."""
    return {
        name: NoiseDecoder(decoder) if hasattr(decoder, "size") or isinstance(decoder, AudioDecoder) else decoder
        for name, decoder in decoders.items()
    }


class NoiseDecoder:
    """Replacement of a decoder of images or sounds that returns noise, at the cost of one copy."""

    def __init__(self, decoder: Any) -> None:
        self.decoder, rng = decoder, np.random.default_rng(0)
        if isinstance(decoder, AudioDecoder):
            self.shape: tuple[int, ...] = (decoder.samples,)
            self.noise = torch.from_numpy(rng.integers(-8192, 8192, decoder.samples + 65536, dtype=np.int16))
        else:
            self.shape = (3, decoder.size, decoder.size)
            self.noise = torch.from_numpy(rng.integers(0, 256, 3 * decoder.size**2 + 65536, dtype=np.uint8))

    def __call__(self, sample: RawSample, rng: np.random.Generator, train: bool) -> torch.Tensor:
        """Return noise: an image (3, size, size) uint8 or a sound (S,) int16."""
        start = int(rng.integers(65536))
        return self.noise[start : start + len(self.noise) - 65536].view(self.shape)

    def collate(self, items: list[torch.Tensor]) -> tuple[torch.Tensor, None]:
        """Stack b images to (b, 3, size, size) uint8, or b sounds to (b, S) int16."""
        return torch.stack(items), None
