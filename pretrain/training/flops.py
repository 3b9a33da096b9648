"""Floating-point operations of a training step, counted by torch, for MFU (model FLOPs utilization)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pretrain import ops
from pretrain.data.batch import Batch


def _count_linear(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    """Return the operations of the product of x (..., k) and weight (m, k)."""
    return 2 * x.numel() * weight[0]


ONEDNN_COUNTS = {torch.ops.mkldnn._linear_pointwise: _count_linear} if ops.ONEDNN else {}
"""Operations that torch's counter does not know, with the functions that count them."""


def build_flop_counter(model: nn.Module, sample: Batch) -> Callable[[Batch], float]:
    """Return a function that counts the forward and backward operations of a batch.

    The model runs once, before it is wrapped, on the CPU, on `sample`: one sample at full length. Inputs that have a mask vary
    in length: their operations are scaled to the length that the batch was trimmed to. (That attention grows with the square
    of the length is neglected.) Recomputed activations and the second forward pass of a cached step are not counted: MFU
    compares the operations that training needs with those that the device could do.
    """
    fixed = 0.0
    per_token: dict[str, float] = {}
    training = model.training
    for modality, inputs in sample.inputs.items():
        masks = {modality: sample.masks[modality]} if modality in sample.masks else {}
        with FlopCounterMode(display=False, custom_mapping=ONEDNN_COUNTS) as counter:
            features = model({modality: inputs}, masks)
            features[modality].sum().backward()
        if masks:
            per_token[modality] = counter.get_total_flops() / inputs[0].numel()
        else:
            fixed += counter.get_total_flops()
    model.zero_grad(set_to_none=True)
    model.train(training)

    def count_flops(batch: Batch) -> float:
        tokens = sum(count * batch.inputs[modality].shape[1:].numel() for modality, count in per_token.items())
        return len(batch) * (fixed + tokens)

    return count_flops


def build_sample(image_size: int | None, text_length: int | None, texts: int = 1) -> Batch:
    """Build a batch of one sample: a black image and `texts` full-length texts.

    None as a size or length leaves that modality out.
    """
    batch = Batch({}, {}, ["one"])
    if image_size is not None:
        batch.inputs["image"] = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8)
    if text_length is not None:
        shape = (1, text_length) if texts == 1 else (1, texts, text_length)
        batch.inputs["text"] = torch.ones(shape, dtype=torch.int64)
        batch.masks["text"] = torch.ones(shape, dtype=torch.bool)
    return batch
