"""Pictures: bytes -> (3, H, W) uint8. Decoding; random crops and colour for training; resize and crop for evaluation.

Normalisation is not done here: pictures travel as uint8 and the tower normalises them on the device. `Preprocess` holds
the whole recipe for those who must repeat it elsewhere (exports).

Legend: H, W = height, width in pixels; b = pictures in a batch. Arrays are HWC (rows, columns, RGB), tensors CHW.

Training decodes a JPEG at 1/2, 1/4 or 1/8 when the crop keeps at least the target's size that way, and resizes with
torch's antialiased filter for uint8: Pillow's filter at several times its speed, equal but for rounding (0.3 levels of
255 on average where the two take rows and columns in another order, 0.01 elsewhere). Evaluation decodes fully and
resizes with Pillow: bit for bit what the evaluation transform of open_clip and torchvision gives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image

from pretrain.data import BadSample
from pretrain.data.decode import EXTENSIONS, MAX_PIXELS, decode_image, decode_pixels, read_header, reduction_factor
from pretrain.errors import ConfigError
from pretrain.ops import CLIP_MEAN, CLIP_STD

if TYPE_CHECKING:
    from pretrain.data.shards.paths import RawSample


_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass
class AugmentConfig:
    """Random changes to training pictures."""

    scale: list[float] = field(default_factory=lambda: [0.9, 1.0])
    """Area of the random crop, as a share of the picture's: least, most. CLIP's own default."""
    ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    """Width over height of the random crop: least, most. torchvision's default."""
    flip: bool = False
    """Mirror half of the pictures. Off: captions say "left of", and letters would be mirrored too."""
    color: float = 0.0
    """Strength c in 0..1: brightness, contrast and saturation are each multiplied by a draw from 1-c to 1+c. No hue
    shift, because captions name colours."""
    grayscale: float = 0.0
    """Probability in 0..1 of taking the colour out."""

    def check(self) -> None:
        """Raises ConfigError for a value out of its range."""
        for name, low, high in (("scale", 0.0, 1.0), ("ratio", 0.0, math.inf)):
            pair = getattr(self, name)
            if len(pair) != 2 or not low < pair[0] <= pair[1] <= high:
                raise ConfigError(f"augment.{name}={pair} must be [least, most], above {low:g}, at most {high:g}")
        for name in ("color", "grayscale"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"augment.{name}={getattr(self, name)} must be between 0 and 1")


@dataclass(frozen=True)
class Preprocess:
    """The evaluation recipe of an image tower, for exports: pixels / 255, minus mean, over std."""

    size: int
    """Side of the square picture, in pixels."""
    resize: Literal["crop", "squash"] = "crop"
    """crop: the shorter side to `size`, then the centre; squash: both sides to `size`."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def to_open_clip(self) -> dict[str, Any]:
        """The `preprocess_cfg` of an open_clip model."""
        mode = "squash" if self.resize == "squash" else "shortest"
        common = {"size": self.size, "mode": "RGB", "mean": list(self.mean), "std": list(self.std)}
        return {**common, "interpolation": self.interpolation, "resize_mode": mode}

    def to_transformers(self) -> dict[str, Any]:
        """The preprocessor_config.json of a transformers CLIPImageProcessor."""
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
# Random changes


def draw_crop(
    height: int, width: int, scale: list[float], ratio: list[float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random part, as torchvision's RandomResizedCrop.get_params draws it."""
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * rng.uniform(scale[0], scale[1])
        aspect = math.exp(rng.uniform(log_low, log_high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
    w, h = width, height  # no luck: the largest centred part whose ratio is allowed
    if width / height < ratio[0]:
        h = min(height, max(1, round(width / ratio[0])))
    elif width / height > ratio[1]:
        w = min(width, max(1, round(height * ratio[1])))
    return (height - h) // 2, (width - w) // 2, h, w


def resize(pixels: np.ndarray, size: tuple[int, int], interpolation: str = "bicubic") -> torch.Tensor:
    """(h, w, 3) uint8 -> (3, H, W) uint8, antialiased, for size = (H, W); Pillow's filter but for rounding."""
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(image, size, mode=interpolation, antialias=True)[0].contiguous()


_LUMA = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)  # ITU-R 601-2, as Pillow and torchvision


def recolor(image: torch.Tensor, brightness: float, contrast: float, saturation: float) -> torch.Tensor:
    """(3, H, W) uint8 -> the same with brightness, contrast and saturation multiplied, in this order (1 = unchanged).

    Each blends with black, with the mean of the grey picture, with the grey picture: torchvision's adjust_*."""
    x = (image.float() * brightness).clamp(0, 255)
    x = (x * contrast + (1 - contrast) * (x * _LUMA).sum(0).mean()).clamp(0, 255)
    x = (x * saturation + (1 - saturation) * (x * _LUMA).sum(0)).clamp(0, 255)
    return x.round().to(torch.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# The decoder the loader calls


class ImageDecoder:
    """The picture of a sample -> (3, size, size) uint8.

    Args:
        size: side of the square output, pixels.
        augment: the random changes in training.
        resize: evaluation: "crop" = shorter side to `size`, then the centre; "squash" = both sides to `size`.
        interpolation: "bicubic" or "bilinear", both antialiased.
        max_pixels: larger pictures are bad samples.
        exact: evaluate with Pillow's resize, bit-equal to torchvision's transform; False evaluates with `resize`, in a
            third of the time.
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
        """(3, size, size) uint8. Raises BadSample."""
        data = next((sample.members[e] for e in EXTENSIONS if e in sample.members), None)
        if data is None:
            raise BadSample("no image", f"members: {', '.join(sorted(sample.members)) or 'none'}")
        return self.decode_train(data, rng) if train else self.decode_eval(data)

    def collate(self, images: list[torch.Tensor]) -> tuple[torch.Tensor, None]:
        """(b, 3, size, size) uint8; pictures have no mask."""
        return torch.stack(images), None

    def decode_train(self, data: bytes, rng: np.random.Generator) -> torch.Tensor:
        """(3, size, size) uint8: random crop, resized, and whatever else `augment` asks for."""
        header, a = read_header(data, self.max_pixels), self.augment
        top, left, h, w = draw_crop(header.height, header.width, a.scale, a.ratio, rng)
        # The crop is drawn first: its size decides how small the picture may be decoded. Its corner moves to the grid of
        # the reduced pixels, or the crop would be cut up to half a pixel off.
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
        """(3, size, size) uint8: the same for the same bytes, always."""
        pixels = decode_image(data, max_pixels=self.max_pixels)
        height, width = pixels.shape[:2]
        target = evaluation_size(height, width, self.size, self.resize)
        if not self.exact:
            image = resize(pixels, target, self.interpolation)
        else:
            picture = Image.fromarray(np.ascontiguousarray(pixels))
            if target != (height, width):
                picture = picture.resize((target[1], target[0]), _FILTERS[self.interpolation])
            image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        top, left = round((target[0] - self.size) / 2), round((target[1] - self.size) / 2)
        return image[:, top : top + self.size, left : left + self.size].contiguous()


def evaluation_size(height: int, width: int, size: int, resize: str) -> tuple[int, int]:
    """(H, W) before the centre crop; the longer side rounds down, as torchvision's Resize does."""
    if resize == "squash":
        return size, size
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def visible_box(height: int, width: int, size: int, resize: str) -> tuple[float, float, float, float]:
    """The box (x0, y0, x1, y1) of a stored image, in its pixels, that reaches the model: the center crop, or all of it."""
    tall, wide = evaluation_size(height, width, size, resize)
    top, left = round((tall - size) / 2), round((wide - size) / 2)
    across, down = width / wide, height / tall
    return left * across, top * down, (left + size) * across, (top + size) * down
