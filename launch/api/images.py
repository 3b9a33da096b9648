"""Images in any form that a user has them in, as the encoded bytes that the decoders read.

So every form takes one path through decoding, and the same image gives the same embedding in each of them.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from pretrain.errors import UserError

ImageLike = Any
"""A path (str or Path), a PIL image, a uint8 array (H, W), (H, W, 3) or (H, W, 4), or the bytes of an image file."""

_FORMS = "a path, a PIL image, a uint8 array (height, width, 3) or the bytes of an image file"
_PNG_MODES = ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")


def as_list(items: Any, name: str) -> Sequence[Any]:
    """Return `items` as a sequence: a single path, text, image or bytes becomes a list of one. Raises UserError."""
    if isinstance(items, str | bytes | bytearray | memoryview | Path | Image.Image):
        return [items]
    if isinstance(items, np.ndarray):
        return [items] if items.ndim < 4 else list(items)
    if isinstance(items, Sequence):
        return items
    if isinstance(items, Iterable):
        return list(items)
    raise UserError(f"{name} must be a list, not {type(items).__name__}")


def read_file(item: Any, name: str) -> bytes | None:
    """Return the content of a file that is given as a path or as its bytes; None for any other kind of object.

    `name` is what messages call it. Raises UserError for a file that cannot be read.
    """
    if isinstance(item, bytes | bytearray | memoryview):
        return bytes(item)
    if isinstance(item, str | Path):
        try:
            return Path(item).expanduser().read_bytes()
        except OSError as error:
            raise UserError(f"{name} cannot be read: {item}: {error.strerror or error}") from error
    return None


def to_bytes(image: ImageLike, name: str) -> bytes:
    """Return the content of an image file that holds `image`; PIL images and arrays become uncompressed PNGs.

    `name` is what messages call it. Raises UserError for files that cannot be read and for any other kind of object.
    """
    if (data := read_file(image, name)) is not None:
        return data
    if isinstance(image, Image.Image):
        return _encode_png(ImageOps.exif_transpose(image), name)
    try:
        pixels = np.asarray(image)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{name} is {type(image).__name__}; give {_FORMS}") from error
    if pixels.dtype != np.uint8:
        raise UserError(f"{name} is {type(image).__name__} of {pixels.dtype}; give {_FORMS}")
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))) or 0 in pixels.shape:
        raise UserError(f"{name} is an array of shape {pixels.shape}; give (height, width), (height, width, 3) or 4 channels")
    return _encode_png(Image.fromarray(pixels), name)


def _to_png_mode(image: Image.Image) -> Image.Image:
    """Return the image in a mode that PNG has, so that decoding treats it as it treats a file of the same pixels.

    Transparency stays, and so do up to 16 bits.
    """
    if image.mode in _PNG_MODES:
        return image
    if image.mode.startswith("I"):
        gray = np.asarray(image)
        has_8_bits = image.mode == "I" and gray.max(initial=0) <= 255
        return Image.fromarray(gray.clip(0, 255).astype(np.uint8) if has_8_bits else gray.clip(0, 65535).astype(np.uint16))
    return image.convert("LA" if image.mode == "La" else "RGBA" if image.has_transparency_data else "RGB")


def _encode_png(image: Image.Image, name: str) -> bytes:
    out = io.BytesIO()
    try:
        _to_png_mode(image).save(out, "PNG", compress_level=0)
    except (OSError, ValueError) as error:  # a truncated file is read here
        raise UserError(f"{name} is a PIL image that cannot be read: {error}") from error
    return out.getvalue()
