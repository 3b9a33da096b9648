"""Decoding of images of any format to pixels.

The size in the header is checked before anything is decoded.

JPEGs are decoded by simplejpeg (libjpeg-turbo), which returns Pillow's pixels bit for bit and can decode at 1/2, 1/4 and
1/8 of the size. Plain lossy WebP is decoded by OpenCV, everything else by Pillow.

Legend: H, W = height, width in pixels.
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

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "jpe", "jfif", "gif", "bmp", "tif", "tiff")
"""Extensions of the member that is a sample's image; its bytes, not its name, decide how it is decoded."""

MAX_PIXELS = 1 << 26
"""Default limit on height x width (8192 x 8192: 192 MiB decoded)."""

_MAX_SCANS = 64  # real progressive JPEGs have about ten; thousands of empty ones would decode for minutes


class Header(NamedTuple):
    """Format and size of an encoded image. Height and width are those after `orientation` is applied."""

    format: str
    """Pillow's name of the format: JPEG, PNG, WEBP, ..."""
    height: int
    width: int
    orientation: int
    """EXIF orientation, 1 (upright) to 8; 5 to 8 swap height and width."""
    is_fast_jpeg: bool
    """Whether simplejpeg can decode it (at 1/1, 1/2, 1/4 or 1/8 of the size)."""


def read_header(data: bytes, max_pixels: int = MAX_PIXELS) -> Header:
    """Return format and size of an encoded image without decoding it.

    Raises:
        BadSample: the data is empty, not an image, or an image of more than `max_pixels` pixels.
    """
    if not data:
        raise BadSample("image empty", "0 bytes")
    header = _read_jpeg_header(data)
    if header is None:
        with _open(data) as image:
            width, height = image.size
            header = Header(str(image.format), height, width, _read_orientation(image), is_fast_jpeg=False)
    if header.height * header.width > max_pixels:
        raise BadSample("image too large", f"{header.width} x {header.height}, more than {max_pixels} pixels")
    if header.format == "JPEG" and header.height * header.width > 1 << 20 and data.count(b"\xff\xda") > _MAX_SCANS:
        raise BadSample("image unreadable", f"a JPEG with more than {_MAX_SCANS} scans")
    return header._replace(height=header.width, width=header.height) if header.orientation >= 5 else header


def decode_image(data: bytes, min_size: int | None = None, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image to (H, W, 3) uint8 RGB, upright, with transparent pixels blended with white.

    Args:
        data: an encoded image (JPEG, PNG, WebP, or any other format that Pillow reads).
        min_size: pixels; a JPEG may be decoded at 1/2, 1/4 or 1/8 while neither side falls below this. None = full size.
        max_pixels: an image of more pixels (height x width) is refused before it is decoded.

    Raises:
        BadSample: the data is empty, not an image, too large, truncated or damaged.
    """
    header = read_header(data, max_pixels)
    factor = 1 if min_size is None else reduction_factor(header, header.height, header.width, min_size)
    return decode_pixels(data, header, factor)


def reduction_factor(header: Header, height: int, width: int, size: int) -> int:
    """Return the factor, 1, 2, 4 or 8, by which an image can be decoded smaller without loss.

    A region of height x width pixels still has at least size x size pixels after division by the factor. Only powers of two:
    libjpeg-turbo has fast code for those, and 5/8 takes longer than 1/1.
    """
    factors = (8, 4, 2) if header.is_fast_jpeg else ()
    return next((f for f in factors if min(height, width) >= size * f), 1)


def decode_pixels(data: bytes, header: Header, factor: int = 1) -> np.ndarray:
    """Decode to (ceil(H / factor), ceil(W / factor), 3) uint8 RGB, upright.

    Args:
        data: an encoded image.
        header: its header.
        factor: 1, 2, 4 or 8, at most what `reduction_factor` returns.

    Raises:
        BadSample: the data is truncated or damaged.
    """
    if header.is_fast_jpeg:
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
    """Rotate and mirror (H, W, 3) by an EXIF orientation of 1 to 8 (CIPA DC-008, tag 274); returns a view."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    rows, columns = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}.get(orientation, (1, 1))
    return pixels[::rows, ::columns]


def _read_jpeg_header(data: bytes) -> Header | None:
    """Return the header of a JPEG that simplejpeg can decode; None for CMYK, rare subsampling, other data."""
    if data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError):  # KeyError: the file ends before the color space is given
        return None
    if space not in ("YCbCr", "RGB", "Gray"):
        return None
    orientation = 1
    head = data[: 1 << 17]  # opening a JPEG in Pillow takes longer than two searches, and few images carry the tag
    if b"Exif\0\0" in head or b"Orientation" in head:
        with _open(data) as image:
            orientation = _read_orientation(image)
    return Header("JPEG", height, width, orientation, is_fast_jpeg=True)


def _decode_jpeg(data: bytes, header: Header, factor: int) -> np.ndarray:
    """Decode with simplejpeg, or with Pillow where simplejpeg fails on a sound image. Raises BadSample."""
    sides = (header.width, header.height) if header.orientation >= 5 else (header.height, header.width)
    min_sides = {"min_height": -(-sides[0] // factor), "min_width": -(-sides[1] // factor)}
    pixels: np.ndarray
    try:
        pixels = simplejpeg.decode_jpeg(data, **min_sides)
        return pixels
    except ValueError as error:
        message = str(error)
    if "extraneous bytes" in message:  # padding that every image viewer ignores
        try:
            pixels = simplejpeg.decode_jpeg(data, **min_sides, strict=False)
            return pixels
        except ValueError as error:
            message = str(error)
    if "premature" in message.lower() or message.startswith("Corrupt JPEG"):
        raise BadSample("image truncated", message)
    return np.array(Image.fromarray(_decode_with_pillow(data)).reduce(factor))


def _open(data: bytes) -> Image.Image:
    """Open with Pillow, which reads the header. Raises BadSample."""
    try:
        return Image.open(io.BytesIO(data))
    except MemoryError:
        raise
    except Exception as error:  # the bytes are in memory, so whatever fails in a parser is due to the content
        raise _as_bad_sample(error, data) from error


def _as_bad_sample(error: Exception, data: bytes) -> BadSample:
    """Return the BadSample that describes an error of Pillow, by reason."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if isinstance(error, BadSample):
        return error
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return BadSample("image too large", text)
    if isinstance(error, Image.UnidentifiedImageError):
        return BadSample("image unreadable", f"not an image, begins with {data[:12]!r}")
    # Messages of Pillow: "image file is truncated", "Truncated File Read", WebP's "could not create decoder object"
    damaged = any(word in text.lower() for word in ("truncated", "decoder", "broken"))
    return BadSample("image truncated" if damaged else "image unreadable", text)


def _read_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 where there is none."""
    try:
        value = image.getexif().get(0x0112, 1)
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, struct.error):
        return 1  # damaged metadata of an intact image: leave the image as it is stored
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _decode_with_pillow(data: bytes) -> np.ndarray:
    """Decode an image of any mode to (H, W, 3) uint8, orientation not applied. Raises BadSample."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            if image.mode.startswith("I"):  # more than 8 bits: Pillow's own conversion clips at 255
                wide = np.asarray(image)
                if image.mode != "I" or wide.max(initial=0) > 255:
                    wide = wide.clip(0, 65535) // 257
                return np.repeat(wide.astype(np.uint8)[:, :, None], 3, axis=2)
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
