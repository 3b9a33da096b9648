"""How one step runs on one or many processes: one file a strategy, one word of configuration.

    single.py   one process                       ddp.py    a copy on each process
    fsdp2.py    weights cut into shares           zero.py   DeepSpeed's stages 1 to 3
    replica.py  a whole copy of sharded weights   batch_norm.py   where statistics cross processes
    stages.py   where DeepSpeed keeps the shares  tuning.py   a file of DeepSpeed's settings

A Strategy owns the wrapped model and the optimizer. The step calls it in this order, whatever it is:

    with strategy.sync_gradients(last_chunk):  features = objective.encode(strategy.model, chunk); strategy.backward(loss)
    report = strategy.apply(lr)      unscale, clip, skip if not finite, step, clamp, zero the gradients

Gradients are averaged over processes, in float32, so that a loss averaged over LOCAL rows is exact (see losses/).

What is saved is the same whatever the strategy: `weights()` whole, and `state/optimizer.pt` with whole moments by parameter
name. So a run may change its strategy and its number of processes between stop and resume. Rank 0 holds all of it in CPU
memory while it writes (12 bytes a parameter).
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
from pretrain.strategies import deepspeed_config

Precision = Literal["fp32", "bf16", "fp16"]
OptimizerState = dict[str, dict[str, Tensor]]
"""Parameter name -> {"step": (), "exp_avg": as the parameter, "exp_avg_sq": as the parameter}."""

# word in the configuration -> (file, arguments)
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
    """What one optimizer step did. Tensors stay on the device: reading them is up to the caller.

    grad_norm (): norm over all parameters before clipping. skipped (): 1.0 where gradients were not finite.
    """

    grad_norm: Tensor
    skipped: Tensor


class Strategy(ABC):
    """The wrapped model, its optimizer, and how they move. Subclasses: one per file of this folder."""

    name: ClassVar[str]
    model: nn.Module
    """What training calls: hooks of DDP, FSDP and DeepSpeed run."""
    module: nn.Module
    """The same model without the wrapper."""
    optimizer: torch.optim.Optimizer

    def __init__(self, precision: Precision, optim: OptimConfig, device: torch.device) -> None:
        self.precision, self.optim, self.device = precision, optim, device

    @abstractmethod
    def setup(self, model: nn.Module) -> None:
        """Moves and wraps the model and builds its optimizer. Collective."""

    def compile(self, backend: str = "inductor") -> None:
        """torch.compile, after setup."""
        self.module.compile(backend=backend)

    # -----------------------------------------------------------------------------------------------------------------
    # One step

    def autocast(self) -> AbstractContextManager[Any]:
        """Forward passes run in here: weights float32, matrix products in the chosen precision."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[self.precision])

    def sync_gradients(self, on: bool) -> AbstractContextManager[Any]:
        """Gradients travel between processes only in the backward pass of the last chunk (on=True)."""
        return nullcontext()

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a loss."""

    @abstractmethod
    def gradients(self) -> dict[str, Tensor]:
        """Between backward and apply: every trainable weight's gradient, whole, mean over processes. Collective, for tests."""

    @abstractmethod
    def apply(self, lr: float) -> StepResult:
        """One optimizer step at learning rate `lr` (times each group's lr_scale), gradients cleared afterwards."""

    # -----------------------------------------------------------------------------------------------------------------
    # Weights

    @abstractmethod
    def local_shards(self) -> dict[str, Tensor]:
        """The tensors, by any name, in which THIS process holds its part of the trainable weights: what the optimizer updates.

        Writing into them takes effect after `refresh`. Between them all processes hold every weight.
        """

    def refresh(self) -> None:  # noqa: B027 - most strategies compute with the local_shards themselves
        """After local_shards were written: the next forward pass sees them. Collective."""

    @abstractmethod
    def load_full_weights(self, weights: dict[str, Tensor]) -> None:
        """Sets every trainable weight from whole tensors by name, and refreshes. Collective."""

    @abstractmethod
    def full_weights(self) -> dict[str, Tensor]:
        """A copy of every weight and buffer, whole, float32, on the CPU of rank 0 (other ranks: empty). Collective."""

    @contextmanager
    def full_model(self) -> Iterator[nn.Module]:
        """The model with every weight on this process, for evaluation: its forward passes wait for no other process."""
        yield self.module

    # -----------------------------------------------------------------------------------------------------------------
    # There and back

    @abstractmethod
    def optimizer_state(self) -> OptimizerState:
        """The optimizer's state, whole, on the CPU of rank 0 (others: empty); empty before the first step. Collective."""

    @abstractmethod
    def load_optimizer_state(self, moments: OptimizerState) -> None:
        """The reverse of `moments`; every process is given all of them. Parameters without any start from zero. Collective."""

    @abstractmethod
    def scaler_state(self) -> dict[str, Any]:
        """The state of fp16's loss scale in the layout of torch.amp.GradScaler; empty for other precisions."""

    @abstractmethod
    def load_scaler_state(self, state: dict[str, Any]) -> None:
        """The reverse of `scaling`."""

    @abstractmethod
    def trainable_names(self) -> list[str]:
        """Names of the parameters that the optimizer moves."""

    def save(self, folder: Path) -> None:
        """Writes what resuming needs beside the weights into `folder`. Collective."""
        state = {"optimizer": self.optimizer_state(), "scaler": self.scaler_state()}
        if distributed.is_main():
            torch.save(state, folder / "optimizer.pt")

    def load(self, folder: Path) -> None:
        """The reverse of `save`, into a strategy that was set up, whichever strategy saved. Collective. Raises UserError."""
        path = folder / "optimizer.pt"
        if not path.exists():
            raise UserError(f"{folder} holds no optimizer.pt: its state was not written by clipfuse, or not whole")
        # Mapped, not read: eight processes of a machine share the pages and each touches only its part.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        unknown = sorted(set(state["optimizer"]) - set(self.trainable_names()))
        if unknown:
            raise ConfigError(f"{path} has moments of {unknown[0]}, which does not train now")
        self.load_optimizer_state(state["optimizer"])
        if state["scaler"]:
            self.load_scaler_state(state["scaler"])


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# ---------------------------------------------------------------------------------------------------------------------
# Choosing


def check(word: str, precision: Precision, compiled: bool, offload: bool, deepspeed: str | None = None) -> None:
    """Refuses, before anything is built, what cannot run on this machine with this many processes. Raises ConfigError."""
    if word not in STRATEGIES:
        raise ConfigError(f"train.strategy={word!r} is not a strategy; the choices are {', '.join(STRATEGIES)}")
    zero = STRATEGIES[word][0] == "zero"
    if word == "single" and distributed.world_size() > 1:
        raise ConfigError(
            f"train.strategy=single runs in one process, not {distributed.world_size()}; choose {', '.join(list(STRATEGIES)[1:])}"
        )
    if zero and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(f"train.strategy={word} needs DeepSpeed, which is not installed: pip install 'clipfuse[deepspeed]'")
    if zero and [int(n) for n in re.findall(r"\d+", metadata.version("deepspeed"))[:3]] < [0, 19, 8]:
        raise ConfigError(
            f"train.strategy={word} needs DeepSpeed 0.19.8 or later (older ones reduce gradients once a chunk); "
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
            "train.precision=bf16 needs a GPU of Nvidia's Ampere generation or later; use fp16 or fp32 on this one"
        )
    if compiled and word == "zero3":
        raise ConfigError(
            "train.compile=true does not go with train.strategy=zero3: DeepSpeed gathers weights in hooks of every module, and "
            "each would break the graph; use fsdp2 to shard weights of a compiled model"
        )
    if offload and not zero:
        raise ConfigError(f"train.offload=true needs train.strategy=zero1, zero2 or zero3, not {word}")
    if offload and not distributed.has_gpu():
        raise ConfigError(
            "train.offload=true moves the optimizer from GPU to CPU memory, and this machine has no GPU; leave it out"
        )
    if deepspeed is not None:
        if not zero:
            raise ConfigError(f"train.deepspeed={deepspeed} needs train.strategy=zero1, zero2 or zero3, not {word}")
        deepspeed_config.read(deepspeed, STRATEGIES[word][1]["stage"])


def build_strategy(
    word: str,
    precision: Precision,
    optim: OptimConfig,
    device: torch.device,
    offload: bool = False,
    deepspeed: str | None = None,
) -> Strategy:
    """The strategy of a word. Raises ConfigError for a word that is none, listing those that are."""
    if word not in STRATEGIES:
        raise ConfigError(f"train.strategy={word!r} is not a strategy; the choices are {', '.join(STRATEGIES)}")
    file, arguments = STRATEGIES[word]
    if offload:
        arguments = {**arguments, "offload": True}
    if deepspeed:
        arguments = {**arguments, "deepspeed": deepspeed}
    made: Strategy = importlib.import_module(f"pretrain.strategies.{file}").build(
        precision=precision, optim=optim, device=device, **arguments
    )
    return made
