"""Clusters of unit vectors by k-means on cosines, and what of each cluster stays when data is balanced.

Vectors are rows of a memory-mapped array (n, D); BLOCK rows of it are in memory at a time, and a sample of them for the fit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

BLOCK = 4096
"""Rows that are compared at a time."""
_SAMPLES_PER_CLUSTER = 256
_MAX_SAMPLE_BYTES = 1 << 30
_ITERATIONS = 12
_MAX_SPREAD_STARTS = 1024  # clusters up to which starts are drawn apart from one another: that takes a pass for each
_SPREAD_SAMPLE = 20_000

Progress = Callable[[int, int], None]


def load_rows(vectors: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return rows of an array as float32, (len(rows), D)."""
    return np.asarray(vectors[rows], dtype=np.float32)


def fit_centroids(vectors: np.ndarray, rows: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """Fit centroids to a sample of rows: 256 a cluster, at most 1 GiB.

    Args:
        vectors: (n, D), of unit length.
        rows: (m,) those that count, in ascending order.
        clusters: how many; fewer where there are fewer rows.
        seed: the same seed gives the same centroids.

    Returns:
        (clusters, D) float32, of unit length.
    """
    rng = np.random.default_rng(seed)
    most = max(clusters, _MAX_SAMPLE_BYTES // (4 * vectors.shape[1]))
    size = min(len(rows), _SAMPLES_PER_CLUSTER * clusters, most)
    sample = load_rows(vectors, np.sort(rng.choice(rows, size, replace=False)))
    clusters = min(clusters, size)
    centroids = _draw_starts(sample, clusters, rng)
    for _ in range(_ITERATIONS):
        nearest, cosines = _find_nearest_one(sample, centroids)
        sums = np.zeros_like(centroids)
        np.add.at(sums, nearest, sample)
        sizes = np.bincount(nearest, minlength=clusters)
        empty = np.flatnonzero(sizes == 0)
        sums[empty] = sample[np.argsort(cosines, kind="stable")[: len(empty)]]  # restart at what fits worst
        updated = _normalize(sums)
        if np.array_equal(updated, centroids):
            break
        centroids = updated
    return centroids


def _draw_starts(sample: np.ndarray, clusters: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the first centroids: by k-means++ (Arthur and Vassilvitskii, 2007), or at random where they are many."""
    if clusters > _MAX_SPREAD_STARTS:
        return sample[rng.choice(len(sample), clusters, replace=False)].copy()
    pool = (
        sample[: max(_SPREAD_SAMPLE, clusters)]
        if len(sample) <= _SPREAD_SAMPLE
        else sample[np.sort(rng.choice(len(sample), max(_SPREAD_SAMPLE, clusters), replace=False))]
    )
    chosen = [int(rng.integers(len(pool)))]
    distances = np.full(len(pool), np.inf)
    while len(chosen) < clusters:
        distances = np.minimum(distances, np.maximum(0.0, 2.0 - 2.0 * (pool @ pool[chosen[-1]])))
        distances[chosen] = 0.0
        total = distances.sum()
        if total <= 0:  # fewer different rows than clusters
            left = np.setdiff1d(np.arange(len(pool)), chosen)
            chosen += left[: clusters - len(chosen)].tolist()
            break
        chosen.append(int(rng.choice(len(pool), p=distances / total)))
    return pool[chosen].copy()


def _normalize(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12))


def _find_nearest_one(sample: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest centroid of each row and its cosine, both (n,)."""
    nearest, cosines = np.empty(len(sample), dtype=np.int64), np.empty(len(sample), dtype=np.float32)
    for start in range(0, len(sample), BLOCK):
        products = sample[start : start + BLOCK] @ centroids.T
        best = products.argmax(axis=1)
        nearest[start : start + BLOCK], cosines[start : start + BLOCK] = best, products[np.arange(len(best)), best]
    return nearest, cosines


def assign(
    vectors: np.ndarray, rows: np.ndarray, centroids: np.ndarray, probes: int, progress: Progress = lambda done, total: None
) -> np.ndarray:
    """Return the `probes` nearest centroids of each row, the nearest first: (m, probes) int32."""
    probes = min(probes, len(centroids))
    nearest = np.empty((len(rows), probes), dtype=np.int32)
    for start in range(0, len(rows), BLOCK):
        products = load_rows(vectors, rows[start : start + BLOCK]) @ centroids.T
        best = np.argpartition(-products, probes - 1, axis=1)[:, :probes]
        order = np.argsort(-np.take_along_axis(products, best, axis=1), axis=1, kind="stable")
        nearest[start : start + BLOCK] = np.take_along_axis(best, order, axis=1)
        progress(min(start + BLOCK, len(rows)), len(rows))
    return nearest


def limit_clusters(clusters: np.ndarray, ranks: np.ndarray, most: int, temperature: float) -> np.ndarray:
    """Return which members of clusters stay, bool (m,): those of the lowest rank.

    Of a cluster of n members all stay up to `most` = N, else N (n/N)^temperature of them, rounded up.

    Args:
        clusters: (m,) the cluster of each.
        ranks: (m,) all different.
        most: N.
        temperature: 0 to 1.
    """
    sizes = np.bincount(clusters)
    limits = np.where(sizes <= most, sizes, np.ceil(most * (np.maximum(sizes, 1) / most) ** temperature - 1e-9))
    order = np.lexsort((ranks, clusters))
    starts = np.concatenate(([0], np.cumsum(sizes)))[:-1]
    places = np.empty(len(clusters), dtype=np.int64)
    places[order] = np.arange(len(clusters)) - starts[clusters[order]]
    stays: np.ndarray = places < limits[clusters]
    return stays
