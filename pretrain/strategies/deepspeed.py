"""zero1 | zero2 | zero3: DeepSpeed's ZeRO. OptimizerState, then gradients too, then weights too, are cut into shares.

Weights, gradients, reductions and moments are float32 in every precision; bf16 and fp16 are autocast inside the model, as
under every other strategy (DeepSpeed's own bf16 mode would round the logit scale and the gradients to 8 bits). DeepSpeed
keeps a float32 master copy of each share, which is what the optimizer moves; the weights of the model follow it. So what
changes a weight outside the optimizer (the clamp of the logit scale, averaging, resuming) must change both.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor, nn

from pretrain import optim as optimizers
from pretrain.optim import OptimConfig
from pretrain.runtime import distributed
from pretrain.strategies import DTYPES, OptimizerState, Precision, StepResult, Strategy, deepspeed_config
from pretrain.strategies.batch_norm import convert_sync_batch_norm

KINDS = ("exp_avg", "exp_avg_sq")
BUCKET_ELEMENTS = 50_000_000
"""Elements sent at a time, and gathered ahead of use: 200 MB."""


class Zero(Strategy):
    """What the three stages share. Bytes a step and process: 2 x 4 x parameters; 3 x 4 under zero3."""

    stage: int
    tuning: dict[str, Any] = {}  # noqa: RUF012
    """Settings of a train.deepspeed file."""
    persistence_threshold = 100_000
    """zero3: parameters below so many elements stay whole on every process."""

    def __init__(self, precision: Precision, optim: OptimConfig, device: torch.device, offload: bool) -> None:
        super().__init__(precision, optim, device)
        self.offload = offload
        self.name = f"zero{self.stage}"  # type: ignore[misc]
        self._replay: ExitStack | None = None
        self._scale = LossScale() if precision == "fp16" else None

    def setup(self, model: nn.Module) -> None:
        distributed.ensure_group()
        self.module = convert_sync_batch_norm(model).to(self.device)
        deepspeed = _deepspeed()
        inside = _Autocast(self.module, self.device.type, self.precision) if self.precision != "fp32" else self.module
        self._before_engine(inside)
        client = optimizers.build_adamw(optimizers.parameter_groups(self.module, self.optim), self.optim)
        engine = deepspeed.initialize(model=inside, optimizer=client, config=self._config(), dist_init_required=False)[0]
        self.model = self.engine = engine
        self.zero: Any = engine.optimizer
        self.optimizer = self.zero.optimizer
        assert engine.zero_optimization_stage() == self.stage, engine.zero_optimization_stage()
        assert engine.dp_world_size == distributed.world_size(), (
            f"{engine.dp_world_size} of {distributed.world_size()} processes"
        )
        assert isinstance(self.zero, self._engine_class()), type(self.zero)
        if self._scale:
            self.zero.override_loss_scale(self._scale.scale)

    def _config(self) -> dict[str, Any]:
        """DeepSpeed's settings: every default that changes what is computed is written out."""
        return deepspeed_config.merge(self._ours(), self.tuning)

    def _ours(self) -> dict[str, Any]:
        place = {"device": "cpu", "pin_memory": torch.cuda.is_available()} if self.offload else {"device": "none"}
        return {
            "train_micro_batch_size_per_gpu": 1,  # only for DeepSpeed's own reports
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self.optim.clip_norm,
            "prescale_gradients": False,
            "gradient_predivide_factor": 1.0,
            "communication_data_type": "fp32",
            "bf16": {"enabled": False},
            "fp16": {"enabled": False},
            "torch_autocast": {"enabled": False},
            "steps_per_print": 2**31,
            "wall_clock_breakdown": False,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW, not one that is compiled for a minute first
            "zero_optimization": {
                "stage": self.stage,
                "contiguous_gradients": True,
                "overlap_comm": self.device.type == "cuda",
                "reduce_scatter": True,
                "reduce_bucket_size": BUCKET_ELEMENTS,
                "allgather_partitions": True,
                "allgather_bucket_size": BUCKET_ELEMENTS,
                "round_robin_gradients": False,
                "offload_optimizer": place,
                **({"offload_param": place} if self.stage == 3 else {}),
                "sub_group_size": 1_000_000_000,
                "stage3_prefetch_bucket_size": BUCKET_ELEMENTS,
                "stage3_param_persistence_threshold": self.persistence_threshold,
                "stage3_max_live_parameters": 1_000_000_000,
                "stage3_max_reuse_distance": 1_000_000_000,
                "memory_efficient_linear": False,  # it replaces torch's linear layer, for the whole process
            },
        }

    def _before_engine(self, inside: nn.Module) -> None:
        """What needs the model, and what of it DeepSpeed gets, before it does."""

    def _engine_class(self) -> Any:
        raise NotImplementedError

    # -----------------------------------------------------------------------------------------------------------------
    # One step

    def autocast(self) -> AbstractContextManager[Any]:
        """Nothing: the engine switches off what is around it, so `_Autocast` is inside."""
        return nullcontext()

    @contextmanager
    def sync_gradients(self, on: bool) -> Iterator[None]:
        """The first chunk that is not the last opens a block in which gradients stay here; the last one closes it."""
        if not on and self._replay is None:
            self._replay = ExitStack()
            self._replay.enter_context(self.engine.coalesce_grad_reduction())
        yield
        if on and self._replay is not None:
            replay, self._replay = self._replay, None
            replay.close()

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def gradients(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_grad

        scale = self.zero.loss_scale
        return {name: safe_get_full_grad(p).detach().clone() / scale for name, p in self._trainable_parameters()}

    def apply(self, lr: float) -> StepResult:
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.engine.step()  # unscales, clips, skips everywhere if not finite anywhere, steps, clears the gradients
        skipped = bool(self.zero.overflow)
        norm = float("inf") if skipped else self.engine.get_global_grad_norm()
        if self._scale:
            self._scale.update(skipped)
            self.zero.override_loss_scale(self._scale.scale)
        self._clamp()
        return StepResult(
            torch.as_tensor(norm, dtype=torch.float32, device=self.device).detach().reshape(()),
            torch.tensor(float(skipped), device=self.device),
        )

    @torch.no_grad()
    def _clamp(self) -> None:
        """The model clamps its scalars in place: in the weights it computes with, and in each copy a process holds."""
        scalars = [p for _, p in self._trainable_parameters() if _size(p) == 1]
        self.module.clamp_()  # type: ignore[operator]
        for copies in zip(*[self._copies(p) for p in scalars], strict=True):
            kept = [p.data for p in scalars]
            for p, tensor in zip(scalars, copies, strict=True):
                p.data = tensor
            self.module.clamp_()  # type: ignore[operator]
            for p, tensor in zip(scalars, kept, strict=True):
                p.data = tensor

    def _copies(self, p: nn.Parameter) -> list[Tensor]:
        """The other places of a parameter of one element on this process, each (1,); empty (0,) where it has none."""
        raise NotImplementedError

    # -----------------------------------------------------------------------------------------------------------------
    # Weights, there and back

    def _flat(self) -> list[Tensor]:
        """The float32 master shares of this process, flat, one or more a parameter group."""
        raise NotImplementedError

    def _master(self, p: nn.Parameter, kind: str | None) -> Tensor:
        """A trainable parameter's master copy, or one of its moments, whole. Collective."""
        raise NotImplementedError

    def _load_master(self, p: nn.Parameter, value: Tensor, kind: str | None) -> None:
        """The reverse of `_master`."""
        raise NotImplementedError

    def _trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]

    def _state_of(self, p: nn.Parameter) -> dict[str, Tensor] | None:
        """The optimizer's state of the share that a parameter lies in; None before the first step."""
        raise NotImplementedError

    def local_shards(self) -> dict[str, Tensor]:
        return {f"share {i}": flat for i, flat in enumerate(self._flat())}

    @torch.no_grad()
    def load_full_weights(self, weights: dict[str, Tensor]) -> None:
        for name, p in self._trainable_parameters():
            self._load_master(p, weights[name].to(self.device), None)
        self.refresh()

    def _frozen(self, p: nn.Parameter) -> Tensor:
        return p.detach()

    @torch.no_grad()
    def _whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, p in self.module.named_parameters():
            yield name, (self._master(p, None) if p.requires_grad else self._frozen(p))

    def full_weights(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, value in self._whole_weights():
            if distributed.is_main():
                found[name] = value.to("cpu", copy=True)
        if not distributed.is_main():
            return found
        buffers = dict(self.module.named_buffers())
        names = self.module.state_dict()
        return {name: found[name] if name in found else buffers[name].detach().cpu() for name in names}

    @torch.no_grad()
    def optimizer_state(self) -> OptimizerState:
        found: OptimizerState = {}
        if not any(len(self.optimizer.state[flat]) for flat in self._flat() if flat in self.optimizer.state):
            return found
        for name, p in self._trainable_parameters():
            values = {kind: self._master(p, kind) for kind in KINDS}
            if distributed.is_main():
                step = next(self.optimizer.state[flat]["step"] for flat in self._flat())
                found[name] = {kind: value.to("cpu", copy=True) for kind, value in values.items()}
                found[name]["step"] = step.detach().cpu().clone()
        return found

    @torch.no_grad()
    def load_optimizer_state(self, moments: OptimizerState) -> None:
        if not moments:
            return
        step = next(iter(moments.values()))["step"]
        for flat in self._flat():
            zeros = {kind: torch.zeros_like(flat) for kind in KINDS}
            self.optimizer.state[flat] = {"step": step.to(flat.device, torch.float32, copy=True), **zeros}
        for name, p in self._trainable_parameters():
            if name in moments:
                for kind in KINDS:
                    self._load_master(p, moments[name][kind], kind)

    def scaler_state(self) -> dict[str, Any]:
        return self._scale.state() if self._scale else {}

    def load_scaler_state(self, state: dict[str, Any]) -> None:
        if self._scale:
            self._scale = LossScale(state["scale"], state["_growth_tracker"])
            self.zero.override_loss_scale(self._scale.scale)

    def trainable_names(self) -> list[str]:
        return [name for name, _ in self._trainable_parameters()]


class LossScale:
    """fp16's loss scale by the rule of torch.amp.GradScaler: halved on overflow, doubled after 2,000 good steps.

    DeepSpeed's own needs float16 weights.
    """

    def __init__(self, scale: float = 65536.0, good: int = 0) -> None:
        self.scale, self.good = scale, good

    def update(self, skipped: bool) -> None:
        """After each step."""
        self.good = 0 if skipped else self.good + 1
        if skipped:
            self.scale /= 2
        elif self.good == 2000:
            self.scale, self.good = self.scale * 2, 0

    def state(self) -> dict[str, Any]:
        """In the layout of GradScaler, so that another strategy can go on with it."""
        rule = {"growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
        return {"scale": self.scale, **rule, "_growth_tracker": self.good}


class _Autocast(nn.Module):
    """The model, forward under autocast."""

    def __init__(self, model: nn.Module, device: str, precision: Precision) -> None:
        super().__init__()
        self.model, self._device, self._dtype = model, device, DTYPES[precision]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self._device, dtype=self._dtype):
            return self.model(*args, **kwargs)


def _size(p: nn.Parameter) -> int:
    return int(getattr(p, "ds_numel", p.numel()))  # zero3 leaves an empty tensor in place of a parameter


def _deepspeed() -> Any:
    """DeepSpeed, quiet, on the process group that is there."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("LOCAL_RANK", str(distributed.local_rank()))  # asserted on, also in a run of one process
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # The shared-memory kernels serve inference only, and would be compiled for a minute at each machine's first run.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = td.get_backend()
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, dist_init_required=False)
    return deepspeed
