"""Copies of models on the meta device, which has shapes but no numbers: a pass over them computes nothing."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn

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


def move_to_meta_(model: nn.Module) -> dict[str, Tensor]:
    """Replace every parameter and buffer of a model by an empty one on the meta device; return those it had, by name.

    Tied weights stay tied; the result has them under each of their names. It is empty for a model that is on the meta device
    already.
    """
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    empty: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                meta = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
                module._parameters[name] = empty.setdefault(id(parameter), meta)  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = empty.setdefault(id(buffer), buffer.detach().to("meta"))
    return {name: tensor.detach() for name, tensor in tensors.items() if not tensor.is_meta}


def is_on_meta(model: nn.Module) -> bool:
    """Return whether a model, or a part of it, has shapes but no weights."""
    return any(p.is_meta for p in model.parameters())
