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

B, D = 12, 5
CASES = [
    (name, tile, same, modalities, scale)
    for name in ("clip", "siglip")
    for tile in (0, 2, 5, 100)
    for same in ("keep", "ignore")
    for modalities, scale in ((("image", "text"), 14.3), (("image", "text", "audio"), 100.0))
]


def run_case(name: str, tile: int, same: str, modalities: tuple[str, ...], scale: float) -> list[Tensor]:
    """Return the loss, the gradients and the accuracy of one case, averaged over ranks as DDP averages.

    The gradients are those of a linear encoder for each modality, and of the scalars.
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
    module = registry.get_component("losses", name)
    loss, report = module.build(module.Config(tile=tile, same_caption=same))(
        features, scalars[0], scalars[1] if scalars[1:] else None, {"caption_id": ids[local]}
    )
    loss.backward()
    leaves: list[Any] = [*weights.values(), *scalars]
    return [distributed.mean(x) for x in (loss.detach(), *(leaf.grad for leaf in leaves), report["image_to_text_accuracy"])]


def run_all_cases() -> list[list[Tensor]]:
    return [run_case(*case) for case in CASES]


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
    expected = run_all_cases()
    for results in world.run(run_all_cases, processes):
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
