"""The configuration of a fine-tuning run.

Towers and shared space are those of `init` unless a key overrides them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from finetune.adapt.freeze import AdaptConfig
from finetune.model import TokenSource, find_subject
from finetune.tasks import EvalConfig
from pretrain import config as configuration
from pretrain import registry
from pretrain.checkpoints import loading, resuming, warm_start
from pretrain.config import SEED, check_numbers, component_field, text_field
from pretrain.data.loader import DataConfig
from pretrain.errors import ConfigError
from pretrain.model import ModelSchema, tower_configs
from pretrain.optim import OptimConfig
from pretrain.training.config import TrainConfig
from pretrain.training.session import check_batch_and_evaluation


@dataclass
class FusionSchema(ModelSchema):
    """The part of a run's configuration that describes the model. Loading a checkpoint reads only this."""

    tokens: TokenSource = "auto"
    """What fusion reads: aligned (tokens projected into the shared space, for towers that pool the mean or maximum), tower (the
    towers' own states), auto (for each modality, aligned where its tower pools so)."""
    fusion: Any = component_field(registry.get_component, "fusion", "name", "cross")
    """Cross-attention between the modalities; null for a task that reads embeddings only."""
    context: Any = component_field(registry.get_component, "context", "name", "dense")
    """How images are attended to."""
    task: Any = component_field(registry.get_component, "tasks", "name", "vqa")
    """The downstream task."""
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    """Which weights of the pretrained model are trained, and how the model is changed first."""


@dataclass
class FinetuneConfig(FusionSchema):
    """All fields of a fine-tuning run that a YAML file or a key=value may set."""

    run: str = "finetune"
    """Name of the run, whose folder is runs/NAME; a name with a slash is the folder itself."""
    seed: int = 0
    """Seeds the order of the data, augmentation, new weights and dropout."""
    resume: str = "auto"
    """auto = resume from the newest checkpoint in the run folder; never = start a new run; or a checkpoint folder;
    or s3://BUCKET/PREFIX, where train.copy_to copied checkpoints."""
    init: Any = text_field(None)
    """Pretraining run, checkpoint or published CLIP from which towers, projections and tokenizer come. {image: RUN, text: RUN}
    takes one tower from each. null requires `image` and `text` sections: a new model is trained on this task's data alone."""
    init_partial: bool = False
    """Load the weights of `init` that fit and initialize the others; both are counted. Otherwise a mismatch is an error."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training and evaluation data, batch size and loading."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and schedule. lr_scale and weight_decay_of accept the parts image, text, heads (projections), fusion, task."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Run length, precision, parallelism, logging and checkpoints."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation of the task on data.val."""

    def check(self) -> None:
        """Refuse combinations that cannot run. Raises ConfigError."""
        check_batch_and_evaluation(self)
        if self.data.sentences:
            raise ConfigError("data.sentences=true is for pretraining: a task uses captions as they are")
        if self.train.stages:
            raise ConfigError("train.stages is for pretraining: a task trains at one size")
        if self.data.draw != 1:
            raise ConfigError(f"data.draw={self.data.draw} is for pretraining: a task uses one caption per image, data.draw=1")
        for name in ("weight", "negatives", "teachers"):
            if getattr(self.data, name) is not None:
                raise ConfigError(f"data.{name}={getattr(self.data, name)!r:.80} is for pretraining: leave it out")
        for name, default in (("incomplete", "bad"), ("decode_on", "cpu")):
            if getattr(self.data, name) != default:
                raise ConfigError(f"data.{name}={getattr(self.data, name)} is for pretraining: leave it out")
        if self.data.train == "synthetic":
            raise ConfigError("data.train=synthetic has no task to learn: give shards (`clipfuse data scenes DIR` draws some)")
        check_numbers(self, "", seed=SEED)


def load_config(path: Path, settings: list[str]) -> FinetuneConfig:
    """Load the configuration of a run.

    Later sources override earlier ones: the architecture of `init`, the file, key=value settings.

    Everything that starts or checks a run reads its configuration here. Raises ConfigError, UserError.
    """
    user_values = configuration.load_values(path, settings)
    registry.allow_modules(registry.dotted_names(user_values))
    init = configuration.read_text_field(user_values, "init")
    if init is None and not {"image", "text"} <= set(user_values):
        raise ConfigError(
            "init=RUN is missing: a pretraining run, a checkpoint, or a published CLIP to start from (a new model needs both "
            "an `image` and a `text` section)"
        )
    checkpoint = resuming.find_saved(user_values, FinetuneConfig.run)
    values = warm_start.with_init_defaults(user_values, checkpoint)
    if isinstance(init, str) and (user_values.get("adapt") or {}).get("contrastive"):
        encoders = loading.load_model(init).config if checkpoint is None else warm_start.read_schema(checkpoint)
        bias = encoders.model.logit_bias  # null or not tells the loss of pretraining
        values["model"] = configuration.merge({"logit_bias": bias}, values.get("model") or {})
    return _say_of_subject(configuration.build(FinetuneConfig, values, str(path)))


def _say_of_subject(config: FinetuneConfig) -> FinetuneConfig:
    """Return the configuration with what it says of `image` said of what texts are about, where that is something else.

    So the shipped configurations, which set rates and frozen blocks of both towers, serve sounds as well. What is said of the
    subject itself stays.
    """
    towers = list(tower_configs(config))
    subject = find_subject(config.fusion, towers)
    if subject == "image":
        return config

    def say_of_subject(values: dict[str, Any]) -> dict[str, Any]:
        said = {subject: values["image"], **values} if "image" in values else values
        return {name: value for name, value in said.items() if name != "image" or "image" in towers}

    optim = replace(
        config.optim,
        lr_scale=say_of_subject(config.optim.lr_scale),
        weight_decay_of=say_of_subject(config.optim.weight_decay_of),
    )
    adapt = replace(config.adapt, trainable_blocks=say_of_subject(config.adapt.trainable_blocks))
    return replace(config, optim=optim, adapt=adapt)
