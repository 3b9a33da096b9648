"""The eight backgrounds of drawn scenes, in soft colors, so that every object stands out.

A background fills a square image, in coordinates from 0 to 1. It contains nothing that could be mistaken for one of the
object kinds (no tree in the meadow, no boat on the sea).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from pretrain.data.scenes.rng import KeyedRandom

Color = tuple[int, int, int]


def _blend(a: Color, b: Color, t: float) -> Color:
    return (round(a[0] + (b[0] - a[0]) * t), round(a[1] + (b[1] - a[1]) * t), round(a[2] + (b[2] - a[2]) * t))


class Canvas:
    """A square image to draw on, `side` pixels wide, in coordinates from 0 to 1."""

    def __init__(self, side: int, top: Color, bottom: Color, horizon: float) -> None:
        """Fill the image with a gradient from `top` to `bottom` at y = `horizon`, with `bottom` below."""
        t = np.clip(np.arange(side, dtype=np.float32) / (horizon * side), 0, 1)[:, None]
        rows = (np.asarray(top) * (1 - t) + np.asarray(bottom) * t).astype(np.uint8)
        opaque = np.pad(rows, ((0, 0), (0, 1)), constant_values=255)
        self.image = Image.fromarray(opaque[:, None]).resize((side, side), Image.Resampling.NEAREST)
        self.draw = ImageDraw.Draw(self.image)
        self.side = side

    def rectangle(self, color: Color, x0: float, y0: float, x1: float, y1: float) -> None:
        """Fill a rectangle."""
        side = self.side
        self.draw.rectangle((x0 * side, y0 * side, x1 * side, y1 * side), fill=color)

    def ellipse(self, color: Color, x: float, y: float, rx: float, ry: float | None = None) -> None:
        """Fill an ellipse, or a circle without `ry`."""
        side, ry = self.side, rx if ry is None else ry
        self.draw.ellipse(((x - rx) * side, (y - ry) * side, (x + rx) * side, (y + ry) * side), fill=color)

    def polygon(self, color: Color, *points: tuple[float, float]) -> None:
        """Fill a polygon."""
        self.draw.polygon([(x * self.side, y * self.side) for x, y in points], fill=color)

    def line(self, color: Color, width: float, *points: tuple[float, float]) -> None:
        """Draw a line through the points."""
        pixels = [(x * self.side, y * self.side) for x, y in points]
        self.draw.line(pixels, fill=color, width=max(1, round(width * self.side)))

    def cloud(self, color: Color, x: float, y: float, size: float) -> None:
        """Draw a cloud around (x, y), 2.5 times `size` wide."""
        for dx, dy, r in ((-0.75, 0.1, 0.5), (0.0, -0.15, 0.7), (0.7, 0.1, 0.5)):
            self.ellipse(color, x + dx * size, y + dy * size, r * size, 0.75 * r * size)
        self.ellipse(color, x, y + 0.25 * size, 1.25 * size, 0.3 * size)

    def hills(self, color: Color, rng: KeyedRandom, horizon: float, height: float, count: int = 3) -> None:
        """Draw round hills behind the horizon."""
        for i in range(count):
            x = (i + rng.uniform(0.1, 0.9)) / count
            self.ellipse(color, x, horizon + 0.02, rng.uniform(0.25, 0.4), height * rng.uniform(0.6, 1.0))


def _draw_grass(side: int, rng: KeyedRandom) -> Image.Image:
    canvas = Canvas(side, (176, 216, 240), (222, 240, 248), 0.5)
    if rng.bernoulli(0.7):
        canvas.cloud((250, 252, 253), rng.uniform(0.1, 0.9), rng.uniform(0.08, 0.2), 0.1)
    horizon = rng.uniform(0.44, 0.54)
    canvas.hills((190, 220, 170), rng, horizon, 0.12)
    canvas.rectangle((178, 214, 140), 0, horizon, 1, 1)
    canvas.ellipse((168, 206, 128), rng.uniform(0, 1), 1.05, 0.9, 0.36)
    for _ in range(14):
        x, y = rng.random(), rng.uniform(horizon + 0.08, 0.98)
        for lean in (-0.012, 0.0, 0.012):
            canvas.line((140, 184, 104), 0.008, (x, y), (x + lean, y - 0.03))
    return canvas.image


def _draw_beach(side: int, rng: KeyedRandom) -> Image.Image:
    canvas = Canvas(side, (160, 212, 240), (226, 243, 250), 0.4)
    if rng.bernoulli(0.6):
        canvas.cloud((250, 252, 253), rng.uniform(0.1, 0.9), rng.uniform(0.08, 0.18), 0.09)
    sea, sand = rng.uniform(0.34, 0.42), rng.uniform(0.54, 0.6)
    canvas.rectangle((116, 190, 214), 0, sea, 1, sand + 0.05)
    for _ in range(7):
        x, y = rng.random(), rng.uniform(sea + 0.03, sand - 0.03)
        canvas.line((160, 216, 230), 0.009, (x, y), (x + 0.1, y))
    tilt = rng.uniform(-0.03, 0.03)
    canvas.polygon((240, 250, 252), (0, sand - tilt), (1, sand + tilt), (1, 1), (0, 1))
    canvas.polygon((244, 226, 178), (0, sand + 0.025 - tilt), (1, sand + 0.025 + tilt), (1, 1), (0, 1))
    for _ in range(24):
        canvas.ellipse((226, 204, 150), rng.random(), rng.uniform(sand + 0.07, 1), 0.006)
    return canvas.image


def _draw_room(side: int, rng: KeyedRandom) -> Image.Image:
    wall: Color = rng.choice([(238, 222, 208), (222, 230, 220), (232, 224, 238), (240, 232, 200), (214, 228, 234)])
    canvas = Canvas(side, wall, wall, 0.5)
    floor = rng.uniform(0.58, 0.66)
    paler = _blend(wall, (255, 255, 255), 0.3)
    for i in range(6):
        canvas.rectangle(paler, i / 6, 0, i / 6 + 0.07, floor)
    x, y = rng.uniform(0.12, 0.6), rng.uniform(0.06, 0.12)
    canvas.rectangle((250, 250, 246), x - 0.02, y - 0.02, x + 0.28, y + 0.3)
    canvas.rectangle((190, 222, 240), x, y, x + 0.26, y + 0.28)
    canvas.line((250, 250, 246), 0.018, (x + 0.13, y), (x + 0.13, y + 0.28))
    canvas.line((250, 250, 246), 0.018, (x, y + 0.14), (x + 0.26, y + 0.14))
    canvas.rectangle((205, 170, 130), 0, floor, 1, 1)
    for i in range(1, 5):
        depth = floor + (1 - floor) * (i / 5) ** 1.4
        canvas.line((190, 153, 112), 0.007, (0, depth), (1, depth))
        for _ in range(2):
            x = rng.random()
            canvas.line((190, 153, 112), 0.007, (x, depth), (x + 0.02, depth + 0.07))
    canvas.rectangle((250, 248, 242), 0, floor - 0.035, 1, floor)
    return canvas.image


def _draw_street(side: int, rng: KeyedRandom) -> Image.Image:
    canvas = Canvas(side, (200, 216, 228), (234, 236, 234), 0.5)
    curb = rng.uniform(0.54, 0.6)
    x = -rng.uniform(0, 0.1)
    while x < 1:
        wide, top = rng.uniform(0.15, 0.25), rng.uniform(0.08, 0.34)
        gray: Color = rng.choice([(190, 196, 208), (202, 196, 200), (184, 200, 204), (206, 204, 196)])
        canvas.rectangle(gray, x, top, x + wide - 0.012, curb)
        lit = (224, 228, 232)
        for row in range(8):
            y = top + 0.03 + 0.065 * row
            if y + 0.035 > curb - 0.04:
                break
            for column in range(3):
                left = x + wide * (0.13 + 0.28 * column)
                canvas.rectangle(lit, left, y, left + wide * 0.14, y + 0.035)
        x += wide
    canvas.rectangle((214, 210, 204), 0, curb, 1, curb + 0.09)
    canvas.line((180, 176, 172), 0.012, (0, curb + 0.09), (1, curb + 0.09))
    canvas.rectangle((150, 152, 158), 0, curb + 0.097, 1, 1)
    middle, offset = (curb + 1.1) / 2, rng.uniform(0, 0.2)
    for i in range(-1, 5):
        canvas.polygon(
            (236, 236, 230),
            *((i * 0.25 + offset + dx, middle + dy) for dx, dy in ((0, 0), (0.12, 0), (0.11, 0.024), (-0.01, 0.024))),
        )
    return canvas.image


def _draw_bridge(side: int, rng: KeyedRandom) -> Image.Image:
    canvas = Canvas(side, (186, 214, 236), (232, 240, 244), 0.45)
    if rng.bernoulli(0.5):
        canvas.cloud((250, 252, 253), rng.uniform(0.1, 0.9), rng.uniform(0.08, 0.18), 0.09)
    canvas.hills((182, 204, 190), rng, 0.46, 0.14)
    canvas.rectangle((130, 186, 208), 0, 0.46, 1, 1)
    for _ in range(16):
        x, y = rng.random(), rng.uniform(0.5, 0.99)
        canvas.line((168, 212, 226), 0.009, (x, y), (x + 0.09, y))
    stone, deck_tone, edge = (206, 196, 184), (224, 216, 206), (172, 160, 148)
    near = 0.8  # the deck's near edge; below it are the arches, with water behind them
    canvas.rectangle(stone, 0, near, 1, 1)
    first, span = rng.uniform(-0.2, 0.1), 0.36
    for i in range(4):
        x = first + span * i
        canvas.ellipse((104, 160, 186), x, 1.0, 0.13, 0.12)
        canvas.ellipse((122, 178, 202), x + 0.012, 1.01, 0.12, 0.11)
    canvas.rectangle(deck_tone, 0, near - 0.14, 1, near)
    canvas.rectangle(edge, 0, near, 1, near + 0.018)
    for i in range(11):  # the far rail
        canvas.rectangle(edge, i / 10 - 0.008, near - 0.235, i / 10 + 0.008, near - 0.14)
    canvas.rectangle(edge, 0, near - 0.25, 1, near - 0.23)
    canvas.rectangle(edge, 0, near - 0.148, 1, near - 0.136)
    return canvas.image


def _draw_snow(side: int, rng: KeyedRandom) -> Image.Image:
    canvas = Canvas(side, (168, 190, 216), (214, 224, 236), 0.55)
    horizon = rng.uniform(0.46, 0.54)
    canvas.hills((200, 213, 230), rng, horizon, 0.2)
    canvas.rectangle((226, 234, 244), 0, horizon, 1, 1)
    for y, tone in ((horizon + 0.12, (218, 228, 240)), (horizon + 0.3, (210, 222, 236))):
        canvas.ellipse(tone, rng.uniform(0, 1), y + 0.2, 0.8, 0.2)
    for _ in range(38):
        canvas.ellipse((250, 252, 255), rng.random(), rng.random(), rng.uniform(0.007, 0.013))
    return canvas.image


def _draw_night(side: int, rng: KeyedRandom) -> Image.Image:
    canvas = Canvas(side, (44, 54, 108), (92, 104, 160), 0.6)
    for _ in range(26):
        canvas.ellipse((240, 240, 210), rng.random(), rng.uniform(0, 0.55), rng.uniform(0.004, 0.008))
    x, y = rng.uniform(0.1, 0.9), rng.uniform(0.08, 0.16)
    outer = [(x + 0.065 * math.cos(t), y + 0.065 * math.sin(t)) for t in np.linspace(0.45, 4.95, 24)]
    inner = [(x + 0.03 + 0.053 * math.cos(t), y - 0.015 + 0.053 * math.sin(t)) for t in np.linspace(4.45, 0.95, 24)]
    canvas.polygon((250, 244, 200), *outer, *inner)  # the moon
    horizon = rng.uniform(0.54, 0.6)
    canvas.hills((84, 100, 146), rng, horizon, 0.14)
    canvas.rectangle((96, 122, 142), 0, horizon, 1, 1)
    canvas.ellipse((88, 112, 136), rng.uniform(0, 1), 1.02, 0.9, 0.26)
    return canvas.image


def _draw_desert(side: int, rng: KeyedRandom) -> Image.Image:
    canvas = Canvas(side, (250, 214, 170), (254, 236, 206), 0.5)
    horizon = rng.uniform(0.46, 0.52)
    for _ in range(2):  # flat rocks far away
        x, wide, high = rng.random(), rng.uniform(0.16, 0.28), rng.uniform(0.1, 0.2)
        base = horizon + 0.02
        canvas.polygon((222, 168, 136), (x, base), (x + 0.03, base - high), (x + wide - 0.03, base - high), (x + wide, base))
    canvas.rectangle((236, 196, 140), 0, horizon, 1, 1)
    canvas.ellipse((228, 184, 126), rng.uniform(-0.1, 0.4), horizon + 0.16, 0.55, 0.1)
    canvas.ellipse((242, 206, 152), rng.uniform(0.4, 1.1), horizon + 0.34, 0.75, 0.2)
    for _ in range(9):
        x, y = rng.random(), rng.uniform(horizon + 0.08, 0.97)
        canvas.line((216, 170, 112), 0.008, (x, y), (x + 0.035, y - 0.008), (x + 0.07, y))
    return canvas.image


@dataclass(frozen=True)
class Background:
    """One background: how it is drawn, and where objects stand on it."""

    draw: Callable[[int, KeyedRandom], Image.Image]
    """Draws it at a given side in pixels."""
    phrases: tuple[str, ...]
    """How captions name it ("on the grass")."""
    base_range: tuple[float, float]
    """(least, largest) y of an object's base point, as a fraction of the image's side."""


BACKGROUNDS: dict[str, Background] = {
    "grass": Background(_draw_grass, ("on the grass", "in a meadow"), (0.66, 0.96)),
    "beach": Background(_draw_beach, ("on the beach", "on a beach"), (0.72, 0.96)),
    "room": Background(_draw_room, ("in a room", "in the room"), (0.74, 0.96)),
    "street": Background(_draw_street, ("in the street", "on a street"), (0.7, 0.96)),
    "bridge": Background(_draw_bridge, ("on a bridge", "on a bridge over the water"), (0.71, 0.78)),
    "snow": Background(_draw_snow, ("in the snow", "on the snow"), (0.66, 0.96)),
    "night": Background(_draw_night, ("at night", "under the night sky"), (0.7, 0.96)),
    "desert": Background(_draw_desert, ("in the desert", "in a desert"), (0.66, 0.96)),
}
