"""Shapes that the objects of drawn scenes consist of, rasterized as palette indices."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

EMPTY, OUTLINE, BODY, SHADE, LIGHT, DARK, WHITE, GLASS, WOOD, METAL, LEAF, GOLD, PINK, CREAM, CENTER = range(15)
PALETTE_SIZE = 16  # every palette index is below this

Point = tuple[float, float]


class Tile:
    """A small image of palette indices to draw on, in the coordinates of an object kind (objects.py).

    Args:
        size: (width, height) of the tile in pixels.
        anchor: position of the object's base point in the tile, in pixels.
        base: the base point in the kind's coordinates: the middle of the lower edge, (width / 2, height).
        unit: pixels per unit of the kind's coordinates.
        flip: mirror horizontally, so that the object faces left.
        tilt: rotation about the base point, in radians.
        stretch: multiplies `unit` for x alone.
    """

    def __init__(
        self, size: tuple[int, int], anchor: Point, base: Point, unit: float, flip: bool, tilt: float, stretch: float
    ) -> None:
        self.image = Image.new("L", size, EMPTY)
        self._draw = ImageDraw.Draw(self.image)
        self._anchor, self._base, self._unit = anchor, base, unit
        self._matrix = build_matrix(unit, flip, tilt, stretch)

    def polygon(self, index: int, *points: Point) -> None:
        """Fill a polygon with straight sides."""
        (a, b, c, d), (x0, y0), (bx, by) = self._matrix, self._anchor, self._base
        self._draw.polygon(
            [(x0 + a * (x - bx) + b * (y - by), y0 + c * (x - bx) + d * (y - by)) for x, y in points], fill=index
        )

    def curve(self, index: int, *points: Point) -> None:
        """Fill the area inside a smooth closed curve through the points."""
        self.polygon(index, *_compute_spline(points, True))

    def ellipse(self, index: int, x: float, y: float, rx: float, ry: float | None = None, turn: float = 0.0) -> None:
        """Fill an ellipse (a circle without `ry`), rotated clockwise by `turn` degrees."""
        self.polygon(index, *_compute_ellipse(x, y, rx, rx if ry is None else ry, turn))

    def rectangle(self, index: int, x0: float, y0: float, x1: float, y1: float, radius: float = 0.0) -> None:
        """Fill a rectangle whose corners are rounded with `radius`."""
        self.polygon(index, *_compute_rectangle(x0, y0, x1, y1, radius))

    def line(self, index: int, width: float, *points: Point, smooth: bool = False) -> None:
        """Draw a line with round ends; `width` is in the kind's units."""
        path = _compute_spline(points, False) if smooth else points
        (a, b, c, d), (x0, y0), (bx, by) = self._matrix, self._anchor, self._base
        pixels = [(x0 + a * (x - bx) + b * (y - by), y0 + c * (x - bx) + d * (y - by)) for x, y in path]
        thickness = max(1.0, width * self._unit)
        self._draw.line(pixels, fill=index, width=round(thickness), joint="curve")
        for x, y in (pixels[0], pixels[-1]):
            r = (thickness - 1) / 2
            self._draw.ellipse((x - r, y - r, x + r, y + r), fill=index)

    def eye(self, x: float, y: float, r: float) -> None:
        """Draw an eye that looks ahead."""
        self.ellipse(WHITE, x, y, r)
        self.ellipse(DARK, x + 0.15 * r, y, 0.68 * r)


def build_matrix(unit: float, flip: bool, tilt: float, stretch: float) -> tuple[float, float, float, float]:
    """Return the 2 x 2 matrix, row by row, from a kind's coordinates to pixels about the base point."""
    cos, sin = math.cos(tilt) * unit, math.sin(tilt) * unit
    across = -stretch if flip else stretch
    return (cos * across, -sin, sin * across, cos)


@lru_cache(maxsize=4096)
def _compute_spline(points: tuple[Point, ...], closed: bool) -> tuple[Point, ...]:
    """Return a Catmull-Rom spline through the points, with five segments for each pair of points."""
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
def _compute_ellipse(x: float, y: float, rx: float, ry: float, turn: float) -> tuple[Point, ...]:
    cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    circle = [(rx * math.cos(a), ry * math.sin(a)) for a in (2 * math.pi * i / 28 for i in range(28))]
    return tuple((x + cos * u - sin * v, y + sin * u + cos * v) for u, v in circle)


@lru_cache(maxsize=4096)
def _compute_rectangle(x0: float, y0: float, x1: float, y1: float, r: float) -> tuple[Point, ...]:
    if r <= 0:
        return ((x0, y0), (x1, y0), (x1, y1), (x0, y1))
    centers = ((x1 - r, y0 + r), (x1 - r, y1 - r), (x0 + r, y1 - r), (x0 + r, y0 + r))
    turns = [(corner, math.radians(90 * corner - 90 + 22.5 * step)) for corner in range(4) for step in range(5)]
    return tuple((centers[c][0] + r * math.cos(a), centers[c][1] + r * math.sin(a)) for c, a in turns)


def compute_curve(*points: Point) -> tuple[Point, ...]:
    """Return the points of a smooth open curve through `points`, to use as one side of a polygon."""
    return _compute_spline(points, False)
