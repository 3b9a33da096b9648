"""The pen that draws the things of the scenes: shapes in a thing's own coordinates become ink numbers in a tile of pixels."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

NOTHING, OUTLINE, BODY, SHADE, LIGHT, DARK, WHITE, GLASS, WOOD, METAL, LEAF, GOLD, PINK, CREAM, HEART = range(15)
INKS = 16  # every ink number is below this

Point = tuple[float, float]


class Pen:
    """Draws shapes, given in a kind's coordinates, as ink numbers into a tile of pixels.

    Args:
        size: (width, height) of the tile in pixels.
        anchor: where the kind's foot, (width / 2, height), comes to lie in the tile, in pixels.
        foot: the kind's foot in its own coordinates.
        unit: pixels per unit of the kind's coordinates; `stretch` multiplies it for x alone.
        flip: face left. `tilt`: turn about the foot, in radians.
    """

    def __init__(
        self, size: tuple[int, int], anchor: Point, foot: Point, unit: float, flip: bool, tilt: float, stretch: float
    ) -> None:
        self.image = Image.new("L", size, NOTHING)
        self._draw = ImageDraw.Draw(self.image)
        self._anchor, self._foot, self._unit = anchor, foot, unit
        self._matrix = matrix(unit, flip, tilt, stretch)

    def poly(self, ink: int, *points: Point) -> None:
        """A polygon with straight sides."""
        (a, b, c, d), (x0, y0), (fx, fy) = self._matrix, self._anchor, self._foot
        self._draw.polygon([(x0 + a * (x - fx) + b * (y - fy), y0 + c * (x - fx) + d * (y - fy)) for x, y in points], fill=ink)

    def blob(self, ink: int, *points: Point) -> None:
        """A closed smooth curve through the points."""
        self.poly(ink, *_spline(points, True))

    def disc(self, ink: int, x: float, y: float, rx: float, ry: float | None = None, turn: float = 0.0) -> None:
        """An ellipse; `turn` in degrees, clockwise."""
        self.poly(ink, *_ellipse(x, y, rx, rx if ry is None else ry, turn))

    def box(self, ink: int, x0: float, y0: float, x1: float, y1: float, round: float = 0.0) -> None:
        """A rectangle with rounded corners."""
        self.poly(ink, *_rounded(x0, y0, x1, y1, round))

    def line(self, ink: int, width: float, *points: Point, smooth: bool = False) -> None:
        """A stroke with round ends; `width` in the kind's units."""
        path = _spline(points, False) if smooth else points
        (a, b, c, d), (x0, y0), (fx, fy) = self._matrix, self._anchor, self._foot
        pixels = [(x0 + a * (x - fx) + b * (y - fy), y0 + c * (x - fx) + d * (y - fy)) for x, y in path]
        thick = max(1.0, width * self._unit)
        self._draw.line(pixels, fill=ink, width=round(thick), joint="curve")
        for x, y in (pixels[0], pixels[-1]):
            r = (thick - 1) / 2
            self._draw.ellipse((x - r, y - r, x + r, y + r), fill=ink)

    def eye(self, x: float, y: float, r: float) -> None:
        """An eye that looks ahead."""
        self.disc(WHITE, x, y, r)
        self.disc(DARK, x + 0.15 * r, y, 0.68 * r)


def matrix(unit: float, flip: bool, tilt: float, stretch: float) -> tuple[float, float, float, float]:
    """Rows of the 2 x 2 matrix from a kind's coordinates about its foot to pixels about the anchor."""
    cos, sin = math.cos(tilt) * unit, math.sin(tilt) * unit
    across = -stretch if flip else stretch
    return (cos * across, -sin, sin * across, cos)


@lru_cache(maxsize=4096)
def _spline(points: tuple[Point, ...], closed: bool) -> tuple[Point, ...]:
    """A Catmull-Rom spline through the points, five pieces to a span."""
    p = np.asarray(points, dtype=np.float64)
    if not closed:
        p = np.concatenate([p[:1], p, p[-1:]])
    t = np.arange(5)[:, None] / 5
    spans = range(len(p)) if closed else range(1, len(p) - 2)
    out: list[Point] = []
    for i in spans:
        p0, p1, p2, p3 = p[i - 1], p[i], p[(i + 1) % len(p)], p[(i + 2) % len(p)]
        c = 0.5 * (2 * p1 + (p2 - p0) * t + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2 + (3 * p1 - p0 - 3 * p2 + p3) * t**3)
        out += [(float(x), float(y)) for x, y in c]
    return tuple(out) if closed else (*out, points[-1])


@lru_cache(maxsize=4096)
def _ellipse(x: float, y: float, rx: float, ry: float, turn: float) -> tuple[Point, ...]:
    cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    circle = [(rx * math.cos(a), ry * math.sin(a)) for a in (2 * math.pi * i / 28 for i in range(28))]
    return tuple((x + cos * u - sin * v, y + sin * u + cos * v) for u, v in circle)


@lru_cache(maxsize=4096)
def _rounded(x0: float, y0: float, x1: float, y1: float, r: float) -> tuple[Point, ...]:
    if r <= 0:
        return ((x0, y0), (x1, y0), (x1, y1), (x0, y1))
    centres = ((x1 - r, y0 + r), (x1 - r, y1 - r), (x0 + r, y1 - r), (x0 + r, y0 + r))
    turns = [(corner, math.radians(90 * corner - 90 + 22.5 * step)) for corner in range(4) for step in range(5)]
    return tuple((centres[c][0] + r * math.cos(a), centres[c][1] + r * math.sin(a)) for c, a in turns)


def smooth(*points: Point) -> tuple[Point, ...]:
    """A smooth open curve through the points, as the points of a polygon's side."""
    return _spline(points, False)
