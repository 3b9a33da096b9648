"""Tests of image decoding and preprocessing, against Pillow, torchvision, open_clip and transformers."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import resource
import struct
import subprocess
import time
import zlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tvf
from open_clip.transform import image_transform
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin
from timm.data import create_transform
from torchvision.transforms import RandomResizedCrop

from pretrain.data import BadSample, images
from pretrain.data.decode import MAX_SIDE, as_contiguous, decode_image, read_header, reduction_factor
from pretrain.data.images import MAX_ASPECT, AugmentConfig, ImageDecoder, Preprocess, crop_visible, visible_box
from pretrain.errors import ConfigError
from pretrain.ops import CLIP_MEAN, CLIP_STD, parse_color


def natural(height: int, width: int, seed: int = 0) -> Image.Image:
    """Return an image with the 1/f spectrum of photographs and a few hard edges."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]) + 1 / max(height, width)
    planes = []
    for _ in range(3):
        spectrum = rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)
        planes.append(np.fft.irfft2(spectrum / frequency, (height, width)))
    pixels = np.stack(planes, -1) + planes[0][:, :, None]
    pixels = 127 + 50 * (pixels - pixels.mean()) / pixels.std()
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    ImageDraw.Draw(image).rectangle((width // 5, height // 4, width // 2, height // 2), fill=(230, 40, 30))
    return image


def drawn(height: int, width: int) -> Image.Image:
    """Return a line drawing."""
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    for i in range(0, width, 9):
        pen.line((i, 0, width - i, height), fill=(i * 7 % 256, i * 13 % 256, 40), width=2)
    pen.ellipse((width // 4, height // 4, width * 3 // 4, height * 3 // 4), fill=(20, 90, 200))
    return image


def encode(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def pillow(data: bytes) -> np.ndarray:
    """Return the pixels that Pillow decodes, upright, with transparent pixels blended with white."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert image is not None
    rgba = image.convert("RGBA")
    white = Image.new("RGB", rgba.size, "white")
    white.paste(rgba, mask=rgba.getchannel("A"))
    return np.asarray(white)


def exact_uint8(normalized: torch.Tensor) -> torch.Tensor:
    """Convert normalized pixels, as open_clip returns them, back to uint8 levels."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (CLIP_MEAN, CLIP_STD))
    return ((normalized * std + mean) * 255).round().to(torch.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "4:1:1"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_is_pillows_bit_for_bit(subsampling: str, progressive: bool) -> None:
    data = encode(natural(187, 251), quality=88, subsampling=subsampling, progressive=progressive)
    assert np.array_equal(decode_image(data), pillow(data))


FORMS: dict[str, bytes] = {}


def _forms() -> None:
    """Fill FORMS: name of a format -> an encoded image of 60 x 80 pixels."""
    image = natural(60, 80)
    alpha = Image.fromarray(np.tile(np.linspace(0, 255, 80).astype(np.uint8), (60, 1)))
    rgba = image.copy()
    rgba.putalpha(alpha)
    palette = image.quantize(60)
    transparent = image.quantize(60)
    FORMS.update(
        gray_jpeg=encode(image.convert("L")),
        rgb_jpeg=encode(image, keep_rgb=True),
        cmyk_jpeg=encode(image.convert("CMYK")),
        png=encode(image, "PNG"),
        gray_png=encode(image.convert("L"), "PNG"),
        one_bit_png=encode(image.convert("1"), "PNG"),
        palette_png=encode(palette, "PNG"),
        palette_transparent_png=encode(transparent, "PNG", transparency=3),
        palette_alpha_png=encode(transparent, "PNG", transparency=bytes(range(0, 240, 4))),
        rgba_png=encode(rgba, "PNG"),
        gray_alpha_png=encode(rgba.convert("LA"), "PNG"),
        color_key_png=encode(image, "PNG", transparency=image.getpixel((5, 5))),
        webp=encode(image, "WEBP", quality=80),
        webp_lossless=encode(image, "WEBP", lossless=True),
        webp_alpha=encode(rgba, "WEBP", quality=80),
        gif=encode(palette, "GIF"),
        bmp=encode(image, "BMP"),
        tiff=encode(image, "TIFF"),
    )


_forms()


@pytest.mark.parametrize("form", sorted(FORMS))
def test_every_format_decodes_as_in_pillow(form: str) -> None:
    pixels = decode_image(FORMS[form])
    assert pixels.shape == (60, 80, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - pillow(FORMS[form])).max() <= 1  # alpha compositing rounds either way
    assert ImageDecoder(32).decode_train(FORMS[form], np.random.default_rng(0)).shape == (3, 32, 32)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    ramp = (np.arange(256 * 4, dtype=np.uint16).reshape(4, 256) % 256) * 257
    assert np.array_equal(decode_image(encode(Image.fromarray(ramp), "PNG"))[..., 1], np.tile(np.arange(256), (4, 1)))
    dark = np.full((3, 5), 200, np.uint16)  # 200 of 65,535 is black, although it would fit in a byte
    assert decode_image(encode(Image.fromarray(dark), "PNG")).max() == 0


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation(orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(natural(96, 144), form, exif=exif)
    expected = pillow(data)
    assert np.array_equal(decode_image(data), expected)
    header = read_header(data)
    assert (header.height, header.width) == expected.shape[:2]
    if form == "JPEG":
        small = decode_image(data, min_size=48)
        assert small.shape[:2] == (expected.shape[0] // 2, expected.shape[1] // 2)
        assert np.abs(small.astype(int) - np.asarray(Image.fromarray(expected).reduce(2))).mean() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 30), (30, 1), (2, 40)])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_of_images_of_one_pixel(form: str, width: int, height: int, orientation: int) -> None:
    """A reversed axis of length 1 has a negative stride, which torch refuses, though NumPy calls the array contiguous."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(natural(height, width), form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))
    expected = pillow(data)
    pixels = decode_image(data)
    assert np.array_equal(pixels, expected)
    assert min(pixels.strides) > 0
    upright = encode(Image.fromarray(expected), "PNG")
    for resize in images.RESIZES:
        decoder = ImageDecoder(48, resize=resize)  # larger than the image, which is therefore decoded at its full size
        assert torch.equal(decoder.decode_eval(data), decoder.decode_eval(upright)), resize
        drawn = [decoder.decode_train(image, np.random.default_rng(1)) for image in (data, upright)]
        assert torch.equal(*drawn), resize


def test_one_row_of_a_turned_image_is_contiguous() -> None:
    row = np.arange(24, dtype=np.uint8).reshape(4, 2, 3)[::-1][1:2]
    assert torch.from_numpy(as_contiguous(row)).tolist() == [[[12, 13, 14], [15, 16, 17]]]


@pytest.mark.parametrize("where", ["before the pixels", "behind the pixels"])
@pytest.mark.parametrize("kind", ["eXIf", "XMP", "ImageMagick"])
def test_the_orientation_of_a_png_is_read_without_its_pixels(kind: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    if kind == "eXIf":
        chunk = png_chunk(b"eXIf", exif.tobytes()[6:])
    elif kind == "XMP":
        chunk = png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + b'<rdf:Description tiff:Orientation="6"/>')
    else:
        text = f"\nexif\n{len(exif.tobytes())}\n{exif.tobytes().hex()}\n"
        chunk = png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text.encode()))
    plain = encode(natural(40, 60), "PNG")
    at = plain.index(b"IDAT" if where == "before the pixels" else b"IEND") - 4
    data = plain[:at] + chunk + plain[at:]
    loads = count_loads(monkeypatch)
    assert read_header(data)[:4] == ("PNG", 60, 40, 6)
    assert loads == []
    pixels = decode_image(data)
    assert loads == ["PNG"]  # once
    assert np.array_equal(pixels, pillow(data))
    assert np.array_equal(pixels, np.rot90(decode_image(plain), -1))


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def count_loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows by the format whenever Pillow decodes the pixels of a PNG."""
    loads: list[str] = []
    load = PngImagePlugin.PngImageFile.load

    def load_and_count(image: Any) -> Any:
        if image.tile:  # empty once the pixels are there
            loads.append(image.format)
        return load(image)

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load_and_count)
    return loads


def test_a_png_above_the_limit_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data, loads = encode(Image.new("1", (3000, 2000)), "PNG"), count_loads(monkeypatch)
    with pytest.raises(BadSample, match="3000 x 2000, more than 5000000 pixels"):
        read_header(data, max_pixels=5_000_000)
    assert loads == []


def test_damaged_metadata_behind_the_pixels_do_not_matter() -> None:
    plain = encode(natural(40, 60), "PNG")
    chunk = bytearray(png_chunk(b"eXIf", b"MM\0*\0\0\0\x08" + bytes(20)))
    chunk[-1] ^= 1
    data = plain[:-12] + bytes(chunk) + plain[-12:]
    assert np.array_equal(decode_image(data), decode_image(plain))


def test_a_jpeg_is_never_decoded_below_what_is_needed() -> None:
    data = encode(natural(301, 401))
    sides = {size: decode_image(data, min_size=size).shape[0] for size in (37, 38, 75, 76, 150, 151, 301, 400)}
    assert sides == {37: 38, 38: 76, 75: 76, 76: 151, 150: 151, 151: 301, 301: 301, 400: 301}


# ---------------------------------------------------------------------------------------------------------------------
# Bad content


def reason(data: bytes) -> str:
    """Return the reason of the BadSample that decoding raises."""
    with pytest.raises(BadSample) as caught:
        decode_image(data)
    assert caught.value.detail
    return caught.value.reason


def huge_jpeg() -> bytes:
    data = bytearray(encode(natural(16, 16)))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", 30000, 30000)
    return bytes(data)


def huge_png(side: int = 30000) -> bytes:
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(bytes(1000)))
        + png_chunk(b"IEND", b"")
    )


def huge_webp() -> bytes:
    """Return a single-color image of the largest size of WebP: under a kilobyte encoded, 805 MB decoded."""
    data = bytearray(encode(Image.new("RGB", (16, 16)), "WEBP", quality=50))
    at = data.index(b"\x9d\x01\x2a") + 3  # key frame: start code, then 14 bits each of width and height
    data[at : at + 4] = struct.pack("<HH", 16383, 16383)
    return bytes(data)


@pytest.mark.parametrize("make", [huge_jpeg, huge_png, huge_webp, lambda: huge_png(9000)])
def test_huge_images_are_refused_by_their_header(make: Any) -> None:
    data = make()
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    assert reason(data) == "image too large"
    assert time.perf_counter() - start < 0.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024  # KiB


def test_data_that_is_not_an_image() -> None:
    assert reason(b"") == "image empty"
    for data in (
        b"<html>not found</html>",
        b"\xff\xd8",
        b"\x89PNG\r\n\x1a\n",
        b"RIFF\0\0\0\0WEBPVP8 ",
        b"GIF89a",
        b"\0" * 99,
    ):
        assert reason(data) in ("image unreadable", "image truncated")


@pytest.mark.parametrize("form", sorted(set(FORMS) - {"bmp", "tiff"}))
@pytest.mark.parametrize("fraction", [0.3, 0.6, 0.95])
def test_truncated_images_are_bad_samples(form: str, fraction: float) -> None:
    data = FORMS[form]
    assert reason(data[: int(len(data) * fraction)]) in ("image truncated", "image unreadable")


@pytest.mark.parametrize("progressive", [False, True])
def test_a_truncated_jpeg_with_an_end_marker_is_bad_too(progressive: bool) -> None:
    data = encode(natural(200, 300), progressive=progressive)
    assert reason(data[: len(data) // 2] + b"\xff\xd9") == "image truncated"


def test_padding_that_viewers_ignore_is_accepted() -> None:
    data = encode(natural(64, 64))
    assert np.array_equal(decode_image(data + b"appended"), decode_image(data))
    padded = data[:-2] + bytes(40) + data[-2:]
    assert np.array_equal(decode_image(padded), decode_image(data))


def repeat_last_scan(data: bytes, times: int) -> bytes:
    """Return a progressive JPEG whose last scan occurs `times` times more."""
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * (times + 1) + b"\xff\xd9"


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (1, 300), (256, 256), (1024, 1024)])
def test_many_scans_are_refused_at_any_size(height: int, width: int, mode: str) -> None:
    data = encode(natural(height, width).convert(mode), progressive=True, quality=30)
    assert decode_image(repeat_last_scan(data, 20)).shape == (height, width, 3)
    with pytest.raises(BadSample) as caught:
        read_header(repeat_last_scan(data, 80))
    assert (caught.value.reason, caught.value.detail) == (
        "image unreadable",
        f"a JPEG of {height * width:,} pixels with more than 64 scans",
    )


def test_the_larger_a_jpeg_the_fewer_its_scans(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(encode(natural(16, 16), progressive=True))
    at = data.index(b"\xff\xc2")
    data[at + 5 : at + 9] = struct.pack(">HH", 8000, 8000)
    assert read_header(bytes(data))[:3] == ("JPEG", 8000, 8000)
    with pytest.raises(BadSample, match="a JPEG of 64,000,000 pixels with more than 16 scans"):
        read_header(repeat_last_scan(bytes(data), 20))


def test_scans_of_thumbnails_and_of_what_is_appended_do_not_count() -> None:
    data = encode(natural(64, 64), progressive=True)
    thumbnail = b"\xff\xed" + struct.pack(">H", 2 + 400) + b"\xff\xda" * 200  # an application's segment
    motion = data[:2] + thumbnail + data[2:] + b"\xff\xda\0\2" * 5000
    assert np.array_equal(decode_image(motion), decode_image(data))


def test_segments_without_end_are_refused() -> None:
    data = encode(natural(16, 16), progressive=True)
    many = data[:2] + b"\xff\xfe\0\2" * 70_000 + repeat_last_scan(data, 80)[2:]
    assert reason(many) == "image unreadable"
    chunks = encode(natural(16, 16), "PNG")
    at = chunks.index(b"IDAT") - 4
    assert reason(chunks[:at] + png_chunk(b"teSt", b"") * 70_000 + chunks[at:]) == "image unreadable"


def test_a_side_beyond_the_limit_is_refused() -> None:
    assert decode_image(encode(Image.new("L", (MAX_SIDE, 1)), "PNG")).shape == (1, MAX_SIDE, 3)
    for size in ((MAX_SIDE + 1, 1), (1, MAX_SIDE + 1)):
        assert reason(encode(Image.new("L", size), "PNG")) == "image too large"


@pytest.mark.parametrize(
    "data",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, 60) + bytes(20) + b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"Image type: a\r\nImage size (x*y): 3*4*5\r\n" + b"\0" * 500 + b"\x1a" + bytes(99),
        b"P6 4 4 255\n" + bytes(48),
        b"%PDF-1.4\n",
        b"\xd7\xcd\xc6\x9a" + bytes(60),
        b"#define a_width 4\n#define a_height 4\nstatic char a_bits[] = {\n0,0,0,0};",
        encode(Image.new("RGB", (8, 8)), "JPEG2000"),
        encode(Image.new("RGB", (8, 8)), "TGA"),
        encode(Image.new("RGB", (8, 8)), "ICO"),
        encode(Image.new("RGB", (8, 8)), "IM"),
        encode(Image.new("RGB", (8, 8)), "EPS"),
    ],
)
def test_only_the_named_formats_are_opened(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: pytest.fail(f"started {args}"))
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    for decode in (read_header, decode_image):
        with pytest.raises(BadSample) as caught:
            decode(data)
        assert caught.value.reason == "image unreadable"
        assert "none of JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF; begins with" in caught.value.detail


def test_an_avif_named_jpg_is_read() -> None:
    data = encode(drawn(64, 80), "AVIF", quality=95)
    assert np.array_equal(decode_image(data), pillow(data))


def test_a_jpeg_with_too_many_scans_is_refused() -> None:
    data = encode(natural(1100, 1100), progressive=True, quality=30)
    last = data.rindex(b"\xff\xda")
    assert reason(data[:last] + data[last:-2] * 80 + b"\xff\xd9") == "image unreadable"


def test_random_bytes_raise_nothing_but_bad_sample() -> None:
    rng = np.random.default_rng(5)
    for data in FORMS.values():
        for _ in range(15):
            broken = bytearray(data)
            for at in rng.integers(0, len(data), 12):
                broken[at] = rng.integers(0, 256)
            with contextlib.suppress(BadSample):
                assert decode_image(bytes(broken)).shape[2] == 3


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation

IMAGES = {
    "wide": natural(375, 500),
    "tall": natural(500, 333, 1),
    "long": natural(90, 500, 2),
    "small": natural(50, 70, 3),
    "exact": natural(224, 224, 4),
    "drawn": drawn(256, 199),
}


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_evaluation_equals_the_transform_of_open_clip(name: str, mode: str, interpolation: str) -> None:
    data = encode(IMAGES[name], quality=92)
    reference = image_transform(224, is_train=False, resize_mode=mode, interpolation=interpolation)
    expected = exact_uint8(reference(Image.open(io.BytesIO(data))))
    ours = "squash" if mode == "squash" else "crop"
    assert torch.equal(ImageDecoder(224, resize=ours, interpolation=interpolation).decode_eval(data), expected)
    fast = ImageDecoder(224, resize=ours, interpolation=interpolation, exact=False).decode_eval(data)
    difference = (fast.int() - expected.int()).abs()
    assert difference.float().mean() < 0.3
    assert difference.max() <= 24


def count_resized_pixels(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the pixels of each image that Pillow or torch makes by resizing."""
    counts: list[int] = []
    resize, interpolate = Image.Image.resize, torch.nn.functional.interpolate

    def resize_and_count(image: Image.Image, size: tuple[int, int], *args: Any, **options: Any) -> Image.Image:
        # Pillow filters the rows of the box first, all that the columns then need.
        rows = options["box"][3] - options["box"][1] + 20 if "box" in options else image.height
        counts.append(int(max(size[0] * rows, size[0] * size[1])))
        return resize(image, size, *args, **options)

    def interpolate_and_count(image: torch.Tensor, size: tuple[int, int], **options: Any) -> torch.Tensor:
        counts.append(max(size[1] * image.shape[2], size[0] * size[1]))
        return interpolate(image, size, **options)

    monkeypatch.setattr(Image.Image, "resize", resize_and_count)
    monkeypatch.setattr(torch.nn.functional, "interpolate", interpolate_and_count)
    return counts


THIN = [(1, 1), (1, 40), (40, 1), (1, 4000), (4000, 1), (2, MAX_SIDE), (MAX_SIDE, 2), (900, 50), (3, 49)]


@pytest.mark.parametrize(("height", "width"), THIN)
@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
@pytest.mark.parametrize("exact", [True, False])
def test_the_work_is_bounded_by_the_target_size(
    height: int, width: int, resize: str, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode(Image.new("L", (width, height), 90), "PNG")
    wide_crops = AugmentConfig(scale=[0.01, 1], ratio=[1e-5, 1e5])
    counts = count_resized_pixels(monkeypatch)
    for decoder in (ImageDecoder(32, resize=resize, exact=exact), ImageDecoder(32, wide_crops, resize=resize)):
        for image in (decoder.decode_eval(data), *(decoder.decode_train(data, np.random.default_rng(s)) for s in range(5))):
            assert image.shape == (3, 32, 32)
            if resize != "pad":
                assert (image == 90).all()
    assert max(counts) <= max(MAX_ASPECT * 32 * 32, height * width)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("height", "width"), [(40, 1500), (1500, 40), (60, 1200), (3, 100), (100, 3), (1, 4000), (2, 777)])
def test_thin_images_are_cropped_before_the_resize(height: int, width: int, interpolation: str) -> None:
    """The result is that of open_clip's transform, which resizes the whole image, up to rounding.

    Pillow chooses by the size which axis it filters first, and rounds in between.
    """
    image = natural(height, width, seed=height)
    reference = image_transform(24, is_train=False, resize_mode="shortest", interpolation=interpolation)
    ours = ImageDecoder(24, interpolation=interpolation).decode_eval(encode(image, "PNG"))
    difference = (ours.int() - exact_uint8(reference(image)).int()).abs()
    assert difference.max() <= 2
    assert difference.float().mean() < 0.3


@pytest.mark.parametrize(("height", "width"), [(48, 48 * MAX_ASPECT), (48 * MAX_ASPECT, 48), (5, 80), (500, 33)])
def test_up_to_the_limit_evaluation_is_bit_equal(height: int, width: int) -> None:
    data = encode(natural(height, width), "PNG")
    for mode, resize in (("shortest", "crop"), ("squash", "squash"), ("longest", "pad")):
        reference = image_transform(40, is_train=False, resize_mode=mode, interpolation="bicubic", fill_color=255)
        expected = exact_uint8(reference(Image.open(io.BytesIO(data))))
        assert torch.equal(ImageDecoder(40, resize=resize).decode_eval(data), expected), mode


# ---------------------------------------------------------------------------------------------------------------------
# Borders


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_padding_equals_the_transforms_of_open_clip_and_timm(name: str, interpolation: str) -> None:
    data = encode(IMAGES[name], quality=92)
    image = Image.open(io.BytesIO(data))
    reference = image_transform(224, is_train=False, resize_mode="longest", interpolation=interpolation, fill_color=255)
    ours = ImageDecoder(224, resize="pad", interpolation=interpolation).decode_eval(data)
    assert torch.equal(ours, exact_uint8(reference(image)))
    options: dict[str, Any] = {"crop_pct": 1.0, "crop_mode": "border", "mean": CLIP_MEAN, "std": CLIP_STD}
    timm_transform = create_transform((3, 224, 224), interpolation=interpolation, **options)
    ours = ImageDecoder(224, resize="pad", interpolation=interpolation, pad_color=parse_color("mean")).decode_eval(data)
    assert torch.equal(ours, exact_uint8(timm_transform(image)))


@pytest.mark.parametrize(("height", "width"), [(30, 90), (90, 30), (64, 64), (64, 65), (1, 500), (500, 1), (33, 2000)])
def test_a_padded_image_is_whole_and_in_the_middle(height: int, width: int) -> None:
    data = encode(Image.new("RGB", (width, height), (200, 10, 10)), "PNG")
    image = ImageDecoder(48, resize="pad", pad_color=(0, 0, 255)).decode_eval(data)
    inside = image[0] == 200
    rows, columns = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
    long, short = max(height, width), min(height, width)
    expected = (48, max(1, round(48 * short / long)))
    assert (len(columns), len(rows)) == (expected if width >= height else expected[::-1])
    assert inside.sum() == len(rows) * len(columns)
    assert (image[2] == 255).sum() == 48 * 48 - inside.sum()
    for lines in (rows, columns):
        assert 0 <= (47 - lines[-1]) - lines[0] <= 1


@pytest.mark.parametrize(
    ("height", "width", "limit"), [(30, 300, 25), (300, 30, 25), (80, 64, 20), (1, 400, 256), (1200, 500, 12)]
)
@pytest.mark.parametrize("scale", [[0.9, 1.0], [0.02, 0.3]])
def test_training_crops_of_a_padded_image(height: int, width: int, limit: float, scale: list[float]) -> None:
    """Against Pillow's crop of the padded image; along each axis it contains the image or lies inside it.

    `limit` is the largest mean difference, in levels; where a row of the result is wider than the image, there is none.
    """
    data = encode(natural(height, width), "JPEG", quality=95)
    side = max(height, width)
    top0, left0 = (side - height) // 2, (side - width) // 2
    square = Image.new("RGB", (side, side), (0, 255, 0))
    square.paste(Image.fromarray(pillow(data)), (left0, top0))
    decoder = ImageDecoder(40, AugmentConfig(scale=scale), resize="pad", pad_color=(0, 255, 0))
    for seed in range(8):
        top, left, h, w = images.draw_crop(side, side, scale, [3 / 4, 4 / 3], np.random.default_rng(seed))
        top = int(np.clip(top, *sorted((top0, top0 + height - h))))
        left = int(np.clip(left, *sorted((left0, left0 + width - w))))
        crop = square.crop((left, top, left + w, top + h))
        expected = np.asarray(crop.resize((40, 40), Image.Resampling.BICUBIC)).astype(int)
        share = np.asarray(crop.resize((40, 40), Image.Resampling.BOX))  # how much of a pixel is border
        ours = decoder.decode_train(data, np.random.default_rng(seed)).permute(1, 2, 0).numpy().astype(int)
        border = (ours == (0, 255, 0)).all(-1)
        assert (~border).any()
        whole = (share == (0, 255, 0)).all(-1)
        # Borders end at a whole pixel: at most one row or column on each side is decided otherwise.
        assert (whole ^ border).sum() <= 2 * 40
        inside = ~(border | whole)
        inside[1:-1, 1:-1] &= inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
        if inside.any():
            assert np.abs(ours - expected)[inside].mean() < limit


def test_colors() -> None:
    assert parse_color("white") == (255, 255, 255)
    assert parse_color("#0a0b0c") == (10, 11, 12)
    assert parse_color("mean", (0.5, 0.25, 0.0)) == (128, 64, 0)
    for text in ("whitish", "", "#12", "#11223344", "255,255,255"):
        with pytest.raises(ConfigError, match=r"image.pad_color='.*' must be a color's name \(white\), #rrggbb, or mean"):
            parse_color(text)


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
@pytest.mark.parametrize(("height", "width"), [(30, 90), (90, 31), (1, 4000), (4000, 1), (MAX_SIDE, 3), (7, 7)])
def test_the_visible_part_is_what_the_decoder_shows(height: int, width: int, resize: str) -> None:
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: max(1, height // 3), : max(1, width // 3)] = (255, 0, 0)
    visible = crop_visible(pixels, 32, resize, (0, 0, 255))
    assert min(visible.size) >= 1
    assert visible.width * visible.height <= max(height * width, 2048 * 2048)
    shown = ImageDecoder(32, resize=resize, pad_color=(0, 0, 255)).decode_eval(encode(Image.fromarray(pixels), "PNG"))
    small = np.asarray(visible.resize((32, 32), Image.Resampling.BOX)).astype(int)
    assert np.abs(small - shown.permute(1, 2, 0).numpy()).mean() < 16
    x0, y0, x1, y1 = visible_box(height, width, 32, resize)
    if resize == "pad":
        assert (x0 <= 0.5 * width / 32, x1 - x0 >= width - 1e-9, y1 - y0 >= height - 1e-9) == (True, True, True)


def test_the_image_processor_that_cannot_pad_says_so() -> None:
    from transformers import CLIPImageProcessor

    settings = Preprocess(96, resize="pad").to_transformers()
    settings.pop("image_processor_type")
    with pytest.raises(ValueError, match="longest_edge=96"):
        CLIPImageProcessor(**settings)(IMAGES["wide"], return_tensors="pt")


@pytest.mark.parametrize("color", [(255, 255, 255), (0, 0, 0), (200, 100, 50)])
def test_open_clip_pads_with_the_exported_color(color: Any) -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    settings = json.loads(json.dumps(Preprocess(96, resize="pad", pad_color=color).to_open_clip()))
    data = encode(IMAGES["tall"])
    expected = image_transform_v2(PreprocessCfg(**settings), is_train=False)(Image.open(io.BytesIO(data)))
    assert torch.equal(ImageDecoder(96, resize="pad", pad_color=color).decode_eval(data), exact_uint8(expected))


@pytest.mark.parametrize("mode", ["crop", "squash"])
def test_exported_preprocessing_equals_evaluation(mode: Any) -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from transformers import CLIPImageProcessor

    preprocess, data = Preprocess(96, resize=mode), encode(IMAGES["wide"])
    image = Image.open(io.BytesIO(data))
    ours = ImageDecoder(96, resize=mode).decode_eval(data)
    assert torch.equal(exact_uint8(image_transform_v2(PreprocessCfg(**preprocess.to_open_clip()), is_train=False)(image)), ours)
    settings = preprocess.to_transformers()
    settings.pop("image_processor_type")
    expected = CLIPImageProcessor(**settings)(image, return_tensors="pt")["pixel_values"][0]
    difference = (exact_uint8(expected).int() - ours.int()).abs()
    assert expected.shape == ours.shape
    assert difference.float().mean() < 0.02
    assert difference.max() <= 2


# ---------------------------------------------------------------------------------------------------------------------
# Training


class Replay:
    """Generator that records its draws, so that torchvision can be given the same ones."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.floats: list[float] = []

    def uniform(self, low: float, high: float) -> float:
        value = float(self.rng.uniform(low, high))
        self.floats.append(value)
        return value

    def integers(self, low: int, high: int) -> int:
        return low + (high - low) // 2


@pytest.mark.parametrize("size", [(375, 500), (500, 60), (60, 500), (3, 3)])
@pytest.mark.parametrize("scale", [[0.9, 1.0], [0.08, 1.0]])
def test_crops_are_those_of_torchvision(size: tuple[int, int], scale: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    ratio = [3 / 4, 4 / 3]
    for seed in range(20):
        replay: Any = Replay(seed)
        ours = images.draw_crop(*size, scale, ratio, replay)
        draws = iter([torch.tensor([x]) for x in replay.floats])
        monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, low, high, draws=draws: next(draws))
        monkeypatch.setattr(torch, "randint", lambda low, high, size: torch.tensor([low + (high - low) // 2]))
        expected = RandomResizedCrop.get_params(torch.zeros(3, *size), scale, ratio)
        monkeypatch.undo()
        assert ours == tuple(expected)


@pytest.mark.parametrize(("height", "width", "limit"), [(300, 400, 0.3), (600, 800, 2.5), (1200, 1600, 2.5), (100, 120, 0.3)])
def test_training_images_against_pillow(height: int, width: int, limit: float) -> None:
    """The result is close to Pillow's crop and antialiased bicubic resize of the full image.

    `limit` is the largest mean absolute difference, in levels of 255; above 0.3 only where the JPEG is decoded smaller.
    """
    data = encode(natural(height, width), quality=92)
    for seed in range(5):
        top, left, h, w = images.draw_crop(height, width, [0.9, 1.0], [3 / 4, 4 / 3], np.random.default_rng(seed))
        f = reduction_factor(read_header(data), h, w, 224)
        assert f == max(1, min(height, width) // 300)
        top, left, h, w = (x // f * f for x in (top, left, h, w))
        crop = Image.fromarray(pillow(data)).crop((left, top, left + w, top + h))
        expected = np.asarray(crop.resize((224, 224), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        ours = ImageDecoder(224).decode_train(data, np.random.default_rng(seed)).numpy()
        assert np.abs(ours.astype(int) - expected).mean() < limit


@pytest.mark.parametrize(
    "factors", [(1.3, 1, 1), (0.6, 1, 1), (1, 1.4, 1), (1, 0.5, 1), (1, 1, 1.5), (1, 1, 0.0), (0.8, 1.2, 1.3)]
)
def test_recolor_against_torchvision(factors: tuple[float, float, float]) -> None:
    image = tvf.pil_to_tensor(natural(64, 64))
    expected = tvf.adjust_brightness(image, factors[0])
    expected = tvf.adjust_saturation(tvf.adjust_contrast(expected, factors[1]), factors[2])
    ours = images.recolor(image, *factors)
    assert (ours.int() - expected.int()).abs().max() <= 3  # torchvision truncates to integer levels after each of the three


def test_flip_color_and_grayscale_are_drawn() -> None:
    data = encode(natural(64, 64), "PNG")
    unchanged = ImageDecoder(64, AugmentConfig(scale=[1, 1], ratio=[1, 1]))
    base = unchanged.decode_train(data, np.random.default_rng(0))
    flips = ImageDecoder(64, AugmentConfig(scale=[1, 1], ratio=[1, 1], flip=True))
    is_flipped = [torch.equal(flips.decode_train(data, np.random.default_rng(s)), base.flip(-1)) for s in range(200)]
    assert 70 < sum(is_flipped) < 130
    gray = ImageDecoder(64, AugmentConfig(grayscale=1.0, color=0.4)).decode_train(data, np.random.default_rng(0))
    assert torch.equal(gray[0], gray[1])
    assert torch.equal(gray[0], gray[2])
    recolored = ImageDecoder(64, AugmentConfig(scale=[1, 1], ratio=[1, 1], color=0.4))
    assert len({bytes(recolored.decode_train(data, np.random.default_rng(s)).numpy()) for s in range(5)}) == 5


def test_the_decoder_as_the_loader_calls_it() -> None:
    decoder = pickle.loads(pickle.dumps(ImageDecoder(48)))
    sample: Any = SimpleNamespace(key="a/1", members={"jpeg": encode(natural(70, 90)), "txt": b"x"})
    one = decoder(sample, np.random.default_rng(3), True)
    assert torch.equal(one, decoder(sample, np.random.default_rng(3), True))
    assert not torch.equal(one, decoder(sample, np.random.default_rng(4), True))
    batch, mask = decoder.collate([one, decoder(sample, np.random.default_rng(3), False)])
    assert batch.shape == (2, 3, 48, 48)
    assert batch.dtype == torch.uint8
    assert mask is None
    assert batch.is_contiguous()
    with pytest.raises(BadSample) as caught:
        decoder(SimpleNamespace(key="a/2", members={"txt": b"x"}), np.random.default_rng(0), True)
    assert (caught.value.reason, caught.value.detail) == ("no image", "members: txt")


@pytest.mark.parametrize(
    "options",
    [
        {"scale": [0.0, 1.0]},
        {"scale": [0.9, 1.1]},
        {"ratio": [2.0, 1.0]},
        {"scale": [0.5]},
        {"color": 2.0},
        {"grayscale": -1},
    ],
)
def test_invalid_augmentation_is_named(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"augment.{next(iter(options))}="):
        AugmentConfig(**options).check()


def test_invalid_decoder_options_are_refused() -> None:
    for options in ({"size": 0}, {"size": 8, "resize": "stretch"}, {"size": 8, "interpolation": "nearest"}):
        with pytest.raises(ConfigError):
            ImageDecoder(**options)
