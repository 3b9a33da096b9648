"""Renders a scene to an image and measures the visible box of each object.

The image is drawn at a multiple of its size and averaged down, which gives soft edges. Each object is a tile of palette
indices (shapes.py). A lookup table turns index and tone into a color, so a surface costs one addition per pixel.

    S = side of the enlarged image, (h, w) = height and width of a tile
"""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import lru_cache

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image

from pretrain.data.scenes import shapes as palette
from pretrain.data.scenes.backgrounds import BACKGROUNDS
from pretrain.data.scenes.layout import Scene, SceneObject
from pretrain.data.scenes.objects import KINDS
from pretrain.data.scenes.rng import KeyedRandom
from pretrain.data.scenes.shapes import Tile

Rgb = tuple[int, int, int]
Bytes = NDArray[np.uint8]

# Of each color: its RGB value, its dark shade (for SHADE and seams), its outline, and its second stripe
_BODY_COLORS: dict[str, tuple[Rgb, Rgb, Rgb, Rgb]] = {
    "red": ((224, 44, 48), (92, 4, 20), (84, 16, 28), (248, 190, 186)),
    "orange": ((250, 138, 28), (150, 62, 0), (112, 56, 16), (254, 220, 176)),
    "yellow": ((254, 220, 44), (190, 116, 0), (120, 84, 16), (222, 160, 16)),
    "green": ((36, 148, 64), (6, 62, 30), (16, 58, 36), (186, 230, 192)),
    "blue": ((36, 98, 224), (10, 30, 112), (16, 36, 98), (186, 210, 252)),
    "purple": ((144, 62, 188), (60, 12, 96), (58, 20, 84), (228, 198, 244)),
    "black": ((44, 44, 50), (10, 10, 14), (100, 100, 112), (176, 176, 184)),
    "white": ((252, 252, 252), (100, 110, 140), (104, 108, 126), (170, 178, 198)),
}
_FIXED_COLORS: dict[int, Rgb] = {
    palette.DARK: (40, 40, 46),
    palette.WHITE: (255, 255, 255),
    palette.GLASS: (178, 220, 242),
    palette.WOOD: (128, 86, 54),
    palette.METAL: (140, 142, 152),
    palette.LEAF: (84, 140, 70),
    palette.GOLD: (252, 206, 70),
    palette.PINK: (240, 154, 164),
    palette.CREAM: (246, 236, 212),
}
_TONES = 8  # number of tones that a surface can give a pixel; a plain surface uses only the first


def render_scene(scene: Scene, size: int, skip: Collection[int] = ()) -> tuple[Image.Image, list[list[int]]]:
    """Render a scene and return its image, `size` pixels square, and the visible box of each object.

    Args:
        skip: indices of objects to leave out. Their shadows stay, so that the images differ only in the object itself.
    Returns:
        image and boxes. A box is [x0, y0, x1, y1] in whole pixels, without the last column and row. The box of an object
        that is left out is [0, 0, 0, 0].
    """
    factor = choose_oversampling(size)
    side = size * factor
    image = np.array(BACKGROUNDS[scene.background].draw(side, scene.build_rng("place")))  # (S, S, 4): RGBA, opaque
    pixels = image.view(np.uint32)[:, :, 0]  # (S, S): the same memory, one integer per pixel
    object_ids = np.zeros((side, side), dtype=np.uint8)
    for item in scene.objects:
        if item.supported_by is None and not item.is_flying:
            _draw_shadow(image, item, side)
    for i, item in enumerate(scene.objects):
        if i not in skip:
            _draw_object(pixels, object_ids, item, i + 1, factor)
    boxes = [_find_visible_box(object_ids, i + 1, factor) for i in range(len(scene.objects))]
    return Image.fromarray(image).reduce(factor).convert("RGB"), boxes


def choose_oversampling(size: int) -> int:
    """Return the factor by which an image of `size` pixels is enlarged while it is drawn."""
    return 4 if size <= 128 else 3 if size <= 256 else 2


def _draw_object(pixels: NDArray[np.uint32], object_ids: Bytes, item: SceneObject, number: int, factor: int) -> None:
    """Draw one object into the image, and write its number into `object_ids` wherever it is visible."""
    side = len(pixels)
    kind = KINDS[item.spec.kind]
    unit = item.longer_side * side / 100
    thickness = round(min(max(1.6 * unit, 0.8 * factor), 2.5 * factor))  # thickness of the outline
    base_x, base_y = item.x * side, item.y * side
    half = (0.5 * kind.width * item.stretch + 0.07 * kind.height + 6) * unit + thickness
    x0, y0 = max(0, int(base_x - half)), max(0, int(base_y - (1.05 * kind.height + 6) * unit - thickness))
    x1, y1 = min(side, int(base_x + half) + 1), min(side, int(base_y + 8 * unit) + thickness + 1)
    anchor, base = (base_x - x0, base_y - y0), (kind.width / 2, kind.height)
    tile = Tile((x1 - x0, y1 - y0), anchor, base, unit, item.spec.flip, item.tilt, item.stretch)
    kind.draw(tile, item.spec.variant)
    indices = np.array(tile.image)  # (h, w)
    outlined = _dilate(indices != palette.EMPTY, thickness)
    indices[outlined & (indices == palette.EMPTY)] = palette.OUTLINE
    if item.spec.surface != "plain":
        indices += _compute_tone_offsets(item, indices.shape[0], indices.shape[1], unit, factor)
    colors = np.take(_build_color_table(item.spec.color, item.spec.surface), indices)
    np.copyto(pixels[y0:y1, x0:x1], colors, where=outlined)
    np.copyto(object_ids[y0:y1, x0:x1], np.uint8(number), where=outlined)


def _dilate(mask: NDArray[np.bool_], radius: int) -> NDArray[np.bool_]:
    """Dilate a mask by a square: return every pixel within `radius` rows and columns of it."""
    out = mask.copy()
    for step in range(1, radius + 1):
        out[:, step:] |= mask[:, :-step]
        out[:, :-step] |= mask[:, step:]
    widened = out.copy()
    for step in range(1, radius + 1):
        out[step:] |= widened[:-step]
        out[:-step] |= widened[step:]
    return out


def _compute_tone_offsets(item: SceneObject, h: int, w: int, unit: float, factor: int) -> Bytes:
    """Return an (h, w) array that, added to the palette indices, selects each pixel's tone.

    The surface must be striped or leather. Values are multiples of PALETTE_SIZE (see _build_color_table).
    """
    rng = KeyedRandom(item.texture)
    phase = rng.random()
    if item.spec.surface == "striped":
        period = max(19 * unit, 4.6 * factor)
        direction = rng.choice(("down", "across", "falling", "rising"))
        period *= 1.0 if direction in ("down", "across") else 2**0.5
        stripe = (np.arange(w + h) / period + phase) % 1 < 0.5
        line = np.where(stripe, 0, palette.PALETTE_SIZE).astype(np.uint8)
        if direction == "down":
            return np.broadcast_to(line[:w], (h, w))
        if direction == "across":
            return np.broadcast_to(line[:h, None], (h, w))
        return _slant(line, h, w, direction == "rising")
    # Leather is quilted: diamonds that are lighter between the seams
    period = max(28 * unit, 7 * factor)
    bulge = 1 - np.abs((np.arange(w + h) / period + phase) % 1 * 2 - 1)  # 0 on a seam, 1 halfway between two
    line = np.minimum(bulge * 2 * _TONES, _TONES - 1).astype(np.uint8) * np.uint8(palette.PALETTE_SIZE)
    quilt: Bytes = np.minimum(_slant(line, h, w, True), _slant(line, h, w, False))
    return quilt


def _slant(line: Bytes, h: int, w: int, rising: bool) -> Bytes:
    """Return an (h, w) array in which each row is the one above it, shifted by one pixel."""
    rows = sliding_window_view(line, w)[:h]
    return rows if rising else rows[::-1]


@lru_cache(maxsize=64)
def _build_color_table(color: str, surface: str) -> NDArray[np.uint32]:
    """Return the color of each palette index in each tone: (_TONES * PALETTE_SIZE,).

    A color is the four bytes of an opaque RGBA pixel.
    """
    body, shade, outline, stripe = (np.array(rgb, dtype=np.float64) for rgb in _BODY_COLORS[color])
    light = np.full(3, 255.0)
    is_white = color == "white"  # shading is more visible on white than on a color
    out = np.zeros((_TONES, palette.PALETTE_SIZE, 3))
    for number, fixed in _FIXED_COLORS.items():
        out[:, number] = fixed
    out[:, palette.CENTER] = _FIXED_COLORS[palette.WOOD if color in ("yellow", "orange") else palette.GOLD]
    out[:, palette.OUTLINE] = outline
    out[:, palette.LIGHT] = _blend(body, light, 0.3)
    for tone in range(_TONES):
        base = body
        if surface == "striped" and tone == 1:
            base = stripe
        elif surface == "leather":  # from the seam to the middle of a diamond
            t = 2 * tone / (_TONES - 1)
            seam, top = _blend(body, shade, 0.34 if is_white else 0.62), _blend(body, light, 0.26)
            base = _blend(seam, body, t) if t < 1 else _blend(body, top, t - 1)
        out[tone, palette.BODY] = base
        out[tone, palette.SHADE] = _blend(base, shade, 0.2 if is_white else 0.4)
    rgb = out.round().clip(0, 255).astype(np.uint8).reshape(-1, 3)
    return np.pad(rgb, ((0, 0), (0, 1)), constant_values=255).view(np.uint32)[:, 0]


def _blend(a: NDArray[np.float64], b: NDArray[np.float64], t: float) -> NDArray[np.float64]:
    return a + (b - a) * t


def _draw_shadow(image: Bytes, item: SceneObject, side: int) -> None:
    """Darken a flat ellipse on the ground under an object."""
    kind = KINDS[item.spec.kind]
    rx = 0.46 * kind.width * item.longer_side * side / 100
    ry = max(2.0, 0.16 * rx)
    cx, cy = item.x * side, item.y * side
    x0, x1 = max(0, math.floor(cx - rx)), min(side, math.ceil(cx + rx) + 1)
    y0, y1 = max(0, math.floor(cy - ry)), min(side, math.ceil(cy + ry) + 1)
    x = (np.arange(x0, x1) - cx) / rx
    y = (np.arange(y0, y1)[:, None] - cy) / ry
    region = image[y0:y1, x0:x1]
    inside = (x * x + y * y < 1)[:, :, None] & np.array([True, True, True, False])  # RGB, not the alpha channel
    np.copyto(region, (region * np.float32(0.78)).astype(np.uint8), where=inside)


def _find_visible_box(object_ids: Bytes, number: int, factor: int) -> list[int]:
    """Return the box of an object's visible pixels in the final image, zeros if it is not visible."""
    visible = object_ids == number
    columns, rows = np.flatnonzero(visible.any(axis=0)), np.flatnonzero(visible.any(axis=1))
    if not len(columns):
        return [0, 0, 0, 0]
    first, last = (columns[0], rows[0]), (columns[-1], rows[-1])
    return [*(int(x) // factor for x in first), *(int(x) // factor + 1 for x in last)]
