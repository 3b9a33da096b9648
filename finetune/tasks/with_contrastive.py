"""A task with the contrastive loss added, so that its embeddings stay useful for search.

    adapt: {contrastive: 0.5}

Each image comes with its caption (data.caption) in addition to the task's own inputs. One pass through the image tower
serves both losses. The loss is that of pretraining: sigmoid where the model has a logit bias, else softmax. Images with the
same caption are not each other's negatives.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from finetune.adapt.freeze import AdaptConfig
from finetune.attention.trace import Trace
from finetune.model import CAPTION, Features, FusionModel, Head
from finetune.tasks import EvalSetup, Prediction, Task
from pretrain import registry
from pretrain.data.loader import Batch
from pretrain.errors import ConfigError


class WithContrastive(Task):
    """Another task whose loss has a weighted contrastive loss added."""

    def __init__(self, task: Task, weight: float) -> None:
        self.task, self.weight = task, weight
        self.primary_metric = task.primary_metric  # type: ignore[misc]
        self.chance = task.chance  # type: ignore[misc]
        self.text_is_question = task.text_is_question  # type: ignore[misc]
        self.can_split = task.can_split
        self.subject = task.subject
        self._contrastive_loss: nn.Module | None = None

    def build_decoders(self, towers: dict[str, Any]) -> dict[str, Any]:
        """Build the task's decoders, and a last one for the caption, which sets `caption_id`."""
        if not {self.subject, "text"} <= set(towers):
            raise ConfigError(f"adapt.contrastive needs {self.subject} and text towers; the model has {', '.join(towers)}")
        return {**self.task.build_decoders(towers), CAPTION: towers["text"]}

    def build_head(self, model: FusionModel) -> Head:
        name = "clip" if model.encoder.logit_bias is None else "siglip"
        loss = registry.get_component("losses", name)
        self._contrastive_loss = loss.build(loss.Config(same_caption="ignore"))
        return self.task.build_head(model)

    def learned_settings(self) -> dict[str, Any]:
        return self.task.learned_settings()

    def encode(self, model: nn.Module, batch: Batch) -> Features:
        return self.task.encode(model, batch)

    def loss(self, features: Features, targets: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute task loss + weight * contrastive loss."""
        assert self._contrastive_loss is not None, "build_head() comes first"
        pairs = {name: features[f"{CAPTION}_{name}"] for name in (self.subject, "text")}
        contrastive, _ = self._contrastive_loss(pairs, features["logit_scale"], features.get("logit_bias"), targets)
        loss, report = self.task.loss(features, targets)
        report = {**report, "task_loss": loss.detach(), "contrastive_loss": contrastive.detach()}
        return loss + self.weight * contrastive, report

    def evaluate(self, model: FusionModel, shards: Any, setup: EvalSetup) -> dict[str, float]:
        decoders = {name: decoder for name, decoder in setup.decoders.items() if name != CAPTION}
        return self.task.evaluate(model, shards, replace(setup, decoders=decoders))

    def predict(
        self, model: FusionModel, inputs: dict[str, Tensor], masks: dict[str, Tensor], trace: Trace | None = None, top: int = 5
    ) -> Prediction:
        return self.task.predict(model, inputs, masks, trace, top)


def add_contrastive_loss(task: Task, config: AdaptConfig) -> Task:
    """Return the task with the contrastive loss added where config.contrastive > 0, else the task itself."""
    return WithContrastive(task, config.contrastive) if config.contrastive > 0 else task
