"""AdamW: parameter groups, learning-rate schedules, weight averaging.

The schedule is a pure function of the step, the average a pure function of the weights seen: resuming needs no scheduler
state.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from pretrain.errors import ConfigError


@dataclass
class OptimConfig:
    """How weights move."""

    lr: float = 5e-4
    """Peak learning rate (CLIP's for a batch of 32k is 5e-4)."""
    lr_scale: dict[str, float] = field(default_factory=dict)
    """Factor on lr for one part of the model by name, for example {image: 0.1}; also `heads` for the projections, and in
    fine-tuning `fusion` and `task`, the new layers."""
    weight_decay: float = 0.2
    """Decoupled weight decay; spares every parameter of one dimension (gains, biases, logit_scale)."""
    weight_decay_of: dict[str, float] = field(default_factory=dict)
    """Weight decay for one part of the model instead, by the names of lr_scale."""
    layer_decay: float = 1.0
    """Factor on lr per block away from a tower's end (layer-wise decay); 1 = off."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    """AdamW's decay of the two moments."""
    eps: float = 1e-6
    """AdamW's epsilon (1e-6 for ViT towers, as CLIP)."""
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """After the warm-up: cosine to final_lr, constant, or warmup-stable-decay (constant, then straight to final_lr)."""
    warmup: int = 500
    """Steps from 0 to lr, along a straight line."""
    decay: float = 0.2
    """wsd only: the share of all steps that the final decay takes."""
    final_lr: float = 0.0
    """Where the schedule ends, as a share of lr."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this norm over all parameters; 0 = off."""
    average: float = 0.0
    """Decay per step of an exponential average of the weights, used for evaluation and model.safetensors; 0 = off."""

    def check(self) -> None:
        """Refuses values that cannot train."""
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


def learning_rate(step: int, total: int, config: OptimConfig) -> float:
    """The learning rate of step 0, 1, ..., total - 1 (total in steps, warm-up included).

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
    """Groups for AdamW: one per (part, layer, decayed or not) that has trainable parameters.

    Each has `lr_scale`, by which the loop multiplies the schedule, and a readable `name`. Parts are the model's towers by
    modality and `heads` for all else, or what its own `layout()` says. Raises ConfigError where lr_scale or weight_decay_of
    name a part that is not there.
    """
    part_of, layer_of, last_layer = _layout(model)
    parts = sorted(set(part_of.values()))
    for key, given in (("lr_scale", config.lr_scale), ("weight_decay_of", config.weight_decay_of)):
        for part in given:
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
        raise ConfigError("nothing to train: every parameter is frozen; set image.trainable_blocks or text's to -1 or above 0")
    return list(groups.values())


def _layout(model: nn.Module) -> tuple[dict[str, str], dict[str, int], dict[str, int]]:
    """parameter -> part, parameter -> layer, part -> its last layer; towers say their own layers.

    A model that has more than towers says parts and layers itself, in `layout()`.
    """
    if hasattr(model, "layout"):
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


def build_adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW, which torch has for CPU and CUDA, and which skips a step on the device when told found_inf."""
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=True)


class WeightAverage:
    """Exponential moving average of the trainable weights, kept in float32 beside them: of each process's own local_shards.

    The decay is warmed up as min(decay, (1 + n) / (10 + n)) so that the first thousand steps do not average in the
    random start (as in TensorFlow's ExponentialMovingAverage). A skipped step (weight 0) leaves it unchanged.
    """

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], decay: float) -> None:
        self.decay = decay
        self.weights = {name: p.detach().float().clone() for name, p in parameters}

    @torch.no_grad()
    def update(self, parameters: Iterable[tuple[str, Tensor]], step: int, applied: Tensor | float = 1.0) -> None:
        """Moves towards the weights after step `step` (from 0); applied is 0 where the step was skipped."""
        pull = (1 - min(self.decay, (1 + step) / (10 + step))) * applied
        pairs = [(self.weights[name], p.detach()) for name, p in parameters]
        if not isinstance(pull, Tensor):
            torch._foreach_lerp_([mine for mine, _ in pairs], [p.float() for _, p in pairs], pull)
            return
        for mine, p in pairs:
            mine.lerp_(p.float(), pull.to(mine.device))  # offloaded local_shards are not where the loss is
