"""A training step does not make the host wait for a GPU: no value is read, no size is asked for, no copy is waited for."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from pretrain.data.batch import Batch
from pretrain.data.length_groups import LengthGroups
from pretrain.data.text_packing import TextPacking
from pretrain.optim import OptimConfig, WeightAverage
from pretrain.strategies.single import Single
from pretrain.training.step import train_step
from tests.support import ROOT, forked, tiny

HISTOGRAM = (0, 0, 0, 40, 60, 50, 30, 10, 5, 3, 2, 1, 1)
STEP = ["clip, 1 chunks", "clip, 2 chunks", "siglip, 1 chunks", "groups, 2 chunks", "packed, 2 chunks"]
TASK = ["vqa, 1 chunks", "retrieval, 1 chunks"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_operation_of_a_step_waits_for_an_imaginary_gpu() -> None:
    """Forward pass, backward pass, clipping, optimizer, clamp and moving average; torch's dispatcher sees every operation."""
    pytest.importorskip("torch.utils.backend_registration")
    result = forked.run("tests.support.host_waits", [], ROOT, 800)  # the server has registered no device
    assert result.returncode == 0, result.stderr[-3000:]
    counts: dict[str, dict[str, list[str]]] = json.loads(result.stdout)
    for name, waits in counts["planted"].items():  # what is known to wait is counted, and nothing else
        assert len(waits) == (0 if name.startswith("none") else 1), (name, waits)
    assert list(counts["steps"]) == [*STEP, *TASK]
    for name, waits in counts["steps"].items():
        assert not waits, (name, waits)


class CountsCopies(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the bytes that are copied to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.copied = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.device != args[0].device:
            self.copied += args[0].nbytes
        return out


def test_chunks_are_views_of_the_batch_on_its_device() -> None:
    """A cached step encodes each chunk twice; the batch is copied once, before it is divided."""
    batch = tiny.build_batch()
    with CountsCopies() as mode:
        moved = batch.to("meta", non_blocking=True)
        chunks = list(moved.iterate_chunks(4))
    assert mode.copied == sum(tensor.nbytes for tensor in batch.tensors())
    for chunk in chunks:
        assert all(tensor._is_view() for tensor in chunk.tensors())
        assert {tensor.device.type for tensor in chunk.tensors()} == {"meta"}


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("texts", ["plain", "groups", "packed"])
def test_cuda_reports_no_wait_in_a_step(precision: Any, chunks: int, texts: str) -> None:
    """torch raises at each wait that it knows of."""
    device = torch.device("cuda", 0)
    strategy = Single(precision, OptimConfig(clip_norm=1.0), device)
    strategy.setup(tiny.build_model("clip"))
    average = WeightAverage(strategy.local_shards().items(), 0.9)
    objective = tiny.build_objective("clip", same_caption="ignore")
    objective.pair_loss.max_logit = 102.0  # type: ignore[assignment]
    batch: Batch = tiny.build_batch()
    if texts != "plain":
        shapes = LengthGroups(HISTOGRAM, 4, group_cost=0) if texts == "groups" else TextPacking(HISTOGRAM)
        batch.groups["text"] = shapes.assign(batch.masks["text"].sum(dim=-1).flatten().numpy())
    pinned = batch.pin_memory()

    def step(number: int) -> torch.Tensor:
        out = train_step(strategy, objective, pinned.to(device, non_blocking=True), chunks, 1e-3, (0, number, 0))
        average.update(strategy.local_shards().items(), number, 1 - out["skipped"])
        return out["loss"]

    step(0)  # libraries start, and buffers are allocated
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [step(number) for number in range(1, 4)]
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert all(torch.isfinite(loss) for loss in losses)
