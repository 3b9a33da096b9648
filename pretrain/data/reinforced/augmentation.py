"""Augmentations that are stored with a sample (KEY.paug.json), applied as they were when its embeddings were made.

    [[top, left, height, width], [[operation, magnitude], [operation, magnitude]]]

First the box of a RandomResizedCrop in pixels of the image; then, where flips were drawn, whether it was flipped (true or
false); then the operations of a RandAugment, numbered as in OPERATIONS; null = none. The crop is resized with Pillow's bicubic
filter, and the operations are those of torchvision on images of Pillow: filled with black, nearest neighbors.

Translations are stored in pixels of TEACHER_SIZE, and so scaled to the size of the student's images. All else is relative.
"""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from pretrain.data import BadSample
from pretrain.data.images import resize_with_pillow
from pretrain.data.sample_json import read_fields

MEMBER, FIELD = "paug.json", "param_aug"
TEACHER_SIZE = 224
"""Side of the images that the teachers of DataCompDR saw, in pixels."""
REASON = "augmentation unreadable"

OPERATIONS = (
    "Identity",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",
    "Solarize",
    "AutoContrast",
    "Equalize",
)
"""torchvision's names of the operations of RandAugment, by their number."""

_MAX_BYTES = 1 << 18  # 30 augmentations take 3 KB
_MAX_OPERATIONS = 16
_MAX_MAGNITUDE = 1e4


class Augmentation(NamedTuple):
    """A stored augmentation."""

    box: tuple[int, int, int, int]
    """(top, left, height, width) of the crop, in pixels of the image."""
    is_flipped: bool
    operations: tuple[tuple[str, float], ...]
    """(name, magnitude) of each."""


def read_augmentations(members: dict[str, bytes]) -> list[Any]:
    """Return the stored augmentations of a sample, at least one, each for `parse_augmentation`. Raises BadSample."""
    data = members.get(MEMBER)
    if data is None:
        raise BadSample("no augmentations", f"data.teachers=samples needs KEY.{MEMBER}")
    if len(data) > _MAX_BYTES:
        raise BadSample(REASON, f"KEY.{MEMBER} of {len(data):,} bytes, more than {_MAX_BYTES:,}")
    value = read_fields({"json": data}).get(FIELD)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadSample(REASON, f"{FIELD} is no json: {error}"[:200]) from error
    if not isinstance(value, list) or not value:
        raise BadSample(REASON, f"{FIELD} is no list of augmentations: {value!r}"[:200])
    return value


def parse_augmentation(entry: Any) -> Augmentation:
    """Return one of `read_augmentations`, checked. Raises BadSample."""
    if not isinstance(entry, list) or not 1 <= len(entry) <= 3:
        raise BadSample(REASON, f"not [box, operations] nor [box, flip, operations]: {entry!r}"[:200])
    box, *rest = entry
    if not (isinstance(box, list) and len(box) == 4 and all(type(x) is int for x in box) and min(box) >= 0 < min(box[2:])):
        raise BadSample(REASON, f"the box is not [top, left, height, width]: {box!r}"[:200])
    is_flipped = bool(rest.pop(0)) if rest and isinstance(rest[0], bool) else False
    operations = rest.pop(0) if rest else None
    if rest or not isinstance(operations, list | None) or len(operations or []) > _MAX_OPERATIONS:
        raise BadSample(REASON, f"the operations are no list of [number, magnitude]: {entry!r}"[:200])
    return Augmentation(tuple(box), is_flipped, tuple(map(_parse_operation, operations or [])))


def _parse_operation(entry: Any) -> tuple[str, float]:
    """Return name and magnitude of an operation. Raises BadSample."""
    if not isinstance(entry, list) or len(entry) != 2 or type(entry[0]) is not int or not 0 <= entry[0] < len(OPERATIONS):
        raise BadSample(REASON, f"an operation is [0 to {len(OPERATIONS) - 1}, magnitude], not {entry!r}"[:200])
    name, magnitude = OPERATIONS[entry[0]], entry[1]
    if type(magnitude) not in (int, float) or not abs(magnitude) <= _MAX_MAGNITUDE:  # neither is a NaN
        raise BadSample(REASON, f"{name} of the magnitude {magnitude!r:.100}")
    if name == "Posterize" and not 1 <= int(magnitude) <= 8:
        raise BadSample(REASON, f"Posterize to {magnitude} bits")
    return name, float(magnitude)


def fit_box(box: tuple[int, int, int, int], height: int, width: int, fields: dict[str, Any]) -> tuple[int, int, int, int]:
    """Return the box in pixels of the stored image.

    The tools that download images may store smaller ones, and note the first size: `original_height` and `original_width`.

    Args:
        box: (top, left, height, width) in pixels of the image as it was.
        height: of the stored image.
        width: of the stored image.
        fields: of the sample's json.

    Raises:
        BadSample: the box does not lie within the image.
    """
    top, left, h, w = box
    old_height, old_width = fields.get("original_height"), fields.get("original_width")
    if type(old_height) is int and type(old_width) is int and (old_height, old_width) != (height, width):
        if top + h > old_height or left + w > old_width:
            raise BadSample("augmentation outside the image", f"{list(box)} in an image of {old_width} x {old_height}")
        bottom, right = round((top + h) * height / old_height), round((left + w) * width / old_width)
        top, left = min(round(top * height / old_height), height - 1), min(round(left * width / old_width), width - 1)
        return top, left, max(1, bottom - top), max(1, right - left)
    if top + h > height or left + w > width:
        raise BadSample(
            "augmentation outside the image",
            f"{list(box)} in an image of {width} x {height}: it is not of the size that the teacher saw, and its json does not "
            "have original_width and original_height",
        )
    return box


def apply_augmentation(pixels: np.ndarray, augmentation: Augmentation, size: int) -> np.ndarray:
    """Return (size, size, 3) uint8: the image (H, W, 3) uint8 with a stored augmentation whose box lies within it."""
    top, left, h, w = augmentation.box
    resized = resize_with_pillow(np.ascontiguousarray(pixels[top : top + h, left : left + w]), (size, size))
    image = Image.fromarray(resized)
    if augmentation.is_flipped:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for name, magnitude in augmentation.operations:
        image = _apply_operation(image, name, magnitude)
    return np.array(image)


def _apply_operation(image: Image.Image, name: str, magnitude: float) -> Image.Image:
    """Return an image with one operation applied; as torchvision does, bit for bit."""
    if name in ("ShearX", "ShearY"):
        angle = math.radians(math.degrees(math.atan(magnitude)))
        x, y = (math.tan(angle), 0.0) if name == "ShearX" else (0.0, math.sin(angle) / math.cos(angle))
        return _transform(image, (1.0, x, 0.0, y, 1.0, 0.0))
    if name in ("TranslateX", "TranslateY"):
        shift = round(int(magnitude) * image.width / TEACHER_SIZE)
        x, y = (-shift, 0) if name == "TranslateX" else (0, -shift)
        return _transform(image, (1.0, 0.0, x, 0.0, 1.0, y))
    if name == "Rotate":
        return image.rotate(magnitude, Image.Resampling.NEAREST, fillcolor=(0, 0, 0))
    if name in ("Brightness", "Color", "Contrast", "Sharpness"):
        enhance: Any = getattr(ImageEnhance, name)
        enhanced: Image.Image = enhance(image).enhance(1.0 + magnitude)
        return enhanced
    if name == "Posterize":
        return ImageOps.posterize(image, int(magnitude))
    if name == "Solarize":
        return ImageOps.solarize(image, magnitude)  # type: ignore[arg-type]  # any number is compared with the pixels
    if name == "AutoContrast":
        return ImageOps.autocontrast(image)
    return ImageOps.equalize(image) if name == "Equalize" else image


def _transform(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """Return the image that has at (x, y) the pixel at matrix (x, y, 1)."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=(0, 0, 0))
