"""Counts the operations for which the host waits for a GPU, on a machine that has none.

Tensors without contents (torch's FakeTensor) lie on an imaginary accelerator: forward, backward and optimizer run as on a GPU.
The name of a backend is set once a process, so it runs in a process of its own:

    python -m tests.support.host_waits       prints {case: [operations that waited]} as JSON

FakeTensor on "cuda" cannot take its place: autograd asks CUDA's driver for the device.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount", "equal")
"""Operations whose result's size, or the result itself, is needed on the host."""
BOOLEANS = (torch.bool, torch.uint8)


class _Backend(_DummyBackendModule):  # type: ignore[misc, no-any-unimported]
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Return the types of autocast, which torch asks for even where it is switched off."""
        return [torch.bfloat16]


def register_device() -> torch.device:
    """Register the imaginary accelerator in this process and return its device."""
    _setup_privateuseone_for_python_backend("imaginary", _Backend())
    return torch.device("imaginary", 0)


class HostWaits(TorchDispatchMode):
    """Runs operations on tensors of `device` without contents, and others as usual; records those that make the host wait."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        target = kwargs.get("device")
        is_target = target is not None and torch.device(target).type == self.device.type
        if not is_target and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        self._record(name, args, kwargs, tensors)
        if name == "_local_scalar_dense":  # any number will do
            return torch.zeros((), dtype=tensors[0].dtype).item()
        with self.fake:
            args, kwargs = tree_map_only(Tensor, self._make_fake, (args, kwargs))
            return func(*args, **kwargs)

    def _make_fake(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)

    def _record(self, name: str, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> None:
        """Record the operation if it makes the host wait."""
        on_device = [tensor.device.type == self.device.type for tensor in tensors]
        is_wait = name in READS and any(on_device)
        if name in ("_to_copy", "copy_") and not kwargs.get("non_blocking", name == "copy_" and len(args) > 2 and args[2]):
            source = on_device[-1]
            target = on_device[0] if name == "copy_" else torch.device(kwargs.get("device") or tensors[0].device).type
            is_wait = source != (target if name == "copy_" else target == self.device.type)
        if name.startswith("index") and on_device[0]:  # by a mask, or by numbers on the host
            indices = [index for index in args[1] if index is not None] if isinstance(args[1], list | tuple) else []
            is_wait = any(index.dtype in BOOLEANS or index.device.type != self.device.type for index in indices)
        if name == "repeat_interleave" and any(on_device):
            is_wait = kwargs.get("output_size") is None
        if is_wait:
            frames = [
                frame for frame in traceback.extract_stack() if not any(n in frame.filename for n in ("/torch/", __file__))
            ]
            self.waits.append(f"{name} in {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}")

    def move(self, module: nn.Module) -> None:
        """Move a module to the device, without contents."""
        for part in module.modules():
            for name, p in part._parameters.items():
                if p is not None:
                    part._parameters[name] = nn.Parameter(torch.empty_like(p, device=self.device), p.requires_grad)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = torch.empty_like(buffer, device=self.device)

    @contextmanager
    def counted(self) -> Iterator[list[str]]:
        """Yield the list of the operations that make the host wait inside the block."""
        before, self.waits = self.waits, []
        try:
            yield self.waits
        finally:
            self.waits = before


# ---------------------------------------------------------------------------------------------------------------------
# The cases


def count_planted(mode: HostWaits) -> dict[str, list[str]]:
    """Return what is counted for operations that are known to make the host wait, and for some that do not."""
    planted: dict[str, list[str]] = {}
    device, host = mode.device, torch.ones(3)
    x = torch.ones(3, device=device)
    for name, operation in {
        "item": lambda: x[0].item(),
        "bool": lambda: bool(x[0] > 0),
        "copy in": lambda: host.to(device),
        "copy out": lambda: x.to("cpu"),
        "copy_ in": lambda: x.copy_(host),
        "host index": lambda: x[torch.tensor([0, 1])],
        "none: copy in": lambda: host.to(device, non_blocking=True),
        "none: cast": lambda: x.to(torch.bfloat16),
        "none: copy_": lambda: x.copy_(x + 1),
        "none: index": lambda: x[torch.zeros(2, dtype=torch.int64, device=device)],
        "none: host": lambda: (host.sum().item(), host[host > 0]),
    }.items():
        with mode.counted() as waits:
            operation()  # type: ignore[no-untyped-call]
        planted[name] = waits
    return planted


def count_steps(mode: HostWaits) -> dict[str, list[str]]:
    """Return the operations that make the host wait in training steps, by case."""
    from pretrain.data.length_groups import LengthGroups
    from pretrain.data.text_packing import TextPacking
    from pretrain.optim import OptimConfig, WeightAverage
    from pretrain.strategies.single import Single
    from pretrain.training.config import TrainConfig
    from pretrain.training.spikes import GuardedObjective, SpikeWatch
    from pretrain.training.step import train_step
    from tests.finetune import test_finetune_gradients as vqa
    from tests.finetune.tasks import test_retrieval_gradients as retrieval
    from tests.support import tiny

    histogram = (0, 0, 0, 40, 60, 50, 30, 10, 5, 3, 2, 1, 1)
    cases: dict[str, tuple[Any, Any, Any, list[int]]] = {}
    for loss in ("clip", "siglip"):
        objective = tiny.build_objective(loss, same_caption="ignore")
        objective.pair_loss.max_logit = 102.0  # as the trainer sets it
        cases[loss] = tiny.build_model(loss), objective, tiny.build_batch(), [1, 2] if loss == "clip" else [1]
    objective = tiny.build_objective("clip")
    objective.pair_loss.max_logit = 102.0
    for name, shapes in (("groups", LengthGroups(histogram, 2, group_cost=0)), ("packed", TextPacking(histogram))):
        batch = tiny.build_batch()
        batch.groups["text"] = shapes.assign(batch.masks["text"].sum(dim=-1).flatten().numpy())
        cases[name] = tiny.build_model("clip"), objective, batch, [2]
    for name, module, chunks in (("vqa", vqa, [1]), ("retrieval", retrieval, [1])):
        cases[name] = *module.build_model_and_task(torch.float32), module.build_batch(), chunks  # type: ignore[attr-defined]

    class OnImaginaryDevice(Single):
        def setup(self, model: nn.Module) -> None:
            mode.move(model)  # Module.to would read the contents
            self.module = self.model = model
            self._prepare()

    counts: dict[str, list[str]] = {}
    for name, (model, objective, batch, all_chunks) in cases.items():
        with mode:
            strategy = OnImaginaryDevice("fp32", OptimConfig(clip_norm=1.0), mode.device)
            strategy.setup(model)
            average = WeightAverage(strategy.local_shards().items(), 0.9)
            spikes = SpikeWatch(TrainConfig(on_spike="skip"), mode.device)
            for chunks in all_chunks:
                with mode.counted() as waits:
                    out = train_step(strategy, GuardedObjective(objective, spikes), batch, chunks, 0.1, (0, 0, 0))
                    spikes.record(out)
                    average.update(strategy.local_shards().items(), 0, 1 - out["skipped"])
                counts[f"{name}, {chunks} chunks"] = waits
    return counts


def main() -> None:
    """Print both counts."""
    mode = HostWaits(register_device())
    with mode:
        planted = count_planted(mode)
    json.dump({"planted": planted, "steps": count_steps(mode)}, sys.stdout)


if __name__ == "__main__":
    main()
