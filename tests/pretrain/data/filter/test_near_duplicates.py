"""Near-duplicates, clusters and balance against brute force, faiss and scikit-learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from pretrain.data.filter import near_duplicates
from pretrain.data.filter.clusters import assign, fit_centroids, limit_clusters
from pretrain.data.filter.near_duplicates import choose_clusters, find_duplicates
from pretrain.errors import UserError


def make_vectors(groups: int, rng: np.random.Generator, width: int = 32, spread: float = 0.05, modes: int = 0) -> np.ndarray:
    """Unit vectors in groups of 1 to 4, a little apart; their centers lie in some modes, as pictures of a kind do."""
    centers = rng.standard_normal((groups, width))
    if modes:
        centers = rng.standard_normal((modes, width))[rng.integers(modes, size=groups)] + 0.6 * centers
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    sizes = rng.integers(1, 5, groups)
    points = np.repeat(centers, sizes, axis=0)
    points += spread * rng.standard_normal(points.shape)
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


def choose_by_brute_force(vectors: np.ndarray, ranked: np.ndarray, threshold: float, protected: int = 0) -> list[int]:
    """Ranks that stay: in their order, those without a near-duplicate among the ones that stay already."""
    cosines = vectors[ranked].astype(np.float64) @ vectors[ranked].astype(np.float64).T
    staying: list[int] = []
    for rank in range(len(ranked)):
        if rank < protected or not any(cosines[rank, other] >= threshold for other in staying):
            staying.append(rank)
    return staying


@pytest.mark.parametrize("protected", [0, 40])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_all_pairs_give_what_brute_force_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protected: int, dtype: str
) -> None:
    monkeypatch.setattr(near_duplicates, "_TILE", 64)  # several blocks
    rng = np.random.default_rng(1)
    vectors = make_vectors(200, rng, spread=0.08).astype(dtype)
    vectors[[7, 300, 301]] = vectors[5]  # equal rows
    ranked = rng.permutation(len(vectors))
    for threshold in (0.85, 0.95):
        result = find_duplicates(vectors, ranked, threshold, tmp_path / f"{threshold}", protected=protected)
        staying = np.flatnonzero(result.keepers < 0)
        assert result.clusters == 0
        assert staying.tolist() == choose_by_brute_force(vectors, ranked, threshold, protected)
        assert len(staying) < len(vectors)
        gone = np.flatnonzero(result.keepers >= 0)
        kept = result.keepers[gone]
        assert np.isin(kept, staying).all()
        assert (kept < gone).all()
        cosines = (vectors[ranked[gone]].astype(np.float64) * vectors[ranked[kept]].astype(np.float64)).sum(axis=1)
        assert (cosines >= threshold - 1e-3).all()


def test_a_search_by_clusters_finds_nearly_all_that_faiss_finds(tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss")
    rng = np.random.default_rng(2)
    vectors = make_vectors(3000, rng, modes=40)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    limits, _, neighbors = index.range_search(vectors, 0.9)
    owners = np.repeat(np.arange(len(vectors)), np.diff(limits.astype(np.int64)))
    exact = {(a, b) for a, b in zip(owners.tolist(), neighbors.tolist(), strict=True) if a < b}
    ranked = np.arange(len(vectors))
    recall = {}
    for probes in (1, 8):
        folder = tmp_path / f"{probes}"
        result = find_duplicates(vectors, ranked, 0.9, folder, clusters=64, probes=probes)
        assert result.clusters == 64
        pairs = np.concatenate([np.load(path) for path in folder.glob("pairs-*.npy")])
        found = {(int(a), int(b)) for a, b in pairs}
        assert found <= exact
        recall[probes] = len(found) / len(exact)
    print(f"{len(exact):,} pairs; recall by clusters searched: {recall}")
    assert recall[8] >= 0.99
    assert recall[1] < recall[8]
    every = find_duplicates(vectors, ranked, 0.9, tmp_path / "all")
    assert every.pairs == len(exact)


def test_a_killed_search_uses_what_it_had_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "_TILE", 64)
    vectors = make_vectors(150, np.random.default_rng(3))
    ranked = np.arange(len(vectors))
    whole = find_duplicates(vectors, ranked, 0.9, tmp_path / "a")
    files = sorted((tmp_path / "a").glob("pairs-*.npy"))
    times = {path: path.stat().st_mtime_ns for path in files}
    files[-1].unlink()
    assert (find_duplicates(vectors, ranked, 0.9, tmp_path / "a").keepers == whole.keepers).all()
    assert [path for path in files if path.stat().st_mtime_ns == times.get(path)] == files[:-1]


def test_a_threshold_that_everything_reaches_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "MAX_PAIRS", 100)
    vectors = make_vectors(100, np.random.default_rng(4))
    with pytest.raises(UserError, match=r"--duplicates -1: more than 100 pairs .* raise it"):
        find_duplicates(vectors, np.arange(len(vectors)), -1, tmp_path)


def test_many_equal_rows_are_one_group_without_pairs(tmp_path: Path) -> None:
    vectors = np.tile(make_vectors(1, np.random.default_rng(5))[:1], (5000, 1))
    result = find_duplicates(vectors, np.arange(5000), 0.9, tmp_path)
    assert result.pairs == 0
    assert result.keepers.tolist() == [-1, *[0] * 4999]


def test_the_search_is_exact_up_to_a_size() -> None:
    assert [choose_clusters(n, None) for n in (1000, 50_000, 50_001, 10**6)] == [0, 0, 101, 2000]
    assert [choose_clusters(1000, n) for n in (0, 1, 64, 5000)] == [0, 0, 64, 1000]


def test_clusters_are_those_that_the_vectors_have() -> None:
    rng = np.random.default_rng(6)
    centers = np.linalg.qr(rng.standard_normal((16, 16)))[0][:6]
    truth = rng.integers(6, size=900)
    vectors = centers[truth] + 0.1 * rng.standard_normal((900, 16))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    rows = np.arange(0, 900, 2)
    centroids = fit_centroids(vectors, rows, 6, seed=0)
    nearest = assign(vectors, rows, centroids, 3)
    assert adjusted_rand_score(truth[rows], nearest[:, 0]) == 1.0
    order = np.argsort(-(vectors[rows] @ centroids.T), axis=1)[:, :3]
    assert (nearest == order).all()
    assert (fit_centroids(vectors, rows, 6, seed=0) == centroids).all()
    assert len(fit_centroids(vectors, rows[:4], 6, seed=0)) == 4
    assert len(fit_centroids(np.tile(vectors[:1], (10, 1)), np.arange(10), 4, seed=0)) == 4


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [(0.0, [3, 10, 10, 10]), (0.5, [3, 10, 20, 40]), (1.0, [3, 10, 40, 160])],  # 10 (40/10)^0.5 = 20
)
def test_large_clusters_are_limited(temperature: float, expected: list[int]) -> None:
    sizes = [3, 10, 40, 160]
    rng = np.random.default_rng(7)
    clusters = rng.permutation(np.repeat(np.arange(4), sizes))
    ranks = rng.permutation(len(clusters))
    stays = limit_clusters(clusters, ranks, 10, temperature)
    assert [int(stays[clusters == i].sum()) for i in range(4)] == expected
    for i in range(4):
        mine = np.sort(ranks[clusters == i])
        assert np.sort(ranks[(clusters == i) & stays]).tolist() == mine[: expected[i]].tolist()
