"""Copies of models on the meta device, which has shapes but no numbers: a pass over them computes nothing."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def copy_to_meta(model: M, buffers: bool = True) -> M:
    """Return a copy of a model whose parameters are on the meta device; no weight is copied.

    What the model has under two names, modules or tied weights, is one in the copy too.

    Args:
        model: the model, or a part of one.
        buffers: whether buffers are on the meta device as well; else the copy has buffers of its own, with their contents.
    """
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    if buffers:
        memo |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    return copy.deepcopy(model, memo)
