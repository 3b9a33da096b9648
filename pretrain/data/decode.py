"""Decoding of images of any format to pixels.

The size in the header is checked before anything is decoded. So are the scans of a JPEG and the chunks of a PNG: a file of a
few kilobytes may ask for minutes of work.

JPEGs are decoded by simplejpeg (libjpeg-turbo), which returns Pillow's pixels bit for bit and can decode at 1/2, 1/4 and
1/8 of the size. Plain lossy WebP is decoded by OpenCV, the other formats in FORMATS by Pillow, and no other format by anything.

Legend: H, W = height, width in pixels.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from pretrain.data import BadSample

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "jpe", "jfif", "gif", "bmp", "tif", "tiff", "avif")
"""Extensions of the member that is a sample's image; its bytes, not its name, decide how it is decoded."""

MAX_PIXELS = 1 << 26
"""Default limit on height x width (8192 x 8192: 192 MiB decoded)."""

MAX_SIDE = (1 << 16) - 1
"""Limit on height and on width, the largest of JPEG: the tables of a resize grow with the longer side."""

FORMATS = {"JPEG": "JPEG", "PNG": "PNG", "WEBP": "WebP", "GIF": "GIF", "BMP": "BMP", "TIFF": "TIFF", "AVIF": "AVIF"}
"""The formats that are read, by Pillow's name. Pillow knows many more, some of which start other programs (PostScript)."""

_MAX_SCANS = 64  # real progressive JPEGs have about ten; thousands of empty ones would decode for minutes
_MAX_SCAN_PIXELS = 1 << 30  # scans x pixels: ten scans of MAX_PIXELS fit
_MAX_SEGMENTS = 1 << 16  # segments of a JPEG, chunks of a PNG: each costs a turn of a loop, however short it is


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
        BadSample: the data is empty, not an image of one of FORMATS, or one that takes too much memory or time to decode: more
            than `max_pixels` pixels, a side above MAX_SIDE, or a JPEG of too many scans.
    """
    if not data:
        raise BadSample("image empty", "0 bytes")
    header = _read_jpeg_header(data)
    if header is None:
        with _open(_drop_png_pixels(data)) as image:
            width, height = image.size
            kind = "JPEG" if image.format == "MPO" else str(image.format)  # MPO: a JPEG with further images behind it
            # Pillow applies the orientation of a TIFF itself, to the size as well.
            orientation = 1 if kind == "TIFF" else _read_orientation(image)
            header = Header(kind, height, width, orientation, is_fast_jpeg=False)
    if header.height * header.width > max_pixels:
        raise BadSample("image too large", f"{header.width} x {header.height}, more than {max_pixels} pixels")
    if max(header.height, header.width) > MAX_SIDE:
        raise BadSample("image too large", f"{header.width} x {header.height}, a side of more than {MAX_SIDE} pixels")
    if min(header.height, header.width) < 1:
        raise BadSample("image unreadable", f"{header.width} x {header.height} pixels")
    if header.format == "JPEG":
        _check_scans(data, header.height * header.width)
    return header._replace(height=header.width, width=header.height) if header.orientation >= 5 else header


def decode_image(data: bytes, min_size: int | None = None, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image to (H, W, 3) uint8 RGB, upright, with transparent pixels blended with white.

    Args:
        data: an encoded image of one of FORMATS.
        min_size: pixels; a JPEG may be decoded at 1/2, 1/4 or 1/8 while neither side falls below this. None = full size.
        max_pixels: an image of more pixels (height x width) is refused before it is decoded.

    Raises:
        BadSample: the data is empty, not an image, too large, truncated or damaged.
    """
    header = read_header(data, max_pixels)
    factor = 1 if min_size is None else reduction_factor(header, header.height, header.width, min_size)
    return as_contiguous(decode_pixels(data, header, factor))


def as_contiguous(pixels: np.ndarray) -> np.ndarray:
    """Return the array, or a copy of it, in the order of rows, with positive strides, as torch needs it."""
    pixels = np.ascontiguousarray(pixels)
    # NumPy calls an array contiguous whatever the stride of an axis of length 1 is, and torch refuses a negative one.
    return pixels if min(pixels.strides) > 0 else pixels.copy()


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
        try:
            webp = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        except cv2.error as error:
            raise _as_bad_sample(error, data) from error
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


def iterate_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, start, end) of each segment of a JPEG that has a content, and (0xD9, end, end) at the end of the image.

    Markers inside compressed data are escaped, so that those of embedded thumbnails and of appended files do not count.
    """
    at = 2
    while (match := _MARKER.search(data, at)) is not None:
        marker, at = data[match.end() - 1], match.end()
        if marker == 0xD9:  # end of image
            yield marker, at, at
            return
        if marker in (0x01, 0xD8):  # no content
            continue
        end = at + int.from_bytes(data[at : at + 2], "big")
        if end < at + 2 or end > len(data):
            return
        yield marker, at + 2, end
        at = end


_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")


def _check_scans(data: bytes, pixels: int) -> None:
    """Raise BadSample for a JPEG whose scans take too long to decode: each goes over all the pixels, even if it is empty."""
    limit = min(_MAX_SCANS, _MAX_SCAN_PIXELS // pixels)
    if data.count(b"\xff\xda") <= limit:  # an upper bound, 100 times as fast as the exact count
        return
    scans = 0
    for number, (marker, _, _) in enumerate(iterate_segments(data)):
        scans += marker == 0xDA
        if scans > limit or number > _MAX_SEGMENTS:
            raise BadSample("image unreadable", f"a JPEG of {pixels:,} pixels with more than {limit} scans")


def _drop_png_pixels(data: bytes) -> bytes:
    """Return a PNG without its pixels, with the metadata behind them in front; other data unchanged.

    Pillow decodes a PNG to look for metadata behind its pixels. Raises BadSample for too many chunks.
    """
    if not data.startswith(_PNG):
        return data
    at, first, metadata = len(_PNG), None, []
    for _ in range(_MAX_SEGMENTS):
        kind, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4], "big")
        if len(kind) < 4 or end > len(data) or kind == b"IEND":
            break
        if kind == b"IDAT":
            first = at if first is None else first
        elif first is not None and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
            metadata.append(data[at:end])
        at = end
    else:
        raise BadSample("image unreadable", f"a PNG of more than {_MAX_SEGMENTS:,} chunks")
    if first is None:
        return data
    # Without its checksum, the header of an IDAT chunk ends what Pillow reads to open the image.
    head, start_of_pixels = data[:first], data[first : first + 8]
    if metadata:
        with suppress(BadSample):  # damaged metadata behind the pixels of an intact image are ignored
            _open(head + b"".join(metadata) + start_of_pixels).close()
            return head + b"".join(metadata) + start_of_pixels
    return head + start_of_pixels


_PNG = b"\x89PNG\r\n\x1a\n"


def _open(data: bytes) -> Image.Image:
    """Open with Pillow, which reads the header. Raises BadSample."""
    try:
        return Image.open(io.BytesIO(data), formats=tuple(FORMATS))
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
        return BadSample("image unreadable", f"none of {', '.join(FORMATS.values())}; begins with {data[:12]!r}")
    # Messages of Pillow: "image file is truncated", "Truncated File Read", WebP's "could not create decoder object"
    damaged = any(word in text.lower() for word in ("truncated", "decoder", "broken"))
    return BadSample("image truncated" if damaged else "image unreadable", text)


def _read_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 where there is none."""
    try:
        value = Image.Image.getexif(image).get(0x0112, 1)  # that of a PNG decodes the pixels first
    except MemoryError:
        raise
    except Exception:  # damaged metadata of an intact image: leave the image as it is stored
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _decode_with_pillow(data: bytes) -> np.ndarray:
    """Decode an image of any mode to (H, W, 3) uint8, orientation not applied. Raises BadSample."""
    try:
        with _open(data) as image:
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
