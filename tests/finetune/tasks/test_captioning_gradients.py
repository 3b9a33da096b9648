"""Captions of unequal length, adapters, the contrastive loss kept on: the gradient of one process on the whole batch."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from finetune import model as models
from finetune.adapt import freeze
from finetune.adapt.freeze import AdaptConfig
from finetune.adapt.lora import LoraConfig
from finetune.model import CAPTION, FusionModel
from finetune.tasks import captioning
from finetune.tasks.with_contrastive import add_contrastive_loss
from pretrain import registry
from pretrain.data.batch import Batch
from pretrain.model import ModelSchema
from pretrain.optim import OptimConfig
from pretrain.runtime import distributed
from pretrain.strategies import build_strategy
from tests.support import tiny, world

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
EXACT = {"ddp": 1e-10, "fsdp2": 1e-10, "zero3": 1e-5}
"""DeepSpeed asserts on float64."""
SMOOTHING, WEIGHT, B = 0.1, 0.7, 8


def built(dtype: torch.dtype) -> tuple[FusionModel, Any]:
    """The same weights at each call, gates and adapters open; what the loss never reaches is frozen, as a run does it."""
    encoder = tiny.build_model("clip")
    config = AdaptConfig(lora=LoraConfig(rank=2, towers=["image"]), contrastive=WEIGHT)
    freeze.adapt_encoder(encoder, config, ModelSchema(image=encoder.towers["image"].config, text=None))
    fusion = registry.get_component("fusion", "cross").Config(layers=1, heads=2, causal=True)
    model = models.build(encoder, fusion, None)
    task = add_contrastive_loss(captioning.build(captioning.Config(smoothing=SMOOTHING), None), config)
    torch.manual_seed(1)
    model.head = task.build_head(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "towers" not in name or ".lora_" in name:
                p.add_(0.2 * torch.randn_like(p))
    model = model.to(dtype)
    small = whole().slice(0, 2)
    freeze.freeze_unused(model, [task.loss(task.encode(model, small), small.targets)[0]])
    return model.train(), task


def whole() -> Batch:
    """The first half of the texts is shorter than the second: the two processes hold unequal numbers of words."""
    batch, texts = tiny.build_batch(0, B), tiny.build_batch(1, B)
    batch.masks["text"][: B // 2, 4:] = False
    batch.inputs[CAPTION], batch.masks[CAPTION] = texts.inputs["text"], texts.masks["text"]
    return batch


def reference(dtype: torch.dtype = torch.float64) -> tuple[float, dict[str, torch.Tensor]]:
    """One process, torch's own cross-entropy over the words, the contrastive loss as its paper writes it."""
    model, _ = built(dtype)
    b = whole()
    image = model.tokens("image", b.inputs["image"])
    logits = model.head.logits(model, image, b.inputs["text"], b.masks["text"])  # type: ignore[operator]
    real = b.masks["text"][:, 1:]
    words = F.cross_entropy(logits[:, :-1][real], b.inputs["text"][:, 1:][real], label_smoothing=SMOOTHING)
    pairs = model.encoder({"image": b.inputs["image"], "text": b.inputs[CAPTION]}, {"text": b.masks[CAPTION]})
    value = words + WEIGHT * tiny.closed_form_loss("clip", pairs)
    value.backward()
    return value.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def cells() -> dict[str, tuple[float, str, float]]:
    """(strategy, chunks) -> worst gradient as a share of what is allowed, where, error of the loss."""
    value, expected = reference()
    rounding = max(tiny.gradient_errors(reference(torch.float32)[1], expected).values())
    share = B // distributed.world_size()
    mine = whole().slice(share * distributed.rank(), share * (distributed.rank() + 1))
    found: dict[str, tuple[float, str, float]] = {}
    for word, bound in EXACT.items():
        strategy = build_strategy(word, "fp32", OptimConfig(clip_norm=0.0), torch.device("cpu"))
        model, task = built(torch.float64 if bound < 1e-6 else torch.float32)
        strategy.setup(model)
        strategy.model.train()
        for chunks in (1, 2):
            loss, got = tiny.run_one_step(strategy, task, mine, chunks, (0, 0, distributed.rank()))
            where, worst = max(tiny.gradient_errors(got, expected).items(), key=lambda item: item[1])
            # Where weights are float32: one process is no nearer to float64 than `rounding` either.
            allowed = bound if bound < 1e-6 else max(bound, 2 * rounding)
            found[f"{word} {chunks}"] = (worst / allowed, where, abs(loss - value) / value)
    return found


def test_gradients_of_two_processes_with_unequal_numbers_of_words() -> None:
    pytest.importorskip("deepspeed")
    for found in world.run(cells, 2):
        assert len(found) == 2 * len(EXACT)
        for cell, (worst, where, error) in found.items():
            assert worst <= 1, (cell, where, worst)
            assert error <= EXACT[cell.split()[0]], (cell, error)
