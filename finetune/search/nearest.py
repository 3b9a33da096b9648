"""The most similar vectors by comparing all of them, a tile at a time.

Where there is a rounded copy of the vectors (rounded.py), it is compared, and the vectors themselves only where they may be
among the best. Their scores are then sums in float64, rounded. Without the copy they are sums in float32: rows whose cosines
are equal but for the rounding of such a sum may change places, as between a query alone and several at once.

Shapes: q = queries, n = vectors, D = their width, k = results of a query, t = vectors of a tile.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from finetune.search import rounded as rounding
from finetune.search.rounded import Rounded

Vectors = NDArray[np.float32]
_TILE = 1 << 25
"""Bytes of vectors that are compared at a time."""
_SPARSE = 4
"""Where a filter leaves less than one row in so many, copying these costs less than comparing all."""
_SELECTIVE = 32
"""Where a rounded copy leaves more than one row in so many, comparing all vectors costs less than comparing these again."""


def find_nearest(
    queries: Vectors, vectors: Vectors, mask: NDArray[np.bool_], k: int, rounded: Rounded | None = None
) -> tuple[NDArray[np.int64], Vectors]:
    """Return the rows (q, k') of the vectors most similar to each query, best first, and their cosines (q, k').

    Of equal ones, the lower row comes first. k' is k, or the number of rows in the mask where that is smaller.

    Args:
        queries: (q, D) of unit length.
        vectors: (n, D) of unit length.
        mask: (n,) which rows may be found.
        k: results of a query.
        rounded: (n, D) the vectors in bfloat16.
    """
    candidates = np.flatnonzero(mask)
    k = min(k, len(candidates))
    if rounded is None or not can_use_rounded(mask, k):
        return _compare_all(queries, vectors, mask, candidates, k)
    rows, scores = np.zeros((len(queries), k), np.int64), np.zeros((len(queries), k), np.float32)
    constants, others = rounding.bound_error(queries), []
    for i, found in enumerate(rounding.find_candidates(queries, rounded, mask, k, len(mask) // _SELECTIVE)):
        exact = None if found is None else _score_exactly(vectors[found[0]], queries[i])
        if found is None or exact is None or not rounding.is_within(found[1], exact, constants[i]):
            others.append(i)
        else:
            of_query = exact.astype(np.float32)
            best = np.argsort(-of_query, kind="stable")[:k]
            rows[i], scores[i] = found[0][best], of_query[best]
    if others:
        rows[others], scores[others] = _compare_all(queries[others], vectors, mask, candidates, k)
    return rows, scores


def can_use_rounded(mask: NDArray[np.bool_], k: int) -> bool:
    """Return whether comparing rounded vectors would be faster: of many rows, for few results."""
    return 0 < k <= len(mask) // _SELECTIVE // 2 and bool(np.count_nonzero(mask) >= len(mask) // _SPARSE)


def _score_exactly(vectors: Vectors, query: Vectors) -> NDArray[np.float64]:
    """Return the cosines (m,) in float64: by einsum, whose sums do not depend on the position of a row as those of BLAS do."""
    return np.asarray(np.einsum("ij,j->i", vectors, query, dtype=np.float64))


def _compare_all(
    queries: Vectors, vectors: Vectors, mask: NDArray[np.bool_], candidates: NDArray[np.int64], k: int
) -> tuple[NDArray[np.int64], Vectors]:
    """As find_nearest; candidates: the rows in the mask, at least k."""
    best_rows, best_scores = np.zeros((len(queries), 0), np.int64), np.zeros((len(queries), 0), np.float32)
    if not k:
        return best_rows, best_scores
    is_sparse = len(candidates) < len(mask) // _SPARSE
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
