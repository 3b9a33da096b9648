"""A fine-tuning run: train() builds encoders from `init`, a fusion and a task's head, and calls fit()."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from finetune import export
from finetune import model as models
from finetune.adapt import freeze
from finetune.config import FinetuneConfig, load_config
from finetune.evaluate import build_result, summary
from finetune.fusion.blocks import FusionConfig, check_modalities
from finetune.model import FusionModel
from finetune.next_commands import suggest_commands
from finetune.tasks import EvalSetup, Task, survey
from finetune.tasks.with_contrastive import add_contrastive_loss
from pretrain import registry
from pretrain.checkpoints import resuming, warm_start
from pretrain.data.config import check_sources
from pretrain.data.loader import Batch, Loader
from pretrain.embedding.split import eval_mode
from pretrain.errors import ConfigError, UserError
from pretrain.model import choose_attention, describe_weights, portable_config, set_performance
from pretrain.runtime import distributed
from pretrain.runtime.console import log_info
from pretrain.runtime.entrypoint import DryRun
from pretrain.training import dry_run, run_end, run_tokenizer
from pretrain.training.loop import Outcome, fit
from pretrain.training.session import (
    build_encoders,
    build_eval_decoders,
    build_loader,
    build_train_decoders,
    open_session,
)

__all__ = ["FinetuneConfig", "build", "describe", "load_config", "train"]


def train(config: FinetuneConfig) -> Outcome:
    """Run one process of a fine-tuning run, from configuration to outcome. Collective. Raises UserError."""
    with open_session(config) as session:
        parts = build(config, session.checkpoint)
        choose_attention(parts.model, session.device, config.train.precision)
        lines = describe_start(parts) if distributed.is_main() else [""]
        for line in lines if session.checkpoint is None else ():
            log_info(line)
        portable = inline(parts)
        resuming.refuse_other_model(portable, parts.tokenizer, session.checkpoint, parts.model)
        _refuse_chunks(config, parts.task)
        merge_adapters = freeze.build_adapter_merger(config.adapt)
        plan = session.build_plan(
            parts.loader,
            portable,
            parts.tokenizer,
            parts.task.primary_metric,
            model=parts.model,
            identity=_identity(portable),
            convert_weights=merge_adapters,
        )
        strategy = session.build_strategy()
        evaluation = build_evaluation(parts, session.device)
        outcome = fit(plan, session.folder, strategy, parts.model, parts.task, parts.loader, evaluation, session.checkpoint)
        commands = suggest_commands(parts.config, parts.task, parts.eval_decoders, session.folder, outcome, lines[-1])
        run_end.print_end(session.folder, outcome, plan.primary_metric, partial(build_results_table, parts), commands)
        return outcome


def build_results_table(parts: Components, evaluated: run_end.Evaluated) -> Table:
    """Build the table that `clipfuse evaluate` would print for a checkpoint, from metrics that are known."""
    config, metrics = parts.config, evaluated.metrics
    result = build_result(
        evaluated.checkpoint, evaluated.step, config.data.val, config.task.name, parts.task, metrics, seconds=None
    )
    return summary(result)


def describe(config: FinetuneConfig, options: DryRun) -> UserError | None:
    """Print what would run (--dry-run), and return why it would be refused; None = it would run. Collective."""
    differences, destination = list(dry_run.list_differences(config)), dry_run.find_destination(config)
    check_sources(config.data.train, config.data.val)
    with run_tokenizer.temporary_tokenizer(config, destination.path, destination.checkpoint):
        parts = build(config, destination.checkpoint)
    lines = [f"init: {config.init} is there, and its weights fit"] if config.init and destination.checkpoint is None else []
    lines.append("memory and time: not estimated for fine-tuning: what cross-attention needs depends on the task")
    lines += describe_start(parts)
    portable = inline(parts)
    destination.check(lambda: resuming.refuse_other_model(portable, parts.tokenizer, destination.checkpoint, parts.model))
    plan = dry_run.closed_session(config, destination).build_plan(
        parts.loader, portable, parts.tokenizer, "", identity=_identity(portable)
    )
    destination.check_identity(plan.identity)
    _refuse_chunks(config, parts.task)
    dry_run.print_summary(parts.config, differences, destination, parts.model.parameter_counts(), parts.loader, options, lines)
    return destination.error


def describe_start(parts: Components) -> list[str]:
    """Return lines that say where the weights of each tower are from, and which formats can hold the model."""
    line = export.describe_formats(parts.model, parts.task, parts.config, parts.tokenizer)
    return [*describe_weights(parts.model.encoder, parts.config.init), line]


# ---------------------------------------------------------------------------------------------------------------------
# Components


@dataclass
class Components:
    """The objects that a fine-tuning run is made of."""

    config: FinetuneConfig
    """The configuration, with the changes that adapting the encoders made (image size)."""
    tokenizer: Any
    model: FusionModel
    task: Task
    loader: Loader
    eval_decoders: dict[str, Any]
    """The task's decoders by modality, for evaluation."""


def build(config: FinetuneConfig, checkpoint: Path | None = None) -> Components:
    """Build the components of a run, fastest checks first, with the same weights on every process.

    checkpoint: the one that the run resumes from, for whose weights the model is built; None = it begins, from init's.

    Raises UserError.
    """
    # -- pretrained encoders, adapted
    tokenizer, encoders = build_encoders(resuming.without_sources(config, checkpoint))
    if config.init is not None and checkpoint is None:
        warm_start.load_weights(encoders, config.init, config.init_partial, tokenizer)
    if isinstance(config.fusion, FusionConfig):
        check_modalities(config.fusion, list(encoders.towers))  # before `adapt`, whose error of a tower says less
    config = freeze.adapt_encoder(encoders, config.adapt, config)  # type: ignore[assignment]
    # -- task, fusion and head
    task = registry.get_component("tasks", config.task.name).build(
        config.task, lambda: survey(config.data.train, config.data.build_cache())
    )
    task.subject = models.find_subject(config.fusion, list(encoders.towers))
    task = add_contrastive_loss(task, config.adapt)
    model = models.build(encoders, config.fusion, config.context, config.tokens, config.adapt.fork)
    model.head = task.build_head(model)
    freeze.freeze_by_name(model, config.adapt.freeze)
    set_performance(model, config.performance, distributed.device())
    # -- data
    loader = build_loader(config, task.build_decoders(build_train_decoders(config, tokenizer, encoders)))
    _freeze_unused(model, task, loader.first_samples(2))
    eval_decoders = task.build_decoders(build_eval_decoders(config, tokenizer, encoders))
    return Components(config, tokenizer, model, task, loader, eval_decoders)


def inline(parts: Components) -> FinetuneConfig:
    """Return the configuration for checkpoints, with architectures and the task's learned settings."""
    config = portable_config(parts.config, parts.model.encoder)
    assert isinstance(config, FinetuneConfig)
    return replace(config, task=replace(config.task, **parts.task.learned_settings()))


def build_evaluation(parts: Components, device: torch.device) -> Callable[[Any], dict[str, float]] | None:
    """Return a function that evaluates the model on data.val; None without data.val."""
    config, task = parts.config, parts.task
    if not config.data.val:
        return None
    setup = EvalSetup(
        parts.eval_decoders, device, config.train.precision, config.eval, config.data.build_cache(), config.data.train
    )
    return lambda model: task.evaluate(model, config.data.val, setup)


def _freeze_unused(model: FusionModel, task: Task, batch: Batch) -> None:
    """Freeze the weights that the task's loss does not use, such as a pooler where only tokens are read.

    Strategies would otherwise wait for their gradients. It runs two samples, the same on every process, and does not change
    the run's random numbers. Raises UserError where nothing is left to train.
    """
    with eval_mode(model), torch.random.fork_rng(devices=[]), torch.enable_grad():
        loss, _ = task.loss(task.encode(model, batch), batch.targets)
    if not loss.requires_grad:
        raise UserError("nothing to train: the loss of this task depends on no weight that is not frozen")
    freeze.freeze_unused(model, [loss])


def _refuse_chunks(config: FinetuneConfig, task: Task) -> None:
    """Refuse train.chunks > 1 for a task whose model compares samples with each other. Raises ConfigError."""
    if config.train.chunks > 1 and not task.can_split:
        raise ConfigError(
            f"train.chunks={config.train.chunks}: {config.task.name} compares samples inside the model, so its batch "
            "cannot be split; use train.chunks=1 and a smaller data.batch_size, or more processes"
        )


def _identity(portable: FinetuneConfig) -> dict[str, Any]:
    """Return what must not change when the run resumes, besides data, seed and batch size."""
    return {"task": f"{portable.task.name} {_digest(portable.task)}"}


def _digest(settings: Any) -> str:
    """Return a short hash of a task's settings, the learned ones included.

    Those in ADDED of the task's module count only where they differ from their defaults, so that runs begun before them resume.
    """
    values, added = asdict(settings), getattr(sys.modules[type(settings).__module__], "ADDED", ())
    defaults = {field.name: field.default for field in fields(settings) if field.name in added}
    values = {name: value for name, value in values.items() if name not in defaults or value != defaults[name]}
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=6).hexdigest()
