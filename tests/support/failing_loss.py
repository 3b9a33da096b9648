"""The clip loss, which fails at a step: loss.name=tests.support.failing_loss loss.at=STEP loss.how=KIND."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from pretrain.losses import clip
from pretrain.runtime import distributed

LOGIT_SCALE, LOGIT_BIAS = clip.LOGIT_SCALE, clip.LOGIT_BIAS


@dataclass
class Config(clip.Config):
    """Settings of the failing loss."""

    name: str = "tests.support.failing_loss"
    at: int = 3
    """The first call that fails, from 1."""
    how: Literal["nan", "crash", "interrupt", "terminate", "spike"] = "nan"
    """nan: every loss from there on is NaN; crash: a ValueError; interrupt: Ctrl-C twice; terminate: one SIGTERM,
    to the last rank; spike: the loss and its gradient are 20 times as large."""
    until: int = 1_000_000
    """The last call with a NaN or a spike."""
    seconds: float = 0.0
    """Duration of a call."""
    seconds_alone: float = 0.0
    """Duration of a call while this is the only process of the run."""
    stop_at: int = 0
    """The call in which the last rank receives SIGTERM, however the loss fails; 0 = none."""


class Loss(clip.Loss):
    """The loss, which counts its calls."""

    calls = 0

    def forward(
        self, features: dict[str, Tensor], scale: Tensor, bias: Tensor | None, targets: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss () and a report, or fail."""
        assert isinstance(self.config, Config)
        self.calls += 1
        loss, report = super().forward(features, scale, bias, targets)
        time.sleep(self.config.seconds_alone if distributed.world_size() == 1 else self.config.seconds)
        if self.calls == self.config.stop_at and distributed.rank() == distributed.world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.config.how in ("nan", "spike") and self.config.at <= self.calls <= self.config.until:
            return loss * (20 if self.config.how == "spike" else float("nan")), report
        if self.config.how in ("nan", "spike"):
            return loss, report
        is_last_rank = distributed.rank() == distributed.world_size() - 1
        if self.calls == self.config.at and (self.config.how != "terminate" or is_last_rank):
            if self.config.how == "crash":
                raise ValueError("a bug in a loss of one's own")
            for _ in range(2 if self.config.how == "interrupt" else 1):
                os.kill(os.getpid(), signal.SIGTERM if self.config.how == "terminate" else signal.SIGINT)
        return loss, report


def build(config: Config) -> Loss:
    """Build the loss."""
    return Loss(config)
