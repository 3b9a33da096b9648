"""What sharded weights ask for: forward passes in step, and a whole copy for evaluation.

Forward passes of a sharded model are collective: two processes that ran different numbers of them would wait for each other
for ever. In training each process runs the same number. In evaluation they need not: it gets a plain model, filled by every
process together, then used by each alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pretrain.towers import Tower


def disable_length_buckets(model: nn.Module) -> None:
    """Towers that encode a batch in as many groups as its lengths ask for do it in one piece."""
    for tower in model.modules():
        if isinstance(tower, Tower) and getattr(tower, "groups", 1) > 1:
            tower.groups = 1  # type: ignore[assignment]


def meta_copy(model: nn.Module) -> nn.Module:
    """The model with parameters that have shapes but no memory (meta device), and its own buffers."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, empty)


@contextmanager
def materialized(
    module: nn.Module, weights: Iterable[tuple[str, Tensor]], buffers: Iterable[tuple[str, Tensor]], device: torch.device
) -> Iterator[nn.Module]:
    """The shell holding the whole weights and buffers inside, on `device`; empty again afterwards."""
    empty = dict(module.named_parameters())
    try:
        for name, value in weights:
            _place(module, name, nn.Parameter(value.detach().to(device, copy=True), requires_grad=False))
        live = dict(buffers)
        for name, buffer in list(module.named_buffers()):
            _place(module, name, live.get(name, buffer).detach().to(device, copy=True))
        yield module
    finally:
        for name, p in empty.items():
            _place(module, name, p)


def _place(model: nn.Module, name: str, value: Tensor) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, value)
