"""Vectors that are hard for rounded arithmetic, and searches by a full sort in float64."""

from __future__ import annotations

import numpy as np


def normalize(rows: np.ndarray) -> np.ndarray:
    wide = rows.astype(np.float64)
    return np.asarray(wide / np.linalg.norm(wide, axis=1, keepdims=True), np.float32)


def draw(family: str, count: int, width: int, seed: int) -> np.ndarray:
    """Rows (count, width) of unit length, of kinds that are hard for rounded arithmetic."""
    rng = np.random.default_rng(seed)
    normal = rng.normal(size=(count, width))
    if family == "near-equal":
        rows = rng.normal(size=width) + 1e-4 * normal
    elif family == "halfway":  # between two numbers of bfloat16, all to one side: the largest error of rounding
        rows = np.where(rng.random((count, width)) < 0.9, 1 + 2.0**-8 - 2.0**-20, -normal)
    elif family == "canceling":
        rows = np.where(np.arange(width) % 2, 1, -1) * (1 + 2.0**-7 * rng.random((count, width)))
    elif family == "denormal":
        rows = normal * 10.0 ** rng.uniform(-45, 0, (count, width))
        rows[:, 0] = 1
    elif family == "one large":
        rows = np.where(np.arange(width) == 0, 1.0, 2.0**-9 * (1 + 2.0**-8))[None] * np.ones((count, 1))
    elif family == "huge and tiny":
        rows = normal * 10.0 ** rng.uniform(-150, 150, (count, 1))
    elif family == "duplicates":
        rows = normal[rng.integers(0, max(1, count // 5), count)]
    else:
        rows = normal
    return normalize(rows)


FAMILIES = ("normal", "near-equal", "halfway", "canceling", "denormal", "one large", "huge and tiny", "duplicates")


def order(queries: np.ndarray, rows: np.ndarray, mask: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The best k by a full sort of scores in float64, rounded to float32; of equal ones, the lower row first."""
    exact = (queries.astype(np.float64)[:, None] * rows.astype(np.float64)).sum(-1)
    scores = np.where(mask, exact, -np.inf).astype(np.float32)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return best, np.take_along_axis(scores, best, 1)
