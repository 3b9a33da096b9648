"""BatchNorm mixes the samples of a batch, so spreading a batch over processes or chunks changes what it computes."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pretrain.errors import ConfigError
from pretrain.runtime import distributed

ADVICE = "choose a tower without BatchNorm (ViT, ConvNeXt), or freeze it: image.trainable_blocks=0"


def active(model: nn.Module) -> list[str]:
    """Names of the layers that normalise with the statistics of the batch while training."""
    was = model.training
    model.train()  # frozen parts of a tower stay in eval mode
    found = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm) and module.training]
    model.train(was)
    return found


def refuse_chunks(model: nn.Module, chunks: int) -> None:
    """Raises ConfigError where train.chunks > 1 would not give the gradient of the whole batch."""
    names = active(model) if chunks > 1 else []
    if names:
        raise ConfigError(
            f"train.chunks={chunks} cannot be exact with {len(names)} layers of BatchNorm in training (first {names[0]}): each "
            f"chunk would be normalised by its own statistics; {ADVICE}"
        )


def convert_sync_batch_norm(model: nn.Module) -> nn.Module:
    """The model, its BatchNorm layers normalising over all processes. Raises ConfigError where torch cannot (CPU)."""
    names = active(model) if distributed.world_size() > 1 else []
    if not names:
        return model
    if not torch.cuda.is_available():
        raise ConfigError(
            f"{len(names)} layers of BatchNorm (first {names[0]}) would be normalised by each process's own samples: torch "
            f"synchronises BatchNorm on GPUs only; train in one process (train.strategy=single), or {ADVICE}"
        )
    from timm.layers import convert_sync_batchnorm  # torch's own drops the activation of timm's fused BatchNormAct2d

    converted: nn.Module = convert_sync_batchnorm(model)
    return converted
