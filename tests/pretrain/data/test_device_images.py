"""Tests of data.decode_on=device: JPEGs decoded where they are needed, by torchvision.

On the CPU torchvision decodes a list of JPEGs with libjpeg; on a GPU the same call runs nvJPEG.
"""

import io
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from pretrain.data import BadSample
from pretrain.data.batch import Batch, allow_missing
from pretrain.data.device_images import DeviceImageDecoder, EncodedImage
from pretrain.data.images import AugmentConfig, ImageDecoder
from pretrain.data.loader import DataConfig, build_loader
from pretrain.data.shards.paths import RawSample
from pretrain.data.text import TextDecoder, load_tokenizer
from tests.support import Small, read_losses, read_sample_keys, run_clipfuse

CPU = torch.device("cpu")
HARD = AugmentConfig(scale=[0.3, 1.0], flip=True, color=0.4, grayscale=0.3)


def smooth(seed: int, height: int, width: int) -> Image.Image:
    """Return an image without sharp edges, so that a rounding of a place shows little."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def decode(decoder: ImageDecoder, images: list[bytes], seed: int = 0, device: torch.device = CPU) -> torch.Tensor:
    """Decode images for training, each with random numbers of its own, in two partial batches."""
    items = [
        decoder(RawSample(f"s/{number}", {"jpg": data}), np.random.default_rng([seed, number]), True)
        for number, data in enumerate(images)
    ]
    half = len(items) // 2 or 1
    first = decoder.collate(items[:half])[0]
    joined = first.join([decoder.collate(items[half:])[0]]) if len(items) > half else first
    return Batch({"image": joined}, {}, ["k"] * len(items)).to(device).inputs["image"]


def expect(decoder: ImageDecoder, images: list[bytes], seed: int = 0) -> torch.Tensor:
    return torch.stack(
        [decoder.decode_train(data, np.random.default_rng([seed, number])) for number, data in enumerate(images)]
    )


def assert_close(actual: torch.Tensor, expected: torch.Tensor, mean: float = 0.5, most: int = 6) -> None:
    assert actual.dtype == torch.uint8
    assert actual.shape == expected.shape
    difference = (actual.int() - expected.int()).abs()
    assert difference.float().mean(dim=(1, 2, 3)).max() < mean
    assert difference.max() <= most


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_images_are_those_of_the_cpu(resize: str, interpolation: str) -> None:
    """Crops, borders, flips and colors of 24 images: the random numbers are drawn in the same order."""
    image = ImageDecoder(48, HARD, resize, interpolation, pad_color=(250, 3, 90))
    sizes = [(60, 80), (90, 50), (50, 50), (95, 51)] * 6  # none is decoded at a half
    images = [encode(smooth(seed, *size), quality=95, subsampling=0) for seed, size in enumerate(sizes)]
    images[3] = encode(smooth(3, 60, 60).convert("L"))
    assert_close(decode(DeviceImageDecoder(image), images), expect(image, images))


def test_a_crop_is_that_of_torchvision() -> None:
    """Decoded by Pillow, cropped and resized by torchvision from the box that was drawn."""
    image = ImageDecoder(64, AugmentConfig(scale=[0.2, 0.9]))
    data = encode(smooth(1, 300, 400), quality=95, subsampling=0)
    actual = decode(DeviceImageDecoder(image), [data])[0]
    item = DeviceImageDecoder(image)(RawSample("s/0", {"jpg": data}), np.random.default_rng([0, 0]), True)
    (top, bottom), (left, right) = item.crop.rows, item.crop.columns
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).permute(2, 0, 1)
    expected = TF.resized_crop(
        pixels, top, left, bottom - top, right - left, [64, 64], TF.InterpolationMode.BICUBIC, antialias=True
    )
    assert_close(actual[None], expected[None])


def test_other_formats_and_rotated_images_are_finished_by_the_worker() -> None:
    """Bit for bit as on the CPU, between JPEGs that are not."""
    image = ImageDecoder(32, HARD)
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated = encode(smooth(0, 40, 70), exif=exif)
    jpeg, png, cmyk = encode(smooth(1, 40, 40)), encode(smooth(2, 40, 50), "PNG"), encode(smooth(3, 40, 40).convert("CMYK"))
    images = [jpeg, rotated, png, jpeg, cmyk]
    actual, expected = decode(DeviceImageDecoder(image), images), expect(image, images)
    assert torch.equal(actual[[1, 2, 4]], expected[[1, 2, 4]])
    assert_close(actual, expected)


def test_evaluation_stays_as_it_is() -> None:
    image, data = ImageDecoder(32), encode(smooth(0, 50, 70))
    sample = RawSample("s/0", {"jpg": data})
    item = DeviceImageDecoder(image)(sample, np.random.default_rng(0), False)
    assert torch.equal(item, image.decode_eval(data))
    assert torch.equal(DeviceImageDecoder(image).collate([item])[0][0], item)


def test_a_sample_without_an_image_is_black() -> None:
    decoders = allow_missing({"image": ImageDecoder(8), "text": ImageDecoder(8), "audio": ImageDecoder(8)}, train=True)
    decoder = DeviceImageDecoder(decoders["image"])
    assert isinstance(decoder.blank_item, EncodedImage)
    assert torch.equal(decoder.collate([decoder.blank_item])[0].to(CPU), torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_truncated_jpegs_are_bad_samples() -> None:
    data = encode(smooth(0, 60, 60))
    thumbnail = Image.Exif()
    thumbnail[0x9286] = encode(smooth(1, 16, 16))  # a JPEG with an end of its own, in front of the scans
    for whole in (data, encode(smooth(0, 60, 60), exif=thumbnail), encode(smooth(0, 60, 60), progressive=True)):
        for kept in (0.5, 0.99):
            sample = RawSample("s/0", {"jpg": whole[: int(kept * len(whole))]})
            with pytest.raises(BadSample, match="image truncated"):
                DeviceImageDecoder(ImageDecoder(32))(sample, np.random.default_rng(0), True)


def test_damage_inside_is_used_as_far_as_it_can_be_decoded(caplog: pytest.LogCaptureFixture) -> None:
    """The others of the batch are what they are without it, and each damaged one is named in one line."""
    image = ImageDecoder(32)
    whole = [encode(smooth(seed, 64, 64), progressive=seed == 1) for seed in range(4)]
    broken = bytearray(whole[1])
    second_scan = broken.index(b"\xff\xda", broken.index(b"\xff\xda") + 2)
    components = broken[second_scan + 4]
    broken[second_scan + 5 + 2 * components] = 77  # its first coefficient, of 64
    with caplog.at_level(logging.WARNING):
        actual = decode(DeviceImageDecoder(image), [whole[0], bytes(broken), *whole[2:]])
    expected = decode(DeviceImageDecoder(image), whole)
    assert torch.equal(actual[[0, 2, 3]], expected[[0, 2, 3]])
    assert not actual[1].any()
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == [
        "s/1: a damaged JPEG that cannot be decoded is used as a black image"
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_reads_the_same_samples(small: Small, workers: int) -> None:
    """With a thread ahead of the trainer and without; images are on the device when it takes them."""
    tokenizer = load_tokenizer(small.tokenizer)
    batches = {}
    for kind in (ImageDecoder, DeviceImageDecoder):
        image: ImageDecoder = ImageDecoder(48, HARD)
        decoders = {"image": image if kind is ImageDecoder else kind(image), "text": TextDecoder(tokenizer, 24)}
        loader = build_loader(DataConfig(train=str(small.train), batch_size=16, workers=workers, window=2), decoders, seed=1)
        loader.partial_size, loader.is_ahead = 5, workers > 0
        iterator = iter(loader)
        batches[kind] = [next(iterator) for _ in range(3)]
        iterator.close()
    for a, b in zip(batches[ImageDecoder], batches[DeviceImageDecoder], strict=True):
        assert a.keys == b.keys
        assert torch.equal(a.inputs["text"], b.inputs["text"])
        assert_close(b.inputs["image"], a.inputs["image"], mean=2.0, most=60)  # drawn scenes have sharp edges


def test_a_run_resumes_and_is_the_same_on_two_processes(small: Small, tmp_path: Path) -> None:
    def train(run: str, *more: str) -> Path:
        settings = ["data.decode_on=device", "train.steps=4", "train.save_every=2", "train.audit=true"]
        run_clipfuse("pretrain", "scenes", *more[:-1], *small.settings(tmp_path / run, *settings, more[-1]), cwd=tmp_path)
        return tmp_path / run

    whole = train("whole", "data.workers=0")
    losses = read_losses(whole)
    assert len(losses) == 4
    resumed = train("resumed", f"resume={whole / 'checkpoints/step-0000002'}")
    assert read_losses(resumed) == {step: loss for step, loss in losses.items() if step > 2}
    last = "checkpoints/step-0000004/model.safetensors"
    assert (resumed / last).read_bytes() == (whole / last).read_bytes()
    shared = train("shared", "--nproc", "2", "train.strategy=ddp")
    by_rank = read_sample_keys(shared, 0), read_sample_keys(shared, 1)
    assert {step: keys + by_rank[1][step] for step, keys in by_rank[0].items()} == read_sample_keys(whole)
    assert list(read_losses(shared).values()) == pytest.approx(list(losses.values()), rel=2e-5)
    assert "decode_on: device" in (whole / "config.yaml").read_text()


@pytest.mark.gpu
def test_nvjpeg_decodes_as_the_cpu_does() -> None:
    """Without subsampling of colors, whose interpolation differs."""
    image = ImageDecoder(48, HARD)
    images = [encode(smooth(seed, 60, 80), quality=95, subsampling=0) for seed in range(8)]
    actual = decode(DeviceImageDecoder(image), images, device=torch.device("cuda"))
    assert actual.is_cuda
    assert_close(actual.cpu(), expect(image, images), mean=1.0, most=10)
