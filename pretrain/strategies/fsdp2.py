"""train.strategy=fsdp2: weights, gradients and optimizer state sharded by torch's fully_shard.

Each block of a tower gathers its weights just before it runs and frees them afterwards. Everything else (embeddings,
projections, scalars) is one more group, that of the root, which stays gathered from the forward to the backward pass. Shards
and optimizer state are float32, and gradients are reduced in float32.

The arithmetic is that of single and ddp. Under bf16 and fp16 autocast rounds the weights of matrix products, so a block gathers
these in that type already, at half the bytes. What autocast leaves in float32, the gains of norms and layer scales, belongs to
the root's group: it is small, and a group of its own would cost each block two more collectives and break its compiled graph.
Activations are never cast between blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from pretrain.optim import OptimConfig
from pretrain.runtime import distributed
from pretrain.strategies import DTYPES, Precision
from pretrain.strategies.batch_norm import convert_sync_batch_norm
from pretrain.strategies.blocks import find_blocks
from pretrain.strategies.full_copy import disable_length_buckets, materialized
from pretrain.strategies.single import Single
from pretrain.towers.meta_copy import copy_to_meta, move_to_meta_


class FSDP2(Single):
    """The sharded model.

    Bytes sent per step and process: 3 x 4 x parameters, for two gathers and one reduction. Under bf16 and fp16 the blocks
    gather 2 bytes per parameter.

    replicas: groups of processes that hold all weights each (hybrid sharding, HSDP). Weights are gathered within a group, of
    consecutive ranks; gradients are reduced within it, and their shards averaged over groups.
    """

    name = "fsdp2"

    def __init__(self, precision: Precision, optim: OptimConfig, device: torch.device, replicas: int = 1) -> None:
        super().__init__(precision, optim, device)
        self.replicas = replicas

    def setup(self, model: nn.Module) -> None:
        distributed.ensure_group()
        model = convert_sync_batch_norm(model)
        initial = move_to_meta_(model)  # what a process holds from here on is its shard
        self._meta_copy = copy_to_meta(model)
        disable_length_buckets(model)
        mesh = self._build_mesh()
        self.blocks = find_blocks(model)
        self._shard_groups(model, mesh)
        self.module = self.model = model
        assert isinstance(model, FSDPModule)
        for name, p in model.named_parameters():
            assert isinstance(p, DTensor), f"{name} is not sharded"
            assert p.device_mesh.size() == distributed.world_size(), f"{name} is sharded over {p.device_mesh.size()} processes"
        _materialize(model, self.device)
        self._send_weights(initial)
        self._prepare()

    @torch.no_grad()
    def _send_weights(self, initial: dict[str, Tensor]) -> None:
        """Fill the shards and buffers with the tensors of rank 0, one after the other. Collective.

        initial: by name; other ranks need none, see `strategies.has_initial_weights`.
        """
        for name, tensor in [*self.module.named_parameters(), *self.module.named_buffers()]:
            full = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
            if distributed.is_main():
                full.copy_(initial[name])
            td.broadcast(full, 0)
            tensor.copy_(self._shard(full, tensor) if isinstance(tensor, DTensor) else full)

    def _build_mesh(self) -> DeviceMesh:
        """Return the mesh over which weights are sharded: one axis, or replicas x shards."""
        processes = distributed.world_size()
        if self.replicas == 1:
            return init_device_mesh(self.device.type, (processes,))
        shape = (self.replicas, processes // self.replicas)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))

    def _shard_groups(self, model: nn.Module, mesh: DeviceMesh) -> None:
        """Shard the root's group, then each block, so that they compute as they would unsharded under autocast."""
        param_dtype = None if self.precision == "fp32" else DTYPES[self.precision]
        of_blocks = {p for block in self.blocks for p in block.parameters()}
        if param_dtype is not None:
            of_blocks -= {p for block in self.blocks for p in find_exact(block)}
        # The root before its blocks: below a sharded block it would look for no parameters.
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=of_blocks)
        for block in self.blocks:
            of_root: set[nn.Parameter] = {p for p in block.parameters() if isinstance(p, DTensor)}
            reduce_dtype = _weight_dtype(block) if param_dtype else None
            policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
            fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=of_root)

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


def _materialize(model: nn.Module, device: torch.device) -> None:
    """Give shards and buffers memory on `device`, uninitialized; tied weights stay tied, which to_empty() undoes."""
    first: dict[int, str] = {}
    tied = [
        (name, first[id(p)])
        for name, p in model.named_parameters(remove_duplicate=False)
        if first.setdefault(id(p), name) != name
    ]
    model.to_empty(device=device)
    for name, original in tied:
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, model.get_parameter(original))


def _weight_dtype(block: nn.Module) -> torch.dtype:
    """Return the type of a block's weights, in which its gradients are reduced: float32; float64 in tests."""
    return next(block.parameters()).dtype


PRODUCTS = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention, nn.Embedding)
"""Modules that use their parameters in products only, whose factors autocast rounds, and tables that are looked up."""


def find_exact(block: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that autocast uses in float32: those outside PRODUCTS of at most one dimension.

    They are gains and biases of norms, and layer scales.
    """
    modules = [module for module in block.modules() if not isinstance(module, PRODUCTS)]
    return [p for module in modules for p in module.parameters(recurse=False) if p.ndim <= 1]


def build(precision: Precision, optim: OptimConfig, device: torch.device, replicas: int = 1) -> FSDP2:
    """Build the strategy."""
    return FSDP2(precision, optim, device, replicas)
