"""fsdp2: weights, gradients and moments are cut into shares, one a process (torch's fully_shard).

Each block of a tower gathers its weights just before it runs and drops them after; everything else (embeddings,
projections, scalars) is one more group that stays gathered from the forward to the backward pass. Shares and moments are
float32. Under bf16 and fp16 the blocks gather and compute in that type; gradients travel and add up in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from pretrain.optim import OptimConfig
from pretrain.runtime import distributed
from pretrain.strategies import DTYPES, Precision
from pretrain.strategies.batch_norm import convert_sync_batch_norm
from pretrain.strategies.full_copy import disable_length_buckets, materialized, meta_copy
from pretrain.strategies.single import Single


class FSDP2(Single):
    """Bytes a step and process: 3 x 4 x parameters (gather twice, reduce once); blocks gather 2 bytes under bf16."""

    name = "fsdp2"

    def setup(self, model: nn.Module) -> None:
        distributed.ensure_group()
        model = convert_sync_batch_norm(model).to(self.device)
        self._meta_copy = meta_copy(model)
        disable_length_buckets(model)
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                td.broadcast(tensor, 0)  # shares of different models would make no model
        mesh = init_device_mesh(self.device.type, (distributed.world_size(),))
        self.blocks = find_blocks(model)
        low = None if self.precision == "fp32" else DTYPES[self.precision]
        for block in self.blocks:
            fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=low, reduce_dtype=_exact(block)))
        fully_shard(model, mesh=mesh)
        self.module = self.model = model
        assert isinstance(model, FSDPModule)
        for name, p in model.named_parameters():
            assert isinstance(p, DTensor), f"{name} is not sharded"
            assert p.device_mesh.size() == distributed.world_size(), f"{name} is sharded over {p.device_mesh.size()} processes"
        self._prepare()

    def compile(self, backend: str = "inductor") -> None:
        for block in self.blocks:  # whole graphs between the hooks that gather
            block.compile(backend=backend)

    def sync_gradients(self, on: bool) -> AbstractContextManager[Any]:
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(on)
        return nullcontext()

    def _clip(self) -> Tensor:
        return self._unshard(super()._clip())

    def _unshard(self, part: Tensor) -> Tensor:
        if not isinstance(part, DTensor):
            return part.detach()
        whole: Tensor = part.full_tensor()
        return whole.detach()

    def _shard(self, whole: Tensor, like: Tensor) -> Tensor:
        assert isinstance(like, DTensor)
        return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)

    def local_shards(self) -> dict[str, Tensor]:
        return {name: p.to_local() for name, p in super().local_shards().items() if isinstance(p, DTensor)}

    @contextmanager
    def full_model(self) -> Iterator[nn.Module]:
        weights = ((name, self._unshard(p)) for name, p in self.module.named_parameters())
        with materialized(self._meta_copy, weights, self.module.named_buffers(), self.device) as module:
            yield module


def _exact(block: nn.Module) -> torch.dtype:
    """The type gradients are reduced in: the weights' own (float32; float64 in tests)."""
    return next(block.parameters()).dtype


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost repeated layers: the children, if they have weights, of every list or sequence with two or more such."""
    if isinstance(model, nn.ModuleList | nn.Sequential):
        repeated = [child for child in model.children() if next(child.parameters(), None) is not None]
        if len(repeated) > 1:
            return repeated
    return [block for child in model.children() for block in find_blocks(child)]


def build(precision: Precision, optim: OptimConfig, device: torch.device) -> FSDP2:
    """The strategy."""
    return FSDP2(precision, optim, device)
