"""loss.matryoshka: the mean of the loss over prefixes, against autograd on the whole batch in closed form, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from pretrain import registry
from pretrain.errors import ConfigError
from pretrain.optim import OptimConfig
from pretrain.runtime import distributed
from pretrain.strategies import build_strategy
from tests.support import tiny, world

WIDTHS = [2, 5]  # of the 8 dimensions of the tiny model, which count as well
LOSSES = ("clip", "siglip")
FORMS: list[tuple[int, dict[str, Any]]] = [(1, {}), (2, {"tile": 3}), (2, {"tile": 3, "exchange": "ring"})]
"""Chunks, and settings of the loss."""


def reference_gradients(loss: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one process: the mean over 2, 5 and all 8 dimensions, each cut and divided by its length."""
    model = tiny.build_model(loss, torch.float64)
    batch = tiny.build_batch()
    features = model(batch.inputs, batch.masks)
    values = []
    for width in (*WIDTHS, 8):
        cut = {name: x[:, :width] / x[:, :width].norm(dim=1, keepdim=True) for name, x in features.items() if x.dim() == 2}
        values.append(tiny.closed_form_loss(loss, {**features, **cut}))
    value = torch.stack(values).mean()
    value.backward()
    return value.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def run_cases(name: str, is_double: bool) -> list[tuple[float, float]]:
    """Return the errors of the loss and of the worst gradient for each loss, form and number of chunks."""
    errors = []
    b = tiny.SAMPLES // distributed.world_size()
    batch = tiny.build_batch().slice(b * distributed.rank(), b * (distributed.rank() + 1))
    for loss in LOSSES:
        expected_loss, expected = reference_gradients(loss)
        strategy = build_strategy(name, "fp32", OptimConfig(clip_norm=0.0), torch.device("cpu"))  # type: ignore[arg-type]
        strategy.persistence_threshold = 100  # type: ignore[attr-defined]
        strategy.setup(tiny.build_model(loss, torch.float64 if is_double else torch.float32))
        strategy.model.train()
        for chunks, form in FORMS:
            objective = tiny.build_objective(loss, matryoshka=WIDTHS, **form)
            value, gradients = tiny.run_one_step(strategy, objective, batch, chunks, (0, 0, distributed.rank()))
            worst = max(tiny.gradient_errors(gradients, expected).values())
            errors.append((abs(value - expected_loss) / abs(expected_loss), worst))
    return errors


WORLDS = [("single", 1), ("ddp", 2), ("fsdp2", 2), ("ddp", 4), ("zero3", 2)]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("name", "processes"), WORLDS, ids=[f"{name}-{n}" for name, n in WORLDS])
def test_gradients_are_those_of_one_process(name: str, processes: int) -> None:
    is_double = not name.startswith("zero")
    if not is_double:
        pytest.importorskip("deepspeed")
    for errors in world.run(run_cases, processes, name, is_double):
        assert len(errors) == len(LOSSES) * len(FORMS)
        assert max(max(pair) for pair in errors) <= (1e-10 if is_double else 1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_whole_embedding_counts_once(loss: str) -> None:
    """Its width may be named; without other widths the loss is the plain one, to the bit."""
    g = torch.Generator().manual_seed(0)
    features = {name: F.normalize(torch.randn(6, 8, generator=g), dim=1) for name in ("image", "text")}
    scale, bias = torch.tensor([10.0]), torch.tensor([-5.0]) if loss == "siglip" else None
    module = registry.get_component("losses", loss)

    def compute(widths: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        result: tuple[torch.Tensor, dict[str, torch.Tensor]] = module.build(module.Config(name=loss, matryoshka=widths))(
            features, scale, bias, {}
        )
        return result

    assert torch.equal(compute([])[0], compute([8])[0])
    assert torch.equal(compute([2, 5])[0], compute([5, 2, 8])[0]) or torch.allclose(compute([2, 5])[0], compute([5, 2, 8])[0])
    assert set(compute([2, 8])[1]) == {"image_to_text_accuracy", "image_to_text_accuracy_2"}


@pytest.mark.parametrize("widths", [[0], [-1, 4], [4, 4]])
def test_widths_that_are_none(widths: list[int]) -> None:
    module = registry.get_component("losses", "clip")
    with pytest.raises(ConfigError, match=r"loss\.matryoshka=.* must be different widths of at least 1"):
        module.Config(matryoshka=widths).check()
