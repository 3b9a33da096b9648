"""Thumbnails of whole images, for pages and figures: what a sample holds, not the square that a model sees.

decoders = {"image": image_decoder, "thumbnail": ThumbnailDecoder()}
batch.targets["thumbnails"]                     a Thumbnail for each sample, beside the model's inputs
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from pretrain.data.decode import EXTENSIONS, MAX_PIXELS, decode_image, read_header
from pretrain.data.shards.paths import RawSample

SIDE = 320
"""Longer side of a thumbnail, in pixels; a smaller image keeps its size."""
MAX_BYTES = 16 << 10
"""Most bytes of a thumbnail's JPEG."""


@dataclass(frozen=True)
class Thumbnail:
    """A small JPEG of a whole image, in its proportions."""

    jpeg: bytes
    height: int
    """Of the stored image, upright, in pixels."""
    width: int

    def open(self) -> Image.Image:
        """Return the thumbnail as an RGB image."""
        return Image.open(io.BytesIO(self.jpeg)).convert("RGB")

    def data_uri(self) -> str:
        """Return the thumbnail as a data URI, which holds it inside a page."""
        return to_data_uri(self.jpeg)


class ThumbnailDecoder:
    """A decoder that gives targets only: `thumbnails`, a list of Thumbnail."""

    def __init__(self, max_pixels: int = MAX_PIXELS) -> None:
        """max_pixels: an image of more pixels is a bad sample."""
        self.max_pixels = max_pixels

    def __call__(self, sample: RawSample, rng: np.random.Generator, train: bool) -> Thumbnail:
        """Return the thumbnail of a sample's image, transparent pixels on white. Raises BadSample."""
        data = next((sample.members[e] for e in EXTENSIONS if e in sample.members), b"")
        return make_thumbnail(data, self.max_pixels)

    def collate(self, items: list[Thumbnail]) -> None:
        """Return None: thumbnails are targets, not inputs."""
        return

    def targets(self, items: list[Thumbnail]) -> dict[str, Any]:
        """Return the thumbnails by name."""
        return {"thumbnails": items}


def make_thumbnail(data: bytes, max_pixels: int = MAX_PIXELS) -> Thumbnail:
    """Make the thumbnail of an encoded image. Raises BadSample."""
    header = read_header(data, max_pixels)
    image = Image.fromarray(decode_image(data, min_size=SIDE, max_pixels=max_pixels))
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return Thumbnail(encode_jpeg(image), header.height, header.width)


def encode_jpeg(image: Image.Image, max_bytes: int = MAX_BYTES) -> bytes:
    """Encode as a JPEG of at most `max_bytes`: first the quality is lowered, then the size."""
    image = image.convert("RGB")
    for quality in (85, 70, 55):
        if len(data := _encode(image, quality)) <= max_bytes:
            return data
    while len(data) > max_bytes and max(image.size) > 1:
        image = image.resize((max(1, image.width * 3 // 4), max(1, image.height * 3 // 4)), Image.Resampling.LANCZOS)
        data = _encode(image, quality)
    return data


def to_data_uri(jpeg: bytes) -> str:
    """Return a JPEG as a data URI."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()


def _encode(image: Image.Image, quality: int) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality, optimize=True)
    return out.getvalue()
