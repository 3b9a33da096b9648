"""A tower for a third modality, as a user would write it: one module outside the project."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.towers import TokenSequence, Tower, masked_mean


@dataclass
class Config:
    tower: str = "tests.support.audio_tower"
    """This module."""
    width: int = 12
    """Width of a frame's state."""


class AudioTower(Tower):
    """A two-layer encoder of frames with 8 bands: inputs (b, T, 8), mask (b, T) -> states (b, T, width)."""

    modality = "audio"
    trims = pools_mean = True
    depth = 1

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.width = self.pooled_width = config.width
        self.frames = nn.Linear(8, config.width)
        self.block = nn.Linear(config.width, config.width)

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> TokenSequence:
        mask = torch.ones(inputs.shape[:2], dtype=torch.bool) if mask is None else mask
        states = self.block(self.frames(inputs).relu())
        return TokenSequence(states, mask, None, masked_mean(states, mask))

    def layer_ids(self) -> dict[str, int]:
        return {name: int(name.startswith("block")) for name, _ in self.named_parameters()}


def build(config: Config, tokenizer: Any = None) -> AudioTower:
    return AudioTower(config)
