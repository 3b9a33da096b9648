"""train.strategy=ddp: the model replicated on every process, by torch's DistributedDataParallel.

Gradients are averaged over processes while the backward pass runs.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from pretrain.errors import ConfigError
from pretrain.optim import OptimConfig
from pretrain.runtime import distributed
from pretrain.strategies import Precision, StepResult
from pretrain.strategies.batch_norm import convert_sync_batch_norm
from pretrain.strategies.single import Single

# Buffers are constants, or statistics that every process computes alike. They need not be broadcast at each forward pass.
# The argument's name changed in torch 2.15.
_NEW = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
_NO_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _NEW else "broadcast_buffers": False}

BUCKET_MB = 100
"""Size of the buckets in MiB. With torch's default of 25, a model of 600 MB takes four times as many reductions."""


class DDP(Single):
    """The replicated model.

    Bytes sent per step and process: 2 x 4 x parameters, in buckets during the backward pass.

    gradient_compression: bf16 sends half the bytes. Gradients are rounded to bf16 and summed in it, so they are not exact.
    """

    name = "ddp"

    def __init__(
        self, precision: Precision, optim: OptimConfig, device: torch.device, gradient_compression: str = "none"
    ) -> None:
        super().__init__(precision, optim, device)
        self.gradient_compression = gradient_compression

    def setup(self, model: nn.Module) -> None:
        distributed.ensure_group()
        self.module = convert_sync_batch_norm(model).to(self.device)
        self._prepare()
        self.model = DistributedDataParallel(
            self.module,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            **_NO_BUFFERS,
            bucket_cap_mb=BUCKET_MB,
            gradient_as_bucket_view=True,  # one copy of the gradients, not two
        )
        assert self.model.process_group.size() == distributed.world_size()
        if self.gradient_compression == "bf16":
            self.model.register_comm_hook(None, bf16_compress_hook)

    def apply(self, lr: float) -> StepResult:
        if not self.optimizer.state:  # torch itself would only report a missing gradient at the second step
            unused = [name for name, p in self._trainable_parameters() if p.grad is None]
            if unused:
                raise ConfigError(
                    f"train.strategy=ddp: {len(unused)} trainable parameters take no part in the loss (first {unused[0]}); "
                    "freeze them, or let their tower call Tower.freeze_unused"
                )
        return super().apply(lr)

    def sync_gradients(self, is_last_chunk: bool) -> AbstractContextManager[Any]:
        return nullcontext() if is_last_chunk else self.model.no_sync()  # type: ignore[operator]


def build(precision: Precision, optim: OptimConfig, device: torch.device, gradient_compression: str = "none") -> DDP:
    """Build the strategy."""
    return DDP(precision, optim, device, gradient_compression)
