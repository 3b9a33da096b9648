"""Tests of image decoding and preprocessing, against Pillow, torchvision, open_clip and transformers."""

from __future__ import annotations

import contextlib
import io
import pickle
import resource
import struct
import time
import zlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tvf
from open_clip.transform import image_transform
from PIL import Image, ImageDraw, ImageOps
from torchvision.transforms import RandomResizedCrop

from pretrain.data import BadSample, images
from pretrain.data.decode import decode_image, read_header, reduction_factor
from pretrain.data.images import AugmentConfig, ImageDecoder, Preprocess
from pretrain.errors import ConfigError
from pretrain.ops import CLIP_MEAN, CLIP_STD


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
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
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
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


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
