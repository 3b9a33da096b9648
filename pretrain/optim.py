"""AdamW: parameter groups, learning-rate schedules, weight averaging.

The learning rate is a pure function of the step, the average a pure function of the past weights: resuming needs no
scheduler state.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from pretrain.config import check_numbers
from pretrain.errors import ConfigError

AVERAGE_BYTES = 2**28
"""Bytes of the average that one group of launches updates on a GPU: the memory that its temporary difference takes."""


@dataclass
class OptimConfig:
    """Optimizer, learning-rate schedule and weight averaging."""

    lr: float = 5e-4
    """Peak learning rate (CLIP used 5e-4 for a batch of 32k)."""
    lr_scale: dict[str, float] = field(default_factory=dict)
    """Factor on lr for one part of the model, by name: a tower ({image: 0.1}), `heads` (the projections), and in fine-tuning
    the new layers, `fusion` and `task`."""
    weight_decay: float = 0.2
    """Decoupled weight decay; not applied to parameters of one dimension (gains, biases, logit_scale)."""
    weight_decay_of: dict[str, float] = field(default_factory=dict)
    """Weight decay of single parts of the model, which replaces weight_decay there; names as in lr_scale."""
    layer_decay: float = 1.0
    """Layer-wise decay: factor on lr for each block between a parameter and its tower's last one; 1 = off."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    """AdamW's decay rates of the first and second moment."""
    eps: float = 1e-6
    """AdamW's epsilon (CLIP uses 1e-6 for ViT towers)."""
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """After the warm-up: cosine to final_lr, constant, or warmup-stable-decay (constant, then linear to final_lr)."""
    warmup: int = 500
    """Number of steps in which the learning rate rises linearly from 0 to lr."""
    decay: float = 0.2
    """wsd only: the fraction of all steps that the final decay takes."""
    final_lr: float = 0.0
    """Learning rate at the end of the schedule, as a fraction of lr."""
    clip_norm: float = 1.0
    """Largest norm of the gradient over all parameters; a larger gradient is scaled down to it. 0 = off."""
    average: float = 0.0
    """Decay per step of an exponential moving average of the weights. Evaluation and model.safetensors use the average;
    0 = off."""

    def check(self) -> None:
        """Raise ConfigError for values that cannot train."""
        if self.lr <= 0:
            raise ConfigError(f"optim.lr={self.lr} must be above 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optim.betas={self.betas} must be two numbers from 0 up to, not including, 1")
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"optim.layer_decay={self.layer_decay} must be above 0 and at most 1 (1 = off)")
        if not 0 <= self.average < 1:
            raise ConfigError(f"optim.average={self.average} must be from 0 (off) up to, not including, 1")
        if not 0 <= self.decay <= 1 or not 0 <= self.final_lr <= 1:
            raise ConfigError(f"optim.decay={self.decay} and optim.final_lr={self.final_lr} must be from 0 to 1")
        if self.warmup < 0 or self.clip_norm < 0 or self.weight_decay < 0 or self.eps <= 0:
            raise ConfigError("optim.warmup, clip_norm, weight_decay must be at least 0 and optim.eps above 0")
        check_numbers(
            self,
            "optim",
            lr="(0, inf)",
            lr_scale="[0, inf)",
            weight_decay="[0, inf)",
            weight_decay_of="[0, inf)",
            eps="(0, inf)",
            warmup="[0, inf)",
            clip_norm="[0, inf)",
        )


def learning_rate(step: int, total: int, config: OptimConfig) -> float:
    """Return the learning rate of step 0, 1, ..., total - 1 (total in steps, warm-up included).

    Cosine as in SGDR (Loshchilov & Hutter 2017) without restarts, warm-up (step + 1) / warmup as in CLIP's open
    reproductions; wsd as in MiniCPM (Hu et al. 2024) with a linear decay.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    floor = config.lr * config.final_lr
    if config.schedule == "cosine":
        progress = min(1.0, (step - config.warmup) / max(1, total - config.warmup))
        return floor + (config.lr - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    if config.schedule == "wsd":
        length = max(1, round(total * config.decay))
        progress = min(1.0, max(0, step - (total - length)) / length)
        return config.lr - (config.lr - floor) * progress
    return config.lr


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Build AdamW's parameter groups: one per part, layer, and whether weight decay applies.

    Frozen parameters are left out. A group has `lr_scale`, by which the loop multiplies the schedule, and a readable `name`.
    Parts are the model's towers by modality and `heads` for all else, or those of the model's own `parameter_layout()`.
    Raises ConfigError where lr_scale or weight_decay_of names an unknown part, or where every parameter is frozen.
    """
    part_of, layer_of, last_layer = _parameter_layout(model)
    parts = sorted(set(part_of.values()))
    for key, values in (("lr_scale", config.lr_scale), ("weight_decay_of", config.weight_decay_of)):
        for part in values:
            if part not in parts:
                raise ConfigError(f"optim.{key} names {part!r}; the model's parts are {', '.join(parts)}")
    groups: dict[tuple[str, int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, layer, decayed = part_of[name], layer_of.get(name, 0), parameter.ndim > 1
        if config.layer_decay == 1:
            layer = 0
        if (part, layer, decayed) not in groups:
            scale = config.lr_scale.get(part, 1.0)
            if part in last_layer:
                scale *= config.layer_decay ** (last_layer[part] - layer) if config.layer_decay < 1 else 1.0
            decay = config.weight_decay_of.get(part, config.weight_decay) if decayed else 0.0
            label = f"{part}.{layer}" + ("" if decayed else ".no_decay")
            groups[part, layer, decayed] = {"params": [], "weight_decay": decay, "lr_scale": scale, "name": label}
        groups[part, layer, decayed]["params"].append(parameter)
    if not groups:
        raise ConfigError("nothing to train: every parameter is frozen; set a tower's trainable_blocks to -1 or above 0")
    return list(groups.values())


def _parameter_layout(model: nn.Module) -> tuple[dict[str, str], dict[str, int], dict[str, int]]:
    """Return three dicts: parameter name -> part, parameter name -> layer, part -> its last layer.

    A tower numbers its layers in `layer_ids()`. A model with more than towers names parts and layers in `parameter_layout()`.
    """
    if hasattr(model, "parameter_layout"):
        part_of, layer_of = cast(Any, model).parameter_layout()
    else:
        part_of, layer_of = {name: "heads" for name, _ in model.named_parameters()}, {}
        for modality, tower in getattr(model, "towers", {}).items():
            for name, layer in tower.layer_ids().items():
                part_of[f"towers.{modality}.{name}"] = modality
                layer_of[f"towers.{modality}.{name}"] = layer
    last: dict[str, int] = {}
    for name, layer in layer_of.items():
        last[part_of[name]] = max(layer, last.get(part_of[name], 0))
    return part_of, layer_of, last


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, with the same bits and state, and less Python in each step.

    Parameter groups with equal settings share one call of the kernel, and shards of FSDP2 are updated as the plain tensors that
    they hold. torch's own methods import its compiler when they are first called, which takes seconds.

    Where `found_inf` (a tensor () on the device) is set and 1, a step changes nothing; `grad_scale` divides the gradients.
    """

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. closure: for torch's interface only; not called."""
        calls: dict[tuple[Any, ...], tuple[list[Any], list[Any], list[Any], list[Any], list[Tensor]]] = {}
        for group in self.param_groups:
            if not group["params"]:
                continue
            first = group["params"][0]
            key = (first.device, first.dtype, group["lr"], *group["betas"], group["weight_decay"], group["eps"])
            params, grads, exp_avgs, exp_avg_sqs, steps = calls.setdefault(key, ([], [], [], [], []))
            for p in group["params"]:
                if (grad := p.grad) is None:
                    continue
                state = self.state[p] or self._init_state(p)
                params.append(p)
                grads.append(grad)
                exp_avgs.append(state["exp_avg"])
                exp_avg_sqs.append(state["exp_avg_sq"])
                steps.append(state["step"])
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        for (device, _, lr, beta1, beta2, weight_decay, eps), (*tensors, steps) in calls.items():
            if not steps:
                continue
            if hasattr(tensors[0][0], "to_local"):
                tensors = [[value.to_local() for value in values] for values in tensors]
            skipped = None if found_inf is None else found_inf.to(device)
            # A list: torch would read the value of a single tensor, and so wait for the device.
            torch._foreach_add_(steps, [torch.ones_like(steps[0]) if skipped is None else 1 - skipped] * len(steps))
            torch._fused_adamw_(
                tensors[0],
                tensors[1],
                tensors[2],
                tensors[3],
                [],
                steps,
                lr=lr,
                beta1=beta1,
                beta2=beta2,
                weight_decay=weight_decay,
                eps=eps,
                amsgrad=False,
                maximize=False,
                grad_scale=None if grad_scale is None else grad_scale.to(device),
                found_inf=skipped,
            )

    def _init_state(self, p: Tensor) -> dict[str, Tensor]:
        """Begin with moments of zero, laid out as torch does."""
        state: dict[str, Tensor] = self.state[p]
        state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        return state

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Remove all gradients."""
        assert set_to_none
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None


def build_adamw(groups: list[dict[str, Any]], config: OptimConfig) -> AdamW:
    """Build a fused AdamW (CPU and CUDA), which skips a step on the device where `found_inf` is set."""
    return AdamW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=True)


class WeightAverage:
    """Exponential moving average, in float32, of the trainable weights that this process holds.

    These are its local shards. The decay is warmed up as min(decay, (1 + n) / (10 + n)), as in TensorFlow's
    ExponentialMovingAverage: so the random initial weights do not weigh in the average of the first thousand steps. A
    skipped step leaves the average unchanged.
    """

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], decay: float) -> None:
        self.decay = decay
        self.weights = {name: p.detach().float().clone() for name, p in parameters}

    @torch.no_grad()
    def update(self, parameters: Iterable[tuple[str, Tensor]], step: int, applied: Tensor | float = 1.0) -> None:
        """Move the average towards the weights after step `step` (from 0).

        applied: 0 if the step was skipped, else 1.
        """
        weight = (1 - min(self.decay, (1 + step) / (10 + step))) * applied
        pairs = [(self.weights[name], p.detach()) for name, p in parameters]
        if not isinstance(weight, Tensor):
            torch._foreach_lerp_([average for average, _ in pairs], [p.float() for _, p in pairs], weight)
            return
        host_weight = None  # offloaded shards are on the CPU, `applied` on the GPU
        on_device = []
        for average, p in pairs:
            if average.device.type == "cpu":
                host_weight = weight.to("cpu") if host_weight is None else host_weight
                average.lerp_(p.float(), host_weight)  # a launch costs nothing here, and resumed runs need the same bits
            else:
                on_device.append((average, p))
        for batch in _batch_by_bytes(on_device):
            _move_towards([average for average, _ in batch], [p.float() for _, p in batch], weight)


def _move_towards(averages: list[Tensor], weights: list[Tensor], weight: Tensor) -> None:
    """Set averages to averages + weight * (weights - averages) in three launches; equal to lerp to rounding.

    weight: (), on the same device. torch's _foreach_lerp_ takes a tensor only per element, which needs one launch for each.
    """
    difference = torch._foreach_sub(weights, averages)
    torch._foreach_mul_(difference, weight)
    torch._foreach_add_(averages, difference)


def _batch_by_bytes(pairs: list[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yield the pairs in order, in lists of at most AVERAGE_BYTES of averages, or of one larger pair."""
    batch: list[tuple[Tensor, Tensor]] = []
    size = 0
    for average, p in pairs:
        if batch and size + average.nbytes > AVERAGE_BYTES:
            yield batch
            batch, size = [], 0
        batch.append((average, p))
        size += average.nbytes
    if batch:
        yield batch
