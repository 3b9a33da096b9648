"""Decides which samples go: rules of single samples, repeated captions, similarity, near-duplicates, balance, in this order.

Each rule sees what those before it have left; a sample that goes has the first reason. Arrays have one entry for each of the n
samples: about 60 bytes a sample are in memory, and near_duplicates.py says what its search takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from pretrain.data.filter.clusters import Progress, assign, fit_centroids, limit_clusters
from pretrain.data.filter.near_duplicates import PROBES, find_duplicates
from pretrain.data.filter.options import FilterOptions
from pretrain.data.filter.scan import IN_SKIP, NOT_IN_KEEP_LIST, Scan
from pretrain.data.sample_filter import read_skip_list
from pretrain.errors import UserError

NEAR_DUPLICATE, OF_HELD_OUT = "near-duplicate", "near-duplicate of a held-out sample"
REPEATED_CAPTION, NO_EMBEDDING, NOT_BEST = "caption that too many samples have", "no embedding", "not among the best"
CLUSTER_FULL = "cluster is full"
_QUANTILES = (0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0)

Stage = Callable[[str], AbstractContextManager[Progress]]
"""Shows the progress of a stage behind its name."""


class Embeddings(Protocol):
    """What a selection needs of pretrain.embedding.aligned.Aligned; arrays have one row for each sample, held-out ones last."""

    @property
    def vectors(self) -> np.ndarray: ...

    @property
    def similarity(self) -> np.ndarray: ...

    @property
    def has_vector(self) -> np.ndarray: ...


class Selection(NamedTuple):
    """Why each sample goes."""

    reasons: np.ndarray
    """(n,) int32, positions in `names`; 0 where a sample stays."""
    names: list[str]
    keepers: np.ndarray
    """(n,) int64: the sample that stays in place of a near-duplicate, or -1."""
    facts: dict[str, Any]
    """For the report: what the rules met."""


class _Reasons:
    """The reason of each sample, the first one that is given."""

    def __init__(self, scans: Sequence[Scan]) -> None:
        self.names = {"": 0}
        self.values = np.zeros(sum(len(scan.reasons) for scan in scans), dtype=np.int32)
        start = 0
        for scan in scans:
            numbers = np.array([self.names.setdefault(name, len(self.names)) for name in scan.names], dtype=np.int32)
            self.values[start : start + len(scan.reasons)] = numbers[scan.reasons]
            start += len(scan.reasons)

    def left(self) -> np.ndarray:
        """Return the samples that have no reason yet, ascending."""
        return np.flatnonzero(self.values == 0)

    def give(self, samples: np.ndarray, name: str) -> None:
        """Give samples a reason."""
        if len(samples):
            self.values[samples] = self.names.setdefault(name, len(self.names))


def select(
    scans: Sequence[Scan], options: FilterOptions, embeddings: Embeddings | None, held_out: int, folder: Path, stage: Stage
) -> Selection:
    """Decide which samples go.

    Args:
        scans: of all shards, in order.
        options: the rules.
        embeddings: of all samples and of the held-out ones after them; None where no rule needs any.
        held_out: how many held-out samples there are.
        folder: for intermediate results of long rules, which a killed run reuses.
        stage: shows progress.

    Raises:
        UserError: most samples have no embedding, or the threshold of near-duplicates tells none apart.
        OSError: the folder cannot be written.
    """
    reasons, facts = _Reasons(scans), dict[str, Any]()
    keepers = np.full(len(reasons.values), -1, dtype=np.int64)
    _count_listed(reasons, options, facts)
    if options.max_repeats is not None:
        reasons.give(_find_repeated(scans, reasons, options.max_repeats), REPEATED_CAPTION)
    if embeddings is not None:
        _check_coverage(embeddings, reasons, options, facts)
        _select_by_similarity(embeddings.similarity, reasons, options, facts)
        if options.duplicates is not None:
            with stage("searching near-duplicates") as progress:
                _remove_duplicates(embeddings, reasons, options, held_out, folder, keepers, facts, progress)
        if options.clusters is not None:
            with stage("finding clusters") as progress:
                _balance(embeddings, reasons, options, facts, progress)
    return Selection(reasons.values, list(reasons.names), keepers, facts)


def _count_listed(reasons: _Reasons, options: FilterOptions, facts: dict[str, Any]) -> None:
    """Count the samples that lists name, beside the lines they have: fewer samples hint at a list of other shards."""
    skipped, others = (int((reasons.values == reasons.names.get(name, -1)).sum()) for name in (IN_SKIP, NOT_IN_KEEP_LIST))
    for path, option, samples in (
        (options.skip, "--skip", skipped),
        (options.keep_list, "--keep-list", len(reasons.values) - skipped - others),
    ):
        if path is not None:
            facts.setdefault("lists", {})[option] = {"lines": len(read_skip_list(path)), "samples": samples}


def _find_repeated(scans: Sequence[Scan], reasons: _Reasons, most: int) -> np.ndarray:
    """Return the samples all of whose captions are captions of more than `most` of the samples that are left."""
    counts = np.concatenate([scan.counts for scan in scans])
    owners = np.repeat(np.arange(len(counts)), counts)
    captions = np.concatenate([scan.captions for scan in scans])
    is_left = reasons.values[owners] == 0
    owners, captions = owners[is_left], captions[is_left]
    _, ids = np.unique(captions, return_inverse=True)
    order = np.lexsort((owners, ids))
    is_new = np.ones(len(order), dtype=bool)  # a sample that has a caption twice counts once
    is_new[1:] = (np.diff(ids[order]) != 0) | (np.diff(owners[order]) != 0)
    samples_of_caption = np.bincount(ids[order][is_new])
    passing = np.bincount(owners[samples_of_caption[ids] <= most], minlength=len(counts))
    return np.unique(owners[passing[owners] == 0])


def _check_coverage(embeddings: Embeddings, reasons: _Reasons, options: FilterOptions, facts: dict[str, Any]) -> None:
    """Count samples without an embedding, and let them go unless they are to stay. Raises UserError."""
    left = reasons.left()
    missing = left[~embeddings.has_vector[left]]
    facts["embeddings"] = {"samples": len(left), "missing": len(missing), "treated": options.missing or "drop"}
    if len(missing) == len(left) and len(left):
        raise UserError("--embeddings: no sample has an embedding there, so they are of other shards: keys are SHARD/KEY")
    if options.missing is None and 2 * len(missing) > len(left):
        raise UserError(
            f"--embeddings: {len(missing):,} of {len(left):,} samples have none there; embed the other shards, too, or give "
            "--missing drop or --missing keep"
        )
    if options.missing != "keep":
        reasons.give(missing, NO_EMBEDDING)


def _select_by_similarity(similarity: np.ndarray, reasons: _Reasons, options: FilterOptions, facts: dict[str, Any]) -> None:
    """Apply --similarity, then --keep-best to what is left; samples without an embedding have passed by here."""
    left = reasons.left()
    left = left[np.isfinite(similarity[left])]
    if len(left):
        values = np.quantile(similarity[left], _QUANTILES)
        facts["similarity"] = {f"{q:.0%}": round(float(value), 4) for q, value in zip(_QUANTILES, values, strict=True)}
    if options.similarity is not None:
        reasons.give(left[similarity[left] < options.similarity], f"similarity below {options.similarity:g}")
    if options.keep_best is not None:
        left = left[reasons.values[left] == 0]
        best = np.lexsort((left, -similarity[left]))
        stays = int(np.ceil(options.keep_best * len(left) - 1e-9))
        if 0 < stays < len(left):
            facts["keep_best"] = {"least_similarity": round(float(similarity[left[best[stays - 1]]]), 4)}
        reasons.give(left[best[stays:]], f"{NOT_BEST} {100 * options.keep_best:.4g}% by similarity")


def _rank(samples: np.ndarray, similarity: np.ndarray) -> np.ndarray:
    """Return samples with the highest similarity of image and caption first, then in order; those without any come last."""
    order = np.lexsort((samples, -np.nan_to_num(similarity[samples], nan=-np.inf)))
    return samples[order]


def _remove_duplicates(
    embeddings: Embeddings,
    reasons: _Reasons,
    options: FilterOptions,
    held_out: int,
    folder: Path,
    keepers: np.ndarray,
    facts: dict[str, Any],
    progress: Progress,
) -> None:
    """Let near-duplicates go, and write the sample that stays in place of each into `keepers`."""
    assert options.duplicates is not None
    count = len(reasons.values)
    left = reasons.left()
    left = left[embeddings.has_vector[left]]
    others = np.arange(count, count + held_out)
    others = others[embeddings.has_vector[others]]
    ranked = np.concatenate([others, _rank(left, embeddings.similarity)])
    found = find_duplicates(
        embeddings.vectors,
        ranked,
        options.duplicates,
        folder,
        protected=len(others),
        clusters=options.search_clusters,
        seed=options.seed,
        progress=progress,
    )
    gone = np.flatnonzero(found.keepers >= 0)
    keepers[ranked[gone]] = ranked[found.keepers[gone]]
    is_of_held_out = found.keepers[gone] < len(others)
    reasons.give(ranked[gone[is_of_held_out]], OF_HELD_OUT)
    reasons.give(ranked[gone[~is_of_held_out]], NEAR_DUPLICATE)
    groups = np.unique(found.keepers[gone])
    search = f"{found.clusters:,} clusters, {min(PROBES, found.clusters)} for each image" if found.clusters else "all pairs"
    facts["near_duplicates"] = {
        "compared": len(ranked),
        "held_out": len(others),
        "pairs": found.pairs,
        "groups": len(groups),
        "search": search,
    }


def _balance(
    embeddings: Embeddings, reasons: _Reasons, options: FilterOptions, facts: dict[str, Any], progress: Progress
) -> None:
    """Limit the clusters of what is left."""
    assert options.clusters is not None
    assert options.per_cluster is not None
    left = reasons.left()
    left = left[embeddings.has_vector[left]]
    if len(left) == 0:
        return
    centroids = fit_centroids(embeddings.vectors, left, options.clusters, options.seed)
    clusters = assign(embeddings.vectors, left, centroids, 1, progress)[:, 0]
    ranks = np.empty(len(left), dtype=np.int64)
    ranks[np.searchsorted(left, _rank(left, embeddings.similarity))] = np.arange(len(left))
    stays = limit_clusters(clusters, ranks, options.per_cluster, options.temperature)
    reasons.give(left[~stays], CLUSTER_FULL)
    sizes = np.bincount(clusters, minlength=len(centroids))
    facts["clusters"] = {
        "clusters": len(centroids),
        "largest": int(sizes.max()),
        "smallest": int(sizes.min()),
        "limited": int((sizes > options.per_cluster).sum()),
    }
