"""A pretraining run, assembled: the schema of its configuration, and its parts built in the order they need each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pretrain import checkpoint, dist, flops, inference, launched, registry, start, strategies
from pretrain import config as configuration
from pretrain import model as models
from pretrain.config import ConfigError, UserError, section
from pretrain.data import loader as loading
from pretrain.data.loader import Batch, DataConfig, Loader
from pretrain.data.sources import evaluated_caption, sources_of
from pretrain.evaluate import EvalConfig, evaluate
from pretrain.loop import Outcome, Plan, TrainConfig, fit
from pretrain.model import DualEncoder, ModelSchema
from pretrain.objective import Contrastive
from pretrain.optim import OptimConfig
from pretrain.runlog import RunFolder, say


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
    loss: Any = section(registry.part, "losses", "name", "clip")
    """What is minimised."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """How weights move."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How long, how precise, how spread."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """What is measured on data.val."""

    def check(self) -> None:
        """Refuses combinations that cannot run."""
        start.check(self.init)
        if self.data.batch_size % (dist.world_size() * self.train.chunks):
            raise ConfigError(
                f"data.batch_size={self.data.batch_size} must be divisible by processes x train.chunks = "
                f"{dist.world_size()} x {self.train.chunks}"
            )
        if self.train.eval_every and not self.data.val:
            raise ConfigError(f"train.eval_every={self.train.eval_every} needs data.val, the shards to evaluate on")


@dataclass
class Parts:
    """What a run is made of."""

    tokenizer: Any
    model: DualEncoder
    decoders: dict[str, Any]
    """For evaluation."""
    loader: Loader


def load_config(path: Path, settings: list[str]) -> PretrainConfig:
    """Load a run's configuration: a file, key=value settings over it, `init`'s architecture under it.

    All that runs, checks or measures a run reads its configuration here. Raises ConfigError, UserError.
    """
    return configuration.build(PretrainConfig, start.under(configuration.merged(path, settings)), str(path))


def assemble(config: PretrainConfig) -> Parts:
    """Builds everything that can be wrong, in the order of what fails fastest. The same weights on every process."""
    loss = registry.part("losses", config.loss.name)
    if config.model.logit_scale is None:
        config.model.logit_scale = loss.LOGIT_SCALE
    if config.model.logit_bias is None:
        config.model.logit_bias = loss.LOGIT_BIAS
    if config.data.val is not None:
        sources_of(config.data.val, "data.val")  # now, not after the first thousand steps
    tokenizer = start.tokenizer(config.init, config.text) if config.text is not None else None
    torch.manual_seed(config.seed)
    model = models.build(inference.towers(config), config.model, tokenizer)
    kinds = (config, tokenizer, model)
    loader = loading.build_loader(
        config.data,
        inference.decoders(*kinds, config.data.caption, config.data.augment, config.data.draw),
        seed=config.seed,
        rank=dist.rank(),
        world=dist.world_size(),
        nodes=dist.nodes(),
    )
    return Parts(tokenizer, model, inference.decoders(*kinds, evaluated_caption(vars(config.data))), loader)


def train(config: PretrainConfig) -> Outcome:
    """One process of a run, from configuration to outcome."""
    agree(config, config.data)
    threads = dist.pin_threads(config.train.threads)
    device = dist.device()
    folder = RunFolder(config.run)
    folder.open()
    try:
        source = resume_from(config.resume, folder)
        parts = assemble(config)
        if source is None and config.init is not None:
            start.load(parts.model, config.init, config.init_partial, parts.tokenizer)
        kept = inference.portable(config, parts.model)
        if dist.is_main():
            configuration.save(config, folder.path / "config.yaml")
        folder.environment(threads)
        plan = Plan(
            seed=config.seed,
            batch_size=config.data.batch_size,
            total_steps=config.train.total_steps(config.data.batch_size, parts.loader.order),
            train=config.train,
            optim=config.optim,
            resolved=configuration.to_dict(config),
            identity={"seed": config.seed, "data.batch_size": config.data.batch_size, "data": parts.loader.digest()},
            files=lambda at: save_files(at, kept, parts.tokenizer),
            primary="image_to_text_R@1",
            flops=_flops(config, parts) if device.type == "cuda" else None,
        )
        train = config.train
        strategy = strategies.choose(train.strategy, train.precision, config.optim, device, train.offload, train.deepspeed)
        objective = Contrastive(registry.part("losses", config.loss.name).build(config.loss).to(device))
        return fit(plan, folder, strategy, parts.model, objective, parts.loader, _evaluation(config, parts, device), source)
    finally:
        folder.close()


def agree(config: Any, data: DataConfig) -> None:
    """Every process has the same configuration, code and data. Raises UserError."""
    if dist.world_size() > 1:
        launched.agree("the configuration", configuration.to_dict(config))
        launched.agree("the code", launched.code_fingerprint())
        if data.train != "synthetic":
            given = data.train
            launched.agree(
                "data.train", lambda: launched.data_fingerprint([p for s in sources_of(given, "data.train") for p in s.shards])
            )


def _flops(config: PretrainConfig, parts: Parts) -> Callable[[Batch], float] | None:
    """Counted for pictures and texts; None where another modality takes part."""
    if config.others or config.image is None or config.text is None:
        return None
    return flops.per_batch(parts.model, flops.one_sample(config.image.size, config.text.length))


def save_files(folder: Path, config: ModelSchema, tokenizer: Any) -> None:
    """What belongs beside the weights of a checkpoint."""
    configuration.save(config, folder / "config.yaml")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder / inference.TOKENIZER)


def _evaluation(config: PretrainConfig, parts: Parts, device: torch.device) -> Callable[[Any], dict[str, float]] | None:
    if not config.data.val:
        return None
    cache = config.data.store()
    return lambda model: evaluate(model, parts.decoders, config.data.val, config.eval, device, config.train.precision, cache)


def resume_from(resume: str, folder: RunFolder) -> Path | None:
    """The checkpoint to go on from, the same on every process. Raises UserError."""
    found: Path | UserError | None = None
    if dist.is_main():
        try:
            found = _choose(resume, folder)
        except UserError as error:
            found = error
    found = dist.broadcast_object(found)
    if isinstance(found, UserError):
        raise found
    return found


def _choose(resume: str, folder: RunFolder) -> Path | None:
    there = checkpoint.complete(folder.checkpoints)
    if resume == "never":
        if there or (folder.path / "metrics.jsonl").exists():
            raise ConfigError(f"resume=never would overwrite the run in {folder.path}; give this one another run=NAME")
        return None
    if resume != "auto":
        return checkpoint.find(resume)
    newest = checkpoint.newest(folder.checkpoints, say)
    if newest is None and there:
        raise UserError(f"no checkpoint in {folder.checkpoints} can be used (named above); resume=PATH goes on from another")
    return newest


# ---------------------------------------------------------------------------------------------------------------------
# --dry-run


def describe(config: PretrainConfig) -> None:
    """Prints what would run: the resolved configuration, parameters of each tower, shards and samples."""
    parts = assemble(config)
    tell(config, config.train, config.data.batch_size, parts.model.parameter_counts(), parts.loader)


def tell(config: Any, train: TrainConfig, size: int, counts: dict[str, dict[str, int]], loader: Loader) -> None:
    """Prints a run, on one process; `size`: samples a step; `counts`: parameters by part of the model."""
    epoch = loader.order.epoch_size
    total = train.total_steps(size, loader.order)
    if not dist.is_main():
        return
    print(configuration.to_yaml(config))
    for name, sizes in counts.items():
        print(f"{name:12} {sizes['total']:>14,} parameters, {sizes['trainable']:,} trainable")
    print(f"{'data':12} {loader.shard_count:>14,} shards, {epoch:,} samples an epoch")
    print(f"{'run':12} {total:>14,} steps of {size:,} samples, {total * size / epoch:.2f} epochs")
