"""zero1 | zero2 | zero3: builds DeepSpeed's ZeRO in the stage that train.strategy names; deepspeed.py says how it works."""

from __future__ import annotations

import torch

from pretrain.optim import OptimConfig
from pretrain.strategies import Precision, deepspeed_config
from pretrain.strategies.deepspeed import Zero
from pretrain.strategies.zero_stages import Zero3, Zero12


def build(
    precision: Precision,
    optim: OptimConfig,
    device: torch.device,
    stage: int,
    offload: bool = False,
    deepspeed: str | None = None,
) -> Zero:
    """The strategy of a stage. deepspeed: a file that deepspeed_config.py reads."""
    three = stage == 3
    made = Zero3(precision, optim, device, offload) if three else Zero12(stage, precision, optim, device, offload)
    made.tuning = deepspeed_config.read(deepspeed, stage) if deepspeed else {}
    return made
