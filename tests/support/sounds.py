"""Shards of colored images, tones and captions: a word is a color and a pitch."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

RATE = 8000
THINGS = {
    "red": ((200, 30, 30), 220),
    "green": ((30, 180, 40), 440),
    "blue": ((40, 60, 200), 880),
    "white": ((230, 230, 230), 1760),
}

AUDIO = ["audio.tower=audio", "audio.name=conv", "audio.widths=[8,16]", "audio.rate=8000", "audio.seconds=0.4", "audio.mels=24"]
"""Settings of a tiny audio tower."""


def make_tone(hertz: float, seconds: float, seed: int) -> bytes:
    """Return a tone in noise as a FLAC file of 8 kHz."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(RATE * seconds)) / RATE
    tone = 0.4 * np.sin(2 * np.pi * hertz * time) + 0.05 * rng.standard_normal(len(time))
    file = io.BytesIO()
    soundfile.write(file, tone, RATE, format="FLAC")
    return file.getvalue()


def write_shard(path: Path, count: int, seed: int = 0) -> None:
    """Write a shard of KEY.jpg, KEY.flac, KEY.txt and KEY.json, whose label is the number of the word."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            number = i % len(THINGS)
            word, (color, hertz) = list(THINGS.items())[number]
            image = io.BytesIO()
            Image.new("RGB", (32, 32), color).save(image, "JPEG")
            seconds = 0.3 if i % 3 else 0.8
            members = {
                "jpg": image.getvalue(),
                "flac": make_tone(hertz * (1 + i / 1000), seconds, seed + i),
                "txt": f"a {word} thing".encode(),
                "json": json.dumps({"label": number}).encode(),
            }
            for name, data in members.items():
                info = tarfile.TarInfo(f"{i:05d}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
