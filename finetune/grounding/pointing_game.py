"""Scores of a map against boxes: pointing game, attention lift, a center baseline, intervals.

    hit     1 where the map's peak lies within half a cell of a box (Zhang et al., arXiv 1608.00507, allow 15 pixels)
    lift    share of the map's sum that lies in the boxes, over their share of the image's area: 1 = a uniform map

Equal peaks share one hit, so that a uniform map scores exactly what a random guess does. Intervals are bootstrapped over
images, because the errors of words about one image are correlated (Field & Welsh, 2007, doi
10.1111/j.1467-9868.2007.00593.x). Pure functions of arrays.

Shapes: H, W = cells of a map; k = boxes; a box is (x0, y0, x1, y1), in cells of the map unless stated otherwise.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


# ---------------------------------------------------------------------------------------------------------------------
# Boxes on the grid of a map


def boxes_to_cells(boxes: Array, visible: tuple[float, float, float, float], grid: tuple[int, int]) -> Array:
    """Convert boxes (k, 4) from pixels of the stored image to cells of the map.

    `visible` is the part of the image that the map covers, in pixels. Boxes are clipped to it, and those outside left out.
    """
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    x0, y0, x1, y1 = visible
    H, W = grid
    scale = np.array([W / (x1 - x0), H / (y1 - y0)] * 2)
    cells: Array = np.clip((boxes - [x0, y0, x0, y0]) * scale, 0, [W, H, W, H])
    return cells[(cells[:, 2] > cells[:, 0]) & (cells[:, 3] > cells[:, 1])]


def mark_near_cells(boxes: Array, grid: tuple[int, int], slack: float = 0.5) -> NDArray[np.bool_]:
    """Return (H, W), True for cells whose center lies in a box or at most `slack` cells from it.

    With a slack of half a cell these are the cells that touch a box.
    """
    y, x = _cell_centers(grid)
    near = np.zeros(grid, dtype=bool)
    for x0, y0, x1, y1 in boxes:
        near |= (x >= x0 - slack) & (x <= x1 + slack) & (y >= y0 - slack) & (y <= y1 + slack)
    return near


def compute_coverage(boxes: Array, grid: tuple[int, int]) -> Array:
    """Return (H, W): the exact share of each cell that lies in any of the boxes."""
    H, W = grid
    if len(boxes) == 0:
        return np.zeros(grid)
    # Divide the image at every edge of a cell or box: each piece then lies entirely inside or outside each of them.
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


def build_center_map(grid: tuple[int, int]) -> Array:
    """Return (H, W): a Gaussian around the middle of the image, where photographs have their subject.

    Its standard deviations are a quarter of the image's sides.
    """
    y, x = _cell_centers(grid)
    H, W = grid
    bell: Array = np.exp(-(((x - W / 2) / (W / 4)) ** 2 + ((y - H / 2) / (H / 4)) ** 2) / 2)
    return bell


def _cell_centers(grid: tuple[int, int]) -> tuple[Array, Array]:
    y, x = (np.arange(cells, dtype=np.float64) + 0.5 for cells in grid)
    return y[:, None], x[None]


# ---------------------------------------------------------------------------------------------------------------------
# Scores of one map


def score_hit(values: Array, near: NDArray[np.bool_]) -> float:
    """Return 1 if the peak of a map (H, W) lies in `near`, else 0; for equal peaks their share.

    `near` is from mark_near_cells().
    """
    peak = values >= values.max()
    return float(near[peak].mean())


def compute_lift(values: Array, inside: Array) -> float:
    """Return the share of a nonnegative map (H, W) in the boxes, over the boxes' share of the image.

    `inside` is from compute_coverage(). A map of zeros counts as uniform and gives 1.
    """
    total, area = values.sum(), inside.mean()
    return 1.0 if total == 0 else float((values * inside).sum() / total / area)


# ---------------------------------------------------------------------------------------------------------------------
# Means over many words


class Interval(NamedTuple):
    """A mean and its confidence interval."""

    mean: float
    low: float
    high: float


def bootstrap(
    values: Array, image_index: NDArray[np.int64], resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Return the mean of `values` (n,) with its percentile interval under resampling of images.

    `image_index` (n,) is the image of each value; `level` the coverage of the interval, 0 to 1.
    """
    _, image_index = np.unique(image_index, return_inverse=True)
    count = int(image_index.max()) + 1
    sums, sizes = np.bincount(image_index, values, count), np.bincount(image_index, minlength=count)
    random = np.random.Generator(np.random.Philox(key=seed))
    means = []
    for start in range(0, resamples, 100):  # 100 at a time, to keep at most 100 x images numbers in memory
        drawn = random.multinomial(count, np.full(count, 1 / count), size=min(100, resamples - start))
        means.append((drawn @ sums) / (drawn @ sizes))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(np.mean(values)), float(low), float(high))
