"""How the model, gradients and optimizer state are distributed; train.strategy names a strategy.

    single.py            one process
    ddp.py               the model replicated on every process, by torch's DistributedDataParallel
    fsdp2.py             weights, gradients and optimizer state sharded, by torch's fully_shard
    zero.py              builds DeepSpeed's ZeRO in the stage that train.strategy names
    deepspeed.py         what the stages of ZeRO share: the engine, its settings, one step, saving
    zero_stages.py       where ZeRO 1 and 2 and ZeRO 3 keep their shards
    deepspeed_config.py  reads the file of DeepSpeed settings that train.deepspeed names
    blocks.py            the blocks that are sharded or compiled one by one
    full_copy.py         an unsharded copy of a sharded model, for evaluation
    batch_norm.py        where BatchNorm would change the result, and how it is synchronized

A Strategy owns the wrapped model and the optimizer. training/step.py calls every strategy in the same order:

    with strategy.sync_gradients(is_last_chunk):
        features = objective.encode(strategy.model, chunk)
        strategy.backward(loss)
    result = strategy.apply(lr)      unscale, clip, skip if not finite, step, clamp, zero the gradients

Gradients are averaged over processes, in float32, so that a loss averaged over LOCAL rows is exact (see pretrain/losses).

What is saved does not depend on the strategy: the full weights, and `state/optimizer.pt` with the full optimizer state by
parameter name. So a run may resume under another strategy or on another number of processes. Rank 0 holds all of it in CPU
memory while it writes (12 bytes per parameter).

May import pretrain.towers, pretrain.runtime, pretrain.optim and pretrain.errors.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pretrain.errors import ConfigError, UserError
from pretrain.optim import OptimConfig
from pretrain.runtime import distributed
from pretrain.strategies import blocks, deepspeed_config

Precision = Literal["fp32", "bf16", "fp16"]
OptimizerState = dict[str, dict[str, Tensor]]
"""Parameter name -> {"step": (), "exp_avg": shaped as the parameter, "exp_avg_sq": shaped as the parameter}."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# train.strategy -> (file of this package, arguments of its build())
STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "single": ("single", {}),
    "ddp": ("ddp", {}),
    "fsdp2": ("fsdp2", {}),
    "zero1": ("zero", {"stage": 1}),
    "zero2": ("zero", {"stage": 2}),
    "zero3": ("zero", {"stage": 3}),
}


@dataclass
class StepResult:
    """The outcome of one optimizer step.

    The tensors stay on the device, so that nothing waits until they are read.

    grad_norm: (), norm over all parameters before clipping. skipped: (), 1.0 where gradients were not finite.
    """

    grad_norm: Tensor
    skipped: Tensor


class Strategy(ABC):
    """Base class: owns the wrapped model and its optimizer, and distributes both over processes."""

    name: ClassVar[str]
    """The value of train.strategy."""
    model: nn.Module
    """The wrapped model. Training calls this one, so that the hooks of DDP, FSDP and DeepSpeed run."""
    module: nn.Module
    """The same model without the wrapper."""
    optimizer: torch.optim.Optimizer
    compiled = "false"
    """The value of train.compile with which blocks were compiled."""

    def __init__(self, precision: Precision, optim: OptimConfig, device: torch.device) -> None:
        self.precision, self.optim, self.device = precision, optim, device

    @abstractmethod
    def setup(self, model: nn.Module) -> None:
        """Move the model to the device, wrap it, and build its optimizer. Collective."""

    def compile(self, word: str = "default", backend: str = "inductor") -> None:
        """Compile the blocks of the model with torch.compile, for batches of one shape. Call it after setup().

        word: a value of train.compile; "false" does nothing.
        """
        if word == "false":
            return
        blocks.compile_blocks(self.module, blocks.MODES[word], backend)
        self.compiled = word

    def begin_step(self) -> None:
        """Announce a new step: CUDA graphs may write over what they returned in the one before."""
        if self.compiled == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()

    # -----------------------------------------------------------------------------------------------------------------
    # One step

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context for forward passes: weights stay float32, matrix products run in `precision`."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[self.precision])

    def sync_gradients(self, is_last_chunk: bool) -> AbstractContextManager[Any]:
        """Return the context of a chunk's backward pass.

        Only the backward pass of the last chunk averages gradients over processes.
        """
        return nullcontext()

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Run the backward pass of a loss, which adds to the gradients."""

    @abstractmethod
    def gradients(self) -> dict[str, Tensor]:
        """Return the full gradient of every trainable weight, averaged over processes. Collective; for tests.

        Call it between backward() and apply().
        """

    @abstractmethod
    def apply(self, lr: float) -> StepResult:
        """Make one optimizer step at learning rate `lr` times each group's lr_scale; clear the gradients."""

    # -----------------------------------------------------------------------------------------------------------------
    # Weights

    @abstractmethod
    def local_shards(self) -> dict[str, Tensor]:
        """Return the tensors in which THIS process holds its shard of the trainable weights.

        The optimizer updates these tensors. The keys may be any names. Together all processes hold every weight. What is
        written into these tensors takes effect after `refresh`.
        """

    def refresh(self) -> None:  # noqa: B027 - most strategies compute with the local shards themselves
        """Let the next forward pass use what was written into the local shards. Collective."""

    @abstractmethod
    def load_full_weights(self, weights: dict[str, Tensor]) -> None:
        """Set every trainable weight from unsharded tensors by name, and refresh. Collective."""

    @abstractmethod
    def full_weights(self) -> dict[str, Tensor]:
        """Return an unsharded copy of every weight and buffer, float32, on the CPU of rank 0. Collective.

        Other ranks return an empty dict.
        """

    @contextmanager
    def full_model(self) -> Iterator[nn.Module]:
        """Yield the model with every weight on this process, for evaluation.

        Its forward passes are not collective: processes may run different numbers of them. Compiled blocks run eagerly: batches
        of evaluation have other shapes, each of which would be compiled.
        """
        with nullcontext() if self.compiled == "false" else torch.compiler.set_stance("force_eager"):
            yield self.module

    # -----------------------------------------------------------------------------------------------------------------
    # Saving and resuming

    @abstractmethod
    def optimizer_state(self) -> OptimizerState:
        """Return a copy of the unsharded optimizer state on the CPU of rank 0. Collective.

        Empty on other ranks, and before the first step.
        """

    @abstractmethod
    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Restore what `optimizer_state` returned. Collective.

        state: all of it, on every process. Parameters that it lacks start with an optimizer state of zero.
        """

    @abstractmethod
    def scaler_state(self) -> dict[str, Any]:
        """Return the state of fp16's loss scaler as torch.amp.GradScaler does; empty for other precisions."""

    @abstractmethod
    def load_scaler_state(self, state: dict[str, Any]) -> None:
        """Restore what `scaler_state` returned."""

    @abstractmethod
    def trainable_names(self) -> list[str]:
        """Return the names of the parameters that the optimizer updates."""

    @abstractmethod
    def trainable_shapes(self) -> dict[str, torch.Size]:
        """Return the full shape of each of these parameters, by name."""

    def saved_state(self) -> dict[str, Any]:
        """Return what resuming needs besides the weights, the content of optimizer.pt, on rank 0. Collective.

        Further steps do not change it: it is a copy on the CPU.
        """
        return {"optimizer": self.optimizer_state(), "scaler": self.scaler_state()}

    def load(self, folder: Path) -> None:
        """Restore optimizer.pt in `folder`, the `saved_state` of any strategy. Collective. Raises UserError.

        Call it after setup().
        """
        path = folder / "optimizer.pt"
        if not path.exists():
            raise UserError(f"{folder} has no optimizer.pt: clipfuse did not write this state, or the checkpoint is incomplete")
        # Memory-mapped: the processes of a machine share the pages, and each process reads only its shard.
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            check_saved_state(state)
        except Exception as error:  # torch's unpickler raises many types of exceptions for damaged files
            raise UserError(f"{path} cannot be read: {str(error)[:300] or type(error).__name__}") from error
        unknown = sorted(set(state["optimizer"]) - set(self.trainable_names()))
        if unknown:
            raise ConfigError(f"{path} has optimizer state of {unknown[0]}, which is not trainable in this configuration")
        shapes = self.trainable_shapes()
        for name, values in state["optimizer"].items():
            for key, value in values.items():
                if key != "step" and value.shape != shapes[name]:
                    raise UserError(
                        f"{path}: {key} of {name} has shape {list(value.shape)}, the parameter has {list(shapes[name])}"
                    )
        self.load_optimizer_state(state["optimizer"])
        if state["scaler"]:
            try:
                self.load_scaler_state(state["scaler"])
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise UserError(f"{path}: the state of the loss scaler cannot be used: {error!r:.300}") from error


MOMENTS = {"step", "exp_avg", "exp_avg_sq"}
"""What AdamW keeps for each parameter: a number, and two tensors of its shape."""


def check_saved_state(state: Any) -> None:
    """Raise ValueError where `state` is not what Strategy.save writes: AdamW's kernels trust shapes and types."""
    if not isinstance(state, dict) or not isinstance(state.get("optimizer"), dict):
        raise ValueError("it holds no optimizer state")
    if not isinstance(state.get("scaler"), dict):
        raise ValueError("it holds no state of the loss scaler, not even an empty one")
    for name, values in state["optimizer"].items():
        if not isinstance(name, str) or not isinstance(values, dict) or set(values) != MOMENTS:
            raise ValueError(f"the state of {name!r:.80} is not that of AdamW")
        for key, value in values.items():
            if (
                not isinstance(value, Tensor)
                or value.layout != torch.strided
                or value.device.type != "cpu"
                or not value.dtype.is_floating_point
                or (key == "step" and value.ndim > 0)  # moments may be 0-d: those of a scalar parameter
            ):
                raise ValueError(f"{key} of {name!r:.80} is not a tensor as AdamW keeps it")


# ---------------------------------------------------------------------------------------------------------------------
# Checking the settings and building a strategy


def check(
    name: str,
    precision: Precision,
    compiled: str,
    offload: bool,
    deepspeed: str | None = None,
    replicas: int = 1,
    gradient_compression: str = "none",
) -> None:
    """Raise ConfigError for settings that cannot run on this machine with this many processes."""
    if name not in STRATEGIES:
        raise ConfigError(f"train.strategy={name!r} is not a strategy; the choices are {', '.join(STRATEGIES)}")
    is_zero = STRATEGIES[name][0] == "zero"
    if name == "single" and distributed.world_size() > 1:
        others = ", ".join(list(STRATEGIES)[1:])
        raise ConfigError(f"train.strategy=single runs in one process, not {distributed.world_size()}; choose {others}")
    if is_zero and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(f"train.strategy={name} needs DeepSpeed, which is not installed: pip install 'clipfuse[deepspeed]'")
    if is_zero and [int(n) for n in re.findall(r"\d+", metadata.version("deepspeed"))[:3]] < [0, 19, 8]:
        raise ConfigError(
            f"train.strategy={name} needs DeepSpeed 0.19.8 or later (older versions reduce gradients once per chunk); "
            f"this is {metadata.version('deepspeed')}: pip install -U 'clipfuse[deepspeed]'"
        )
    if precision == "fp16" and not distributed.has_gpu():
        raise ConfigError("train.precision=fp16 needs a GPU; use bf16 or fp32 on a CPU")
    if (
        precision == "bf16"
        and distributed.has_gpu()
        and torch.cuda.is_available()
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise ConfigError(
            "train.precision=bf16 needs a GPU of NVIDIA's Ampere generation or later; use fp16 or fp32 on this one"
        )
    blocks.check_mode(compiled, name)
    if offload and not is_zero:
        raise ConfigError(f"train.offload=true needs train.strategy=zero1, zero2 or zero3, not {name}")
    if offload and not distributed.has_gpu():
        raise ConfigError(
            "train.offload=true moves the optimizer from GPU to CPU memory, and this machine has no GPU; leave it out"
        )
    processes = distributed.world_size()
    if replicas != 1 and name != "fsdp2":
        raise ConfigError(f"train.replicas={replicas} needs train.strategy=fsdp2, not {name}")
    if replicas < 1 or processes % replicas:
        raise ConfigError(f"train.replicas={replicas} must divide the number of processes, which is {processes}")
    if gradient_compression != "none" and name != "ddp":
        raise ConfigError(f"train.gradient_compression={gradient_compression} needs train.strategy=ddp, not {name}")
    if deepspeed is not None:
        if not is_zero:
            raise ConfigError(f"train.deepspeed={deepspeed} needs train.strategy=zero1, zero2 or zero3, not {name}")
        deepspeed_config.read(deepspeed, STRATEGIES[name][1]["stage"])


def has_initial_weights(name: str) -> bool:
    """Return whether this process builds the model of a run under train.strategy=`name` with its initial weights.

    fsdp2 sends those of rank 0 to the other processes, tensor by tensor. Those build what they can on the meta device, and hold
    their shard only.
    """
    return name != "fsdp2" or distributed.is_main()


def build_strategy(
    name: str,
    precision: Precision,
    optim: OptimConfig,
    device: torch.device,
    offload: bool = False,
    deepspeed: str | None = None,
    replicas: int = 1,
    gradient_compression: str = "none",
) -> Strategy:
    """Build the strategy that train.strategy names.

    Raises ConfigError, which lists the choices, for an unknown name.
    """
    if name not in STRATEGIES:
        raise ConfigError(f"train.strategy={name!r} is not a strategy; the choices are {', '.join(STRATEGIES)}")
    file, arguments = STRATEGIES[name]
    if offload:
        arguments = {**arguments, "offload": True}
    if replicas != 1:
        arguments = {**arguments, "replicas": replicas}
    if gradient_compression != "none":
        arguments = {**arguments, "gradient_compression": gradient_compression}
    if deepspeed:
        arguments = {**arguments, "deepspeed": deepspeed}
    strategy: Strategy = importlib.import_module(f"pretrain.strategies.{file}").build(
        precision=precision, optim=optim, device=device, **arguments
    )
    return strategy
