"""Tests of data.decode_on=device: JPEGs decoded where they are needed, by torchvision.

On the CPU torchvision decodes a list of JPEGs with libjpeg; on a GPU the same call runs nvJPEG.
"""

import io
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from pretrain.data import BadSample, device_images
from pretrain.data.batch import Batch, allow_missing
from pretrain.data.device_images import MAX_BYTES, DeviceImageDecoder, EncodedImage
from pretrain.data.images import AugmentConfig, ImageDecoder
from pretrain.data.loader import DataConfig, build_loader
from pretrain.data.shards.paths import RawSample
from pretrain.data.text import TextDecoder, load_tokenizer
from pretrain.errors import UserError
from pretrain.runtime.device_copy import feed
from tests.support import Small, read_losses, read_sample_keys, run_clipfuse

CPU = torch.device("cpu")
START_OF_SCAN = b"\xff\xda"
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
    (top, bottom), (left, right) = item.plan.crop.rows, item.plan.crop.columns
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
    for whole in (
        data,
        encode(smooth(0, 60, 60), exif=thumbnail),
        encode(smooth(0, 60, 60), progressive=True),
    ):  # by the worker
        for kept in (0.5, 0.99):
            sample = RawSample("s/0", {"jpg": whole[: int(kept * len(whole))]})
            with pytest.raises(BadSample, match="image truncated"):
                DeviceImageDecoder(ImageDecoder(32))(sample, np.random.default_rng(0), True)


def break_scan(data: bytes) -> bytes:
    """Return a JPEG whose scan names a Huffman table that is not there: sound for who reads headers only."""
    broken = bytearray(data)
    scan = broken.index(b"\xff\xda")
    broken[scan + 6] = 0x33
    return bytes(broken)


def test_damage_inside_is_used_as_far_as_it_can_be_decoded(caplog: pytest.LogCaptureFixture) -> None:
    """The others of the batch are what they are without it, and each damaged one is named in one line."""
    image = ImageDecoder(32)
    whole = [encode(smooth(seed, 64, 64)) for seed in range(5)]
    with caplog.at_level(logging.WARNING):
        actual = decode(DeviceImageDecoder(image), [whole[0], break_scan(whole[1]), *whole[2:]])
    expected = decode(DeviceImageDecoder(image), whole)
    assert torch.equal(actual[[0, 2, 3, 4]], expected[[0, 2, 3, 4]])
    assert not actual[1].any()
    line = "s/1: a JPEG that fails on cpu cannot be decoded and is used as a black image: "
    assert [record.getMessage()[: len(line)] for record in caplog.records] == [line]


def test_a_device_that_decodes_none_ends_the_run() -> None:
    """Not one warning for each image, and not an image as black as the next."""
    image = ImageDecoder(32)
    with pytest.raises(UserError, match=r"torchvision decodes none of 3 JPEGs on cpu .* use data\.decode_on=cpu"):
        decode(DeviceImageDecoder(image), [break_scan(encode(smooth(seed, 64, 64))) for seed in range(3)])


def test_the_worker_finishes_what_a_device_decodes_badly() -> None:
    """Progressive JPEGs, large ones, and rare subsamplings; and what is behind a JPEG is not its content."""
    image = ImageDecoder(32)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8))
    rare = simplejpeg.encode_jpeg(np.array(smooth(0, 64, 64)), colorsubsampling="411")
    for_worker = [
        encode(smooth(0, 64, 64), progressive=True), encode(smooth(0, 40, 600)), encode(noise, quality=100, subsampling=0), rare
    ]  # fmt: skip
    assert len(for_worker[2]) > MAX_BYTES
    for number, data in enumerate(for_worker):
        item = DeviceImageDecoder(image)(RawSample("s/0", {"jpg": data}), np.random.default_rng(number), True)
        assert item.plan is None
        expected = image.decode_train(data, np.random.default_rng(number))
        assert torch.equal(torch.from_numpy(item.data).view(3, 32, 32), expected)
    trailer = encode(smooth(0, 64, 64)) + b"film" + START_OF_SCAN + b"film"
    item = DeviceImageDecoder(image)(RawSample("s/0", {"jpg": trailer}), np.random.default_rng(0), True)
    assert item.plan.size == (64, 64)


def test_a_batch_is_decoded_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    image, images = ImageDecoder(32, HARD), [encode(smooth(seed, 50 + seed, 60)) for seed in range(5)]
    images[2] = encode(smooth(2, 40, 40), "PNG")
    whole = decode(DeviceImageDecoder(image), images)
    monkeypatch.setattr(device_images, "GROUP_PIXELS", 6500)
    assert torch.equal(decode(DeviceImageDecoder(image), images), whole)


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


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"subsampling": 2}, {"quality": 60}, {}])
def test_batches_decoded_ahead_of_a_busy_gpu_do_not_mix(options: dict[str, int]) -> None:
    """nvJPEG writes on a stream of its own: eight batches in a row are what each is alone."""
    image, cuda = ImageDecoder(224, HARD, "pad"), torch.device("cuda")
    decoder = DeviceImageDecoder(image)
    encoded = [[encode(smooth(100 * n + i, 400 + i, 500), **options) for i in range(16)] for n in range(8)]
    alone = [decode(decoder, images, seed=n, device=cuda) for n, images in enumerate(encoded)]

    def batches() -> Iterator[tuple[int, Batch]]:
        for n, images in enumerate(encoded):
            items = [
                decoder(RawSample(f"s/{i}", {"jpg": data}), np.random.default_rng([n, i]), True)
                for i, data in enumerate(images)
            ]
            yield n, Batch({"image": decoder.collate(items)[0]}, {}, ["k"] * len(items))

    busy = torch.randn(4096, 4096, device=cuda)
    with feed(batches(), cuda, True, lambda: None) as fed:
        for n, batch in fed:
            for _ in range(20):
                busy = torch.tanh(busy @ busy)
            assert batch is not None
            assert torch.equal(batch.inputs["image"], alone[n])
