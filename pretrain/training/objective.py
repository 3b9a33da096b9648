"""The contract between the loop and what it trains, and the contrastive objective of pretraining.

An objective encodes a batch into features, and computes the loss from features. The two are separate functions because the
cached step (step.py) calls them at different times.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pretrain.data.loader import Batch
from pretrain.losses import NEGATIVES, normalize_weights

Features = dict[str, Tensor]
"""By name: (b, D), or (b, k, D) with k texts a sample, for the features of samples; (1,) for scalars of the model
(`logit_scale`, `logit_bias`)."""
SCALARS = ("logit_scale", "logit_bias")


class Objective(Protocol):
    """What the loop calls to train a model."""

    can_split: bool
    """Whether encode() of a batch is the concatenation of encode() of its chunks. train.chunks > 1 needs it."""

    def encode(self, model: nn.Module, batch: Batch) -> Features:
        """Return the model's outputs for a batch that lies on its device."""
        ...

    def loss(self, features: Features, targets: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss (), averaged over this process's samples, and numbers to report."""
        ...


class Contrastive:
    """A loss of losses/ on pairs of embeddings, averaged over the k texts of each sample.

    Of more than two towers, the loss covers all pairs. With targets["weight"], (b,) or (b, k), the average is weighted. With
    targets["negative_mask"] (b, F), the last F texts of each sample are its negatives.
    """

    can_split = True

    def __init__(self, pair_loss: nn.Module) -> None:
        self.pair_loss = pair_loss

    def encode(self, model: nn.Module, batch: Batch) -> Features:
        """Return (b, D) or (b, k, D) for each modality, L2-normalized, and the exponentiated logit_scale (1,)."""
        features: Features = model(batch.inputs, batch.masks, **({"groups": batch.groups} if batch.groups else {}))
        return features

    def loss(self, features: Features, targets: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its report, in float32 (float64 stays), whatever the precision of the towers."""
        embeddings = {
            name: value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
            for name, value in features.items()
            if name not in SCALARS
        }
        targets = dict(targets)
        if "weight" in targets:
            targets["weight"] = normalize_weights(targets["weight"])
        if "negative_mask" in targets:
            captions = embeddings["text"].shape[1] - targets["negative_mask"].shape[1]
            embeddings["text"], embeddings[NEGATIVES] = embeddings["text"].split(
                [captions, targets["negative_mask"].shape[1]], 1
            )
        outcomes = [
            self.pair_loss(pair, features["logit_scale"], features.get("logit_bias"), pair_targets)
            for pair, pair_targets in _split_texts(embeddings, targets)
        ]
        loss = torch.stack([loss for loss, _ in outcomes]).mean()
        report = {name: torch.stack([numbers[name] for _, numbers in outcomes]).mean() for name in outcomes[0][1]}
        scalars = {name: features[name].detach().squeeze() for name in SCALARS if name in features}
        return loss, {**report, **scalars}


def _split_texts(embeddings: Features, targets: dict[str, Any]) -> Iterator[tuple[Features, dict[str, Any]]]:
    """Yield, for every k, features (b, D) with the k-th text of each sample, and its targets.

    Modalities with one item a sample are the same in every yield, and so are negatives.
    """
    texts = {name for name, value in embeddings.items() if value.dim() == 3 and name != NEGATIVES}
    by_text = {name: targets[name] for name in ("caption_id", "weight") if name in targets and targets[name].dim() == 2}
    teachers: dict[str, dict[str, Tensor]] = targets.get("teachers", {}) if "caption_id" in by_text else {}
    for k in range(max((embeddings[name].shape[1] for name in texts), default=1)):
        features = {name: value[:, k] if name in texts else value for name, value in embeddings.items()}
        text_targets: dict[str, Any] = {**targets, **{name: value[:, k] for name, value in by_text.items()}}
        for number, teacher in teachers.items():
            of_text = {name: value[:, k] if name.startswith("text") else value for name, value in teacher.items()}
            text_targets["teachers"] = {**text_targets["teachers"], number: of_text}
        yield features, text_targets
