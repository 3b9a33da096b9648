"""single: one process, the model as it is. Also the base of the strategies whose optimizer is torch's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pretrain import optim as optimizers
from pretrain.optim import OptimConfig
from pretrain.runtime import distributed
from pretrain.strategies import OptimizerState, Precision, StepResult, Strategy


class Single(Strategy):
    """Subclasses whose parameters are parts of the weights say how a part becomes whole (`_unshard`) and back (`_shard`)."""

    name = "single"

    def setup(self, model: nn.Module) -> None:
        self.module = model.to(self.device)
        self.model = self.module
        self._prepare()

    def _prepare(self) -> None:
        self.optimizer = optimizers.build_adamw(optimizers.parameter_groups(self.module, self.optim), self.optim)
        self.scaler = torch.amp.GradScaler(self.device.type) if self.precision == "fp16" else None
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    def _unshard(self, part: Tensor) -> Tensor:
        """A parameter, or a tensor shaped like one, whole. Collective."""
        return part.detach()

    def _shard(self, whole: Tensor, like: Tensor) -> Tensor:
        """The part of a whole tensor that stands where `like` stands."""
        return whole.to(like.device)

    # -----------------------------------------------------------------------------------------------------------------
    # One step

    def backward(self, loss: Tensor) -> None:
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    def gradients(self) -> dict[str, Tensor]:
        scale = self.scaler.get_scale() if self.scaler else 1.0
        found = [(name, p.grad) for name, p in self._trainable_parameters()]
        return {name: self._unshard(grad) / scale for name, grad in found if grad is not None}

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
            # The fused kernel leaves weights and moments alone where found_inf is 1: no answer has to travel to the host.
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
        found = {}
        for name, value in self.module.state_dict().items():
            value = self._unshard(value)  # every rank takes part, rank 0 keeps
            if distributed.is_main():
                found[name] = value.to("cpu", copy=True)
        return found

    # -----------------------------------------------------------------------------------------------------------------
    # There and back

    @torch.no_grad()
    def optimizer_state(self) -> OptimizerState:
        found: OptimizerState = {}
        for name, p in self._trainable_parameters():
            if p not in self.optimizer.state:
                continue
            values = {key: self._unshard(value) for key, value in self.optimizer.state[p].items()}
            if distributed.is_main():
                found[name] = {key: value.cpu() for key, value in values.items()}
        return found

    @torch.no_grad()
    def load_optimizer_state(self, moments: OptimizerState) -> None:
        for name, p in self._trainable_parameters():
            if name in moments:
                self.optimizer.state[p] = {
                    # Copies: what is given may lie in a mapped file.
                    key: self._shard(value, p).to(p.dtype, copy=True) if value.ndim else value.to(self.device, copy=True)
                    for key, value in moments[name].items()
                }

    def scaler_state(self) -> dict[str, Any]:
        return self.scaler.state_dict() if self.scaler else {}

    def load_scaler_state(self, state: dict[str, Any]) -> None:
        if self.scaler:
            self.scaler.load_state_dict(state)

    def trainable_names(self) -> list[str]:
        return [name for name, _ in self._trainable_parameters()]

    def _trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The optimizer's parameters with their names, in the order of the model: the same on every rank."""
        return [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]


def build(precision: Precision, optim: OptimConfig, device: torch.device) -> Single:
    """The strategy."""
    return Single(precision, optim, device)
