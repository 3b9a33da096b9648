"""How well a map finds a thing: the pointing game and attention lift, what chance would score, and how sure the figures are.

    hit     1 where the map's peak lies within half a patch of a box (Zhang et al., arXiv 1608.00507, give 15 pixels)
    lift    share of the map inside the boxes, over their share of the picture: 1 = no better than looking everywhere

Peaks that tie share their hit, so that a map that says nothing scores exactly what a blind guess does. Intervals are
bootstrapped over pictures, because words about one picture err together (Field & Welsh, 2007, doi
10.1111/j.1467-9868.2007.00593.x). Pure functions of arrays; may import pretrain's floors.

Shapes: H, W = cells of a map; k = boxes; a box is (x0, y0, x1, y1), in cells of the map unless said otherwise.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


# ---------------------------------------------------------------------------------------------------------------------
# Where things are on the grid


def to_cells(boxes: Array, part: tuple[float, float, float, float], grid: tuple[int, int]) -> Array:
    """Boxes in pixels of the stored picture (k, 4) -> in cells of `grid` laid over `part`; those outside it are left out."""
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    x0, y0, x1, y1 = part
    H, W = grid
    scale = np.array([W / (x1 - x0), H / (y1 - y0)] * 2)
    cells: Array = np.clip((boxes - [x0, y0, x0, y0]) * scale, 0, [W, H, W, H])
    return cells[(cells[:, 2] > cells[:, 0]) & (cells[:, 3] > cells[:, 1])]


def reached(boxes: Array, grid: tuple[int, int], slack: float = 0.5) -> NDArray[np.bool_]:
    """(H, W): cells whose middle lies in a box or at most `slack` cells beside it. With half a cell: cells that touch one."""
    y, x = _middles(grid)
    out = np.zeros(grid, dtype=bool)
    for x0, y0, x1, y1 in boxes:
        out |= (x >= x0 - slack) & (x <= x1 + slack) & (y >= y0 - slack) & (y <= y1 + slack)
    return out


def covered(boxes: Array, grid: tuple[int, int]) -> Array:
    """(H, W): the part of each cell that lies in any of the boxes, exactly."""
    H, W = grid
    if len(boxes) == 0:
        return np.zeros(grid)
    # TokenSpans the picture wherever a cell or a box begins: each piece lies wholly inside or outside of everything.
    xs = np.unique(np.concatenate([np.arange(W + 1.0), np.clip(boxes[:, [0, 2]].ravel(), 0, W)]))
    ys = np.unique(np.concatenate([np.arange(H + 1.0), np.clip(boxes[:, [1, 3]].ravel(), 0, H)]))
    x, y = (xs[1:] + xs[:-1]) / 2, (ys[1:] + ys[:-1])[:, None] / 2
    inside = np.zeros((len(ys) - 1, len(xs) - 1), dtype=bool)
    for x0, y0, x1, y1 in boxes:
        inside |= (x > x0) & (x < x1) & (y > y0) & (y < y1)
    areas = inside * np.diff(ys)[:, None] * np.diff(xs)
    rows = np.add.reduceat(areas, np.searchsorted(ys, np.arange(H)), axis=0)
    cells: Array = np.add.reduceat(rows, np.searchsorted(xs, np.arange(W)), axis=1)
    return cells


def centre_map(grid: tuple[int, int]) -> Array:
    """(H, W): a bell about the middle of the picture, a quarter of its sides wide: where photographers put things."""
    y, x = _middles(grid)
    H, W = grid
    bell: Array = np.exp(-(((x - W / 2) / (W / 4)) ** 2 + ((y - H / 2) / (H / 4)) ** 2) / 2)
    return bell


def _middles(grid: tuple[int, int]) -> tuple[Array, Array]:
    y, x = (np.arange(cells, dtype=np.float64) + 0.5 for cells in grid)
    return y[:, None], x[None]


# ---------------------------------------------------------------------------------------------------------------------
# One map


def hit(values: Array, near: NDArray[np.bool_]) -> float:
    """Of the peak (H, W) of a map, or of its several equal ones, the part that lies in `near`, what `reached` gives."""
    peak = values >= values.max()
    return float(near[peak].mean())


def lift(values: Array, inside: Array) -> float:
    """Share of the map (H, W), which is nowhere negative, in the boxes over their share of the picture; `covered` gives them.

    A map of zeros looked nowhere in particular: 1.
    """
    total, area = values.sum(), inside.mean()
    return 1.0 if total == 0 else float((values * inside).sum() / total / area)


# ---------------------------------------------------------------------------------------------------------------------
# Many


class Interval(NamedTuple):
    """A mean, and between what it would fall in 95 of 100 samples of as many pictures."""

    mean: float
    low: float
    high: float


def bootstrap(
    values: Array, image_index: NDArray[np.int64], resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """The mean of `values` (n,) with its percentile interval over images drawn anew; `image_index` (n,): the image of each."""
    _, image_index = np.unique(image_index, return_inverse=True)
    count = int(image_index.max()) + 1
    sums, sizes = np.bincount(image_index, values, count), np.bincount(image_index, minlength=count)
    random = np.random.Generator(np.random.Philox(key=seed))
    means = []
    for start in range(0, resamples, 100):  # at most 100 x pictures numbers in memory
        drawn = random.multinomial(count, np.full(count, 1 / count), size=min(100, resamples - start))
        means.append((drawn @ sums) / (drawn @ sizes))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(np.mean(values)), float(low), float(high))
