"""Floating-point operations that training on a batch needs, for MFU (model FLOPs utilization).

The model runs as a copy on the meta device, which has shapes but no numbers: weights, BatchNorm statistics, gradients and
random generators of the real model stay as they are. torch's counter adds up the products of both passes, attention included.

MFU counts the work that training needs (Chowdhery et al. 2022, PaLM, appendix B), not all that is executed. So left out are
activations that are recomputed, the second forward pass of a cached step, and padding of towers that ignore it. Causal
attention counts as full attention. The loss, normalizations and activation functions are not counted.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from pretrain.data.batch import Batch
from pretrain.model import DualEncoder
from pretrain.towers.meta_copy import copy_to_meta

_SAMPLES = 2
"""Samples of a counting pass: BatchNorm refuses a single value per channel."""


class _Shape(NamedTuple):
    """Shape of one row of an input, which decides its operations."""

    modality: str
    inputs: tuple[int, ...]
    dtype: torch.dtype
    mask: tuple[int, ...] | None
    patch_dropout: float | None


class FlopCounter:
    """Counts the forward and backward operations of this process's part of each batch.

    `add` only stores lengths, where the masks are, without waiting for the device. `take` reads them, and counts. Frozen parts
    count as much of the backward pass as gradients need.

    Args:
        model: before a strategy wraps, shards or moves it.
    """

    def __init__(self, model: DualEncoder) -> None:
        self._model = copy_to_meta(model).train()
        self._trims = {name: self._model.tower(name).trims for name in self._model.towers}
        for name in self._model.towers:
            self._model.tower(name).set_checkpointing(False)
        self.patch_dropout: float | None = None
        """Of the batches that follow, for the image tower; None = as the tower is built."""
        self._rows: dict[_Shape, int] = {}
        self._lengths: dict[_Shape, Tensor] = {}
        """Rows of each length, 0 to N, for inputs whose padding is no work: (N + 1,) int64 on the masks' device."""
        self._counts: dict[tuple[_Shape, int | None], int] = {}

    def add(self, batch: Batch) -> None:
        """Add a batch, which may be on any device."""
        for modality, inputs in batch.inputs.items():
            mask = batch.masks.get(modality)
            if mask is not None and mask.dim() == 3:  # several texts a sample
                inputs, mask = inputs.flatten(0, 1), mask.flatten(0, 1)
            mask_shape = None if mask is None else tuple(mask.shape[1:])
            dropout = self.patch_dropout if modality == "image" else None
            shape = _Shape(modality, tuple(inputs.shape[1:]), inputs.dtype, mask_shape, dropout)
            if mask is None or inputs.shape[:2] != mask.shape or not self._trims[modality]:
                self._rows[shape] = self._rows.get(shape, 0) + len(inputs)
                continue
            if shape not in self._lengths:
                self._lengths[shape] = torch.zeros(mask.shape[1] + 1, dtype=torch.int64, device=mask.device)
            lengths = mask.sum(dim=1)
            self._lengths[shape].scatter_add_(0, lengths, torch.ones_like(lengths))

    def take(self) -> int:
        """Return the operations of all batches since the last call."""
        total = sum(rows * self._count(shape, None) for shape, rows in self._rows.items())
        for shape, histogram in self._lengths.items():
            rows_by_length = {length: rows for length, rows in enumerate(histogram.tolist()) if rows and length}
            total += sum(rows * self._count_length(shape, length) for length, rows in rows_by_length.items())
        self._rows, self._lengths = {}, {}
        return total

    def _count_length(self, shape: _Shape, length: int) -> int:
        """Return the operations of a row of `length` tokens.

        In a transformer they are a polynomial of degree 2: three passes determine it and a fourth confirms it. Where it does
        not hold (attention in windows), every length has a pass of its own.
        """
        longest = shape.inputs[0]
        nodes = (2, 3, 5)
        if length in nodes or longest <= max(nodes):
            return self._count(shape, length)
        values = [self._count(shape, node) for node in nodes]
        if self._count(shape, longest) == _interpolate(nodes, values, longest):
            return _interpolate(nodes, values, length)
        return self._count(shape, length)

    def _count(self, shape: _Shape, length: int | None) -> int:
        """Return the operations of a row, from a pass over empty tensors. length: of its tokens; None = all."""
        if (shape, length) not in self._counts:
            self._counts[shape, length] = self._run(shape, length)
        return self._counts[shape, length]

    def _run(self, shape: _Shape, length: int | None) -> int:
        if shape.patch_dropout is not None:
            self._model.tower(shape.modality).set_patch_dropout(shape.patch_dropout)
        try:
            return self._run_within(nullcontext(), shape, length)
        except RuntimeError:  # transformers looks into masks that it does not know to be without contents
            self._model.zero_grad(set_to_none=True)
            return self._run_within(FakeTensorMode(allow_non_fake_inputs=True), shape, length)  # several times as slow

    def _run_within(self, mode: AbstractContextManager[Any], shape: _Shape, length: int | None) -> int:
        from torch.utils.flop_counter import FlopCounterMode  # imports Triton, which runs on CPUs do not need

        sizes = shape.inputs if length is None else (length, *shape.inputs[1:])
        mask_sizes = shape.mask if length is None else (length,)
        # "math" computes attention by products that the counter sees, and recomputes none in the backward pass.
        with mode, FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            inputs = {shape.modality: torch.empty(_SAMPLES, *sizes, dtype=shape.dtype, device="meta")}
            masks = {}
            if mask_sizes is not None:
                masks[shape.modality] = torch.empty(_SAMPLES, *mask_sizes, dtype=torch.bool, device="meta")
            embedding = self._model(inputs, masks)[shape.modality]
            if embedding.requires_grad:
                embedding.sum().backward()
        self._model.zero_grad(set_to_none=True)
        return int(counter.get_total_flops()) // _SAMPLES


def _interpolate(nodes: tuple[int, int, int], values: list[int], at: int) -> int:
    """Return the value at `at` of the polynomial of degree 2 through three points, by Newton's divided differences."""
    (x0, x1, x2), (y0, y1, y2) = nodes, values
    slope0, slope1 = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    return round(y0 + (at - x0) * (slope0 + (at - x1) * (slope1 - slope0) / (x2 - x0)))


def build_sample(image_size: int | None, text_length: int | None, texts: int = 1, audio_samples: int | None = None) -> Batch:
    """Build a batch of one sample: a black image, `texts` full-length texts, and a silent sound.

    None as a size or length leaves that modality out.
    """
    batch = Batch({}, {}, ["one"])
    if image_size is not None:
        batch.inputs["image"] = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8)
    if text_length is not None:
        shape = (1, text_length) if texts == 1 else (1, texts, text_length)
        batch.inputs["text"] = torch.ones(shape, dtype=torch.int64)
        batch.masks["text"] = torch.ones(shape, dtype=torch.bool)
    if audio_samples is not None:
        batch.inputs["audio"] = torch.zeros(1, audio_samples, dtype=torch.int16)
    return batch
