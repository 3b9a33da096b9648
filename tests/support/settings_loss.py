"""The clip loss, which writes the settings of torch in each process to FOLDER/RANK.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.losses import clip
from pretrain.runtime import distributed, performance

LOGIT_SCALE, LOGIT_BIAS = clip.LOGIT_SCALE, clip.LOGIT_BIAS


@dataclass
class Config(clip.Config):
    """Settings of the loss."""

    name: str = "tests.support.settings_loss"
    folder: str = ""
    """Where the files are written."""


class Loss(clip.Loss):
    """The loss."""

    def forward(
        self, features: dict[str, Tensor], scale: Tensor, bias: Tensor | None, targets: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss () and a report."""
        assert isinstance(self.config, Config)
        settings = {**performance.read_settings(), "precision": torch.get_float32_matmul_precision()}
        Path(self.config.folder, f"{distributed.rank()}.json").write_text(json.dumps(settings))
        return super().forward(features, scale, bias, targets)


def build(config: Config) -> Loss:
    """Build the loss."""
    return Loss(config)
