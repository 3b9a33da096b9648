"""What the stages of DeepSpeed's ZeRO share: the engine, its settings, one step, and saving.

Stage 1 shards the optimizer state, stage 2 the gradients too, stage 3 the weights too.

Weights, gradients, reductions and optimizer state are float32 in every precision. bf16 and fp16 are autocast inside the
model, as under every other strategy: DeepSpeed's own bf16 mode would round the logit scale and the gradients to 8 bits.

DeepSpeed keeps float32 master weights, sharded. The optimizer updates these, and the weights of the model are copied from
them. So whatever changes a weight outside the optimizer must change both: the clamp of the logit scale, averaging, resuming.
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
from pretrain.runtime import distributed, performance
from pretrain.strategies import DTYPES, OptimizerState, Precision, StepResult, Strategy, deepspeed_config
from pretrain.strategies.batch_norm import convert_sync_batch_norm

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's names for its state of a parameter."""
BUCKET_ELEMENTS = 50_000_000
"""Elements that are sent at once, and gathered ahead of use: 200 MB."""


class Zero(Strategy):
    """Base class of the three stages.

    Bytes sent per step and process: 2 x 4 x parameters; 3 x 4 x parameters under zero3.
    """

    stage: int
    file_settings: dict[str, Any] = {}  # noqa: RUF012
    """Settings of the file that train.deepspeed names."""
    persistence_threshold = 100_000
    """zero3: parameters with fewer elements than this stay unsharded on every process."""

    def __init__(self, precision: Precision, optim: OptimConfig, device: torch.device, offload: bool) -> None:
        super().__init__(precision, optim, device)
        self.offload = offload
        self.name = f"zero{self.stage}"  # type: ignore[misc]
        self._deferred_reduction: ExitStack | None = None
        self._loss_scale = LossScale() if precision == "fp16" else None

    def setup(self, model: nn.Module) -> None:
        distributed.ensure_group()
        self.module = convert_sync_batch_norm(model).to(self.device)
        deepspeed = _init_deepspeed()
        inner = _AutocastModel(self.module, self.device.type, self.precision) if self.precision != "fp32" else self.module
        self._prepare_model(inner)
        client = optimizers.build_adamw(optimizers.parameter_groups(self.module, self.optim), self.optim)
        engine = deepspeed.initialize(model=inner, optimizer=client, config=self._engine_config(), dist_init_required=False)[0]
        self.model = self.engine = engine
        self.zero: Any = engine.optimizer
        self.optimizer = self.zero.optimizer
        assert engine.zero_optimization_stage() == self.stage, engine.zero_optimization_stage()
        assert engine.dp_world_size == distributed.world_size(), (
            f"{engine.dp_world_size} of {distributed.world_size()} processes"
        )
        assert isinstance(self.zero, self._zero_optimizer_class()), type(self.zero)
        if self._loss_scale:
            self.zero.override_loss_scale(self._loss_scale.scale)

    def _engine_config(self) -> dict[str, Any]:
        """Return the settings of the engine: our defaults, replaced by those of train.deepspeed."""
        return deepspeed_config.merge(self._default_config(), self.file_settings)

    def _default_config(self) -> dict[str, Any]:
        """Return our default settings of DeepSpeed.

        Each one that changes what is computed is explicit, because DeepSpeed's own defaults change between versions.
        """
        offload = {"device": "cpu", "pin_memory": torch.cuda.is_available()} if self.offload else {"device": "none"}
        return {
            "train_micro_batch_size_per_gpu": 1,  # only DeepSpeed's own reports read it
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
            "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW: DeepSpeed's takes a minute to compile
            "zero_optimization": {
                "stage": self.stage,
                "contiguous_gradients": True,
                "overlap_comm": self.device.type == "cuda",
                "reduce_scatter": True,
                "reduce_bucket_size": BUCKET_ELEMENTS,
                "allgather_partitions": True,
                "allgather_bucket_size": BUCKET_ELEMENTS,
                "round_robin_gradients": False,
                "offload_optimizer": offload,
                **({"offload_param": offload} if self.stage == 3 else {}),
                "sub_group_size": 1_000_000_000,
                "stage3_prefetch_bucket_size": BUCKET_ELEMENTS,
                "stage3_param_persistence_threshold": self.persistence_threshold,
                "stage3_max_live_parameters": 1_000_000_000,
                "stage3_max_reuse_distance": 1_000_000_000,
                "memory_efficient_linear": False,  # it would replace torch's linear layer in the whole process
            },
        }

    def _prepare_model(self, inner: nn.Module) -> None:
        """Prepare the model before DeepSpeed wraps it. inner: the module that is given to DeepSpeed."""

    def _zero_optimizer_class(self) -> Any:
        """Return the class of DeepSpeed's optimizer for this stage, to check that the engine uses it."""
        raise NotImplementedError

    # -----------------------------------------------------------------------------------------------------------------
    # One step

    def autocast(self) -> AbstractContextManager[Any]:
        """Return an empty context; `_AutocastModel` enables autocast inside the engine.

        The engine disables any autocast around it.
        """
        return nullcontext()

    @contextmanager
    def sync_gradients(self, is_last_chunk: bool) -> Iterator[None]:
        """Defer the reduction of gradients from the first chunk until the last one has run its backward pass."""
        if not is_last_chunk and self._deferred_reduction is None:
            self._deferred_reduction = ExitStack()
            self._deferred_reduction.enter_context(self.engine.coalesce_grad_reduction())
        yield
        if is_last_chunk and self._deferred_reduction is not None:
            deferred, self._deferred_reduction = self._deferred_reduction, None
            deferred.close()

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def gradients(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_grad

        scale = self.zero.loss_scale
        return {name: safe_get_full_grad(p).detach().clone() / scale for name, p in self._trainable_parameters()}

    def apply(self, lr: float) -> StepResult:
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.engine.step()  # unscales, clips, skips on all ranks if not finite on any, steps, clears the gradients
        skipped = bool(self.zero.overflow)
        norm = float("inf") if skipped else self.engine.get_global_grad_norm()
        if self._loss_scale:
            self._loss_scale.update(skipped)
            self.zero.override_loss_scale(self._loss_scale.scale)
        self._clamp()
        return StepResult(
            torch.as_tensor(norm, dtype=torch.float32, device=self.device).detach().reshape(()),
            torch.tensor(float(skipped), device=self.device),
        )

    @torch.no_grad()
    def _clamp(self) -> None:
        """Let the model clamp its scalars, in its weights and in every other copy on this process."""
        scalars = [p for _, p in self._trainable_parameters() if _numel(p) == 1]
        self.module.clamp_()  # type: ignore[operator]
        for copies in zip(*[self._other_copies(p) for p in scalars], strict=True):
            data = [p.data for p in scalars]
            for p, tensor in zip(scalars, copies, strict=True):
                p.data = tensor
            self.module.clamp_()  # type: ignore[operator]
            for p, tensor in zip(scalars, data, strict=True):
                p.data = tensor

    def _other_copies(self, p: nn.Parameter) -> list[Tensor]:
        """Return this process's other copies of a one-element parameter, each (1,), to be written into.

        Where this process holds none: a tensor that nothing reads, (1,) or (0,).
        """
        raise NotImplementedError

    # -----------------------------------------------------------------------------------------------------------------
    # Weights and optimizer state

    def _flat_shards(self) -> list[Tensor]:
        """Return this process's flat shards of the float32 master weights: one or more per parameter group."""
        raise NotImplementedError

    def _gather_master(self, p: nn.Parameter, key: str | None) -> Tensor:
        """Return the full master weight of a trainable parameter, or its optimizer state. Collective.

        key: None for the weight, or one of MOMENTS.
        """
        raise NotImplementedError

    def _load_master(self, p: nn.Parameter, value: Tensor, key: str | None) -> None:
        """Set this process's shard of what `_gather_master` returns from the full tensor."""
        raise NotImplementedError

    def _trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]

    def local_shards(self) -> dict[str, Tensor]:
        return {f"shard {i}": flat for i, flat in enumerate(self._flat_shards())}

    @torch.no_grad()
    def load_full_weights(self, weights: dict[str, Tensor]) -> None:
        for name, p in self._trainable_parameters():
            self._load_master(p, weights[name].to(self.device), None)
        self.refresh()

    def _gather_frozen(self, p: nn.Parameter) -> Tensor:
        """Return the full tensor of a frozen parameter, which has no master weight. Collective."""
        return p.detach()

    @torch.no_grad()
    def _gather_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter's name and full tensor, in the order of the model. Collective."""
        for name, p in self.module.named_parameters():
            yield name, (self._gather_master(p, None) if p.requires_grad else self._gather_frozen(p))

    def full_weights(self) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = {}
        for name, value in self._gather_weights():
            if distributed.is_main():
                weights[name] = value.to("cpu", copy=True)
        if not distributed.is_main():
            return weights
        buffers = dict(self.module.named_buffers())
        names = self.module.state_dict()
        return {name: weights[name] if name in weights else buffers[name].to("cpu", copy=True) for name in names}

    @torch.no_grad()
    def optimizer_state(self) -> OptimizerState:
        state: OptimizerState = {}
        if not any(len(self.optimizer.state[flat]) for flat in self._flat_shards() if flat in self.optimizer.state):
            return state
        for name, p in self._trainable_parameters():
            values = {key: self._gather_master(p, key) for key in MOMENTS}
            if distributed.is_main():
                step = next(self.optimizer.state[flat]["step"] for flat in self._flat_shards())
                state[name] = {key: value.to("cpu", copy=True) for key, value in values.items()}
                state[name]["step"] = step.detach().cpu().clone()
        return state

    @torch.no_grad()
    def load_optimizer_state(self, state: OptimizerState) -> None:
        if not state:
            return
        step = next(iter(state.values()))["step"]
        for flat in self._flat_shards():
            zeros = {key: torch.zeros_like(flat) for key in MOMENTS}
            self.optimizer.state[flat] = {"step": step.to(flat.device, torch.float32, copy=True), **zeros}
        for name, p in self._trainable_parameters():
            if name in state:
                for key in MOMENTS:
                    self._load_master(p, state[name][key], key)

    def scaler_state(self) -> dict[str, Any]:
        return self._loss_scale.state_dict() if self._loss_scale else {}

    def load_scaler_state(self, state: dict[str, Any]) -> None:
        if self._loss_scale:
            self._loss_scale = LossScale(state["scale"], state["_growth_tracker"])
            self.zero.override_loss_scale(self._loss_scale.scale)

    def trainable_names(self) -> list[str]:
        return [name for name, _ in self._trainable_parameters()]

    def trainable_shapes(self) -> dict[str, torch.Size]:
        return {name: torch.Size(getattr(p, "ds_shape", p.shape)) for name, p in self._trainable_parameters()}


class LossScale:
    """fp16's loss scale by the rule of torch.amp.GradScaler.

    It is halved on overflow, and doubled after 2,000 steps without overflow. DeepSpeed's own loss scaler needs float16
    weights.
    """

    def __init__(self, scale: float = 65536.0, good_steps: int = 0) -> None:
        self.scale, self.good_steps = scale, good_steps

    def update(self, skipped: bool) -> None:
        """Adjust the scale after a step. skipped: whether the step was skipped because of an overflow."""
        self.good_steps = 0 if skipped else self.good_steps + 1
        if skipped:
            self.scale /= 2
        elif self.good_steps == 2000:
            self.scale, self.good_steps = self.scale * 2, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the state in the layout of GradScaler, so that another strategy can resume from it."""
        rule = {"growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
        return {"scale": self.scale, **rule, "_growth_tracker": self.good_steps}


class _AutocastModel(nn.Module):
    """Wraps the model and runs its forward pass under autocast."""

    def __init__(self, model: nn.Module, device: str, precision: Precision) -> None:
        super().__init__()
        self.model, self._device, self._dtype = model, device, DTYPES[precision]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self._device, dtype=self._dtype):
            return self.model(*args, **kwargs)


def _numel(p: nn.Parameter) -> int:
    """Return the number of elements of the full parameter."""
    return int(getattr(p, "ds_numel", p.numel()))  # zero3 leaves an empty tensor in place of a parameter


def _init_deepspeed() -> Any:
    """Import DeepSpeed, silence its log, and let it use the existing process group."""
    performance.name_deepspeed_device()
    os.environ.setdefault("LOCAL_RANK", str(distributed.local_rank()))  # DeepSpeed requires it even with one process
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # The shared-memory kernels serve inference only, and compiling them takes a minute at a machine's first run.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = td.get_backend()
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, dist_init_required=False)
    return deepspeed
