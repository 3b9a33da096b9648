"""Bytes of a picture -> pixels, whatever its format, or BadSample. Nothing is decoded before its header was judged.

JPEGs go through simplejpeg (libjpeg-turbo), which gives Pillow's pixels bit for bit and can decode at 1/2, 1/4 and 1/8;
everything else through Pillow, but for plain lossy WebP. H, W = height, width in pixels.
"""

from __future__ import annotations

import io
import struct
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from pretrain.data import BadSample

EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""The members of a sample that are its picture; the bytes, not the name, say how to decode it."""

MAX_PIXELS = 1 << 26
"""Default cap on height x width (8192 x 8192: 192 MiB decoded)."""

_MAX_SCANS = 64  # real progressive JPEGs have about ten; thousands of empty ones would decode for minutes


class Header(NamedTuple):
    """What the first bytes of a picture say. Height and width are those a viewer sees: after `orientation`."""

    format: str
    """As Pillow names it: JPEG, PNG, WEBP, ..."""
    height: int
    width: int
    orientation: int
    """EXIF: 1 (upright) to 8; 5 to 8 swap the sides."""
    fast: bool
    """simplejpeg decodes it (at 1/1, 1/2, 1/4, 1/8); Pillow otherwise."""


def read_header(data: bytes, max_pixels: int = MAX_PIXELS) -> Header:
    """Format and size without decoding. Raises BadSample for no picture at all, and for one above `max_pixels`."""
    if not data:
        raise BadSample("image empty", "0 bytes")
    found = _read_jpeg_header(data)
    if found is None:
        with _open(data) as image:
            width, height = image.size
            found = Header(str(image.format), height, width, _read_orientation(image), fast=False)
    if found.height * found.width > max_pixels:
        raise BadSample("image too large", f"{found.width} x {found.height}, more than {max_pixels} pixels")
    if found.format == "JPEG" and found.height * found.width > 1 << 20 and data.count(b"\xff\xda") > _MAX_SCANS:
        raise BadSample("image unreadable", f"a JPEG of more than {_MAX_SCANS} scans")
    return found._replace(height=found.width, width=found.height) if found.orientation >= 5 else found


def decode_image(data: bytes, min_size: int | None = None, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """One picture as (H, W, 3) uint8 RGB, upright; transparent parts on white.

    Args:
        data: an encoded picture (JPEG, PNG, WebP, or anything else Pillow reads).
        min_size: pixels; a JPEG may come at 1/2, 1/4 or 1/8 as long as neither side falls below this.
        max_pixels: refused above this height x width, before decoding.

    Raises:
        BadSample: empty, not a picture, too large, truncated or damaged.
    """
    header = read_header(data, max_pixels)
    factor = 1 if min_size is None else reduction_factor(header, header.height, header.width, min_size)
    return decode_pixels(data, header, factor)


def reduction_factor(header: Header, height: int, width: int, size: int) -> int:
    """The largest of 1, 2, 4, 8 by which this picture can be decoded smaller with height x width pixels of it still
    size x size. Only powers of two: libjpeg-turbo has fast code for those, and 5/8 takes longer than 1/1."""
    factors = (8, 4, 2) if header.fast else ()
    return next((f for f in factors if min(height, width) >= size * f), 1)


def decode_pixels(data: bytes, header: Header, factor: int = 1) -> np.ndarray:
    """(ceil(H / factor), ceil(W / factor), 3) uint8 RGB, upright; `factor` as `reduction` gives it. Raises BadSample."""
    if header.fast:
        pixels = _decode_jpeg(data, header, factor)
    elif header.format == "WEBP" and data[12:16] == b"VP8 ":  # lossy, no alpha, no metadata: 1.6 x as fast as Pillow
        webp = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        if webp is None:
            raise BadSample("image truncated", "WebP data ends early or is damaged")
        pixels = np.asarray(webp, np.uint8)
    else:
        pixels = _decode_with_pillow(data)
    return apply_orientation(pixels, header.orientation)


def apply_orientation(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turns and mirrors (H, W, 3) as EXIF orientation 1..8 asks (CIPA DC-008, tag 274); a view."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    rows, columns = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}.get(orientation, (1, 1))
    return pixels[::rows, ::columns]


def _read_jpeg_header(data: bytes) -> Header | None:
    """None for what is not a JPEG, or one that Pillow must read (CMYK, rare subsampling)."""
    if data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError):  # KeyError: a file that ends before its header says the colour space
        return None
    if space not in ("YCbCr", "RGB", "Gray"):
        return None
    orientation = 1
    head = data[: 1 << 17]  # opening a JPEG in Pillow takes longer than two searches, and few pictures carry the tag
    if b"Exif\0\0" in head or b"Orientation" in head:
        with _open(data) as image:
            orientation = _read_orientation(image)
    return Header("JPEG", height, width, orientation, fast=True)


def _decode_jpeg(data: bytes, header: Header, factor: int) -> np.ndarray:
    sides = (header.width, header.height) if header.orientation >= 5 else (header.height, header.width)
    least = {"min_height": -(-sides[0] // factor), "min_width": -(-sides[1] // factor)}
    pixels: np.ndarray
    try:
        pixels = simplejpeg.decode_jpeg(data, **least)
        return pixels
    except ValueError as error:
        message = str(error)
    if "extraneous bytes" in message:  # padding that every viewer passes over in silence
        try:
            pixels = simplejpeg.decode_jpeg(data, **least, strict=False)
            return pixels
        except ValueError as error:
            message = str(error)
    if "premature" in message.lower() or message.startswith("Corrupt JPEG"):
        raise BadSample("image truncated", message)
    return np.array(Image.fromarray(_decode_with_pillow(data)).reduce(factor))


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except MemoryError:
        raise
    except Exception as error:  # the bytes are in memory: whatever a parser trips over is the content's fault
        raise _as_bad_sample(error, data) from error


def _as_bad_sample(error: Exception, data: bytes) -> BadSample:
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if isinstance(error, BadSample):
        return error
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return BadSample("image too large", text)
    if isinstance(error, Image.UnidentifiedImageError):
        return BadSample("image unreadable", f"not a picture, begins with {data[:12]!r}")
    # Pillow's words: "image file is truncated", "Truncated File Read", WebP's "could not create decoder object"
    damaged = any(word in text.lower() for word in ("truncated", "decoder", "broken"))
    return BadSample("image truncated" if damaged else "image unreadable", text)


def _read_orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(0x0112, 1)
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, struct.error):
        return 1  # broken metadata of a sound picture: show it as it is stored
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _decode_with_pillow(data: bytes) -> np.ndarray:
    """(H, W, 3) uint8 of any mode, as stored (not turned)."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            if image.mode.startswith("I"):  # Pillow's own conversion clips at 255
                deep = np.asarray(image)
                if image.mode != "I" or deep.max(initial=0) > 255:
                    deep = deep.clip(0, 65535) // 257
                return np.repeat(deep.astype(np.uint8)[:, :, None], 3, axis=2)
            if image.mode == "F":
                raise BadSample("image unreadable", "floating-point pixels, whose range is not known")
            if image.has_transparency_data:
                white = Image.new("RGBA", image.size, (255, 255, 255, 255))
                return np.array(Image.alpha_composite(white, image.convert("RGBA")).convert("RGB"))
            return np.array(image.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:
        raise _as_bad_sample(error, data) from error
