"""Near-duplicates among unit vectors: pairs whose cosine reaches a threshold, and which of them stay.

Samples are taken by rank. One stays unless another that stays, of a lower rank, is a near-duplicate of it. So no two that stay
are near-duplicates, and each that goes has one that stays: unlike connected components, chains do not make a group of all.

Pairs are found in products of blocks: among all rows, which is exact up to the rounding of float32 and of the stored numbers,
or by clusters. Then a row is compared with those of its own cluster and of its next ones (`PROBES` in all), and a pair is found
where either looks into the cluster of the other. Rows with the same numbers are grouped first, whatever their cluster.

Memory: 64 MiB for a product, 8 bytes a pair (at most MAX_PAIRS), about 40 bytes a row, and 12 bytes a row and probe. Pairs of a
block or of some clusters are saved as they are found, so that a killed search goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pretrain.data.filter.clusters import BLOCK, Progress, assign, fit_centroids, load_rows
from pretrain.errors import UserError
from pretrain.runtime.files import replace_atomically

EXACT_ROWS = 50_000
"""Rows up to which all pairs are compared unless the number of clusters is given."""
ROWS_PER_CLUSTER = 500
"""Of a search by clusters, where their number is not given."""
PROBES = 8
"""Clusters that a row looks into."""
MAX_PAIRS = 200_000_000
"""Pairs above which the threshold is too low to be one of near-duplicates: 1.6 GB."""
_UNIT_ROWS = 1 << 16  # rows whose pairs are saved in one file
_TILE = BLOCK


class Duplicates(NamedTuple):
    """The result of a search, for m rows by rank."""

    keepers: np.ndarray
    """(m,) int64: the rank of the row that stays in place of each; -1 for those that stay."""
    clusters: int
    """Clusters of the search; 0 = all pairs were compared."""
    pairs: int
    """Pairs of near-duplicates that were found, without those of equal rows."""


def choose_clusters(rows: int, clusters: int | None) -> int:
    """Return how many clusters a search has; 0 = all pairs are compared."""
    if clusters is not None:
        return 0 if clusters == 1 else min(clusters, rows)
    return 0 if rows <= EXACT_ROWS else -(-rows // ROWS_PER_CLUSTER)


def find_duplicates(
    vectors: np.ndarray,
    ranked: np.ndarray,
    threshold: float,
    folder: Path,
    *,
    protected: int = 0,
    clusters: int | None = None,
    probes: int = PROBES,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> Duplicates:
    """Find the near-duplicates among rows.

    Args:
        vectors: (n, D), of unit length.
        ranked: (m,) rows by rank, the one that stays first.
        threshold: least cosine of near-duplicates.
        folder: for the pairs; what an earlier, killed search with the same arguments left there is used.
        protected: how many of the first ranks stay in any case, near-duplicates of one another or not.
        clusters: of the search; 0 or 1 = compare all pairs; None = by the number of rows.
        probes: clusters that a row looks into.
        seed: of the k-means.
        progress: called with (steps done, steps in all).

    Raises:
        UserError: there are more than MAX_PAIRS pairs.
        OSError: the pairs cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    firsts = _find_first_equals(vectors, ranked)
    firsts[:protected] = np.arange(protected)
    distinct = np.flatnonzero(firsts == np.arange(len(ranked)))  # ranks
    count = choose_clusters(len(distinct), clusters)
    order = distinct[np.argsort(ranked[distinct], kind="stable")]  # ranks in the order of the file, for sequential reads
    rows = ranked[order]
    if count:
        units = _iterate_cluster_units(vectors, rows, count, probes, seed, folder)
    else:
        units = _iterate_blocks(len(rows))
    found: list[np.ndarray] = []
    total = 0
    for number, steps, tiles in units:
        path = folder / f"pairs-{number:06d}.npy"
        if not path.exists():
            pairs = _search_tiles(vectors, rows, order, threshold, protected, tiles, MAX_PAIRS - total)
            with replace_atomically(path) as partial, open(partial, "wb") as file:
                np.save(file, pairs)
        found.append(np.load(path))
        total += len(found[-1])
        _check_pairs(total, threshold)
        progress(number + 1, steps)
    pairs = np.concatenate(found) if found else np.zeros((0, 2), dtype=np.uint32)
    keepers = choose(pairs, len(ranked))
    copies = np.flatnonzero(firsts != np.arange(len(ranked)))
    keepers[copies] = np.where(keepers[firsts[copies]] >= 0, keepers[firsts[copies]], firsts[copies])
    return Duplicates(keepers, count, len(pairs))


def _check_pairs(pairs: int, threshold: float) -> None:
    if pairs > MAX_PAIRS:
        raise UserError(
            f"--duplicates {threshold:g}: more than {MAX_PAIRS:,} pairs of images have this cosine, so it tells no "
            "near-duplicates apart; raise it"
        )


def _find_first_equals(vectors: np.ndarray, ranked: np.ndarray) -> np.ndarray:
    """Return for each rank the lowest rank whose row has the same numbers, (m,) int64: by a digest of 64 bits."""
    weights = np.random.default_rng(0).integers(0, 1 << 63, vectors.shape[1], dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    kind = np.uint16 if vectors.dtype.itemsize == 2 else np.uint32
    digests = np.empty(len(ranked), dtype=np.uint64)
    for start in range(0, len(ranked), BLOCK):
        block = np.ascontiguousarray(vectors[ranked[start : start + BLOCK]]) + vectors.dtype.type(0)  # -0.0 becomes 0.0
        digests[start : start + BLOCK] = (block.view(kind).astype(np.uint64) * weights).sum(axis=1, dtype=np.uint64)
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    result: np.ndarray = first[inverse].astype(np.int64)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Which rows are compared. A tile is (places of rows, places of rows), which index the rows in the order of the file.

_Tile = tuple[np.ndarray, np.ndarray]
_Unit = tuple[int, int, Callable[[], Iterator[_Tile]]]
"""Number of the unit, number of units, and its tiles."""


def _iterate_blocks(rows: int) -> Iterator[_Unit]:
    """Yield units that compare all pairs: one for each block of rows, with all blocks from it on."""
    starts = range(0, rows, _TILE)

    def tiles(start: int) -> Iterator[_Tile]:
        left = np.arange(start, min(start + _TILE, rows))
        for other in range(start, rows, _TILE):
            yield left, np.arange(other, min(other + _TILE, rows))

    for number, start in enumerate(starts):
        yield number, len(starts), lambda start=start: tiles(start)  # type: ignore[misc]


def _iterate_cluster_units(
    vectors: np.ndarray, rows: np.ndarray, clusters: int, probes: int, seed: int, folder: Path
) -> Iterator[_Unit]:
    """Yield units that compare rows with those of the clusters they look into."""
    path = folder / "clusters.npy"
    if not path.exists():
        nearest = assign(vectors, rows, fit_centroids(vectors, rows, clusters, seed), probes)
        with replace_atomically(path) as partial, open(partial, "wb") as file:
            np.save(file, nearest)
    nearest = np.load(path)
    by_home = np.argsort(nearest[:, 0], kind="stable")
    home_starts = np.searchsorted(nearest[by_home, 0], np.arange(clusters + 1))
    flat = nearest.ravel()
    by_probe = np.argsort(flat, kind="stable")
    probe_starts = np.searchsorted(flat[by_probe], np.arange(clusters + 1))
    by_probe //= nearest.shape[1]  # places of rows, ascending in each cluster

    units: list[range] = []
    first = size = 0
    for cluster in range(clusters):
        size += int(probe_starts[cluster + 1] - probe_starts[cluster])
        if size >= _UNIT_ROWS or cluster == clusters - 1:
            units.append(range(first, cluster + 1))
            first, size = cluster + 1, 0

    def tiles(unit: range) -> Iterator[_Tile]:
        for cluster in unit:
            members = by_home[home_starts[cluster] : home_starts[cluster + 1]]
            visitors = by_probe[probe_starts[cluster] : probe_starts[cluster + 1]]
            for start in range(0, len(visitors), _TILE):
                for other in range(0, len(members), _TILE):
                    yield visitors[start : start + _TILE], members[other : other + _TILE]

    for number, unit in enumerate(units):
        yield number, len(units), lambda unit=unit: tiles(unit)  # type: ignore[misc]


def _search_tiles(
    vectors: np.ndarray,
    rows: np.ndarray,
    ranks: np.ndarray,
    threshold: float,
    protected: int,
    tiles: Callable[[], Iterator[_Tile]],
    most: int,
) -> np.ndarray:
    """Return the pairs of near-duplicates of some tiles, (p, 2) uint32: the lower rank first, sorted, each once."""
    found: list[np.ndarray] = []
    total = 0
    loaded: tuple[np.ndarray, np.ndarray] | None = None
    for left, right in tiles():
        if len(left) == 0 or len(right) == 0:
            continue
        if loaded is None or loaded[0] is not left:
            loaded = left, load_rows(vectors, rows[left])
        products = loaded[1] @ load_rows(vectors, rows[right]).T
        i, j = np.nonzero(products >= threshold)
        a, b = ranks[left[i]], ranks[right[j]]
        pairs = np.stack((np.minimum(a, b), np.maximum(a, b)), axis=1)
        pairs = pairs[(pairs[:, 0] != pairs[:, 1]) & (pairs[:, 1] >= protected)].astype(np.uint32)
        total += len(pairs)
        if total > 2 * most:  # a pair may be met twice
            _check_pairs(MAX_PAIRS + 1, threshold)
        found.append(pairs)
    return np.unique(np.concatenate(found), axis=0) if found else np.zeros((0, 2), dtype=np.uint32)


# ---------------------------------------------------------------------------------------------------------------------
# Which rows stay


def choose(pairs: np.ndarray, rows: int) -> np.ndarray:
    """Return for each rank the rank of the row that stays in its place, (rows,) int64; -1 for those that stay.

    pairs: (p, 2), the lower rank first.
    """
    open_, stays, goes = 0, 1, 2
    state = np.zeros(rows, dtype=np.uint8)
    keepers = np.full(rows, rows, dtype=np.int64)
    low, high = pairs[:, 0], pairs[:, 1]
    while len(low):
        waits = np.zeros(rows, dtype=bool)
        waits[high] = True
        state[(state == open_) & ~waits] = stays
        decided = state[low] == stays
        np.minimum.at(keepers, high[decided], low[decided])
        state[high[decided]] = goes
        left = (state[low] == open_) & (state[high] == open_)
        low, high = low[left], high[left]
    keepers[keepers == rows] = -1
    return keepers
