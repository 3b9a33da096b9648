"""LoRA through peft: a linear layer W x becomes W x + (alpha / rank) B A x, with W frozen.

Hu et al. 2021, arXiv 2106.09685.
In training the adapters are separate weights (`...base_layer.weight`, `...lora_A.default.weight`). A checkpoint's
model.safetensors holds their products merged into W, under the names of the plain model. Evaluation, export and the next
fine-tuning therefore need neither peft nor this file. The checkpoint's state/ holds the separate weights, for resuming.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from pretrain.config import check_numbers
from pretrain.errors import ConfigError, closest
from pretrain.ops import Linear
from pretrain.towers import Tower

M = TypeVar("M", bound=nn.Module)
ADAPTER = "default"
"""peft's name of the first adapter, which is part of parameter names."""


@dataclass
class LoraConfig:
    """Settings of the low-rank adapters."""

    rank: int = 0
    """Columns of B and rows of A; 0 = no adapters."""
    alpha: float = 16.0
    """The output of an adapter is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout rate on the input of A, 0 to below 1."""
    towers: list[str] = field(default_factory=list)
    """Towers that get adapters, by modality; [] = all."""
    targets: list[str] = field(default_factory=list)
    """Linear layers in the blocks that get one, by the last word of their names (qkv, fc1, q_proj); [] = all of them. A tower
    without any of these gets no adapters and is frozen."""

    def check(self) -> None:
        """Raise ConfigError for a value out of range."""
        if self.rank < 0 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ConfigError(
                f"adapt.lora.rank={self.rank} (from 0), adapt.lora.alpha={self.alpha} (above 0) and adapt.lora.dropout="
                f"{self.dropout} (0 to below 1) do not fit together"
            )
        check_numbers(self, "adapt.lora", alpha="(0, inf)")


def inject_adapters(tower: Tower, config: LoraConfig) -> None:
    """Freeze a tower and add adapters to the linear layers of its blocks, in place.

    A is drawn from torch's global generator, B starts at zero. Raises ConfigError where peft is missing or the blocks have
    no linear layers.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError("adapt.lora needs peft, which is not installed: pip install 'clipfuse[finetune]'") from error
    ids = tower.layer_ids()
    names = [name for name in list_linear_layers(tower) if not config.targets or name.rpartition(".")[2] in config.targets]
    if not names:
        tower.requires_grad_(False)
        return
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=cast(Any, config.alpha), lora_dropout=config.dropout, target_modules=names, bias="none"
    )
    peft.inject_adapter_in_model(settings, cast(Any, tower), ADAPTER)
    layer_ids = {name: ids[strip_adapter(name)] for name, _ in tower.named_parameters()}
    tower.layer_ids = functools.partial(dict, layer_ids)  # type: ignore[method-assign]


@contextmanager
def without_adapters(model: M) -> Iterator[M]:
    """Yield a model whose layers inside the `with` block are those that the adapters adapt: the plain model."""
    adapted = [(name, layer) for name, layer in model.named_modules() if hasattr(layer, "base_layer")]
    try:
        for name, layer in adapted:
            model.set_submodule(name, cast(nn.Module, layer.base_layer))
        yield model
    finally:
        for name, layer in adapted:
            model.set_submodule(name, layer)


def list_linear_layers(tower: Tower) -> list[str]:
    """Return the names of the linear layers in a tower's blocks. Raises ConfigError where there are none."""
    inside = {name.rpartition(".")[0] for name, layer in tower.layer_ids().items() if 1 <= layer <= tower.depth}
    # Exact types only: torch's own attention passes the weights of a subclass of Linear to a function, which skips adapters.
    layers = [name for name, module in tower.named_modules() if name in inside and type(module) in (nn.Linear, Linear)]
    if not layers:
        raise ConfigError(
            f"adapt.lora: the {tower.modality} tower has no linear layers in its blocks; use adapt.trainable_blocks"
        )
    return layers


def check_targets(towers: list[Tower], config: LoraConfig) -> None:
    """Raise ConfigError for a target that none of the towers has."""
    words = sorted({name.rpartition(".")[2] for tower in towers for name in list_linear_layers(tower)})
    for target in config.targets:
        if target not in words:
            modalities = " or ".join(tower.modality for tower in towers)
            raise ConfigError(
                f"adapt.lora.targets: no linear layer {target!r} in the {modalities} tower's blocks{closest(target, words)}; "
                f"they have {', '.join(words)}"
            )


def strip_adapter(name: str) -> str:
    """Return the name in the plain model of a parameter of the adapted model.

    For a parameter of an adapter this is the parameter of the layer that it adapts.
    """
    name = re.sub(rf"\.lora_[AB]\.{ADAPTER}\.", ".", name)
    return name.replace(".base_layer.", ".")


def merge_adapters(weights: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Merge the adapters of a state dict into the plain model's weights: W + (alpha / rank) B A.

    A state dict without adapters is returned with the same content.
    """
    merged: dict[str, Tensor] = {}
    for name, value in weights.items():
        if f".lora_A.{ADAPTER}." in name or f".lora_B.{ADAPTER}." in name:
            continue
        stem, layer, leaf = name.rpartition(".base_layer.")
        if layer and leaf == "weight" and f"{stem}.lora_A.{ADAPTER}.weight" in weights:
            down, up = (weights[f"{stem}.lora_{which}.{ADAPTER}.weight"] for which in "AB")
            value = value + (alpha / len(down)) * (up.to(value.dtype) @ down.to(value.dtype))
        merged[strip_adapter(name)] = value
    return merged
