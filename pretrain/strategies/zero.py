"""train.strategy=zero1 | zero2 | zero3: builds DeepSpeed's ZeRO in that stage.

deepspeed.py explains how it works.
"""

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
    """Build the strategy of a stage, 1 to 3.

    deepspeed: path of a settings file, which deepspeed_config.py reads.
    """
    is_stage_3 = stage == 3
    strategy = Zero3(precision, optim, device, offload) if is_stage_3 else Zero12(stage, precision, optim, device, offload)
    strategy.file_settings = deepspeed_config.read(deepspeed, stage) if deepspeed else {}
    return strategy
