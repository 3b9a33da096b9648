"""single: one process, the model as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain import optim as optimizers
from pretrain.checkpoint import load_tensors, save_tensors
from pretrain.config import ConfigError, UserError
from pretrain.optim import OptimConfig
from pretrain.strategies import Applied, Precision, Strategy


class Single(Strategy):
    """Also the base of the strategies whose optimizer sees ordinary whole tensors."""

    word = "single"

    def setup(self, model: nn.Module) -> None:
        self.module = model.to(self.device)
        self.model = self.module
        self._prepare()

    def _prepare(self) -> None:
        self.optimizer = optimizers.adamw(optimizers.parameter_groups(self.module, self.optim), self.optim)
        self.scaler = torch.amp.GradScaler(self.device.type) if self.precision == "fp16" else None
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    def backward(self, loss: Tensor) -> None:
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    def apply(self, lr: float) -> Applied:
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
        clamp: Callable[[], None] = self.module.clamp_
        clamp()
        self.optimizer.zero_grad(set_to_none=True)
        return Applied(norm, skipped)

    def _clip(self) -> Tensor:
        limit = self.optim.clip_norm or float("inf")
        return torch.nn.utils.clip_grad_norm_(self.parameters, limit, foreach=True)

    def weights(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu() for name, value in self.module.state_dict().items()}

    def save(self, folder: Path) -> None:
        state: dict[str, Any] = {"optimizer": self._by_name(self.optimizer.state_dict())}
        if self.scaler:
            state["scaler"] = self.scaler.state_dict()
        save_tensors(folder / "optimizer.pt", state)

    def load(self, folder: Path) -> None:
        path = folder / "optimizer.pt"
        if not path.exists():
            raise UserError(f"{folder} holds no optimizer.pt: it was written by another strategy than {self.word}")
        state = load_tensors(path)
        moments = state["optimizer"]
        names = self._names()
        if set(moments) - set(names):
            raise ConfigError(f"{path} has moments of {sorted(set(moments) - set(names))[0]}, which does not train now")
        mine = self.optimizer.state_dict()
        mine["state"] = {i: moments[name] for i, name in enumerate(names) if name in moments}
        self.optimizer.load_state_dict(mine)
        if self.scaler and "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])

    def _names(self) -> list[str]:
        """Names of the optimizer's parameters, in its own order."""
        name_of = {id(p): name for name, p in self.module.named_parameters()}
        return [name_of[id(p)] for p in self.parameters]

    def _by_name(self, state: dict[str, Any]) -> dict[str, Any]:
        """Moments by parameter name: the grouping may change between stop and resume."""
        return {name: state["state"][i] for i, name in enumerate(self._names()) if i in state["state"]}


def build(precision: Precision, optim: OptimConfig, device: torch.device) -> Single:
    """The strategy."""
    return Single(precision, optim, device)
