"""The most similar vectors by comparing all of them, a tile at a time.

Shapes: q = queries, n = vectors, D = their width, k = results of a query, t = vectors of a tile.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
_TILE = 1 << 25
"""Bytes of vectors that are compared at a time."""


def find_nearest(queries: Vectors, vectors: Vectors, mask: NDArray[np.bool_], k: int) -> tuple[NDArray[np.int64], Vectors]:
    """Return the rows (q, k') of the vectors most similar to each query, best first, and their cosines (q, k').

    Of equal ones, the lower row comes first. k' is k, or the number of rows in the mask where that is smaller.

    Args:
        queries: (q, D) of unit length.
        vectors: (n, D) of unit length.
        mask: (n,) which rows may be found.
        k: results of a query.
    """
    candidates = np.flatnonzero(mask)
    k = min(k, len(candidates))
    best_rows, best_scores = np.zeros((len(queries), 0), np.int64), np.zeros((len(queries), 0), np.float32)
    if not k:
        return best_rows, best_scores
    is_sparse = len(candidates) < len(mask) // 4  # copying so few costs less than comparing all
    total, step = len(candidates) if is_sparse else len(mask), max(k, _TILE // (4 * vectors.shape[1]))
    for begin in range(0, total, step):
        end = min(begin + step, total)
        rows = candidates[begin:end] if is_sparse else np.arange(begin, end)
        scores = queries @ (vectors[rows] if is_sparse else vectors[begin:end]).T  # (q, t)
        if not is_sparse:
            scores[:, ~mask[begin:end]] = -np.inf
        scores = np.concatenate([best_scores, scores], axis=1)
        rows = np.concatenate([best_rows, np.broadcast_to(rows, (len(queries), len(rows)))], axis=1)
        kept = _find_top(scores, k)
        best_scores, best_rows = np.take_along_axis(scores, kept, 1), np.take_along_axis(rows, kept, 1)
    return best_rows, best_scores


def _find_top(scores: Vectors, k: int) -> NDArray[np.int64]:
    """Return the positions (q, k) of the k highest scores (q, m), best first; of equal ones the first."""
    k = min(k, scores.shape[1])
    thresholds = np.partition(scores, scores.shape[1] - k, axis=1)[:, scores.shape[1] - k]
    kept = np.empty((len(scores), k), dtype=np.int64)
    for i, threshold in enumerate(thresholds):
        candidates = np.flatnonzero(scores[i] >= threshold)
        kept[i] = candidates[np.argsort(-scores[i, candidates], kind="stable")][:k]
    return kept
