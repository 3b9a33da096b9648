"""LoRA (Hu et al. 2021, arXiv 2106.09685) through peft: a linear layer W x becomes W x + (alpha / rank) B A x, W frozen.

While training the adapters are weights of their own (`...base_layer.weight`, `...lora_A.default.weight`); a checkpoint's
model.safetensors holds the products merged into W, under the names of the plain model, so that evaluation, export and the
next fine-tuning need neither peft nor this file. What resuming needs lies in the checkpoint's state/.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from pretrain.errors import ConfigError, closest
from pretrain.ops import Linear
from pretrain.towers import Tower

ADAPTER = "default"
"""peft's name of the first adapter, which stands in the parameters' names."""


@dataclass
class LoraConfig:
    """Low-rank adapters."""

    rank: int = 0
    """Columns of B and rows of A; 0 = no adapters."""
    alpha: float = 16.0
    """What the adapters add is scaled by alpha / rank."""
    dropout: float = 0.0
    """On what enters A, 0 to below 1."""
    towers: list[str] = field(default_factory=list)
    """Towers that get adapters, by modality; [] = all."""
    targets: list[str] = field(default_factory=list)
    """Linear layers in the blocks that get one, by the last word of their names (qkv, fc1, q_proj); [] = all of them. A tower
    that has none of these stays as it is."""

    def check(self) -> None:
        """Raises ConfigError."""
        if self.rank < 0 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ConfigError(
                f"adapt.lora.rank={self.rank} (from 0), adapt.lora.alpha={self.alpha} (above 0) and adapt.lora.dropout="
                f"{self.dropout} (0 to below 1) do not fit together"
            )


def inject(tower: Tower, config: LoraConfig) -> None:
    """Freezes a tower and gives the linear layers of its blocks adapters, in place. Random numbers: torch's generator.

    Raises ConfigError: peft is missing, or no linear layers.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError("adapt.lora needs peft, which is not installed: pip install 'clipfuse[finetune]'") from error
    ids = tower.layer_ids()
    names = [name for name in linear_layers(tower) if not config.targets or name.rpartition(".")[2] in config.targets]
    if not names:
        tower.requires_grad_(False)
        return
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=cast(Any, config.alpha), lora_dropout=config.dropout, target_modules=names, bias="none"
    )
    peft.inject_adapter_in_model(settings, cast(Any, tower), ADAPTER)
    renamed = {name: ids[plain_name(name)] for name, _ in tower.named_parameters()}
    tower.layer_ids = functools.partial(dict, renamed)  # type: ignore[method-assign]


def linear_layers(tower: Tower) -> list[str]:
    """The names of the linear layers in a tower's blocks. Raises ConfigError where there are none."""
    inside = {name.rpartition(".")[0] for name, layer in tower.layer_ids().items() if 1 <= layer <= tower.depth}
    # torch's own attention hands weights of a subclass of Linear to a function, past any adapter.
    found = [name for name, module in tower.named_modules() if name in inside and type(module) in (nn.Linear, Linear)]
    if not found:
        raise ConfigError(
            f"adapt.lora: the {tower.modality} tower has no linear layers in its blocks; use adapt.trainable_blocks"
        )
    return found


def check_targets(towers: list[Tower], config: LoraConfig) -> None:
    """Raises ConfigError for a target that none of the towers has."""
    words = sorted({name.rpartition(".")[2] for tower in towers for name in linear_layers(tower)})
    for target in config.targets:
        if target not in words:
            modalities = " or ".join(tower.modality for tower in towers)
            raise ConfigError(
                f"adapt.lora.targets: no linear layer {target!r} in the {modalities} tower's blocks{closest(target, words)}; "
                f"they have {', '.join(words)}"
            )


def plain_name(name: str) -> str:
    """The parameter of the plain model that a parameter of the adapted one belongs to."""
    name = re.sub(rf"\.lora_[AB]\.{ADAPTER}\.", ".", name)
    return name.replace(".base_layer.", ".")


def merge(weights: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """A state dict with adapters -> the plain model's: W + (alpha / rank) B A. One without passes unchanged."""
    out: dict[str, Tensor] = {}
    for name, value in weights.items():
        if f".lora_A.{ADAPTER}." in name or f".lora_B.{ADAPTER}." in name:
            continue
        stem, layer, leaf = name.rpartition(".base_layer.")
        if layer and leaf == "weight" and f"{stem}.lora_A.{ADAPTER}.weight" in weights:
            down, up = (weights[f"{stem}.lora_{which}.{ADAPTER}.weight"] for which in "AB")
            value = value + (alpha / len(down)) * (up.to(value.dtype) @ down.to(value.dtype))
        out[plain_name(name)] = value
    return out
