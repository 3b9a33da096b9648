"""An unsharded copy of a sharded model, for evaluation.

Forward passes of a sharded model are collective: processes that run different numbers of them wait for each other forever.
In training every process runs the same number. In evaluation the numbers may differ, so each process gets an ordinary model:
all processes gather its weights together, then each uses it alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pretrain.towers import Tower


def disable_length_buckets(model: nn.Module) -> None:
    """Make text towers encode a batch in one group.

    Every process then runs the same number of forward passes, whatever the lengths of its texts.
    """
    for tower in model.modules():
        if isinstance(tower, Tower) and getattr(tower, "groups", 1) > 1:
            tower.groups = 1  # type: ignore[assignment]


@contextmanager
def materialized(
    module: nn.Module, weights: Iterable[tuple[str, Tensor]], buffers: Iterable[tuple[str, Tensor]], device: torch.device
) -> Iterator[nn.Module]:
    """Yield the meta copy `module`, filled with unsharded weights and buffers on `device`.

    Its parameters return to the meta device afterwards. Tied weights are filled under all their names.
    """
    empty = dict(module.named_parameters(remove_duplicate=False))
    try:
        for name, value in weights:
            filled, tied = nn.Parameter(value.detach().to(device, copy=True), requires_grad=False), empty[name]
            for alias in (alias for alias, p in empty.items() if p is tied):
                _set_tensor(module, alias, filled)
        live = dict(buffers)
        for name, buffer in list(module.named_buffers()):
            _set_tensor(module, name, live.get(name, buffer).detach().to(device, copy=True))
        yield module
    finally:
        for name, p in empty.items():
            _set_tensor(module, name, p)


def _set_tensor(model: nn.Module, name: str, value: Tensor) -> None:
    """Replace the parameter or buffer of that dotted name."""
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, value)
