"""On several processes, gradients averaged over ranks are those of one process with the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as td
from torch import Tensor
from torch.nn import functional as F

from pretrain import registry
from pretrain.runtime import distributed
from tests.support import world
from tests.support.largest_tensor import LargestTensor

B, D = 12, 5
CASES: list[tuple[Any, ...]] = [
    (name, tile, same, modalities, scale, "gather")
    for name in ("clip", "siglip")
    for tile in (0, 2, 5, 100)
    for same in ("keep", "ignore")
    for modalities, scale in ((("image", "text"), 14.3), (("image", "text", "audio"), 100.0))
]
CASES += [
    (name, tile, same, modalities, scale, "ring")
    for name in ("clip", "siglip")
    for tile in (0, 2)
    for same in ("keep", "ignore")
    for modalities, scale in ((("image", "text"), 14.3), (("image", "text", "audio"), 100.0))
]
CASES += [
    (name, tile, "ignore", ("image", "text", "audio"), 14.3, exchange, True)
    for name in ("clip", "siglip")
    for tile, exchange in ((0, "gather"), (2, "gather"), (5, "gather"), (2, "ring"))
]
NEGATIVES = 2


def run_case(
    name: str, tile: int, same: str, modalities: tuple[str, ...], scale: float, exchange: str, is_labeled: bool = False
) -> list[Tensor]:
    """Return the loss, the gradients and the accuracy of one case, averaged over ranks as DDP averages.

    The gradients are those of a linear encoder for each modality, and of the scalars. As in a cached step, the loss is
    computed on detached features, and its gradients are then given to the encoders.
    """
    g = torch.Generator().manual_seed(3)
    inputs = {m: torch.randn(B, 4, generator=g, dtype=torch.float64) for m in modalities}
    weights = {m: torch.randn(4, D, generator=g, dtype=torch.float64).requires_grad_() for m in modalities}
    ids = torch.tensor([0, 1, 2, 0, 3, 4, 5, 1, 0, 6, 7, 5])
    scalars = [torch.tensor([scale], dtype=torch.float64, requires_grad=True)]
    if name == "siglip":
        scalars.append(torch.tensor([-2.0], dtype=torch.float64, requires_grad=True))
    b = B // distributed.world_size()
    local = slice(distributed.rank() * b, (distributed.rank() + 1) * b)
    features = {m: F.normalize(inputs[m][local] @ weights[m], dim=1) for m in modalities}
    targets = {"caption_id": ids[local]}
    if is_labeled:  # weights of the pairs, and negatives from an encoder of their own
        texts = torch.randn(B, NEGATIVES, 4, generator=g, dtype=torch.float64)
        weights["negatives"] = torch.randn(4, D, generator=g, dtype=torch.float64).requires_grad_()
        features["negatives"] = F.normalize(texts[local] @ weights["negatives"], dim=-1)
        pair_weights = torch.rand(B, generator=g, dtype=torch.float64) * (torch.arange(B) % 5 != 3)
        targets["weight"] = (pair_weights / pair_weights.mean())[local]
        targets["negative_mask"] = (torch.arange(B * NEGATIVES).view(B, NEGATIVES) % 7 != 4)[local]
        targets["negative_id"] = (torch.arange(B * NEGATIVES).view(B, NEGATIVES) % 9)[local]
    detached = {m: x.detach().requires_grad_() for m, x in features.items()}
    module = registry.get_component("losses", name)
    loss, report = module.build(module.Config(tile=tile, same_caption=same, exchange=exchange))(
        detached, scalars[0], scalars[1] if scalars[1:] else None, targets
    )
    loss.backward()
    torch.autograd.backward(list(features.values()), [x.grad for x in detached.values()])
    leaves: list[Any] = [*weights.values(), *scalars]
    return [distributed.mean(x) for x in (loss.detach(), *(leaf.grad for leaf in leaves), report["image_to_text_accuracy"])]


def run_all_cases() -> list[list[Tensor]]:
    return [run_case(*case) for case in CASES]


def largest_tensors(name: str, b: int, d: int) -> dict[str, int]:
    """Return by exchange the elements of the largest tensor that a loss of b local rows and its backward pass make."""
    module, elements = registry.get_component("losses", name), {}
    for exchange in ("gather", "ring"):
        g = torch.Generator().manual_seed(distributed.rank())
        features = {m: F.normalize(torch.randn(b, d, generator=g), dim=1).requires_grad_() for m in ("image", "text")}
        scale, bias = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True) if name == "siglip" else None
        config = module.Config(tile=8, same_caption="ignore", exchange=exchange)
        with LargestTensor() as largest:
            module.build(config)(features, scale, bias, {"caption_id": torch.arange(b)})[0].backward()
        elements[exchange] = largest.elements
    return elements


def run_all_on_ranks(b: int, d: int) -> tuple[list[list[Tensor]], dict[str, dict[str, int]]]:
    return run_all_cases(), {name: largest_tensors(name, b, d) for name in ("clip", "siglip")}


def transferred_bytes(name: str, tile: int) -> list[int]:
    """Return the bytes of each collective that one loss and its backward pass call."""
    sizes: list[int] = []
    names = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce")
    originals = {n: getattr(td, n) for n in names}

    def record_size(n: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            sizes.append(max(a.numel() * a.element_size() for a in args if isinstance(a, Tensor)))
            return originals[n](*args, **kwargs)

        return call

    for n in names:
        setattr(td, n, record_size(n))
    try:
        features = {m: torch.ones(B // distributed.world_size(), D, requires_grad=True) for m in ("image", "text")}
        module = registry.get_component("losses", name)
        scale, bias = torch.ones(1), torch.ones(1) if name == "siglip" else None
        module.build(module.Config(tile=tile))(features, scale, bias, {})[0].backward()
    finally:
        for n in names:
            setattr(td, n, originals[n])
    return sizes


@pytest.mark.parametrize("processes", [2, 4])
def test_gradients_are_those_of_one_process(processes: int) -> None:
    """Computed with all features on each rank, and with blocks that travel: then no rank holds more than a block."""
    expected, b, d = run_all_cases(), 32, 16
    for results, elements in world.run(run_all_on_ranks, processes, b, d):
        for name in ("clip", "siglip"):
            assert elements[name]["gather"] >= processes * b * d
            assert elements[name]["ring"] <= b * d
        for case, computed, reference in zip(CASES, results, expected, strict=True):
            for x, y in zip(computed, reference, strict=True):
                error = torch.linalg.norm(x.double() - y.double())
                floor = max(1e-3 * max(float(torch.linalg.norm(w)) for w in reference[1:-1]), float(torch.linalg.norm(y)))
                assert error <= 1e-10 * floor, case


def test_tiles_transfer_half_of_what_dense_losses_do() -> None:
    """A dense softmax gathers both modalities in one collective and reduces both in another.

    In tiles only the second modality is transferred, and twice B numbers, however many ranks there are.
    """
    matrix, processes = B * D * 4, 2
    assert world.run(transferred_bytes, processes, "clip", 0) == [[2 * matrix, 2 * matrix]] * processes
    assert world.run(transferred_bytes, processes, "clip", 4) == [[matrix, B * 4, B * 4, matrix]] * processes
    assert world.run(transferred_bytes, processes, "siglip", 4) == [[matrix, matrix]] * processes
