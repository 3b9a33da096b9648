"""Decoding of JPEGs where they are needed, on a GPU by nvJPEG through torchvision: data.decode_on=device.

A worker reads an image's header, draws its crop and changes as for data.decode_on=cpu, and sends the JPEG as it is.
EncodedImages decodes, crops, resizes and changes the images of a batch when the batch is moved to its device, which a thread
does one batch ahead. The worker finishes what nvJPEG does not decode, or decodes otherwise: other formats, CMYK and RGB JPEGs,
and images with an EXIF orientation.

The worker also finishes JPEGs of which it would send more than it saves: larger than MAX_BYTES, or MAX_REDUCTION times the
tower's input, which libjpeg-turbo decodes at an eighth. Progressive ones nvJPEG decodes on one thread of the host.

The pixels differ from those of data.decode_on=cpu by rounding, by nvJPEG's upsampling of colors, and because a JPEG is decoded
whole here, where libjpeg-turbo decodes a large one at a half or less.

Legend: b = images in a batch, S = side of the tower's input in pixels, h, w = height, width of an image.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import simplejpeg
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from pretrain.data import BadSample
from pretrain.data.batch import EncodedInput
from pretrain.data.decode import Header, iterate_segments, read_header
from pretrain.data.images import Changes, Crop, ImageDecoder, get_image
from pretrain.errors import UserError
from pretrain.printable import one_safe_line

if TYPE_CHECKING:
    from pretrain.data.shards.paths import RawSample

log = logging.getLogger(__name__)

MAX_BYTES = 1 << 20
"""Size of a JPEG above which the worker decodes it: 256 of them are sent at once, through shared memory."""
MAX_REDUCTION = 16
"""Ratio of the longer side to the tower's input above which the worker decodes a JPEG. The filter of torch's antialiased resize
on GPUs grows with it, and is refused at about three times as much."""
GROUP_PIXELS = 128 << 20
"""Pixels that are decoded at once on a device: 400 MB."""
MAX_NAMED = 20
"""Damaged images that a process names in the log."""
_BASELINE, _END = 0xC0, 0xD9  # markers of a JPEG: the frame of a baseline one, and the end of the image
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_SUBSAMPLINGS = ("444", "422", "420", "440", "Gray")


class Plan(NamedTuple):
    """What is to be done with a JPEG."""

    size: tuple[int, int]
    """(h, w)."""
    crop: Crop
    changes: Changes
    key: str
    """ "shard/KEY" of the sample, for messages."""


@dataclass(frozen=True)
class EncodedImage:
    """A JPEG with what is to be done with it, or an image that is finished."""

    data: np.ndarray
    """A JPEG's bytes, or the pixels of a finished image: (3 S S) uint8."""
    plan: Plan | None = None
    """None = finished."""


@dataclass
class EncodedImages(EncodedInput):
    """The images of a batch, which become (b, 3, S, S) uint8 on a device."""

    data: Tensor
    """The bytes of all images, one after the other, uint8."""
    plans: list[Plan | None]
    """Of each image."""
    lengths: list[int]
    """Bytes of each image."""
    decoder: ImageDecoder

    def join(self, others: Sequence[Self]) -> Self:
        """Return these images and those of `others`."""
        parts: list[Self] = [self, *others]
        plans = [plan for part in parts for plan in part.plans]
        lengths = [length for part in parts for length in part.lengths]
        return type(self)(torch.cat([part.data for part in parts]), plans, lengths, self.decoder)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Tensor:
        """Decode to (b, 3, S, S) uint8 on `device`, in groups of at most GROUP_PIXELS.

        Raises UserError where torchvision decodes no JPEG on the device.
        """
        device, size = torch.device(device), self.decoder.size
        data = self.data.split(self.lengths)
        finished: dict[int, Tensor] = {}
        for group in self._list_groups():
            decoded = decode_jpegs([data[n] for n in group], list(group.values()), device)
            for (n, plan), pixels in zip(group.items(), decoded, strict=True):
                finished[n] = finish(pixels, plan, self.decoder)
        for n in range(len(self.plans)):
            if self.plans[n] is None:
                finished[n] = data[n].view(3, size, size).to(device, non_blocking=non_blocking)
        return torch.stack([finished[n] for n in range(len(self.plans))])

    def _list_groups(self) -> list[dict[int, Plan]]:
        """Return the plans of the JPEGs that are decoded at once, by number, for one group after the other."""
        groups: list[dict[int, Plan]] = []
        pixels = GROUP_PIXELS
        for n, plan in enumerate(self.plans):
            if plan is None:
                continue
            pixels += math.prod(plan.size)
            if pixels > GROUP_PIXELS:
                groups.append({})
                pixels = math.prod(plan.size)
            groups[-1][n] = plan
        return groups


class DeviceImageDecoder(ImageDecoder):
    """A decoder that leaves JPEGs to the device in training. It evaluates on the CPU, bit for bit as ImageDecoder does.

    Args:
        image: the decoder whose settings it takes.
    """

    def __init__(self, image: ImageDecoder) -> None:
        vars(self).update(vars(image))
        if hasattr(image, "blank_item"):  # samples may lack an image
            self.blank_item = EncodedImage(image.blank(train=True).numpy().ravel())

    def __call__(self, sample: RawSample, rng: np.random.Generator, train: bool) -> Any:
        """Return an EncodedImage in training, and (3, S, S) uint8 in evaluation. Raises BadSample."""
        if not train:
            return super().__call__(sample, rng, train)
        data = get_image(sample)
        header = read_header(data, self.max_pixels)
        markers = [marker for marker, _, _ in iterate_segments(data)] if header.is_fast_jpeg else []
        if not self._is_for_device(data, header, markers):
            return EncodedImage(self.decode_train_pixels(data, header, rng).contiguous().numpy().ravel())
        if markers[-1] != _END:
            raise BadSample("image truncated", f"a JPEG of {len(data):,} bytes without its end")
        crop, changes = self.draw_crop(header, rng), self.draw_changes(rng)
        return EncodedImage(np.frombuffer(data, np.uint8), Plan((header.height, header.width), crop, changes, sample.key))

    def _is_for_device(self, data: bytes, header: Header, markers: Sequence[int]) -> bool:
        """Return whether an image is to be decoded on the device. markers: of its segments; [] = not a JPEG."""
        if not markers or header.orientation != 1 or len(data) > MAX_BYTES:
            return False
        if max(header.height, header.width) > MAX_REDUCTION * self.size or _BASELINE not in markers:
            return False
        _, _, space, subsampling = simplejpeg.decode_jpeg_header(data, strict=False)
        return space in ("YCbCr", "Gray") and subsampling in _SUBSAMPLINGS and len(_FRAMES.intersection(markers)) == 1

    def collate(self, images: list[Any]) -> tuple[Any, None]:
        """Return the EncodedImages of a training batch, and (b, 3, S, S) uint8 of one in evaluation."""
        if not isinstance(images[0], EncodedImage):
            return super().collate(images)
        data = torch.from_numpy(np.concatenate([image.data for image in images]))
        decoder = ImageDecoder(  # without what is not used there
            self.size, self.augment, self.resize, self.interpolation, self.max_pixels, self.exact, self.pad_color
        )
        return EncodedImages(data, [image.plan for image in images], [len(image.data) for image in images], decoder), None


def decode_jpegs(data: list[Tensor], plans: list[Plan], device: torch.device) -> list[Tensor]:
    """Decode JPEGs to (3, h, w) uint8 on `device`.

    One that the device does not decode is decoded on the CPU as far as possible; where that fails as well it is black. Either
    is logged.

    Args:
        data: the bytes of each, on the host.
        plans: of each.
        device: where they are decoded.

    Raises:
        UserError: the device decodes none, of these or at all.
    """
    check_device(device)
    decoded = _decode_group(data, plans, device)
    if len(plans) > 1 and all(isinstance(one, RuntimeError) for one in decoded):
        raise UserError(
            f"data.decode_on=device: torchvision decodes none of {len(plans)} JPEGs on {device} ({_shorten(decoded[0])}); "
            "use data.decode_on=cpu"
        )
    return [
        _decode_damaged(one, plan, device, pixels) if isinstance(pixels, RuntimeError) else pixels
        for one, plan, pixels in zip(data, plans, decoded, strict=True)
    ]


@cache
def check_device(device: torch.device) -> None:
    """Raise UserError where torchvision cannot decode JPEGs on a device, for example without nvJPEG."""
    sound = np.frombuffer(simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8)), np.uint8).copy()
    try:
        decode_jpeg([torch.from_numpy(sound)], mode=ImageReadMode.RGB, device=device)
    except RuntimeError as error:
        raise UserError(
            f"data.decode_on=device: torchvision decodes no JPEG on {device} ({_shorten(error)}); use data.decode_on=cpu"
        ) from error


def finish(pixels: Tensor, plan: Plan, decoder: ImageDecoder) -> Tensor:
    """Crop, resize and change an image (3, h, w) uint8, on its device; return (3, S, S) uint8."""
    (top, bottom), (left, right) = plan.crop.rows, plan.crop.columns
    crop = pixels[None, :, top:bottom, left:right].float()  # torch has no antialiased resize of uint8 for GPUs
    resized = torch.nn.functional.interpolate(crop, plan.crop.target, mode=decoder.interpolation, antialias=True)
    resized = resized[0].round_().clamp_(0, 255).to(torch.uint8)
    return plan.changes.apply(decoder.pad_crop(resized, plan.crop))


def _decode_group(data: list[Tensor], plans: list[Plan], device: torch.device) -> list[Tensor | RuntimeError]:
    """Decode JPEGs on a device; return pixels, or the error of each that it does not decode."""
    if device.type == "cuda":
        # nvJPEG writes on a stream of torchvision's own, into memory of the current one: kernels that were queued there may
        # still read what that memory held before.
        torch.cuda.current_stream(device).synchronize()
    try:
        pixels = decode_jpeg(data, mode=ImageReadMode.RGB, device=device)
        for one, plan in zip(pixels, plans, strict=True):
            if one.shape[1:] != plan.size:
                raise RuntimeError(f"decoded to {tuple(one.shape[1:])}, not {plan.size}")
        return list(pixels)
    except RuntimeError as error:  # it does not say of which image
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # what was queued before the error still writes
        if len(data) == 1:
            return [error]
        half = len(data) // 2
        return _decode_group(data[:half], plans[:half], device) + _decode_group(data[half:], plans[half:], device)


def _decode_damaged(data: Tensor, plan: Plan, device: torch.device, error: RuntimeError) -> Tensor:
    """Decode on the CPU a JPEG that the device does not decode, to (3, h, w) uint8 on `device`; see `decode_jpegs`."""
    encoded = data.numpy().tobytes()
    try:
        pixels, what = simplejpeg.decode_jpeg(encoded, strict=False), "is decoded on the CPU, as far as it can be"
    except ValueError:
        pixels, what = np.zeros((*plan.size, 3), np.uint8), "cannot be decoded and is used as a black image"
    number = next(_damaged)
    if number < MAX_NAMED:
        more = " (further ones are not named)" if number == MAX_NAMED - 1 else ""
        log.warning(one_safe_line(f"{plan.key}: a JPEG that fails on {device} {what}: {_shorten(error)}{more}"))
    return torch.from_numpy(pixels).permute(2, 0, 1).to(device)


_damaged = count()


def _shorten(error: object) -> str:
    return " ".join(str(error).split())[:120]
