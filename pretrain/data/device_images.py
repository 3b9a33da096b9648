"""Decoding of JPEGs where they are needed, on a GPU by nvJPEG through torchvision: data.decode_on=device.

A worker reads an image's header, draws its crop and changes as for data.decode_on=cpu, and sends the JPEG as it is.
EncodedImages decodes, crops, resizes and changes the images of a batch when the batch is moved to its device, which a thread
does one batch ahead. The worker finishes what nvJPEG does not decode, or decodes otherwise: other formats, CMYK and RGB JPEGs,
and images with an EXIF orientation.

The pixels differ from those of data.decode_on=cpu by rounding, by nvJPEG's upsampling of colors, and because a large JPEG is
decoded whole here, where libjpeg-turbo decodes it at a half or less.

Legend: b = images in a batch, S = side of the tower's input in pixels, h, w = height, width of an image.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import simplejpeg
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from pretrain.data import BadSample, MissingContent
from pretrain.data.batch import EncodedInput
from pretrain.data.decode import EXTENSIONS, read_header
from pretrain.data.images import Changes, Crop, ImageDecoder
from pretrain.data.members import explain_missing_image

if TYPE_CHECKING:
    from pretrain.data.shards.paths import RawSample

log = logging.getLogger(__name__)

END_OF_IMAGE, START_OF_SCAN = b"\xff\xd9", b"\xff\xda"


@dataclass(frozen=True)
class EncodedImage:
    """A JPEG with what is to be done with it, or an image that is finished."""

    data: np.ndarray
    """A JPEG's bytes, or the pixels of a finished image: (3 S S) uint8."""
    size: tuple[int, int] | None
    """(h, w) of a JPEG; None = finished."""
    crop: Crop | None = None
    changes: Changes | None = None
    key: str = ""
    """ "shard/KEY" of the sample, for messages."""


@dataclass
class EncodedImages(EncodedInput):
    """The images of a batch, which become (b, 3, S, S) uint8 on a device."""

    data: Tensor
    """The bytes of all images, one after the other, uint8."""
    images: list[EncodedImage]
    """Without their data."""
    lengths: list[int]
    """Bytes of each image."""
    decoder: ImageDecoder

    def join(self, others: Sequence[Self]) -> Self:
        """Return these images and those of `others`."""
        parts: list[Self] = [self, *others]
        images = [image for part in parts for image in part.images]
        lengths = [length for part in parts for length in part.lengths]
        return type(self)(torch.cat([part.data for part in parts]), images, lengths, self.decoder)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Tensor:
        """Decode to (b, 3, S, S) uint8 on `device`."""
        device, size = torch.device(device), self.decoder.size
        data = self.data.split(self.lengths)
        numbers = [number for number, image in enumerate(self.images) if image.size is not None]
        decoded = iter(decode_jpegs([data[n] for n in numbers], [self.images[n] for n in numbers], device))
        finished = [
            data[number].view(3, size, size).to(device, non_blocking=non_blocking)
            if image.size is None
            else finish(next(decoded), image, self.decoder)
            for number, image in enumerate(self.images)
        ]
        return torch.stack(finished)


class DeviceImageDecoder(ImageDecoder):
    """A decoder that leaves JPEGs to the device in training. It evaluates on the CPU, bit for bit as ImageDecoder does.

    Args:
        image: the decoder whose settings it takes.
    """

    def __init__(self, image: ImageDecoder) -> None:
        vars(self).update(vars(image))
        if hasattr(image, "blank_item"):  # samples may lack an image
            self.blank_item = EncodedImage(image.blank(train=True).numpy().ravel(), None)

    def __call__(self, sample: RawSample, rng: np.random.Generator, train: bool) -> Any:
        """Return an EncodedImage in training, and (3, S, S) uint8 in evaluation. Raises BadSample."""
        if not train:
            return super().__call__(sample, rng, train)
        data = next((sample.members[e] for e in EXTENSIONS if e in sample.members), None)
        if data is None:
            raise MissingContent("no image", explain_missing_image(sample.members, EXTENSIONS))
        header = read_header(data, self.max_pixels)
        if not header.is_fast_jpeg or header.orientation != 1 or _color_space(data) not in ("YCbCr", "Gray"):
            return EncodedImage(self.decode_train(data, rng).contiguous().numpy().ravel(), None)
        # Neither marker can stand inside of compressed data, and a thumbnail with an end of its own lies before all scans.
        if data.rfind(END_OF_IMAGE) < data.rfind(START_OF_SCAN):
            raise BadSample("image truncated", f"a JPEG of {len(data):,} bytes without its end")
        crop, changes = self.draw_crop(header, rng), self.draw_changes(rng)
        return EncodedImage(np.frombuffer(data, np.uint8), (header.height, header.width), crop, changes, sample.key)

    def collate(self, images: list[Any]) -> tuple[Any, None]:
        """Return the EncodedImages of a training batch, and (b, 3, S, S) uint8 of one in evaluation."""
        if not isinstance(images[0], EncodedImage):
            return super().collate(images)
        data = torch.from_numpy(np.concatenate([image.data for image in images]))
        none = np.empty(0, np.uint8)
        described = [EncodedImage(none, image.size, image.crop, image.changes, image.key) for image in images]
        return EncodedImages(data, described, [len(image.data) for image in images], self), None


def decode_jpegs(data: list[Tensor], images: list[EncodedImage], device: torch.device) -> list[Tensor]:
    """Decode JPEGs to (3, h, w) uint8 on `device`.

    One that the device cannot decode is decoded on the CPU as far as possible; where that fails as well it is black. Either is
    logged.

    Args:
        data: the bytes of each, on the host.
        images: what is known of each.
        device: where they are decoded.
    """
    if not data:
        return []
    # torchvision keeps a pointer to each tensor: views of one tensor that begin anywhere are allowed.
    try:
        return _check_sizes(decode_jpeg(data, mode=ImageReadMode.RGB, device=device), images)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # it does not say of which image
        return [_decode_alone(one, image, device) for one, image in zip(data, images, strict=True)]


def finish(pixels: Tensor, image: EncodedImage, decoder: ImageDecoder) -> Tensor:
    """Crop, resize and change an image (3, h, w) uint8, on its device; return (3, S, S) uint8."""
    assert image.crop is not None
    assert image.changes is not None
    (top, bottom), (left, right) = image.crop.rows, image.crop.columns
    crop = pixels[None, :, top:bottom, left:right].float()  # torch has no antialiased resize of uint8 for GPUs
    resized = torch.nn.functional.interpolate(crop, image.crop.target, mode=decoder.interpolation, antialias=True)
    resized = resized[0].round_().clamp_(0, 255).to(torch.uint8)
    return image.changes.apply(decoder.pad_crop(resized, image.crop))


def _check_sizes(pixels: list[Tensor], images: list[EncodedImage]) -> list[Tensor]:
    """Return the images. Raises RuntimeError for one whose size is not that of its header."""
    for one, image in zip(pixels, images, strict=True):
        if one.shape[1:] != image.size:
            raise RuntimeError(f"{image.key}: decoded to {tuple(one.shape[1:])}, not {image.size}")
    return pixels


def _decode_alone(data: Tensor, image: EncodedImage, device: torch.device) -> Tensor:
    """Decode one JPEG to (3, h, w) uint8 on `device`, see `decode_jpegs`."""
    assert image.size is not None
    try:
        return _check_sizes([decode_jpeg(data, mode=ImageReadMode.RGB, device=device)], [image])[0]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:120]
    try:
        pixels = simplejpeg.decode_jpeg(data.numpy().tobytes(), strict=False)
        log.warning(f"{image.key}: a damaged JPEG is used as far as it can be decoded ({reason})")
    except ValueError:
        pixels = np.zeros((*image.size, 3), np.uint8)
        log.warning(f"{image.key}: a damaged JPEG that cannot be decoded is used as a black image ({reason})")
    return torch.from_numpy(pixels).permute(2, 0, 1).to(device)


def _color_space(data: bytes) -> str:
    return str(simplejpeg.decode_jpeg_header(data, strict=False)[2])
