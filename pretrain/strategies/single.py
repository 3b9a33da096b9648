"""train.strategy=single: one process, the model unwrapped. Also the base class of ddp and fsdp2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pretrain import optim as optimizers
from pretrain.optim import OptimConfig
from pretrain.runtime import distributed
from pretrain.strategies import OptimizerState, Precision, StepResult, Strategy


class Single(Strategy):
    """One process, with torch's own optimizer.

    A subclass that shards its parameters overrides `_unshard` and `_shard`.
    """

    name = "single"

    def setup(self, model: nn.Module) -> None:
        self.module = model.to(self.device)
        self.model = self.module
        self._prepare()

    def _prepare(self) -> None:
        self.optimizer = optimizers.build_adamw(optimizers.parameter_groups(self.module, self.optim), self.optim)
        self.scaler = torch.amp.GradScaler(self.device.type) if self.precision == "fp16" else None
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    def _unshard(self, shard: Tensor) -> Tensor:
        """Return the full tensor of a parameter, or of a tensor sharded like one. Collective."""
        return shard.detach()

    def _shard(self, full: Tensor, like: Tensor) -> Tensor:
        """Return this process's shard of a full tensor, sharded like the parameter `like`."""
        return full.to(like.device)

    # -----------------------------------------------------------------------------------------------------------------
    # One step

    def backward(self, loss: Tensor) -> None:
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    def gradients(self) -> dict[str, Tensor]:
        scale = self.scaler.get_scale() if self.scaler else 1.0
        grads = [(name, p.grad) for name, p in self._trainable_parameters()]
        return {name: self._unshard(grad) / scale for name, grad in grads if grad is not None}

    def apply(self, lr: float) -> StepResult:
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        norm = self._clip()
        skipped = (~torch.isfinite(norm)).to(torch.float32)
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            # The fused kernel changes nothing where found_inf is 1, so that the host need not wait for its value.
            self.optimizer.grad_scale = None  # type: ignore[attr-defined]
            self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
            self.optimizer.step()
        clamp = self.module.clamp_
        assert callable(clamp)
        clamp()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(norm, skipped)

    def _clip(self) -> Tensor:
        limit = self.optim.clip_norm or float("inf")
        return torch.nn.utils.clip_grad_norm_(self.parameters, limit, foreach=True)

    # -----------------------------------------------------------------------------------------------------------------
    # Weights

    def local_shards(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self._trainable_parameters()}

    @torch.no_grad()
    def load_full_weights(self, weights: dict[str, Tensor]) -> None:
        for name, p in self._trainable_parameters():
            p.copy_(self._shard(weights[name], p))
        self.refresh()

    @torch.no_grad()
    def full_weights(self) -> dict[str, Tensor]:
        weights = {}
        for name, value in self.module.state_dict().items():
            value = self._unshard(value)  # collective: all ranks call it, and only rank 0 keeps the result
            if distributed.is_main():
                weights[name] = value.to("cpu", copy=True)
        return weights

    # -----------------------------------------------------------------------------------------------------------------
    # Saving and resuming

    @torch.no_grad()
    def optimizer_state(self) -> OptimizerState:
        state: OptimizerState = {}
        for name, p in self._trainable_parameters():
            if p not in self.optimizer.state:
                continue
            values = {key: self._unshard(value) for key, value in self.optimizer.state[p].items()}
            if distributed.is_main():
                state[name] = {key: value.to("cpu", copy=True) for key, value in values.items()}
        return state

    @torch.no_grad()
    def load_optimizer_state(self, state: OptimizerState) -> None:
        for name, p in self._trainable_parameters():
            if name in state:
                self.optimizer.state[p] = {
                    # Copied, because `state` may be memory-mapped from a file.
                    key: self._shard(value, p).to(p.dtype, copy=True) if value.ndim else value.to(self.device, copy=True)
                    for key, value in state[name].items()
                }

    def scaler_state(self) -> dict[str, Any]:
        return self.scaler.state_dict() if self.scaler else {}

    def load_scaler_state(self, state: dict[str, Any]) -> None:
        if self.scaler:
            self.scaler.load_state_dict(state)

    def trainable_names(self) -> list[str]:
        return [name for name, _ in self._trainable_parameters()]

    def trainable_shapes(self) -> dict[str, torch.Size]:
        return {name: p.shape for name, p in self._trainable_parameters()}

    def _trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return the optimizer's parameters with their names, in the model's order, equal on all ranks."""
        return [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]


def build(precision: Precision, optim: OptimConfig, device: torch.device) -> Single:
    """Build the strategy."""
    return Single(precision, optim, device)
