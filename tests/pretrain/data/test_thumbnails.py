"""Thumbnails show whole images in their proportions, and are small whatever the image."""

import io

import numpy as np
import pytest
from PIL import Image

from pretrain.data import BadSample, loader
from pretrain.data.images import ImageDecoder
from pretrain.data.thumbnails import MAX_BYTES, SIDE, ThumbnailDecoder, encode_jpeg, make_thumbnail
from tests.support import Small


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("size", [(900, 300), (120, 700), (64, 64), (4000, 1)])
def test_a_thumbnail_is_the_whole_image(size: tuple[int, int]) -> None:
    ramp = np.linspace(0, 255, size[0] * size[1]).reshape(size[1], size[0]).astype(np.uint8)
    image = Image.fromarray(ramp).convert("RGB")
    thumbnail = make_thumbnail(encode(image))
    assert (thumbnail.width, thumbnail.height) == size
    small = thumbnail.open()
    scale = min(1, SIDE / max(size))
    assert small.size == pytest.approx((max(1, size[0] * scale), max(1, size[1] * scale)), abs=1)
    expected = image.resize(small.size, Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(small, float) - np.asarray(expected, float)).mean() < 4


def test_noise_is_small_and_transparent_or_turned_images_are_shown_as_decoded() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), dtype=np.uint8))
    assert len(make_thumbnail(encode(noise)).jpeg) <= MAX_BYTES
    assert len(encode_jpeg(noise, 3000)) <= 3000
    clear = make_thumbnail(encode(Image.new("RGBA", (40, 20), (0, 0, 0, 0)))).open()
    assert np.asarray(clear).min() > 250
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    turned = make_thumbnail(encode(Image.new("RGB", (40, 20)), "JPEG", exif=exif))
    assert (turned.width, turned.height) == turned.open().size == (20, 40)
    with pytest.raises(BadSample, match="image empty"):
        make_thumbnail(b"")


def test_thumbnails_come_beside_the_models_inputs(small: Small) -> None:
    decoders = {"image": ImageDecoder(32), "thumbnail": ThumbnailDecoder()}
    batches = list(loader.build_eval_loader(small.val, decoders, 8, workers=2, max_samples=20))
    assert [len(batch.targets["thumbnails"]) for batch in batches] == [8, 8, 4]
    assert set(batches[0].inputs) == {"image"}
    assert {thumbnail.open().size for batch in batches for thumbnail in batch.targets["thumbnails"]} == {(64, 64)}
