"""Floating-point operations of a training step, counted by torch, for MFU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pretrain import ops
from pretrain.data.batch import Batch


def _product(x: torch.Size, y: torch.Size, *_: Any, **__: Any) -> int:
    """Of (..., k) and (m, k)."""
    return 2 * x.numel() * y[0]


OURS = {torch.ops.mkldnn._linear_pointwise: _product} if ops.ONEDNN else {}
"""Operations that torch's counter does not know."""


def per_batch(model: nn.Module, sample: Batch) -> Callable[[Batch], float]:
    """A function that gives the forward and backward operations of a batch.

    The model runs once on `sample`, one sample at full length, on the CPU, before it is wrapped. Inputs with a mask have a
    length: their share is scaled with the length that the batch was trimmed to (attention's square of it is neglected).
    Recomputed activations and the second forward pass of a cached step are not counted: the figure is what training asks for.
    """
    fixed = 0.0
    per_token: dict[str, float] = {}
    training = model.training
    for modality, inputs in sample.inputs.items():
        masks = {modality: sample.masks[modality]} if modality in sample.masks else {}
        with FlopCounterMode(display=False, custom_mapping=OURS) as counter:
            features = model({modality: inputs}, masks)
            features[modality].sum().backward()
        if masks:
            per_token[modality] = counter.get_total_flops() / inputs[0].numel()
        else:
            fixed += counter.get_total_flops()
    model.zero_grad(set_to_none=True)
    model.train(training)

    def flops(batch: Batch) -> float:
        tokens = sum(count * batch.inputs[modality].shape[1:].numel() for modality, count in per_token.items())
        return len(batch) * (fixed + tokens)

    return flops


def one_sample(image_size: int | None, text_length: int | None, texts: int = 1) -> Batch:
    """A black picture and a full-length text, or several."""
    batch = Batch({}, {}, ["one"])
    if image_size is not None:
        batch.inputs["image"] = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8)
    if text_length is not None:
        shape = (1, text_length) if texts == 1 else (1, texts, text_length)
        batch.inputs["text"] = torch.ones(shape, dtype=torch.int64)
        batch.masks["text"] = torch.ones(shape, dtype=torch.bool)
    return batch
