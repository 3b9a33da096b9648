"""Three towers under ddp, in chunks: two processes have the gradient of one on the whole batch, with CLAP's BatchNorm too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pretrain import registry
from pretrain.data.batch import Batch
from pretrain.model import LOGIT_SCALE, DualEncoder
from pretrain.optim import OptimConfig
from pretrain.runtime import distributed
from pretrain.strategies import build_strategy
from tests.pretrain.towers.test_audio import CLAP
from tests.support import tiny, world

TOWERS: dict[str, dict[str, Any]] = {
    "clap": {"args": {**CLAP, "hidden_dropout_prob": 0.0}},
    "conv": {"name": "conv", "widths": [8, 16], "mels": 24},
}
RATE, SECONDS = 8000, 0.6


def build_model(tower: str) -> DualEncoder:
    """Build a model of images, texts and sounds in float64, in training mode."""
    pair = tiny.build_model("clip")
    torch.manual_seed(0)
    audio = registry.get_component("towers", "audio").Config(
        **TOWERS[tower], rate=RATE, seconds=SECONDS, n_fft=256, window=200, hop=80, fmax=4000.0
    )
    alone = registry.get_component("towers", "audio").build(audio)
    towers = {**{name: pair.tower(name) for name in pair.towers}, "audio": alone}
    return DualEncoder(towers, 8, LOGIT_SCALE, None).double().train()


def build_batch() -> Batch:
    batch = tiny.build_batch()
    sounds = torch.randint(-9000, 9000, (len(batch), round(RATE * SECONDS)), dtype=torch.int16, generator=torch.manual_seed(3))
    return Batch({**batch.inputs, "audio": sounds}, batch.masks, batch.keys, batch.targets)


def reference_gradients(tower: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Return loss and gradients of one process: the mean over the three pairs, in closed form."""
    model, batch = build_model(tower), build_batch()
    features = model(batch.inputs, batch.masks)
    losses = [
        tiny.closed_form_loss("clip", {"image": features[a], "text": features[b], "logit_scale": features["logit_scale"]})
        for a, b in (("image", "text"), ("image", "audio"), ("text", "audio"))
    ]
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def run_cases() -> list[tuple[str, float, float]]:
    """Return (tower, error of the loss, largest error of a gradient)."""
    results = []
    for tower in TOWERS:
        expected_loss, expected = reference_gradients(tower)
        strategy = build_strategy("ddp", "fp32", OptimConfig(clip_norm=0.0), torch.device("cpu"))
        strategy.setup(build_model(tower))
        rank, b = distributed.rank(), tiny.SAMPLES // distributed.world_size()
        batch = build_batch().slice(b * rank, b * (rank + 1))
        loss, gradients = tiny.run_one_step(strategy, tiny.build_objective("clip"), batch, 2, (0, 0, rank))
        results.append((tower, abs(loss - expected_loss), max(tiny.gradient_errors(gradients, expected).values())))
    return results


@pytest.mark.timeout(180)
def test_two_processes_have_the_gradient_of_one() -> None:
    for tower, loss_error, gradient_error in world.run(run_cases, 2, timeout=150)[0]:
        assert loss_error < 1e-10, tower
        assert gradient_error < 1e-10, tower
