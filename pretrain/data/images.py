"""The image decoder: encoded bytes to (3, H, W) uint8.

It augments in training, and resizes and crops in evaluation. Images travel as uint8; the tower normalizes them on the
device. `Preprocess` describes all of evaluation preprocessing, normalization included, for exports.

Legend: H, W = height, width in pixels; b = images in a batch. Arrays are HWC (rows, columns, RGB), tensors CHW.

Training decodes a JPEG at 1/2, 1/4 or 1/8 of its size where the crop still has at least the target size. It resizes with
torch's antialiased uint8 filter: Pillow's filter at several times its speed, equal up to rounding. Evaluation decodes at
full size and resizes with Pillow: bit for bit the evaluation transform of open_clip and torchvision.

A resize of a thin image could take any amount of memory: 8000 x 1 px, its shorter side made 224 px, has 400 million pixels.
Where the sides differ by more than MAX_ASPECT, evaluation therefore crops before it resizes. The result differs from that
transform by rounding alone.

Measured: the two filters differ by 0.3 of 255 levels on average where they filter rows and columns in a different order,
and by 0.01 elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image

from pretrain.config import check_numbers
from pretrain.data import MissingContent
from pretrain.data.decode import (
    EXTENSIONS,
    MAX_PIXELS,
    Header,
    as_contiguous,
    decode_image,
    decode_pixels,
    read_header,
    reduction_factor,
)
from pretrain.data.members import explain_missing_image
from pretrain.errors import ConfigError
from pretrain.ops import CLIP_MEAN, CLIP_STD, WHITE, Color, parse_color

if TYPE_CHECKING:
    from pretrain.data.shards.paths import RawSample


_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

MAX_ASPECT = 16
"""Ratio of the longer to the shorter side up to which an image is resized whole. Panoramas have up to 10."""

RESIZES = ("crop", "squash", "pad")
"""How an image becomes square. crop: the shorter side is resized, then the center is cropped; squash: both sides are resized;
pad: the longer side is resized, and borders fill the rest."""


@dataclass
class AugmentConfig:
    """Random changes to training images."""

    scale: list[float] = field(default_factory=lambda: [0.9, 1.0])
    """Smallest and largest area of the random crop, as a fraction of the image's area. CLIP's default."""
    ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    """Smallest and largest ratio of width to height of the random crop. torchvision's default."""
    flip: bool = False
    """Mirror half of the images. Off by default: captions say "left of", and letters would be mirrored too."""
    color: float = 0.0
    """Strength c in 0..1: brightness, contrast and saturation are each multiplied by a factor drawn from 1-c to 1+c. Hue is
    not changed, because captions name colors."""
    grayscale: float = 0.0
    """Probability in 0..1 of converting an image to gray."""

    def check(self) -> None:
        """Raise ConfigError for a value out of its range."""
        for name, low, high in (("scale", 0.0, 1.0), ("ratio", 0.0, math.inf)):
            pair = getattr(self, name)
            if len(pair) != 2 or not low < pair[0] <= pair[1] <= high:
                raise ConfigError(f"augment.{name}={pair} must be [least, most], above {low:g}, at most {high:g}")
        for name in ("color", "grayscale"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"augment.{name}={getattr(self, name)} must be between 0 and 1")
        check_numbers(self, "data.augment")


def parse_resize(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return image.resize and, for "pad", image.pad_color of a `preprocess_cfg` of open_clip.

    Raises ConfigError for a color that is none.
    """
    resize = {"squash": "squash", "longest": "pad"}.get(recipe.get("resize_mode") or "shortest", "crop")
    fill = recipe.get("fill_color", 0)
    color = fill if isinstance(fill, list) else [fill] * 3
    if len(color) != 3 or not all(isinstance(value, int) and 0 <= value <= 255 for value in color):
        raise ConfigError(f"preprocess_cfg.fill_color={fill!r} must be a number from 0 to 255, or a list of three")
    return {"resize": resize} | ({"pad_color": "#" + bytes(color).hex()} if resize == "pad" else {})


@dataclass(frozen=True)
class Preprocess:
    """Evaluation preprocessing, for exports: resize, crop, then (pixels / 255 - mean) / std."""

    size: int
    """Side of the square image, in pixels."""
    resize: Literal["crop", "squash", "pad"] = "crop"
    """One of RESIZES."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    pad_color: Color = WHITE
    """Of the borders, for resize "pad"."""

    def to_open_clip(self) -> dict[str, Any]:
        """Return the `preprocess_cfg` of an open_clip model."""
        mode = {"crop": "shortest", "squash": "squash", "pad": "longest"}[self.resize]
        common = {"size": self.size, "mode": "RGB", "mean": list(self.mean), "std": list(self.std)}
        fill = {"fill_color": self.pad_color[0] if len(set(self.pad_color)) == 1 else list(self.pad_color)}
        return {**common, "interpolation": self.interpolation, "resize_mode": mode, **(fill if self.resize == "pad" else {})}

    def pads_with_mean(self) -> bool:
        """Whether borders have the mean color, the only one that timm's transforms, and so transformers, pad with."""
        return self.pad_color == parse_color("mean", self.mean)

    def to_transformers(self) -> dict[str, Any]:
        """Return the preprocessor_config.json of a transformers CLIPImageProcessor.

        That one cannot pad: for "pad", it reports the size that it does not know when it is called.
        """
        square = {"height": self.size, "width": self.size}
        sizes = {"crop": {"shortest_edge": self.size}, "squash": square, "pad": {"longest_edge": self.size}}
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": sizes[self.resize],
            "resample": int(_FILTERS[self.interpolation]),
            "do_center_crop": self.resize == "crop",
            "crop_size": square,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation


def draw_crop(
    height: int, width: int, scale: list[float], ratio: list[float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw a crop (top, left, height, width), like torchvision's RandomResizedCrop.get_params.

    Args:
        height: of the image, in pixels.
        width: of the image, in pixels.
        scale: smallest and largest area of the crop, as a fraction of the image's area.
        ratio: smallest and largest ratio of width to height.
        rng: the source of randomness.
    """
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * rng.uniform(scale[0], scale[1])
        aspect = math.exp(rng.uniform(log_low, log_high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
    w, h = width, height  # no crop fitted: take the largest centered one of an allowed ratio
    if width / height < ratio[0]:
        h = min(height, max(1, round(width / ratio[0])))
    elif width / height > ratio[1]:
        w = min(width, max(1, round(height * ratio[1])))
    return (height - h) // 2, (width - w) // 2, h, w


def resize(pixels: np.ndarray, size: tuple[int, int], interpolation: str = "bicubic") -> torch.Tensor:
    """Resize (h, w, 3) uint8 to (3, H, W) uint8 with antialiasing, for size = (H, W).

    It equals Pillow's resize up to rounding.
    """
    image = torch.from_numpy(as_contiguous(pixels)).permute(2, 0, 1)[None]
    if pixels.shape[0] > MAX_ASPECT * pixels.shape[1]:  # the filter widens all rows first
        image = torch.nn.functional.interpolate(image, (size[0], pixels.shape[1]), mode=interpolation, antialias=True)
    return torch.nn.functional.interpolate(image, size, mode=interpolation, antialias=True)[0].contiguous()


def resize_with_pillow(pixels: np.ndarray, size: tuple[int, int], interpolation: str = "bicubic") -> np.ndarray:
    """Resize (h, w, 3) uint8 to (H, W, 3) uint8 with Pillow, for size = (H, W)."""
    (h, w), (H, W) = pixels.shape[:2], size
    image = Image.fromarray(pixels)
    if h > MAX_ASPECT * w:  # Pillow widens all rows first
        image = image.resize((w, H), _FILTERS[interpolation])
    return np.array(image if image.size == (W, H) else image.resize((W, H), _FILTERS[interpolation]))


@cache
def _get_luma(device: torch.device) -> torch.Tensor:
    """Return the weights of the channels in gray, (3, 1, 1), of ITU-R 601-2, as Pillow and torchvision have them."""
    return torch.tensor([0.299, 0.587, 0.114], device=device).view(3, 1, 1)


def recolor(image: torch.Tensor, brightness: float, contrast: float, saturation: float) -> torch.Tensor:
    """Multiply brightness, contrast and saturation of (3, H, W) uint8, in this order (1 = unchanged).

    They blend the image with black, with the mean of the gray image, and with the gray image: torchvision's adjust_*.
    """
    luma = _get_luma(image.device)
    x = (image.float() * brightness).clamp(0, 255)
    x = (x * contrast + (1 - contrast) * (x * luma).sum(0).mean()).clamp(0, 255)
    x = (x * saturation + (1 - saturation) * (x * luma).sum(0)).clamp(0, 255)
    return x.round().to(torch.uint8)


class Crop(NamedTuple):
    """The part of an image that training uses, and where it lies in the tower's input."""

    height: int
    """Of the crop in pixels of the image, its borders included."""
    width: int
    rows: tuple[int, int]
    """First row of the image inside the crop, and the one after the last."""
    columns: tuple[int, int]
    corner: tuple[int, int]
    """Row and column of the first of these pixels in the tower's input; (0, 0) without borders."""
    target: tuple[int, int]
    """Height and width to which these pixels are resized."""


class Changes(NamedTuple):
    """Random changes to a cropped image, in this order."""

    flip: bool
    colors: tuple[float, float, float] | None
    """Factors of brightness, contrast and saturation; None = unchanged."""
    gray: bool

    def apply(self, image: torch.Tensor) -> torch.Tensor:
        """Return (3, H, W) uint8 with the changes."""
        image = image.flip(-1) if self.flip else image
        image = image if self.colors is None else recolor(image, *self.colors)
        return recolor(image, 1, 1, 0) if self.gray else image


# ---------------------------------------------------------------------------------------------------------------------
# The decoder


def get_image(sample: RawSample) -> bytes:
    """Return the encoded image of a sample. Raises MissingContent."""
    data = next((sample.members[e] for e in EXTENSIONS if e in sample.members), None)
    if data is None:
        raise MissingContent("no image", explain_missing_image(sample.members, EXTENSIONS))
    return data


class ImageDecoder:
    """Decoder of the image of a sample, to (3, size, size) uint8.

    Args:
        size: side of the square output, in pixels.
        augment: the random changes in training; None = the defaults of AugmentConfig.
        resize: one of RESIZES. In training, "pad" draws the random crop from the padded image, the others from the image.
        interpolation: "bicubic" or "bilinear", both antialiased.
        max_pixels: a sample whose image has more pixels is a bad sample.
        exact: evaluate with Pillow's resize, bit-equal to torchvision's transform. False evaluates with the function
            `resize`, in a third of the time.
        pad_color: color of the borders of "pad".
    """

    def __init__(
        self,
        size: int,
        augment: AugmentConfig | None = None,
        resize: str = "crop",
        interpolation: str = "bicubic",
        max_pixels: int = MAX_PIXELS,
        exact: bool = True,
        pad_color: Color = WHITE,
    ) -> None:
        if size < 1:
            raise ConfigError(f"image.size={size} must be at least 1 pixel")
        if resize not in RESIZES:
            raise ConfigError(f"image.resize={resize!r} must be one of {', '.join(RESIZES)}")
        if interpolation not in _FILTERS:
            raise ConfigError(f"image.interpolation={interpolation!r} must be one of {', '.join(_FILTERS)}")
        self.size, self.resize, self.interpolation = size, resize, interpolation
        self.max_pixels, self.exact, self.pad_color = max_pixels, exact, pad_color
        self.augment = augment or AugmentConfig()
        self.augment.check()

    def __call__(self, sample: RawSample, rng: np.random.Generator, train: bool) -> torch.Tensor:
        """Decode the image of a sample to (3, size, size) uint8. Raises BadSample."""
        data = get_image(sample)
        return self.decode_train(data, rng) if train else self.decode_eval(data)

    def blank(self, train: bool) -> torch.Tensor:
        """Return the item of a sample without an image: black."""
        return torch.zeros(3, self.size, self.size, dtype=torch.uint8)

    def collate(self, images: list[torch.Tensor]) -> tuple[torch.Tensor, None]:
        """Stack b images to (b, 3, size, size) uint8; images have no mask."""
        return torch.stack(images), None

    def decode_train(self, data: bytes, rng: np.random.Generator) -> torch.Tensor:
        """Decode to (3, size, size) uint8 with the random changes of `augment`. Raises BadSample."""
        return self.decode_train_pixels(data, read_header(data, self.max_pixels), rng)

    def decode_train_pixels(self, data: bytes, header: Header, rng: np.random.Generator) -> torch.Tensor:
        """Do the work of `decode_train` on an image whose header is read already."""
        crop, changes = self.draw_crop(header, rng), self.draw_changes(rng)
        # The crop is drawn first: its size decides how small the image may be decoded.
        f = reduction_factor(header, crop.height, crop.width, self.size)
        pixels = decode_pixels(data, header, f)
        (top, bottom), (left, right) = (self._reduce(crop.rows, f), self._reduce(crop.columns, f))
        image = resize(pixels[top:bottom, left:right], crop.target, self.interpolation)
        return changes.apply(self.pad_crop(image, crop))

    def draw_crop(self, header: Header, rng: np.random.Generator) -> Crop:
        """Draw the crop of a training image: from the image, or with resize="pad" from the image with its borders.

        Along each axis, a crop of the padded image contains the image or lies inside it: a crop of nothing but border would
        teach nothing.
        """
        if self.resize != "pad":
            top, left, h, w = draw_crop(header.height, header.width, self.augment.scale, self.augment.ratio, rng)
            return Crop(h, w, (top, top + h), (left, left + w), (0, 0), (self.size, self.size))
        side = max(header.height, header.width)
        top, left, h, w = draw_crop(side, side, self.augment.scale, self.augment.ratio, rng)
        ranges: list[tuple[int, int]] = []  # of rows, then of columns
        corner: list[int] = []
        target: list[int] = []
        for length, start, extent in ((header.height, top, h), (header.width, left, w)):
            border = (side - length) // 2
            low, high = sorted((border, border + length - extent))
            start = min(max(start, low), high)
            begin, end = max(start, border), min(start + extent, border + length)  # in pixels of the padded image
            ranges.append((begin - border, max(end - border, begin - border + 1)))
            corner.append(min(round((begin - start) * self.size / extent), self.size - 1))
            target.append(max(1, round((end - start) * self.size / extent) - corner[-1]))
        return Crop(h, w, ranges[0], ranges[1], (corner[0], corner[1]), (target[0], target[1]))

    def draw_changes(self, rng: np.random.Generator) -> Changes:
        """Draw the changes of a training image after its crop."""
        a, factors = self.augment, None
        flip = a.flip and rng.random() < 0.5
        if a.color > 0:
            brightness, contrast, saturation = (float(x) for x in rng.uniform(1 - a.color, 1 + a.color, 3))
            factors = (brightness, contrast, saturation)
        return Changes(flip, factors, a.grayscale > 0 and rng.random() < a.grayscale)

    def pad_crop(self, image: torch.Tensor, crop: Crop) -> torch.Tensor:
        """Return (3, size, size) of the resized crop (3, *crop.target), with the borders that belong to it."""
        if crop.target == (self.size, self.size):
            return image
        return self._pad(image, -crop.corner[0], -crop.corner[1])

    def _reduce(self, pixels: tuple[int, int], factor: int) -> tuple[int, int]:
        """Return a range of rows or columns in an image that is decoded smaller by `factor`.

        Its begin is aligned to the grid of the reduced pixels; otherwise the crop would be up to half a pixel off.
        """
        begin, end = pixels
        if self.resize == "pad":
            return begin // factor, max(begin // factor + 1, -(-end // factor))
        return begin // factor, begin // factor + (end - begin) // factor

    def decode_eval(self, data: bytes) -> torch.Tensor:
        """Decode to (3, size, size) uint8, deterministically. Raises BadSample."""
        pixels = decode_image(data, max_pixels=self.max_pixels)
        height, width = pixels.shape[:2]
        if self.resize == "crop" and max(height, width) > MAX_ASPECT * min(height, width):
            return torch.from_numpy(crop_and_resize(pixels, self.size, self.interpolation)).permute(2, 0, 1).contiguous()
        target = evaluation_size(height, width, self.size, self.resize)
        if self.exact:
            image = torch.from_numpy(resize_with_pillow(pixels, target, self.interpolation)).permute(2, 0, 1)
        else:
            image = resize(pixels, target, self.interpolation)
        if self.resize == "pad":
            return self._pad(image, *find_corner(target, self.size))
        top, left = find_corner(target, self.size)
        return image[:, top : top + self.size, left : left + self.size].contiguous()

    def _pad(self, image: torch.Tensor, top: int, left: int) -> torch.Tensor:
        """Return (3, size, size) with an image (3, h, w) whose first pixel is `-top`, `-left` from the corner."""
        padded = torch.empty(3, self.size, self.size, dtype=torch.uint8, device=image.device)
        for channel, level in zip(padded, self.pad_color, strict=True):
            channel.fill_(level)  # a tensor of the color would be a copy that a GPU is waited for
        padded[:, -top : image.shape[1] - top, -left : image.shape[2] - left] = image
        return padded


def find_corner(resized: tuple[int, int], size: int) -> tuple[int, int]:
    """Return (top, left) of the model's input in the resized image, in its pixels; negative where borders are added.

    torchvision's CenterCrop and open_clip's CenterCropOrPad round in the same way.
    """
    top, left = (round((side - size) / 2) if side >= size else -((size - side) // 2) for side in resized)
    return top, left


def crop_and_resize(pixels: np.ndarray, size: int, interpolation: str) -> np.ndarray:
    """Resize the shorter side to `size` and crop the center, without resizing what is cropped off.

    Args:
        pixels: (h, w, 3) uint8.
        size: side of the result, in pixels.
        interpolation: "bicubic" or "bilinear".

    Returns:
        (size, size, 3) uint8.
    """
    height, width = pixels.shape[:2]
    x0, y0, x1, y1 = visible_box(height, width, size, "crop")
    box = (x0, y0, min(x1, width), min(y1, height))
    return np.array(Image.fromarray(pixels).resize((size, size), _FILTERS[interpolation], box=box))


def evaluation_size(height: int, width: int, size: int, resize: str) -> tuple[int, int]:
    """Return the resized (H, W) before the center crop, or before borders are added.

    For "crop", the longer side is rounded down as in torchvision's Resize; for "pad", the shorter one to the nearest number as
    in open_clip's and timm's ResizeKeepRatio, but to 1 at least.

    Args:
        height: of the image, in pixels.
        width: of the image, in pixels.
        size: side of the square output, in pixels.
        resize: one of RESIZES.
    """
    if resize == "squash":
        return size, size
    if resize == "pad":
        ratio = max(height / size, width / size)
        return max(1, round(height / ratio)), max(1, round(width / ratio))
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def visible_box(height: int, width: int, size: int, resize: str) -> tuple[float, float, float, float]:
    """Return the box of a stored image that the model's input covers.

    That is the center crop, the whole image ("squash"), or the image with its borders ("pad"), which lie outside the image.

    Returns:
        (x0, y0, x1, y1) in pixels of the stored image.
    """
    resized_height, resized_width = evaluation_size(height, width, size, resize)
    top, left = find_corner((resized_height, resized_width), size)
    scale_x, scale_y = width / resized_width, height / resized_height
    return left * scale_x, top * scale_y, (left + size) * scale_x, (top + size) * scale_y


def crop_visible(pixels: np.ndarray, size: int, resize: str, color: Color = WHITE, limit: int = 2048) -> Image.Image:
    """Return the part of an image that the model's input covers, in the image's own pixels, borders included.

    Args:
        pixels: (h, w, 3) uint8.
        size: side of the model's input, in pixels.
        resize: one of RESIZES.
        color: of the borders.
        limit: an image whose padded side would be longer is scaled down to this many pixels.
    """
    height, width = pixels.shape[:2]
    if resize == "pad" and max(height, width) > limit:
        pixels = resize_with_pillow(pixels, evaluation_size(height, width, limit, "pad"))
        height, width = pixels.shape[:2]
    x0, y0, x1, y1 = visible_box(height, width, size, resize)
    left, top = min(round(x0), width - 1), min(round(y0), height - 1)
    right, bottom = max(round(x1), left + 1), max(round(y1), top + 1)  # at least one pixel, whatever is rounded
    visible = Image.new("RGB", (right - left, bottom - top), color)
    inside = Image.fromarray(as_contiguous(pixels[max(top, 0) : bottom, max(left, 0) : right]))
    visible.paste(inside, (max(-left, 0), max(-top, 0)))
    return visible
