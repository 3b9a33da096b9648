"""What is trained: an objective encodes a batch into features, and scores features. The two are apart for cached steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pretrain.data.loader import Batch

Features = dict[str, Tensor]
"""By name: (b, D), or (b, k, D) with k texts a sample, for what belongs to samples, (1,) for scalars of the model
(`logit_scale`, `logit_bias`)."""
SCALARS = ("logit_scale", "logit_bias")


class Objective(Protocol):
    """The contract between the loop and what it trains."""

    splits: bool
    """Whether encode() of a batch is the concatenation of encode() of its chunks: what train.chunks > 1 needs."""

    def encode(self, model: nn.Module, batch: Batch) -> Features:
        """The model's outputs for a batch that lies on its device."""
        ...

    def loss(self, features: Features, targets: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss (), averaged over this process's samples, and numbers to report."""
        ...


class Contrastive:
    """Pairs from two towers (or all pairs of more), scored by a loss of losses/; the mean over the k texts of each sample."""

    splits = True

    def __init__(self, loss: nn.Module) -> None:
        self.score = loss

    def encode(self, model: nn.Module, batch: Batch) -> Features:
        """(b, D) or (b, k, D) a modality, L2-normalised, and the exponentiated logit_scale (1,)."""
        features: Features = model(batch.inputs, batch.masks)
        return features

    def loss(self, features: Features, targets: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """In float32 (float64 stays), whatever the precision of the towers."""
        pairs = {
            name: value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
            for name, value in features.items()
            if name not in SCALARS
        }
        scored = [
            self.score(one, features["logit_scale"], features.get("logit_bias"), about) for one, about in _each(pairs, targets)
        ]
        loss = torch.stack([loss for loss, _ in scored]).mean()
        report = {name: torch.stack([told[name] for _, told in scored]).mean() for name in scored[0][1]}
        scalars = {name: features[name].detach().squeeze() for name in SCALARS if name in features}
        return loss, {**report, **scalars}


def _each(pairs: Features, targets: dict[str, Any]) -> Iterator[tuple[Features, dict[str, Any]]]:
    """The k-th text of every sample with its id, for every k; what there is one of takes part in all."""
    count = max(value.shape[1] if value.dim() == 3 else 1 for value in pairs.values())
    ids = targets.get("caption_id")
    for k in range(count):
        own = targets if ids is None or ids.dim() == 1 else {**targets, "caption_id": ids[:, k]}
        yield {name: value[:, k] if value.dim() == 3 else value for name, value in pairs.items()}, own
