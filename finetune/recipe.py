"""A fine-tuning run, assembled: what `init` brings, a fusion, a task's head, and pretrain's one loop."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from finetune import adapt
from finetune import model as models
from finetune.aligned import keep_aligned
from finetune.config import FinetuneConfig, load_config
from finetune.model import FusionModel
from finetune.tasks import Setting, Task, survey
from pretrain import config as configuration
from pretrain import dist, inference, registry, start, strategies
from pretrain import model as encoders
from pretrain.config import ConfigError, UserError
from pretrain.data import loader as loading
from pretrain.data.loader import Batch, Loader
from pretrain.data.sources import evaluated_caption, sources_of
from pretrain.embed import evaluating
from pretrain.loop import Outcome, Plan, fit
from pretrain.recipe import agree, resume_from, save_files, tell
from pretrain.runlog import RunFolder

__all__ = ["FinetuneConfig", "assemble", "describe", "load_config", "train"]


@dataclass
class Parts:
    """What a run is made of."""

    config: FinetuneConfig
    """With what adapting the encoders changed."""
    tokenizer: Any
    model: FusionModel
    task: Task
    decoders: dict[str, Any]
    """For evaluation."""
    loader: Loader


def assemble(config: FinetuneConfig) -> Parts:
    """Builds everything that can be wrong, in the order of what fails fastest. The same weights on every process."""
    if config.data.val is not None:
        sources_of(config.data.val, "data.val")  # now, not after the first thousand steps
    tokenizer = start.tokenizer(config.init, config.text) if config.text is not None else None
    torch.manual_seed(config.seed)
    encoder = encoders.build(inference.towers(config), config.model, tokenizer)
    if config.init is not None:
        start.load(encoder, config.init, config.init_partial, tokenizer)
    config = adapt.apply(encoder, config.adapt, config)  # type: ignore[assignment]
    task = registry.part("tasks", config.task.name).build(config.task, lambda: survey(config.data.train, config.data.store()))
    task = keep_aligned(task, config.adapt)
    model = models.build(encoder, config.fusion, config.context, config.tokens, config.adapt.fork)
    model.head = task.head(model)
    adapt.freeze_named(model, config.adapt.freeze)
    kinds = (config, tokenizer, encoder)
    loader = loading.build_loader(
        config.data,
        task.decoders(inference.decoders(*kinds, config.data.caption, config.data.augment)),
        seed=config.seed,
        rank=dist.rank(),
        world=dist.world_size(),
        nodes=dist.nodes(),
    )
    _freeze_unreached(model, task, loader.sample(2))
    return Parts(
        config, tokenizer, model, task, task.decoders(inference.decoders(*kinds, evaluated_caption(vars(config.data)))), loader
    )


def train(config: FinetuneConfig) -> Outcome:
    """One process of a run, from configuration to outcome."""
    agree(config, config.data)
    threads = dist.pin_threads(config.train.threads)
    device = dist.device()
    folder = RunFolder(config.run)
    folder.open()
    try:
        source = resume_from(config.resume, folder)
        parts = assemble(config)
        task = parts.task
        kept = portable(parts)
        if dist.is_main():
            configuration.save(config, folder.path / "config.yaml")
        folder.environment(threads)
        identity = {
            "seed": config.seed,
            "data.batch_size": config.data.batch_size,
            "data": parts.loader.digest(),
            "task": f"{config.task.name} {_digest(kept.task)}",
        }
        plan = Plan(
            seed=config.seed,
            batch_size=config.data.batch_size,
            total_steps=config.train.total_steps(config.data.batch_size, parts.loader.order),
            train=config.train,
            optim=config.optim,
            resolved=configuration.to_dict(config),
            identity=identity,
            files=lambda at: save_files(at, kept, parts.tokenizer),
            primary=task.primary_metric,
            plain=adapt.plain(config.adapt),
        )
        if config.train.chunks > 1 and not task.splits:
            raise ConfigError(
                f"train.chunks={config.train.chunks}: {config.task.name} compares samples inside the model, so its batch "
                "cannot be cut; use train.chunks=1 and a smaller data.batch_size, or more processes"
            )
        train = config.train
        strategy = strategies.choose(train.strategy, train.precision, config.optim, device, train.offload, train.deepspeed)
        return fit(plan, folder, strategy, parts.model, task, parts.loader, _evaluation(parts, device), source)
    finally:
        folder.close()


def portable(parts: Parts) -> FinetuneConfig:
    """The configuration as a checkpoint keeps it: architectures and what the task learnt from its data inline."""
    config = inference.portable(parts.config, parts.model.encoder)
    assert isinstance(config, FinetuneConfig)
    return replace(config, task=replace(config.task, **parts.task.settings()))


def describe(config: FinetuneConfig) -> None:
    """Prints what would run: the resolved configuration, parameters of each part, shards and samples."""
    parts = assemble(config)
    tell(parts.config, config.train, config.data.batch_size, parts.model.parameter_counts(), parts.loader)


def _freeze_unreached(model: FusionModel, task: Task, batch: Batch) -> None:
    """Weights that the task's loss does not depend on (a pooler, where tokens are read) are frozen, or strategies would wait
    for their gradient. One pass over two samples, the same on every process, which draws no random numbers of the run's."""
    with evaluating(model), torch.random.fork_rng(devices=[]), torch.enable_grad():
        loss, _ = task.loss(task.encode(model, batch), batch.targets)
    if not loss.requires_grad:
        raise UserError("nothing to train: the loss of this task depends on no weight that is not frozen")
    adapt.freeze_unreached(model, [loss])


def _evaluation(parts: Parts, device: torch.device) -> Any:
    config, task = parts.config, parts.task
    if not config.data.val:
        return None
    setting = Setting(parts.decoders, device, config.train.precision, config.eval, config.data.store(), config.data.train)
    return lambda model: task.evaluate(model, config.data.val, setting)


def _digest(settings: Any) -> str:
    """A short name for a task's settings: answers and all."""
    return hashlib.blake2b(json.dumps(asdict(settings), sort_keys=True).encode(), digest_size=6).hexdigest()
