"""The image decoder: encoded bytes to (3, H, W) uint8.

It augments in training, and resizes and crops in evaluation. Images travel as uint8; the tower normalizes them on the
device. `Preprocess` describes all of evaluation preprocessing, normalization included, for exports.

Legend: H, W = height, width in pixels; b = images in a batch. Arrays are HWC (rows, columns, RGB), tensors CHW.

Training decodes a JPEG at 1/2, 1/4 or 1/8 of its size where the crop still has at least the target size. It resizes with
torch's antialiased uint8 filter: Pillow's filter at several times its speed, equal up to rounding. Evaluation decodes at
full size and resizes with Pillow: bit for bit the evaluation transform of open_clip and torchvision.

Measured: the two filters differ by 0.3 of 255 levels on average where they filter rows and columns in a different order,
and by 0.01 elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from collections.abc import Sequence
import torch
from PIL import Image

from pretrain.data import BadSample
from pretrain.data.decode import EXTENSIONS, MAX_PIXELS, decode_image, decode_pixels, read_header, reduction_factor
from pretrain.data.members import explain_missing_image
from pretrain.errors import ConfigError
from pretrain.config import check_numbers
from pretrain.ops import CLIP_MEAN, CLIP_STD

if TYPE_CHECKING:
    from pretrain.data.shards.paths import RawSample


_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


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


@dataclass(frozen=True)
class Preprocess:
    """Evaluation preprocessing, for exports: resize, crop, then (pixels / 255 - mean) / std."""

    size: int
    """Side of the square image, in pixels."""
    resize: Literal["crop", "squash"] = "crop"
    """crop: resize the shorter side to `size`, then crop the center; squash: resize both sides to `size`."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def to_open_clip(self) -> dict[str, Any]:
        """Return the `preprocess_cfg` of an open_clip model."""
        mode = "squash" if self.resize == "squash" else "shortest"
        common = {"size": self.size, "mode": "RGB", "mean": list(self.mean), "std": list(self.std)}
        return {**common, "interpolation": self.interpolation, "resize_mode": mode}

    def to_transformers(self) -> dict[str, Any]:
        """Return the preprocessor_config.json of a transformers CLIPImageProcessor."""
        square = {"height": self.size, "width": self.size}
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": square if self.resize == "squash" else {"shortest_edge": self.size},
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
        check_numbers(self, "data.augment")
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
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(image, size, mode=interpolation, antialias=True)[0].contiguous()


_LUMA = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)  # ITU-R 601-2, as Pillow and torchvision


def recolor(image: torch.Tensor, brightness: float, contrast: float, saturation: float) -> torch.Tensor:
    """Multiply brightness, contrast and saturation of (3, H, W) uint8, in this order (1 = unchanged).

    They blend the image with black, with the mean of the gray image, and with the gray image: torchvision's adjust_*.
    """
    x = (image.float() * brightness).clamp(0, 255)
    x = (x * contrast + (1 - contrast) * (x * _LUMA).sum(0).mean()).clamp(0, 255)
    x = (x * saturation + (1 - saturation) * (x * _LUMA).sum(0)).clamp(0, 255)
    return x.round().to(torch.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# The decoder


class ImageDecoder:
    """Decoder of the image of a sample, to (3, size, size) uint8.

    Args:
        size: side of the square output, in pixels.
        augment: the random changes in training; None = the defaults of AugmentConfig.
        resize: in evaluation, "crop" = shorter side to `size`, then the center; "squash" = both sides to `size`.
        interpolation: "bicubic" or "bilinear", both antialiased.
        max_pixels: a sample whose image has more pixels is a bad sample.
        exact: evaluate with Pillow's resize, bit-equal to torchvision's transform. False evaluates with the function
            `resize`, in a third of the time.
    """

    def __init__(
        self,
        size: int,
        augment: AugmentConfig | None = None,
        resize: str = "crop",
        interpolation: str = "bicubic",
        max_pixels: int = MAX_PIXELS,
        exact: bool = True,
    ) -> None:
        if size < 1:
            raise ConfigError(f"image.size={size} must be at least 1 pixel")
        if resize not in ("crop", "squash"):
            raise ConfigError(f"image.resize={resize!r} must be one of crop, squash")
        if interpolation not in _FILTERS:
            raise ConfigError(f"image.interpolation={interpolation!r} must be one of {', '.join(_FILTERS)}")
        self.size, self.resize, self.interpolation = size, resize, interpolation
        self.max_pixels, self.exact = max_pixels, exact
        self.augment = augment or AugmentConfig()
        self.augment.check()

    def __call__(self, sample: RawSample, rng: np.random.Generator, train: bool) -> torch.Tensor:
        """Decode the image of a sample to (3, size, size) uint8. Raises BadSample."""
        data = next((sample.members[e] for e in EXTENSIONS if e in sample.members), None)
        if data is None:
            raise BadSample("no image", explain_missing_image(sample.members, EXTENSIONS))
        return self.decode_train(data, rng) if train else self.decode_eval(data)

    def collate(self, images: list[torch.Tensor]) -> tuple[torch.Tensor, None]:
        """Stack b images to (b, 3, size, size) uint8; images have no mask."""
        return torch.stack(images), None

    def decode_train(self, data: bytes, rng: np.random.Generator) -> torch.Tensor:
        """Decode to (3, size, size) uint8 with the random changes of `augment`. Raises BadSample."""
        header, a = read_header(data, self.max_pixels), self.augment
        top, left, h, w = draw_crop(header.height, header.width, a.scale, a.ratio, rng)
        # The crop is drawn first: its size decides how small the image may be decoded. Its corner is aligned to the grid of
        # the reduced pixels; otherwise the crop would be up to half a pixel off.
        f = reduction_factor(header, h, w, self.size)
        pixels = decode_pixels(data, header, f)
        top, left, h, w = top // f, left // f, h // f, w // f
        image = resize(pixels[top : top + h, left : left + w], (self.size, self.size), self.interpolation)
        if a.flip and rng.random() < 0.5:
            image = image.flip(-1)
        if a.color > 0:
            image = recolor(image, *(float(x) for x in rng.uniform(1 - a.color, 1 + a.color, 3)))
        if a.grayscale > 0 and rng.random() < a.grayscale:
            image = recolor(image, 1, 1, 0)
        return image

    def decode_eval(self, data: bytes) -> torch.Tensor:
        """Decode to (3, size, size) uint8, deterministically. Raises BadSample."""
        pixels = decode_image(data, max_pixels=self.max_pixels)
        height, width = pixels.shape[:2]
        target = evaluation_size(height, width, self.size, self.resize)
        if not self.exact:
            image = resize(pixels, target, self.interpolation)
        else:
            pil_image = Image.fromarray(np.ascontiguousarray(pixels))
            if target != (height, width):
                pil_image = pil_image.resize((target[1], target[0]), _FILTERS[self.interpolation])
            image = torch.from_numpy(np.array(pil_image)).permute(2, 0, 1)
        top, left = round((target[0] - self.size) / 2), round((target[1] - self.size) / 2)
        return image[:, top : top + self.size, left : left + self.size].contiguous()


def evaluation_size(height: int, width: int, size: int, resize: str) -> tuple[int, int]:
    """Return the resized (H, W) before the center crop; the longer side is rounded down.

    torchvision's Resize rounds in the same way.

    Args:
        height: of the image, in pixels.
        width: of the image, in pixels.
        size: side of the square output, in pixels.
        resize: "crop" or "squash".
    """
    if resize == "squash":
        return size, size
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def visible_box(height: int, width: int, size: int, resize: str) -> tuple[float, float, float, float]:
    """Return the box of a stored image that the model sees: the center crop, or the whole image.

    Returns:
        (x0, y0, x1, y1) in pixels of the stored image.
    """
    resized_height, resized_width = evaluation_size(height, width, size, resize)
    top, left = round((resized_height - size) / 2), round((resized_width - size) / 2)
    scale_x, scale_y = width / resized_width, height / resized_height
    return left * scale_x, top * scale_y, (left + size) * scale_x, (top + size) * scale_y
