"""Refuses or synchronizes BatchNorm, whose result depends on how a batch is split.

BatchNorm normalizes by the statistics of a batch, so each process and each chunk would use its own.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pretrain.errors import ConfigError
from pretrain.runtime import distributed

ADVICE = "choose a tower without BatchNorm (ViT, ConvNeXt), or freeze it: image.trainable_blocks=0"


def find_training_batch_norms(model: nn.Module) -> list[str]:
    """Return the names of the layers that normalize with the statistics of the batch during training."""
    was_training = model.training
    model.train()  # frozen modules of a tower stay in eval mode
    names = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm) and module.training]
    model.train(was_training)
    return names


def refuse_chunks(model: nn.Module, chunks: int) -> None:
    """Raise ConfigError where train.chunks > 1 would not give the gradient of the whole batch."""
    names = find_training_batch_norms(model) if chunks > 1 else []
    if names:
        raise ConfigError(
            f"train.chunks={chunks} cannot be exact with {len(names)} BatchNorm layers in training (first {names[0]}): each "
            f"chunk would be normalized by its own statistics; use train.chunks=1, {ADVICE}"
        )


def convert_sync_batch_norm(model: nn.Module) -> nn.Module:
    """Convert the model's BatchNorm layers to normalize over all processes.

    Raises ConfigError on CPUs, where torch cannot.
    """
    names = find_training_batch_norms(model) if distributed.world_size() > 1 else []
    if not names:
        return model
    if not torch.cuda.is_available():
        raise ConfigError(
            f"{len(names)} BatchNorm layers (first {names[0]}) would normalize over the samples of one process only: torch "
            f"synchronizes BatchNorm on GPUs only; train in one process (train.strategy=single), or {ADVICE}"
        )
    from timm.layers import convert_sync_batchnorm  # torch's own drops the activation of timm's fused BatchNormAct2d

    converted: nn.Module = convert_sync_batchnorm(model)
    return converted
