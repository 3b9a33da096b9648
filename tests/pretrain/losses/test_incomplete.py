"""Samples that lack a modality: each pair of modalities counts the samples that have both, against the formula in float64."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain import registry
from pretrain.errors import ConfigError
from pretrain.losses import gather_present
from pretrain.runtime import distributed
from tests.support import world

B, D = 12, 5
MODALITIES = ("image", "text", "audio")
PRESENT = {
    "some": {
        "image": [1, 1, 1, 0, 1, 1, 0, 1, 1, 0, 1, 1],
        "text": [1, 1, 0, 1, 1, 1, 1, 1, 0, 1, 1, 1],
        "audio": [0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0],
    },
    # Of four processes, some have no sample of a pair; no sample at all has image and audio.
    "blocks": {
        "image": [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0],
        "text": [1] * 12,
        "audio": [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1],
    },
    "nothing": {"image": [1] * 12, "text": [0] * 12, "audio": [0] * 12},
}
CASES = [
    (name, tile, present, same, is_weighted)
    for name in ("clip", "siglip")
    for tile in (0, 2, 5)
    for present in PRESENT
    for same, is_weighted in (("keep", False), ("ignore", True))
]


def make_case(name: str, present: str, is_weighted: bool) -> tuple[dict[str, Tensor], list[Tensor], dict[str, Any]]:
    """Return the features (B, D) of each modality, the scalars of the model, and the targets of the whole batch."""
    g = torch.Generator().manual_seed(5)
    features = {m: F.normalize(torch.randn(B, D, generator=g, dtype=torch.float64), dim=1) for m in MODALITIES}
    scalars = [torch.tensor([14.3], dtype=torch.float64)] + [torch.tensor([-2.0], dtype=torch.float64)] * (name == "siglip")
    targets: dict[str, Any] = {
        "caption_id": torch.tensor([0, 1, 2, 0, 3, 4, 5, 1, 0, 6, 7, 5]),
        "present": {m: torch.tensor(values, dtype=torch.bool) for m, values in PRESENT[present].items()},
    }
    if is_weighted:
        weights = torch.rand(B, generator=g, dtype=torch.float64) + 0.1
        targets["weight"] = weights / weights.mean()
    return features, scalars, targets


def formula(name: str, features: dict[str, Tensor], scalars: list[Tensor], targets: dict[str, Any], same: str) -> Tensor:
    """Return the mean over pairs of sum(w l) / sum(w) over the samples that have both, one logit at a time."""
    ids, weights = targets["caption_id"].tolist(), targets.get("weight", torch.ones(B, dtype=torch.float64))
    losses = []
    for first, second in combinations(MODALITIES, 2):
        both = [i for i in range(B) if targets["present"][first][i] and targets["present"][second][i]]
        total: Any = 0
        for i in both:
            columns = [j for j in both if j == i or same == "keep" or ids[j] != ids[i]]
            x, y, scale = features[first], features[second], scalars[0][0]
            if name == "clip":
                row, column = (torch.stack([scale * (x[i] @ y[j] if f else x[j] @ y[i]) for j in columns]) for f in (1, 0))
                total = total + weights[i] * (row.logsumexp(0) + column.logsumexp(0) - 2 * scale * x[i] @ y[i]) / 2
            else:
                for j in columns:
                    logit = scale * x[i] @ y[j] + scalars[1][0]
                    pair_weight = (weights[i] + weights[j]) / 2
                    total = total + pair_weight * F.softplus(-logit if j == i else logit)
        if both:
            losses.append(total / weights[both].sum())
    return torch.stack(losses).mean() if losses else sum(x.sum() for x in (*features.values(), *scalars)) * 0


def run_case(name: str, tile: int, present: str, same: str, is_weighted: bool) -> list[Tensor]:
    """Return the loss averaged over processes, and the gradients as a strategy that averages over processes has them."""
    features, scalars, targets = make_case(name, present, is_weighted)
    b = B // distributed.world_size()
    local = slice(distributed.rank() * b, (distributed.rank() + 1) * b)
    rows = {m: x[local].clone().requires_grad_() for m, x in features.items()}
    scalars = [x.clone().requires_grad_() for x in scalars]
    targets = {
        key: {m: x[local] for m, x in value.items()} if isinstance(value, dict) else value[local]
        for key, value in targets.items()
    }
    module = registry.get_component("losses", name)
    loss, report = module.build(module.Config(tile=tile, same_caption=same))(rows, *(*scalars, None)[:2], targets)
    loss.backward()
    assert all(bool(value.isfinite()) for value in report.values())
    zeros = [torch.zeros_like(x) if x.grad is None else x.grad for x in (*rows.values(), *scalars)]
    gathered = [distributed.gather_without_grad(grad) / distributed.world_size() for grad in zeros[: len(rows)]]
    return [distributed.mean(loss.detach()), *gathered, *(distributed.mean(grad) for grad in zeros[len(rows) :])]


def run_all_cases() -> list[list[Tensor]]:
    return [run_case(*case) for case in CASES]


def check_all(results: list[list[Tensor]]) -> None:
    for case, computed in zip(CASES, results, strict=True):
        name, _, present, same, is_weighted = case
        features, scalars, targets = make_case(name, present, is_weighted)
        leaves = [x.requires_grad_() for x in (*features.values(), *scalars)]
        loss = formula(name, features, scalars, targets, same)
        expected = [loss.detach(), *torch.autograd.grad(loss, leaves, materialize_grads=True)]
        for x, y in zip(computed, expected, strict=True):
            assert torch.linalg.norm(x - y) <= 1e-11 * max(1.0, float(torch.linalg.norm(y))), case


def test_value_and_gradients_are_those_of_the_formula() -> None:
    check_all(run_all_cases())


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_with_different_numbers_of_pairs(processes: int) -> None:
    for results in world.run(run_all_cases, processes):
        check_all(results)


def test_a_sample_that_has_all_changes_nothing() -> None:
    features, scalars, targets = make_case("clip", "some", True)
    module = registry.get_component("losses", "clip")
    everything = {**targets, "present": {m: torch.ones(B, dtype=torch.bool) for m in MODALITIES}}
    del targets["present"]
    for tile in (0, 4):
        loss = module.build(module.Config(tile=tile))
        for x, y in zip(*(loss(features, scalars[0], None, t) for t in (targets, everything)), strict=True):
            torch.testing.assert_close(x, y)


def test_blocks_that_travel_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"loss\.exchange=ring"):
        gather_present(make_case("clip", "some", False)[2], [("image", "text")], is_ring=True)
