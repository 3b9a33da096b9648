"""The places of the drawn scenes: what is behind the things. Soft colours, so that every thing stands out.

A place draws itself over a whole square picture in coordinates from 0 to 1 and holds nothing that could be taken for
one of the kinds of things (no tree in the meadow, no boat on the sea).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from pretrain.data.scenes.rng import Dice

Color = tuple[int, int, int]


def _mix(a: Color, b: Color, t: float) -> Color:
    return (round(a[0] + (b[0] - a[0]) * t), round(a[1] + (b[1] - a[1]) * t), round(a[2] + (b[2] - a[2]) * t))


class Sheet:
    """A square picture to draw on, `side` pixels wide, in coordinates from 0 to 1."""

    def __init__(self, side: int, top: Color, bottom: Color, horizon: float) -> None:
        """The sky: from `top` to `bottom` at height `horizon`, `bottom` below it."""
        t = np.clip(np.arange(side, dtype=np.float32) / (horizon * side), 0, 1)[:, None]
        rows = (np.asarray(top) * (1 - t) + np.asarray(bottom) * t).astype(np.uint8)
        opaque = np.pad(rows, ((0, 0), (0, 1)), constant_values=255)
        self.image = Image.fromarray(opaque[:, None]).resize((side, side), Image.Resampling.NEAREST)
        self.draw = ImageDraw.Draw(self.image)
        self.side = side

    def box(self, color: Color, x0: float, y0: float, x1: float, y1: float) -> None:
        """A rectangle."""
        s = self.side
        self.draw.rectangle((x0 * s, y0 * s, x1 * s, y1 * s), fill=color)

    def disc(self, color: Color, x: float, y: float, rx: float, ry: float | None = None) -> None:
        """An ellipse, or a circle."""
        s, ry = self.side, rx if ry is None else ry
        self.draw.ellipse(((x - rx) * s, (y - ry) * s, (x + rx) * s, (y + ry) * s), fill=color)

    def poly(self, color: Color, *points: tuple[float, float]) -> None:
        """A polygon."""
        self.draw.polygon([(x * self.side, y * self.side) for x, y in points], fill=color)

    def line(self, color: Color, width: float, *points: tuple[float, float]) -> None:
        """A stroke through the points."""
        pixels = [(x * self.side, y * self.side) for x, y in points]
        self.draw.line(pixels, fill=color, width=max(1, round(width * self.side)))

    def cloud(self, color: Color, x: float, y: float, size: float) -> None:
        """A cloud about (x, y), two and a half `size` wide."""
        for dx, dy, r in ((-0.75, 0.1, 0.5), (0.0, -0.15, 0.7), (0.7, 0.1, 0.5)):
            self.disc(color, x + dx * size, y + dy * size, r * size, 0.75 * r * size)
        self.disc(color, x, y + 0.25 * size, 1.25 * size, 0.3 * size)

    def hills(self, color: Color, dice: Dice, horizon: float, height: float, count: int = 3) -> None:
        """Round hills behind the horizon."""
        for i in range(count):
            x = (i + dice.between(0.1, 0.9)) / count
            self.disc(color, x, horizon + 0.02, dice.between(0.25, 0.4), height * dice.between(0.6, 1.0))


def _grass(side: int, dice: Dice) -> Image.Image:
    sheet = Sheet(side, (176, 216, 240), (222, 240, 248), 0.5)
    if dice.chance(0.7):
        sheet.cloud((250, 252, 253), dice.between(0.1, 0.9), dice.between(0.08, 0.2), 0.1)
    horizon = dice.between(0.44, 0.54)
    sheet.hills((190, 220, 170), dice, horizon, 0.12)
    sheet.box((178, 214, 140), 0, horizon, 1, 1)
    sheet.disc((168, 206, 128), dice.between(0, 1), 1.05, 0.9, 0.36)
    for _ in range(14):
        x, y = dice.random(), dice.between(horizon + 0.08, 0.98)
        for lean in (-0.012, 0.0, 0.012):
            sheet.line((140, 184, 104), 0.008, (x, y), (x + lean, y - 0.03))
    return sheet.image


def _beach(side: int, dice: Dice) -> Image.Image:
    sheet = Sheet(side, (160, 212, 240), (226, 243, 250), 0.4)
    if dice.chance(0.6):
        sheet.cloud((250, 252, 253), dice.between(0.1, 0.9), dice.between(0.08, 0.18), 0.09)
    sea, sand = dice.between(0.34, 0.42), dice.between(0.54, 0.6)
    sheet.box((116, 190, 214), 0, sea, 1, sand + 0.05)
    for _ in range(7):
        x, y = dice.random(), dice.between(sea + 0.03, sand - 0.03)
        sheet.line((160, 216, 230), 0.009, (x, y), (x + 0.1, y))
    tilt = dice.between(-0.03, 0.03)
    sheet.poly((240, 250, 252), (0, sand - tilt), (1, sand + tilt), (1, 1), (0, 1))
    sheet.poly((244, 226, 178), (0, sand + 0.025 - tilt), (1, sand + 0.025 + tilt), (1, 1), (0, 1))
    for _ in range(24):
        sheet.disc((226, 204, 150), dice.random(), dice.between(sand + 0.07, 1), 0.006)
    return sheet.image


def _room(side: int, dice: Dice) -> Image.Image:
    wall: Color = dice.pick([(238, 222, 208), (222, 230, 220), (232, 224, 238), (240, 232, 200), (214, 228, 234)])
    sheet = Sheet(side, wall, wall, 0.5)
    floor = dice.between(0.58, 0.66)
    paler = _mix(wall, (255, 255, 255), 0.3)
    for i in range(6):
        sheet.box(paler, i / 6, 0, i / 6 + 0.07, floor)
    x, y = dice.between(0.12, 0.6), dice.between(0.06, 0.12)
    sheet.box((250, 250, 246), x - 0.02, y - 0.02, x + 0.28, y + 0.3)
    sheet.box((190, 222, 240), x, y, x + 0.26, y + 0.28)
    sheet.line((250, 250, 246), 0.018, (x + 0.13, y), (x + 0.13, y + 0.28))
    sheet.line((250, 250, 246), 0.018, (x, y + 0.14), (x + 0.26, y + 0.14))
    sheet.box((205, 170, 130), 0, floor, 1, 1)
    for i in range(1, 5):
        depth = floor + (1 - floor) * (i / 5) ** 1.4
        sheet.line((190, 153, 112), 0.007, (0, depth), (1, depth))
        for _ in range(2):
            x = dice.random()
            sheet.line((190, 153, 112), 0.007, (x, depth), (x + 0.02, depth + 0.07))
    sheet.box((250, 248, 242), 0, floor - 0.035, 1, floor)
    return sheet.image


def _street(side: int, dice: Dice) -> Image.Image:
    sheet = Sheet(side, (200, 216, 228), (234, 236, 234), 0.5)
    kerb = dice.between(0.54, 0.6)
    x = -dice.between(0, 0.1)
    while x < 1:
        wide, top = dice.between(0.15, 0.25), dice.between(0.08, 0.34)
        grey: Color = dice.pick([(190, 196, 208), (202, 196, 200), (184, 200, 204), (206, 204, 196)])
        sheet.box(grey, x, top, x + wide - 0.012, kerb)
        lit = (224, 228, 232)
        for row in range(8):
            y = top + 0.03 + 0.065 * row
            if y + 0.035 > kerb - 0.04:
                break
            for column in range(3):
                left = x + wide * (0.13 + 0.28 * column)
                sheet.box(lit, left, y, left + wide * 0.14, y + 0.035)
        x += wide
    sheet.box((214, 210, 204), 0, kerb, 1, kerb + 0.09)
    sheet.line((180, 176, 172), 0.012, (0, kerb + 0.09), (1, kerb + 0.09))
    sheet.box((150, 152, 158), 0, kerb + 0.097, 1, 1)
    middle, offset = (kerb + 1.1) / 2, dice.between(0, 0.2)
    for i in range(-1, 5):
        sheet.poly(
            (236, 236, 230),
            *((i * 0.25 + offset + dx, middle + dy) for dx, dy in ((0, 0), (0.12, 0), (0.11, 0.024), (-0.01, 0.024))),
        )
    return sheet.image


def _bridge(side: int, dice: Dice) -> Image.Image:
    sheet = Sheet(side, (186, 214, 236), (232, 240, 244), 0.45)
    if dice.chance(0.5):
        sheet.cloud((250, 252, 253), dice.between(0.1, 0.9), dice.between(0.08, 0.18), 0.09)
    sheet.hills((182, 204, 190), dice, 0.46, 0.14)
    sheet.box((130, 186, 208), 0, 0.46, 1, 1)
    for _ in range(16):
        x, y = dice.random(), dice.between(0.5, 0.99)
        sheet.line((168, 212, 226), 0.009, (x, y), (x + 0.09, y))
    stone, deck_tone, edge = (206, 196, 184), (224, 216, 206), (172, 160, 148)
    near = 0.8  # the deck's near edge; below it the arches, with the water seen through them
    sheet.box(stone, 0, near, 1, 1)
    first, span = dice.between(-0.2, 0.1), 0.36
    for i in range(4):
        x = first + span * i
        sheet.disc((104, 160, 186), x, 1.0, 0.13, 0.12)
        sheet.disc((122, 178, 202), x + 0.012, 1.01, 0.12, 0.11)
    sheet.box(deck_tone, 0, near - 0.14, 1, near)
    sheet.box(edge, 0, near, 1, near + 0.018)
    for i in range(11):  # the far rail
        sheet.box(edge, i / 10 - 0.008, near - 0.235, i / 10 + 0.008, near - 0.14)
    sheet.box(edge, 0, near - 0.25, 1, near - 0.23)
    sheet.box(edge, 0, near - 0.148, 1, near - 0.136)
    return sheet.image


def _snow(side: int, dice: Dice) -> Image.Image:
    sheet = Sheet(side, (168, 190, 216), (214, 224, 236), 0.55)
    horizon = dice.between(0.46, 0.54)
    sheet.hills((200, 213, 230), dice, horizon, 0.2)
    sheet.box((226, 234, 244), 0, horizon, 1, 1)
    for y, tone in ((horizon + 0.12, (218, 228, 240)), (horizon + 0.3, (210, 222, 236))):
        sheet.disc(tone, dice.between(0, 1), y + 0.2, 0.8, 0.2)
    for _ in range(38):
        sheet.disc((250, 252, 255), dice.random(), dice.random(), dice.between(0.007, 0.013))
    return sheet.image


def _night(side: int, dice: Dice) -> Image.Image:
    sheet = Sheet(side, (44, 54, 108), (92, 104, 160), 0.6)
    for _ in range(26):
        sheet.disc((240, 240, 210), dice.random(), dice.between(0, 0.55), dice.between(0.004, 0.008))
    x, y = dice.between(0.1, 0.9), dice.between(0.08, 0.16)
    outer = [(x + 0.065 * math.cos(t), y + 0.065 * math.sin(t)) for t in np.linspace(0.45, 4.95, 24)]
    inner = [(x + 0.03 + 0.053 * math.cos(t), y - 0.015 + 0.053 * math.sin(t)) for t in np.linspace(4.45, 0.95, 24)]
    sheet.poly((250, 244, 200), *outer, *inner)  # the moon
    horizon = dice.between(0.54, 0.6)
    sheet.hills((84, 100, 146), dice, horizon, 0.14)
    sheet.box((96, 122, 142), 0, horizon, 1, 1)
    sheet.disc((88, 112, 136), dice.between(0, 1), 1.02, 0.9, 0.26)
    return sheet.image


def _desert(side: int, dice: Dice) -> Image.Image:
    sheet = Sheet(side, (250, 214, 170), (254, 236, 206), 0.5)
    horizon = dice.between(0.46, 0.52)
    for _ in range(2):  # flat rocks far away
        x, wide, high = dice.random(), dice.between(0.16, 0.28), dice.between(0.1, 0.2)
        base = horizon + 0.02
        sheet.poly((222, 168, 136), (x, base), (x + 0.03, base - high), (x + wide - 0.03, base - high), (x + wide, base))
    sheet.box((236, 196, 140), 0, horizon, 1, 1)
    sheet.disc((228, 184, 126), dice.between(-0.1, 0.4), horizon + 0.16, 0.55, 0.1)
    sheet.disc((242, 206, 152), dice.between(0.4, 1.1), horizon + 0.34, 0.75, 0.2)
    for _ in range(9):
        x, y = dice.random(), dice.between(horizon + 0.08, 0.97)
        sheet.line((216, 170, 112), 0.008, (x, y), (x + 0.035, y - 0.008), (x + 0.07, y))
    return sheet.image


@dataclass(frozen=True)
class Place:
    """A place: its drawing, the words for being there, and between which heights the feet of things stand (0..1)."""

    draw: Callable[[int, Dice], Image.Image]
    phrases: tuple[str, ...]
    ground: tuple[float, float]


PLACES: dict[str, Place] = {
    "grass": Place(_grass, ("on the grass", "in a meadow"), (0.66, 0.96)),
    "beach": Place(_beach, ("on the beach", "on a beach"), (0.72, 0.96)),
    "room": Place(_room, ("in a room", "in the room"), (0.74, 0.96)),
    "street": Place(_street, ("in the street", "on a street"), (0.7, 0.96)),
    "bridge": Place(_bridge, ("on a bridge", "on a bridge over the water"), (0.71, 0.78)),
    "snow": Place(_snow, ("in the snow", "on the snow"), (0.66, 0.96)),
    "night": Place(_night, ("at night", "under the night sky"), (0.7, 0.96)),
    "desert": Place(_desert, ("in the desert", "in a desert"), (0.66, 0.96)),
}
