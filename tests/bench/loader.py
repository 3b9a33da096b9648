"""Compares images/s of our loader and open_clip's on one core; prints one JSON line.

    python -m tests.bench.loader [--images 1000 --rounds 3] [--device cpu|cuda]

Both turn JPEGs of 500 x 375 into training images of 224 px. The images have the spectrum of photographs (about 80 KB each),
are generated for the run, and are in the page cache for both. Both run in this process with one thread, from tars to
batches of images and token ids. open_clip's pipeline is assembled from its parts, in the order and with the settings of
open_clip_train.data.get_wds_dataset (3.3.0), with its own transform and tokenizer.

On a GPU, or where --device names one, also images/s of data.decode_on=device there: what a batch of encoded images takes until
it is decoded, cropped and resized, in elapsed time.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import statistics
import tarfile
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import open_clip
import torch
import webdataset as wds
from open_clip.transform import image_transform
from PIL import Image

from pretrain.data.device_images import DeviceImageDecoder
from pretrain.data.images import AugmentConfig, ImageDecoder
from pretrain.data.loader import DataConfig, build_loader
from pretrain.data.shards.paths import RawSample, expand_shards
from pretrain.data.text import TextDecoder, load_tokenizer, train_tokenizer

BATCH = 50
NODE_RATE = 64_000
"""Images per second that 8 GPUs of a node take with a compiled ViT-B/32, estimated."""
WORDS = "a red blue old dog cat house tree boat on the under of near with street people mountain photo water".split()  # noqa: SIM905


def main() -> None:
    """Measure both and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else None)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        size = write_shards(Path(folder), args.images)
        train_tokenizer(folder, Path(folder) / "tokenizer", vocab=400)
        decoders = {
            "image": ImageDecoder(224, AugmentConfig()),
            "text": TextDecoder(load_tokenizer(Path(folder) / "tokenizer"), 77),
        }
        on_device = measure_device(expand_shards(folder), torch.device(args.device)) if args.device else None
        our_batches = iter(build_loader(DataConfig(train=folder, batch_size=BATCH, workers=0), decoders, seed=0))
        peer_batches = iterate_open_clip_batches(expand_shards(folder))
        first = next(our_batches), next(peer_batches)
        assert first[0].inputs["image"].shape == first[1][0].shape == (BATCH, 3, 224, 224)
        rounds = [(measure_rate(peer_batches, args.images), measure_rate(our_batches, args.images)) for _ in range(args.rounds)]
    peer_rate, our_rate = (statistics.median(rates) for rates in zip(*rounds, strict=True))
    figures = {
        "bench": "loader",
        "kilobytes_per_image": round(size / 1000, 1),
        "open_clip_images_per_second": round(peer_rate, 1),
        "images_per_second": round(our_rate, 1),
        "ratio": round(our_rate / peer_rate, 2),
        "cores_for_64k_images_per_second": math.ceil(NODE_RATE / our_rate),
        "open_clip_cores_for_64k_images_per_second": math.ceil(NODE_RATE / peer_rate),
    }
    if on_device is not None:
        figures["images_per_second_decoded_on_device"] = round(on_device, 1)
    print(json.dumps(figures))


def measure_device(paths: list[str], device: torch.device, rounds: int = 5) -> float:
    """Return images per second of the images of a shard, as one batch, with data.decode_on=device."""
    decoder = DeviceImageDecoder(ImageDecoder(224, AugmentConfig()))
    with tarfile.open(paths[0]) as tar:
        files = [(member.name, tar.extractfile(member)) for member in tar]
        images = [file.read() for name, file in files if file is not None and name.endswith(".jpg")]
    items = [decoder(RawSample("s/k", {"jpg": data}), np.random.default_rng(n), True) for n, data in enumerate(images)]
    batch = decoder.collate(items)[0]
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        batch.to(device)[-1, -1, -1, -1].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return len(images) / statistics.median(seconds)


def measure_rate(batches: Iterator[Any], images: int) -> float:
    """Return images per second of processor time."""
    start = time.process_time()
    for _ in range(images // BATCH):
        next(batches)
    return images // BATCH * BATCH / (time.process_time() - start)


def iterate_open_clip_batches(paths: list[str]) -> Iterator[Any]:
    """Yield the batches of open_clip's training script, without end."""
    preprocess = image_transform(224, is_train=True)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    while True:
        yield from wds.DataPipeline(
            wds.SimpleShardList(paths),
            wds.tarfile_to_samples(),
            wds.shuffle(bufsize=5000, initial=1000),
            wds.select(lambda sample: "txt" in sample and "jpg" in sample),
            wds.decode("pilrgb"),
            wds.rename(image="jpg;png;jpeg;webp", text="txt"),
            wds.map_dict(image=preprocess, text=lambda text: tokenizer(text)[0]),
            wds.to_tuple("image", "text"),
            wds.batched(BATCH, partial=False),
        )


def write_shards(folder: Path, images: int) -> float:
    """Write shards of images and captions; return the mean size of an image in bytes."""
    rng = np.random.default_rng(0)
    size = 0
    for shard in range(4):
        with tarfile.open(folder / f"{shard:04d}.tar", "w") as tar:
            for i in range(images // 4):
                data = io.BytesIO()
                Image.fromarray(generate_photograph(rng)).save(data, "JPEG", quality=88)
                size += len(data.getvalue())
                caption = " ".join(rng.choice(WORDS, int(rng.integers(5, 20)))).encode()
                for name, content in (("jpg", data.getvalue()), ("txt", caption)):
                    info = tarfile.TarInfo(f"{shard:04d}{i:05d}.{name}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return size / images


def generate_photograph(rng: np.random.Generator) -> np.ndarray:
    """Return random pixels whose amplitudes fall with frequency as in photographs: (375, 500, 3) uint8."""
    height, width = 375, 500
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    frequency **= 1.2
    luminance = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((height, width))) / frequency, (height, width))
    tint = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((3, height, width))) / frequency**1.25, (height, width))
    pixels = 128 + 50 * luminance[..., None] / luminance.std() + 15 * np.moveaxis(tint, 0, -1) / tint.std()
    return pixels.clip(0, 255).astype(np.uint8)


if __name__ == "__main__":
    main()
