"""A pretraining run, assembled: the schema of its configuration, and its parts built in the order they need each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pretrain import checkpoint, dist, registry
from pretrain import config as configuration
from pretrain.config import ConfigError, section
from pretrain.data import loader as loading
from pretrain.data.loader import DataConfig, Loader
from pretrain.evaluate import EvalConfig
from pretrain.loop import Plan, TrainConfig
from pretrain.model import DualEncoder, ModelSchema
from pretrain.objective import Contrastive
from pretrain.optim import OptimConfig
from pretrain.runlog import RunFolder, say


@dataclass
class PretrainConfig(ModelSchema):
    run: str = "pretrain"
    """Name of the run: its folder is runs/NAME; with a slash it is the folder itself."""
    seed: int = 0
    """Seeds the order of the data, augmentation, initial weights and dropout."""
    resume: str = "auto"
    """auto = go on from the newest checkpoint in the run folder; never = start anew; or a checkpoint folder."""
    init: str | None = None
    """A run or checkpoint whose weights the towers and projections start from."""
    data: DataConfig = field(default_factory=DataConfig)
    """What is read, and how."""
    loss: Any = section("losses", "name", "clip")
    """What is minimised."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """How weights move."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How long, how precise, how spread."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """What is measured on data.val."""

    def check(self) -> None:
        """Refuses combinations that cannot run."""
        if self.data.batch_size % (dist.world_size() * self.train.chunks):
            raise ConfigError(
                f"data.batch_size={self.data.batch_size} must be divisible by processes x train.chunks = "
                f"{dist.world_size()} x {self.train.chunks}"
            )
        if self.train.strategy == "single" and dist.world_size() > 1:
            raise ConfigError(f"train.strategy=single runs in one process, not {dist.world_size()}")
        if self.train.precision == "fp16" and not torch.cuda.is_available():
            raise ConfigError("train.precision=fp16 needs a GPU; use bf16 or fp32 on a CPU")
        if self.train.eval_every and not self.data.val:
            raise ConfigError(f"train.eval_every={self.train.eval_every} needs data.val, the shards to evaluate on")
