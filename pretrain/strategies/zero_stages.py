"""Where DeepSpeed keeps the shares: stages 1 and 2 cut flat groups of parameters, stage 3 cuts each parameter.

Its own helpers for whole tensors (safe_get_full_...) want an optimizer step to have been made; these do not.
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
from pretrain.strategies.full_copy import disable_length_buckets, materialized, meta_copy

RECOMPUTES = ("grad_checkpointing", "gradient_checkpointing")
"""What timm's and transformers' modules say when they recompute activations in the backward pass."""


class Zero12(Zero):
    """Stages 1 and 2: every process holds the weights; each parameter group is one flat tensor, cut evenly."""

    def __init__(self, stage: int, precision: Precision, optim: OptimConfig, device: torch.device, offload: bool) -> None:
        self.stage = stage
        super().__init__(precision, optim, device, offload)

    def _engine_class(self) -> Any:
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

        return DeepSpeedZeroOptimizer

    def _flat(self) -> list[Tensor]:
        flats: list[Tensor] = self.zero.single_partition_of_fp32_groups
        return flats

    def _span(self, p: nn.Parameter) -> tuple[Tensor, slice, slice] | None:
        """(flat share, where in it, where in the flattened parameter) of what this process holds of p, if anything."""
        held = p._hp_mapping  # type: ignore[attr-defined]
        if held is None:
            return None
        there, here = held.hp_fragment_address, held.lp_fragment_address
        flat = self._flat()[held.param_group_index]
        return flat, slice(there.start, there.start + there.numel), slice(here.start, here.start + here.numel)

    def _master(self, p: nn.Parameter, kind: str | None) -> Tensor:
        whole = torch.zeros(p.numel(), device=self.device)
        span = self._span(p)
        if span is not None:
            flat, there, here = span
            whole[here] = (flat if kind is None else self.optimizer.state[flat][kind])[there].to(self.device)
        td.all_reduce(whole)
        return whole.view(p.shape)

    def _load_master(self, p: nn.Parameter, value: Tensor, kind: str | None) -> None:
        span = self._span(p)
        if span is not None:
            flat, there, here = span
            (flat if kind is None else self.optimizer.state[flat][kind])[there] = value.reshape(-1)[here].to(flat.device)

    def _copies(self, p: nn.Parameter) -> list[Tensor]:
        span = self._span(p)
        return [p.new_zeros(1) if span is None else span[0].data[span[1]]]

    def refresh(self) -> None:
        self.zero.update_lp_params()


class Zero3(Zero):
    """Stage 3: each parameter is cut evenly, and gathered while it is needed."""

    stage = 3

    def _before_engine(self, inside: nn.Module) -> None:
        self._meta_copy = meta_copy(self.module)
        disable_length_buckets(self.module)
        self._surprises = any(getattr(m, flag, False) for m in self.module.modules() for flag in RECOMPUTES)
        inside.register_forward_pre_hook(self._forget)  # before DeepSpeed's own hook, which reads the trace

    def _forget(self, *_: Any) -> None:
        """Drops the trace of which module runs when, by which DeepSpeed gathers weights ahead of use.

        Recomputed activations and forward passes without backward pass (the cached step) do not follow it, and DeepSpeed
        0.19.8 then either drops it itself or ends the run with a "tracing error". Weights are gathered when needed instead.
        """
        self._surprises = self._surprises or not torch.is_grad_enabled()
        trace = self.zero.parameter_offload.get_param_coordinator()
        if self._surprises and not trace.is_invalid_trace():
            trace._invalidate_trace()

    def _engine_class(self) -> Any:
        from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

        return DeepSpeedZeroOptimizer_Stage3

    def _flat(self) -> list[Tensor]:
        flats: list[Tensor] = self.zero.fp32_partitioned_groups_flat
        return flats

    def _master(self, p: nn.Parameter, kind: str | None) -> Tensor:
        shape: torch.Size = p.ds_shape  # type: ignore[attr-defined]
        whole: Tensor = self.zero.get_full_hp_param(p, kind).view(shape)
        return whole

    def _load_master(self, p: nn.Parameter, value: Tensor, kind: str | None) -> None:
        share = self._share(p, kind)
        value = value.reshape(-1)
        begin = share.numel() * distributed.rank()
        mine = value[begin : begin + share.numel()]
        share[: mine.numel()] = mine.to(share.device)

    def _share(self, p: nn.Parameter, kind: str | None) -> Tensor:
        group, begin, count = self.zero.grad_position[self.zero.get_param_id(p)]
        flat = self._flat()[group]
        whole: Tensor = flat if kind is None else self.optimizer.state[flat][kind]
        return whole.narrow(0, begin, count)

    def _copies(self, p: nn.Parameter) -> list[Tensor]:
        return [self._share(p, None).data, p.ds_tensor.data]  # type: ignore[attr-defined]

    def _frozen(self, p: nn.Parameter) -> Tensor:
        import deepspeed

        with deepspeed.zero.GatheredParameters([p]):
            return p.detach().clone()

    def refresh(self) -> None:
        self.zero._partition_all_parameters()  # what is whole already would not be gathered anew
        for group in range(len(self._flat())):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        self.zero._post_step(set())

    @contextmanager
    def full_model(self) -> Iterator[nn.Module]:
        with materialized(self._meta_copy, self._whole_weights(), self.module.named_buffers(), self.device) as module:
            yield module
