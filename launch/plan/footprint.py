"""The memory that a batch needs, found without computing: a forward and backward pass on tensors without contents.

torch's FakeTensorMode runs the operations of the training step on shapes alone, while a dispatch mode tracks which storages are
alive. So the figure covers any tower, precision and recomputation, in seconds, on a machine without a GPU.
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

from pretrain.data.batch import Batch

SIZES = (8, 24)
"""Batch sizes of the two passes. Memory is linear in the batch size, so two points determine it."""


@dataclass(frozen=True)
class Footprint:
    """Peak memory as (constant, per sample), in bytes, without and with the gradients of weights that exist at each moment."""

    activations: tuple[float, float]
    with_gradients: tuple[float, float]

    def at(self, samples: int, gradients: bool = False) -> int:
        """The peak for a batch of `samples`, in bytes."""
        constant, per_sample = self.with_gradients if gradients else self.activations
        return round(constant + per_sample * samples)


def measure_footprint(model: nn.Module, sample: Batch, dtype: torch.dtype | None, recomputes: bool = False) -> Footprint:
    """Measure a training pass over batches of samples like `sample`, one sample at full length.

    dtype: of autocast; None = no autocast. recomputes: whether the model recomputes activations in the backward pass.
    """
    small, large = (_run_pass(model, sample, size, dtype, recomputes) for size in SIZES)
    return Footprint(_fit_line(small.peak, large.peak), _fit_line(small.peak_with_gradients, large.peak_with_gradients))


def _fit_line(small: int, large: int) -> tuple[float, float]:
    per_sample = (large - small) / (SIZES[1] - SIZES[0])
    return small - per_sample * SIZES[0], per_sample


def _run_pass(model: nn.Module, sample: Batch, size: int, dtype: torch.dtype | None, recomputes: bool) -> _MemoryTracker:
    training = model.training
    model.train()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        parameters = {n: _fake(p, mode).detach().requires_grad_(p.requires_grad) for n, p in model.named_parameters()}
        buffers = {n: _fake(b, mode) for n, b in model.named_buffers()}
        inputs = {n: torch.empty(size, *x.shape[1:], dtype=x.dtype) for n, x in sample.inputs.items()}
        masks = {n: torch.empty(size, *x.shape[1:], dtype=x.dtype) for n, x in sample.masks.items()}
        existing = [*parameters.values(), *buffers.values(), *inputs.values(), *masks.values()]
        tracker = _MemoryTracker(existing, recomputes)
        with tracker:
            for p in parameters.values():
                if p.requires_grad:
                    p.register_post_accumulate_grad_hook(tracker.record_gradient)
            named = {f"model.{name}": value for name, value in {**parameters, **buffers}.items()}
            gc.collect()
            was_frozen = gc.get_freeze_count() > 0
            gc.freeze()  # so that collections during the pass look at its own objects only
            try:
                functional_call(_ForwardBackward(model, dtype), named, (inputs, masks))
            finally:
                if not was_frozen:  # thawing takes everything that was frozen, as by `deferred_imports.uncollected`
                    gc.unfreeze()
    model.train(training)
    return tracker


def _fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """Return a tensor without contents on the CPU, like `tensor`, which may be on the meta device."""
    return torch.empty(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else mode.from_tensor(tensor)


class _ForwardBackward(nn.Module):
    """Both passes in one call: blocks that are recomputed in the backward pass need the same weights there."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, inputs: dict[str, Tensor], masks: dict[str, Tensor]) -> None:
        with torch.autocast("cpu", dtype=self.dtype, enabled=self.dtype is not None):
            out = self.model(inputs, masks)
        features = [value for value in out.values() if value.requires_grad]
        torch.autograd.backward(features, [torch.empty_like(value) for value in features])


class _MemoryTracker(TorchDispatchMode):
    """Count the bytes of all storages alive, apart from those that exist before the pass."""

    def __init__(self, existing: list[Tensor], recomputes: bool) -> None:
        super().__init__()
        self._known: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in existing}
        self._gradients: set[int] = set()
        self._live = self._live_gradients = 0
        self._recomputes = recomputes
        self.peak = self.peak_with_gradients = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._track, out)
        return out

    def _track(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return tensor

        def on_free(_: object) -> None:
            self._known.pop(key, None)
            if key in self._gradients:
                self._gradients.discard(key)
                self._live_gradients -= size
            else:
                self._live -= size

        self._known[key] = weakref.ref(storage, on_free)
        self._live += size
        self._update_peaks()
        return tensor

    def record_gradient(self, parameter: Tensor) -> None:
        """Count the bytes of this parameter's gradient as a gradient from here on; a hook."""
        if self._recomputes:
            gc.collect()  # recomputed tensors without contents sit in reference cycles; real ones do not
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        if storage._cdata not in self._gradients:
            self._gradients.add(storage._cdata)
            self._live -= storage.nbytes()
            self._live_gradients += storage.nbytes()

    def _update_peaks(self) -> None:
        self.peak = max(self.peak, self._live)
        self.peak_with_gradients = max(self.peak_with_gradients, self._live + self._live_gradients)
