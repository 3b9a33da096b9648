"""Where DeepSpeed keeps the shards of ZeRO.

Stages 1 and 2 shard flattened groups of parameters, stage 3 shards each parameter. DeepSpeed's own helpers for full tensors
(safe_get_full_...) work only after an optimizer step. These also work before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor, nn

from pretrain.optim import OptimConfig
from pretrain.runtime import distributed
from pretrain.strategies import Precision
from pretrain.strategies.deepspeed import Zero
from pretrain.strategies.full_copy import disable_length_buckets, materialized
from pretrain.towers.meta_copy import copy_to_meta

CHECKPOINTING_FLAGS = ("grad_checkpointing", "gradient_checkpointing")
"""Attributes that timm's and transformers' modules set when they recompute activations in the backward pass."""


class Zero12(Zero):
    """Stages 1 and 2: every process holds the weights; the master weights are sharded.

    The master weights of a parameter group are one flat tensor, sharded evenly.
    """

    def __init__(self, stage: int, precision: Precision, optim: OptimConfig, device: torch.device, offload: bool) -> None:
        self.stage = stage
        super().__init__(precision, optim, device, offload)

    def _zero_optimizer_class(self) -> Any:
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

        return DeepSpeedZeroOptimizer

    def _flat_shards(self) -> list[Tensor]:
        flats: list[Tensor] = self.zero.single_partition_of_fp32_groups
        return flats

    def _fragment(self, p: nn.Parameter) -> tuple[Tensor, slice, slice] | None:
        """Return where this process holds a fragment of p's master weight; None if it holds nothing of it.

        Returns (flat shard, slice of that shard, slice of the flattened parameter).
        """
        mapping = p._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        in_flat, in_parameter = mapping.hp_fragment_address, mapping.lp_fragment_address
        flat = self._flat_shards()[mapping.param_group_index]
        return (
            flat,
            slice(in_flat.start, in_flat.start + in_flat.numel),
            slice(in_parameter.start, in_parameter.start + in_parameter.numel),
        )

    def _gather_master(self, p: nn.Parameter, key: str | None) -> Tensor:
        full = torch.zeros(p.numel(), device=self.device)
        fragment = self._fragment(p)
        if fragment is not None:
            flat, in_flat, in_parameter = fragment
            full[in_parameter] = (flat if key is None else self.optimizer.state[flat][key])[in_flat].to(self.device)
        td.all_reduce(full)
        return full.view(p.shape)

    def _load_master(self, p: nn.Parameter, value: Tensor, key: str | None) -> None:
        fragment = self._fragment(p)
        if fragment is not None:
            flat, in_flat, in_parameter = fragment
            shard = flat if key is None else self.optimizer.state[flat][key]
            shard[in_flat] = value.reshape(-1)[in_parameter].to(flat.device)

    def _other_copies(self, p: nn.Parameter) -> list[Tensor]:
        fragment = self._fragment(p)
        return [p.new_zeros(1) if fragment is None else fragment[0].data[fragment[1]]]

    def refresh(self) -> None:
        self.zero.update_lp_params()


class Zero3(Zero):
    """Stage 3: each parameter is sharded evenly, and gathered while it is used."""

    stage = 3

    def _prepare_model(self, inner: nn.Module) -> None:
        self._meta_copy = copy_to_meta(self.module, buffers=False)
        disable_length_buckets(self.module)
        modules = self.module.modules()
        self._is_order_irregular = any(getattr(m, flag, False) for m in modules for flag in CHECKPOINTING_FLAGS)
        inner.register_forward_pre_hook(self._drop_trace)  # runs before DeepSpeed's own hook, which reads the trace

    def _drop_trace(self, *_: Any) -> None:
        """Drop DeepSpeed's trace of the order of modules if forward passes may not follow it.

        DeepSpeed gathers weights ahead of use by this trace. Recomputed activations and forward passes without a backward
        pass (the cached step) do not follow the trace. DeepSpeed 0.19.8 then either drops it itself or ends the run with a
        "tracing error". Without it, weights are gathered when they are used.
        """
        self._is_order_irregular = self._is_order_irregular or not torch.is_grad_enabled()
        coordinator = self.zero.parameter_offload.get_param_coordinator()
        if self._is_order_irregular and not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()

    def _zero_optimizer_class(self) -> Any:
        from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

        return DeepSpeedZeroOptimizer_Stage3

    def _flat_shards(self) -> list[Tensor]:
        flats: list[Tensor] = self.zero.fp32_partitioned_groups_flat
        return flats

    def _gather_master(self, p: nn.Parameter, key: str | None) -> Tensor:
        shape: torch.Size = p.ds_shape  # type: ignore[attr-defined]
        full: Tensor = self.zero.get_full_hp_param(p, key).view(shape)
        return full

    def _load_master(self, p: nn.Parameter, value: Tensor, key: str | None) -> None:
        shard = self._master_shard(p, key)
        value = value.reshape(-1)
        begin = shard.numel() * distributed.rank()
        local = value[begin : begin + shard.numel()]  # shorter than the shard where that is padded
        shard[: local.numel()] = local.to(shard.device)

    def _master_shard(self, p: nn.Parameter, key: str | None) -> Tensor:
        """Return this process's shard of p's master weight, or of its optimizer state: a flat view.

        key: None for the weight, or one of MOMENTS.
        """
        group, begin, count = self.zero.grad_position[self.zero.get_param_id(p)]
        flat = self._flat_shards()[group]
        values: Tensor = flat if key is None else self.optimizer.state[flat][key]
        return values.narrow(0, begin, count)

    def _other_copies(self, p: nn.Parameter) -> list[Tensor]:
        return [self._master_shard(p, None).data, p.ds_tensor.data]  # type: ignore[attr-defined]

    def _gather_frozen(self, p: nn.Parameter) -> Tensor:
        import deepspeed

        with deepspeed.zero.GatheredParameters([p]):
            return p.detach().clone()

    def refresh(self) -> None:
        self.zero._partition_all_parameters()  # a parameter that is still gathered would not be gathered again
        for group in range(len(self._flat_shards())):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        self.zero._post_step(set())

    @contextmanager
    def full_model(self) -> Iterator[nn.Module]:
        with materialized(self._meta_copy, self._gather_weights(), self.module.named_buffers(), self.device) as module:
            yield module
