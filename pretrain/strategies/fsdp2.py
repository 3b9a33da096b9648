"""train.strategy=fsdp2: weights, gradients and optimizer state sharded by torch's fully_shard.

Each block of a tower gathers its weights just before it runs and frees them afterwards. Everything else (embeddings,
projections, scalars) is one more group, which stays gathered from the forward to the backward pass. Shards and optimizer
state are float32. Under bf16 and fp16 the blocks gather and compute in that type; gradients are reduced in float32.
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
    """The sharded model.

    Bytes sent per step and process: 3 x 4 x parameters, for two gathers and one reduction. Under bf16 and fp16 the blocks
    gather 2 bytes per parameter.
    """

    name = "fsdp2"

    def setup(self, model: nn.Module) -> None:
        distributed.ensure_group()
        model = convert_sync_batch_norm(model).to(self.device)
        self._meta_copy = meta_copy(model)
        disable_length_buckets(model)
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                td.broadcast(tensor, 0)  # all shards must come from the same weights
        mesh = init_device_mesh(self.device.type, (distributed.world_size(),))
        self.blocks = find_blocks(model)
        param_dtype = None if self.precision == "fp32" else DTYPES[self.precision]
        for block in self.blocks:
            policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=_weight_dtype(block))
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh)
        self.module = self.model = model
        assert isinstance(model, FSDPModule)
        for name, p in model.named_parameters():
            assert isinstance(p, DTensor), f"{name} is not sharded"
            assert p.device_mesh.size() == distributed.world_size(), f"{name} is sharded over {p.device_mesh.size()} processes"
        self._prepare()

    def compile(self, backend: str = "inductor") -> None:
        for block in self.blocks:  # block by block, so that the hooks that gather weights do not break a graph
            block.compile(backend=backend)

    def sync_gradients(self, is_last_chunk: bool) -> AbstractContextManager[Any]:
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(is_last_chunk)
        return nullcontext()

    def _clip(self) -> Tensor:
        return self._unshard(super()._clip())

    def _unshard(self, shard: Tensor) -> Tensor:
        if not isinstance(shard, DTensor):
            return shard.detach()
        full: Tensor = shard.full_tensor()
        return full.detach()

    def _shard(self, full: Tensor, like: Tensor) -> Tensor:
        assert isinstance(like, DTensor)
        return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)

    def local_shards(self) -> dict[str, Tensor]:
        return {name: p.to_local() for name, p in super().local_shards().items() if isinstance(p, DTensor)}

    @contextmanager
    def full_model(self) -> Iterator[nn.Module]:
        weights = ((name, self._unshard(p)) for name, p in self.module.named_parameters())
        with materialized(self._meta_copy, weights, self.module.named_buffers(), self.device) as module:
            yield module


def _weight_dtype(block: nn.Module) -> torch.dtype:
    """Return the type of a block's weights, in which its gradients are reduced: float32; float64 in tests."""
    return next(block.parameters()).dtype


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the outermost repeated layers of a model, which are sharded one by one.

    They are the children that have weights of every ModuleList or Sequential with at least two such children.
    """
    if isinstance(model, nn.ModuleList | nn.Sequential):
        repeated = [child for child in model.children() if next(child.parameters(), None) is not None]
        if len(repeated) > 1:
            return repeated
    return [block for child in model.children() for block in find_blocks(child)]


def build(precision: Precision, optim: OptimConfig, device: torch.device) -> FSDP2:
    """Build the strategy."""
    return FSDP2(precision, optim, device)
