"""A pretraining run: the schema of its configuration, and train(), which builds its components and calls fit()."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pretrain import config as configuration
from pretrain import model as models
from pretrain import registry
from pretrain.checkpoints import warm_start
from pretrain.config import component_field
from pretrain.data.loader import Batch, DataConfig, Loader
from pretrain.evaluation.evaluate import EvalConfig, evaluate
from pretrain.model import DualEncoder, ModelSchema
from pretrain.optim import OptimConfig
from pretrain.training import flops
from pretrain.training.loop import Outcome, TrainConfig, fit
from pretrain.training.objective import Contrastive
from pretrain.training.session import (
    build_encoders,
    build_eval_decoders,
    build_loader,
    build_train_decoders,
    check_batch_and_evaluation,
    open_session,
    print_summary,
)


@dataclass
class PretrainConfig(ModelSchema):
    """A pretraining run: everything a YAML file or a key=value may say."""

    run: str = "pretrain"
    """Name of the run: its folder is runs/NAME; with a slash it is the folder itself."""
    seed: int = 0
    """Seeds the order of the data, augmentation, initial weights and dropout."""
    resume: str = "auto"
    """auto = go on from the newest checkpoint in the run folder; never = start anew; or a checkpoint folder."""
    init: Any = None
    """A run, a checkpoint or a published CLIP whose weights towers and projections start from; {image: RUN, text: RUN} for
    one tower each. Sections that name no architecture take its own."""
    init_partial: bool = False
    """Take what fits of init's weights and let the rest start anew; both are counted. Otherwise a difference is an error."""
    data: DataConfig = field(default_factory=DataConfig)
    """What is read, and how."""
    loss: Any = component_field(registry.get_component, "losses", "name", "clip")
    """What is minimised."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """How weights move."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How long, how precise, how spread."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """What is measured on data.val."""

    def check(self) -> None:
        """Refuses combinations that cannot run."""
        warm_start.check(self.init)
        check_batch_and_evaluation(self)


def load_config(path: Path, settings: list[str]) -> PretrainConfig:
    """Load a run's configuration: a file, key=value settings over it, `init`'s architecture under it.

    All that runs, checks or measures a run reads its configuration here. Raises ConfigError, UserError.
    """
    return configuration.build(
        PretrainConfig, warm_start.with_init_defaults(configuration.load_values(path, settings)), str(path)
    )


def train(config: PretrainConfig) -> Outcome:
    """Run one process of a pretraining run, from configuration to outcome. Collective. Raises UserError."""
    with open_session(config) as session:
        parts = build(config)
        if session.checkpoint is None and config.init is not None:
            warm_start.load_weights(parts.model, config.init, config.init_partial, parts.tokenizer)
        portable = models.portable_config(config, parts.model)
        session.write_config()
        flops_per_batch = build_flops_counter(config, parts) if session.device.type == "cuda" else None
        plan = session.build_plan(parts.loader, portable, parts.tokenizer, "image_to_text_R@1", flops=flops_per_batch)
        strategy = session.build_strategy()
        objective = Contrastive(registry.get_component("losses", config.loss.name).build(config.loss).to(session.device))
        evaluation = build_evaluation(config, parts, session.device)
        return fit(plan, session.folder, strategy, parts.model, objective, parts.loader, evaluation, session.checkpoint)


def describe(config: PretrainConfig) -> None:
    """Print what would run: the resolved configuration, parameters of each tower, shards and samples."""
    parts = build(config)
    print_summary(config, parts.model.parameter_counts(), parts.loader)


# ---------------------------------------------------------------------------------------------------------------------
# Components


@dataclass
class Components:
    """What a pretraining run is made of."""

    tokenizer: Any
    model: DualEncoder
    loader: Loader
    eval_decoders: dict[str, Any]
    """By modality."""


def build(config: PretrainConfig) -> Components:
    """Build all that can be wrong, in the order of what fails fastest. The same weights on every process."""
    loss = registry.get_component("losses", config.loss.name)
    if config.model.logit_scale is None:
        config.model.logit_scale = loss.LOGIT_SCALE
    if config.model.logit_bias is None:
        config.model.logit_bias = loss.LOGIT_BIAS
    tokenizer, model = build_encoders(config)
    loader = build_loader(config, build_train_decoders(config, tokenizer, model))
    return Components(tokenizer, model, loader, build_eval_decoders(config, tokenizer, model))


def build_flops_counter(config: PretrainConfig, parts: Components) -> Callable[[Batch], float] | None:
    """Build what counts a batch's operations, of images and texts; None where another modality takes part."""
    if config.others or config.image is None or config.text is None:
        return None
    return flops.build_flop_counter(parts.model, flops.build_sample(config.image.size, config.text.length))


def build_evaluation(
    config: PretrainConfig, parts: Components, device: torch.device
) -> Callable[[Any], dict[str, float]] | None:
    """Build what evaluates a model on data.val; None where there is none."""
    if not config.data.val:
        return None
    val, precision, cache = config.data.val, config.train.precision, config.data.build_cache()
    return lambda model: evaluate(model, parts.eval_decoders, val, config.eval, device, precision, cache)
