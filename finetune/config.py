"""The configuration of a fine-tuning run. Towers and shared space are those of `init`, unless a key says otherwise."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.adapt.freeze import AdaptConfig
from finetune.model import Source
from finetune.tasks import EvalConfig
from pretrain import config as configuration
from pretrain import registry
from pretrain.checkpoints import loading, warm_start
from pretrain.config import component_field
from pretrain.data.loader import DataConfig
from pretrain.errors import ConfigError
from pretrain.model import ModelSchema
from pretrain.optim import OptimConfig
from pretrain.training.loop import TrainConfig
from pretrain.training.session import check_batch_and_evaluation


@dataclass
class FusionSchema(ModelSchema):
    """The part of a run's configuration that says what the model is: all that loading a checkpoint reads."""

    tokens: Source = "auto"
    """What fusion reads: aligned (tokens in the shared space, for towers that pool their mean or maximum), tower (the towers'
    own states), auto (aligned where that has a meaning, by modality)."""
    fusion: Any = component_field(registry.get_component, "fusion", "name", "cross")
    """How the modalities read each other; null for a task that needs embeddings only."""
    context: Any = component_field(registry.get_component, "context", "name", "dense")
    """How a picture is attended to."""
    task: Any = component_field(registry.get_component, "tasks", "name", "vqa")
    """What is learned."""
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    """What of the pretrained model moves."""


@dataclass
class FinetuneConfig(FusionSchema):
    """A fine-tuning run: everything a YAML file or a key=value may say."""

    run: str = "finetune"
    """Name of the run: its folder is runs/NAME; with a slash it is the folder itself."""
    seed: int = 0
    """Seeds the order of the data, augmentation, new weights and dropout."""
    resume: str = "auto"
    """auto = go on from the newest checkpoint in the run folder; never = start anew; or a checkpoint folder."""
    init: Any = None
    """A pretraining run, a checkpoint, or a published CLIP: gives towers, projections, tokenizer; {image: RUN, text: RUN} for
    one tower each. null only where `image` and `text` describe a new model, which then learns all from this task's data."""
    init_partial: bool = False
    """Take what fits of init's weights and let the rest start anew; both are counted. Otherwise a difference is an error."""
    data: DataConfig = field(default_factory=DataConfig)
    """What is read, and how."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """How weights move. lr_scale and weight_decay_of know the parts image, text, heads (projections), fusion, task."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How long, how precise, how spread."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """How the task is evaluated on data.val."""

    def check(self) -> None:
        """Refuses combinations that cannot run."""
        check_batch_and_evaluation(self)
        if self.data.draw != 1:
            raise ConfigError(f"data.draw={self.data.draw} is for pretraining: a task takes one caption of each picture")
        if self.data.train == "synthetic":
            raise ConfigError("data.train=synthetic has no task to learn: give shards (`clipfuse data scenes DIR` draws some)")


def load_config(path: Path, settings: list[str]) -> FinetuneConfig:
    """Load a run's configuration: a file, key=value settings over it, `init`'s architecture under it.

    All that runs or checks a run reads its configuration here. Raises ConfigError, UserError.
    """
    given = configuration.load_values(path, settings)
    init = given.get("init")
    if init is None and not {"image", "text"} <= set(given):
        raise ConfigError(
            "init=RUN is missing: a pretraining run, a checkpoint, or a published CLIP to start from (a new model needs both "
            "an `image` and a `text` section)"
        )
    laid = warm_start.with_init_defaults(given)
    if isinstance(init, str) and (given.get("adapt") or {}).get("contrastive"):
        bias = loading.load_model(init).config.model.logit_bias  # says which loss it was pretrained with
        laid["model"] = configuration.merge({"logit_bias": bias}, laid.get("model") or {})
    return configuration.build(FinetuneConfig, laid, str(path))
