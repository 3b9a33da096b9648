"""From a scene to its picture and the true box of each thing.

Drawn at a multiple of the size and averaged down, which gives soft edges. Each thing is a tile of ink numbers
(scene_pen.py); a look-up table turns ink and surface into colours, so a surface costs one addition a pixel.

    S = side of the enlarged picture, h w = a tile
"""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import lru_cache

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image

from pretrain.data.scenes import shapes as ink
from pretrain.data.scenes.backgrounds import PLACES
from pretrain.data.scenes.layout import Scene, Thing
from pretrain.data.scenes.objects import KINDS
from pretrain.data.scenes.rng import Dice

Rgb = tuple[int, int, int]
Bytes = NDArray[np.uint8]

# The colour; its depth, for shade and seams; its outline; its other stripe
_BODY: dict[str, tuple[Rgb, Rgb, Rgb, Rgb]] = {
    "red": ((224, 44, 48), (92, 4, 20), (84, 16, 28), (248, 190, 186)),
    "orange": ((250, 138, 28), (150, 62, 0), (112, 56, 16), (254, 220, 176)),
    "yellow": ((254, 220, 44), (190, 116, 0), (120, 84, 16), (222, 160, 16)),
    "green": ((36, 148, 64), (6, 62, 30), (16, 58, 36), (186, 230, 192)),
    "blue": ((36, 98, 224), (10, 30, 112), (16, 36, 98), (186, 210, 252)),
    "purple": ((144, 62, 188), (60, 12, 96), (58, 20, 84), (228, 198, 244)),
    "black": ((44, 44, 50), (10, 10, 14), (100, 100, 112), (176, 176, 184)),
    "white": ((252, 252, 252), (100, 110, 140), (104, 108, 126), (170, 178, 198)),
}
_FIXED: dict[int, Rgb] = {
    ink.DARK: (40, 40, 46),
    ink.WHITE: (255, 255, 255),
    ink.GLASS: (178, 220, 242),
    ink.WOOD: (128, 86, 54),
    ink.METAL: (140, 142, 152),
    ink.LEAF: (84, 140, 70),
    ink.GOLD: (252, 206, 70),
    ink.PINK: (240, 154, 164),
    ink.CREAM: (246, 236, 212),
}
_TONES = 8  # a surface gives each pixel one of so many tones; a plain surface has the first alone


def paint(scene: Scene, size: int, skip: Collection[int] = ()) -> tuple[Image.Image, list[list[int]]]:
    """The picture, `size` pixels square, and the box of what is seen of each thing.

    Args:
        skip: things to leave out, shadows apart: what differs then is the thing.
    Returns:
        boxes as whole pixels x0, y0, x1, y1, the last column and row not included; [0, 0, 0, 0] for a thing left out.
    """
    over = oversampling(size)
    side = size * over
    sheet = np.array(PLACES[scene.place].draw(side, scene.dice("place")))  # (S, S, 4): RGBA, opaque
    pixels = sheet.view(np.uint32)[:, :, 0]  # (S, S): the same, one number a pixel
    owner = np.zeros((side, side), dtype=np.uint8)
    for thing in scene.things:
        if thing.on is None and not thing.flies:
            _shadow(sheet, thing, side)
    for i, thing in enumerate(scene.things):
        if i not in skip:
            _lay(pixels, owner, thing, i + 1, over)
    boxes = [_box(owner, i + 1, over) for i in range(len(scene.things))]
    return Image.fromarray(sheet).reduce(over).convert("RGB"), boxes


def oversampling(size: int) -> int:
    """How many times finer a picture is drawn."""
    return 4 if size <= 128 else 3 if size <= 256 else 2


def _lay(pixels: NDArray[np.uint32], owner: Bytes, thing: Thing, number: int, over: int) -> None:
    """Draw one thing into the picture, and its number into `owner` wherever it is seen."""
    side = len(pixels)
    kind = KINDS[thing.look.kind]
    unit = thing.extent * side / 100
    rim = round(min(max(1.6 * unit, 0.8 * over), 2.5 * over))  # the outline
    foot_x, foot_y = thing.x * side, thing.y * side
    half = (0.5 * kind.width * thing.stretch + 0.07 * kind.height + 6) * unit + rim
    x0, y0 = max(0, int(foot_x - half)), max(0, int(foot_y - (1.05 * kind.height + 6) * unit - rim))
    x1, y1 = min(side, int(foot_x + half) + 1), min(side, int(foot_y + 8 * unit) + rim + 1)
    at, foot = (foot_x - x0, foot_y - y0), (kind.width / 2, kind.height)
    pen = ink.Pen((x1 - x0, y1 - y0), at, foot, unit, thing.look.flip, thing.tilt, thing.stretch)
    kind.draw(pen, thing.look.variant)
    inks = np.array(pen.image)  # (h, w)
    grown = _grow(inks != ink.NOTHING, rim)
    inks[grown & (inks == ink.NOTHING)] = ink.OUTLINE
    if thing.look.surface != "plain":
        inks += _tones(thing, inks.shape[0], inks.shape[1], unit, over)
    colors = np.take(_table(thing.look.color, thing.look.surface), inks)
    np.copyto(pixels[y0:y1, x0:x1], colors, where=grown)
    np.copyto(owner[y0:y1, x0:x1], np.uint8(number), where=grown)


def _grow(mask: NDArray[np.bool_], by: int) -> NDArray[np.bool_]:
    """Every pixel within `by` columns and rows of the mask."""
    out = mask.copy()
    for step in range(1, by + 1):
        out[:, step:] |= mask[:, :-step]
        out[:, :-step] |= mask[:, step:]
    wide = out.copy()
    for step in range(1, by + 1):
        out[step:] |= wide[:-step]
        out[:-step] |= wide[step:]
    return out


def _tones(thing: Thing, h: int, w: int, unit: float, over: int) -> Bytes:
    """(h, w): for each pixel the first row of its tone in the table, for a surface that is not plain."""
    dice = Dice(thing.texture)
    phase = dice.random()
    if thing.look.surface == "striped":
        period = max(19 * unit, 4.6 * over)
        way = dice.pick(("down", "across", "falling", "rising"))
        period *= 1.0 if way in ("down", "across") else 2**0.5
        stripe = (np.arange(w + h) / period + phase) % 1 < 0.5
        line = np.where(stripe, 0, ink.INKS).astype(np.uint8)
        if way == "down":
            return np.broadcast_to(line[:w], (h, w))
        if way == "across":
            return np.broadcast_to(line[:h, None], (h, w))
        return _slanted(line, h, w, way == "rising")
    # Leather is quilted: diamonds that bulge between seams
    period = max(28 * unit, 7 * over)
    bulge = 1 - np.abs((np.arange(w + h) / period + phase) % 1 * 2 - 1)  # 0 on a seam, 1 between two
    line = np.minimum(bulge * 2 * _TONES, _TONES - 1).astype(np.uint8) * np.uint8(ink.INKS)
    quilt: Bytes = np.minimum(_slanted(line, h, w, True), _slanted(line, h, w, False))
    return quilt


def _slanted(line: Bytes, h: int, w: int, rising: bool) -> Bytes:
    """(h, w): each row is the one above it moved by a pixel."""
    rows = sliding_window_view(line, w)[:h]
    return rows if rising else rows[::-1]


@lru_cache(maxsize=64)
def _table(color: str, surface: str) -> NDArray[np.uint32]:
    """(tones x inks,): the colour of each ink in each tone, as the four bytes of an opaque pixel."""
    body, deep, rim, stripe = (np.array(rgb, dtype=np.float64) for rgb in _BODY[color])
    light = np.full(3, 255.0)
    gentle = color == "white"  # a little shade shows more on white than on a colour
    out = np.zeros((_TONES, ink.INKS, 3))
    for number, fixed in _FIXED.items():
        out[:, number] = fixed
    out[:, ink.HEART] = _FIXED[ink.WOOD if color in ("yellow", "orange") else ink.GOLD]
    out[:, ink.OUTLINE] = rim
    out[:, ink.LIGHT] = _mix(body, light, 0.3)
    for tone in range(_TONES):
        base = body
        if surface == "striped" and tone == 1:
            base = stripe
        elif surface == "leather":  # from the seam up to the bulge
            t = 2 * tone / (_TONES - 1)
            seam, top = _mix(body, deep, 0.34 if gentle else 0.62), _mix(body, light, 0.26)
            base = _mix(seam, body, t) if t < 1 else _mix(body, top, t - 1)
        out[tone, ink.BODY] = base
        out[tone, ink.SHADE] = _mix(base, deep, 0.2 if gentle else 0.4)
    rgb = out.round().clip(0, 255).astype(np.uint8).reshape(-1, 3)
    return np.pad(rgb, ((0, 0), (0, 1)), constant_values=255).view(np.uint32)[:, 0]


def _mix(a: NDArray[np.float64], b: NDArray[np.float64], t: float) -> NDArray[np.float64]:
    return a + (b - a) * t


def _shadow(sheet: Bytes, thing: Thing, side: int) -> None:
    """A soft-looking flat ellipse on the ground under a thing."""
    kind = KINDS[thing.look.kind]
    rx = 0.46 * kind.width * thing.extent * side / 100
    ry = max(2.0, 0.16 * rx)
    cx, cy = thing.x * side, thing.y * side
    x0, x1 = max(0, math.floor(cx - rx)), min(side, math.ceil(cx + rx) + 1)
    y0, y1 = max(0, math.floor(cy - ry)), min(side, math.ceil(cy + ry) + 1)
    x = (np.arange(x0, x1) - cx) / rx
    y = (np.arange(y0, y1)[:, None] - cy) / ry
    region = sheet[y0:y1, x0:x1]
    under = (x * x + y * y < 1)[:, :, None] & np.array([True, True, True, False])  # colours, not opacity
    np.copyto(region, (region * np.float32(0.78)).astype(np.uint8), where=under)


def _box(owner: Bytes, number: int, over: int) -> list[int]:
    seen = owner == number
    columns, rows = np.flatnonzero(seen.any(axis=0)), np.flatnonzero(seen.any(axis=1))
    if not len(columns):
        return [0, 0, 0, 0]
    first, last = (columns[0], rows[0]), (columns[-1], rows[-1])
    return [*(int(x) // over for x in first), *(int(x) // over + 1 for x in last)]
