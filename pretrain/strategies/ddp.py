"""ddp: the whole model on every process; gradients are averaged while the backward pass runs (torch's DDP)."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pretrain.errors import ConfigError
from pretrain.optim import OptimConfig
from pretrain.runtime import distributed
from pretrain.strategies import Precision, StepResult
from pretrain.strategies.batch_norm import convert_sync_batch_norm
from pretrain.strategies.single import Single

# Buffers are constants, or statistics that every process computes alike: no need to send them at each forward pass.
# The argument's name changed in torch 2.15.
_NEW = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
_NO_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _NEW else "broadcast_buffers": False}


class DDP(Single):
    """Bytes a step and process: 2 x 4 x parameters, sent in buckets while the backward pass goes on."""

    name = "ddp"

    def setup(self, model: nn.Module) -> None:
        distributed.ensure_group()
        self.module = convert_sync_batch_norm(model).to(self.device)
        self._prepare()
        self.model = DistributedDataParallel(
            self.module,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            **_NO_BUFFERS,
            gradient_as_bucket_view=True,  # one copy of the gradients, not two
        )
        assert self.model.process_group.size() == distributed.world_size()

    def apply(self, lr: float) -> StepResult:
        if not self.optimizer.state:  # torch would only say at the second step that it still waits for a gradient
            unused = [name for name, p in self._trainable_parameters() if p.grad is None]
            if unused:
                raise ConfigError(
                    f"train.strategy=ddp: {len(unused)} trainable parameters take no part in the loss (first {unused[0]}); "
                    "freeze them, or let the tower say so (Tower.freeze_unused)"
                )
        return super().apply(lr)

    def sync_gradients(self, on: bool) -> AbstractContextManager[Any]:
        return nullcontext() if on else self.model.no_sync()  # type: ignore[operator]


def build(precision: Precision, optim: OptimConfig, device: torch.device) -> DDP:
    """The strategy."""
    return DDP(precision, optim, device)
