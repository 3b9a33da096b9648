"""What a model needs for a batch, found without computing: one forward and backward pass on tensors that have no contents.

torch's FakeTensorMode runs the very operations of the training step on shapes alone; a dispatch mode watches which storages
live. So the figure covers any tower, precision and recomputation, in seconds, on a machine without the GPU.
"""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from pretrain.data.batch import Batch

SIZES = (8, 24)
"""Samples of the two passes: memory is a constant and a share a sample, which two points tell."""


@dataclass(frozen=True)
class Footprint:
    """Bytes as (constant, a sample). `activations` leaves gradients of weights out, `both` is the peak with those that exist
    at each moment."""

    activations: tuple[float, float]
    both: tuple[float, float]
    flops: float
    """Forward and backward operations a sample."""

    def at(self, samples: int, gradients: bool = False) -> int:
        """The peak for a batch of `samples`, in bytes."""
        constant, each = self.both if gradients else self.activations
        return round(constant + each * samples)


def footprint(model: nn.Module, sample: Batch, dtype: torch.dtype | None) -> Footprint:
    """Of a training pass over batches of samples like `sample` (one, at full length); dtype: of autocast, None without."""
    one, two = (_pass(model, sample, size, dtype) for size in SIZES)
    return Footprint(_line(one.peak, two.peak), _line(one.peak_both, two.peak_both), two.flops / SIZES[1])


def _line(first: int, second: int) -> tuple[float, float]:
    each = (second - first) / (SIZES[1] - SIZES[0])
    return first - each * SIZES[0], each


def _pass(model: nn.Module, sample: Batch, size: int, dtype: torch.dtype | None) -> _Watch:
    training = model.training
    model.train()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        parameters = {n: mode.from_tensor(p).detach().requires_grad_(p.requires_grad) for n, p in model.named_parameters()}
        buffers = {n: mode.from_tensor(b) for n, b in model.named_buffers()}
        inputs = {n: torch.empty(size, *x.shape[1:], dtype=x.dtype) for n, x in sample.inputs.items()}
        masks = {n: torch.empty(size, *x.shape[1:], dtype=x.dtype) for n, x in sample.masks.items()}
        given = [*parameters.values(), *buffers.values(), *inputs.values(), *masks.values()]
        watch = _Watch(given)
        with FlopCounterMode(display=False) as counter, watch:
            for p in parameters.values():
                if p.requires_grad:
                    p.register_post_accumulate_grad_hook(watch.gradient)
            named = {f"model.{name}": value for name, value in {**parameters, **buffers}.items()}
            gc.collect()
            gc.freeze()  # so that collecting while the pass goes on looks at its own objects only
            try:
                functional_call(_ForwardBackward(model, dtype), named, (inputs, masks))
            finally:
                gc.unfreeze()
    watch.flops = counter.get_total_flops()
    model.train(training)
    return watch


class _ForwardBackward(nn.Module):
    """Both passes in one call: blocks that are recomputed in the backward pass want the same weights there."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, inputs: dict[str, Tensor], masks: dict[str, Tensor]) -> None:
        with torch.autocast("cpu", dtype=self.dtype, enabled=self.dtype is not None):
            out = self.model(inputs, masks)
        features = [value for value in out.values() if value.requires_grad]
        torch.autograd.backward(features, [torch.empty_like(value) for value in features])


class _Watch(TorchDispatchMode):
    """Counts the bytes of the storages that live, from birth to death."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self._known: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in given}
        self._gradients: set[int] = set()
        self._live = self._live_gradients = 0
        self.peak = self.peak_both = 0
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, out)
        return out

    def _see(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return tensor

        def gone(_: object) -> None:
            self._known.pop(key, None)
            if key in self._gradients:
                self._gradients.discard(key)
                self._live_gradients -= size
            else:
                self._live -= size

        self._known[key] = weakref.ref(storage, gone)
        self._live += size
        self._mark()
        return tensor

    def gradient(self, parameter: Tensor) -> None:
        """Hook of a parameter: from here on these bytes are a gradient's."""
        gc.collect()  # recomputed tensors without contents sit in reference cycles; real ones do not
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        if storage._cdata not in self._gradients:
            self._gradients.add(storage._cdata)
            self._live -= storage.nbytes()
            self._live_gradients += storage.nbytes()

    def _mark(self) -> None:
        self.peak = max(self.peak, self._live)
        self.peak_both = max(self.peak_both, self._live + self._live_gradients)
