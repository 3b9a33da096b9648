"""What pretraining and fine-tuning runs have in common; a recipe assembles the rest and calls fit().

    with open_session(config) as session:      # the run folder is locked, the checkpoint to resume from is known
        ...                                    # model, loader and objective, which only the recipe knows
        session.write_config()
        plan = session.build_plan(loader, save_config, tokenizer, "image_to_text_R@1")
        return fit(plan, session.folder, session.build_strategy(), model, objective, loader, evaluate, session.checkpoint)

`config` is a PretrainConfig or a FinetuneConfig everywhere here: their common fields are read, no others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain import config as configuration
from pretrain import model as models
from pretrain import strategies
from pretrain.checkpoints import loading, store, warm_start
from pretrain.data import loader as loaders
from pretrain.data.config import evaluation_caption, resolve_sources
from pretrain.data.loader import Batch, Loader
from pretrain.errors import ConfigError, UserError
from pretrain.model import DualEncoder, ModelSchema
from pretrain.runtime import distributed, preflight
from pretrain.runtime.agree import on_main
from pretrain.runtime.console import log_info
from pretrain.strategies import Strategy
from pretrain.training.loop import RunPlan
from pretrain.training.run_dir import RunFolder


def check_batch_and_evaluation(config: Any) -> None:
    """Refuse a batch that the processes cannot share, and evaluations without data. Raises ConfigError."""
    if config.data.batch_size % (distributed.world_size() * config.train.chunks):
        raise ConfigError(
            f"data.batch_size={config.data.batch_size} must be divisible by processes x train.chunks = "
            f"{distributed.world_size()} x {config.train.chunks}"
        )
    if config.train.eval_every and not config.data.val:
        raise ConfigError(f"train.eval_every={config.train.eval_every} needs data.val, the shards to evaluate on")


# ---------------------------------------------------------------------------------------------------------------------
# Around a run


@dataclass
class Session:
    """One process of a run: its locked folder, its checkpoint to resume from, its device."""

    config: Any
    folder: RunFolder
    checkpoint: Path | None
    """To resume from; None = a run that begins."""
    device: torch.device
    threads: int

    def write_config(self) -> None:
        """Write config.yaml and environment.json into the run folder."""
        if distributed.is_main():
            configuration.save(self.config, self.folder.path / "config.yaml")
        self.folder.environment(self.threads)

    def build_plan(
        self,
        loader: Loader,
        portable: ModelSchema,
        tokenizer: Any,
        primary: str,
        *,
        identity: dict[str, Any] | None = None,
        flops: Callable[[Batch], float] | None = None,
        plain: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    ) -> RunPlan:
        """Collect what fit() needs to know beside model, objective and loader.

        portable: the configuration that checkpoints hold. identity: what else must not change when the run is resumed.
        """
        config = self.config
        data_identity = {"seed": config.seed, "data.batch_size": config.data.batch_size, "data": loader.digest()}
        return RunPlan(
            seed=config.seed,
            batch_size=config.data.batch_size,
            total_steps=config.train.total_steps(config.data.batch_size, loader.order),
            train=config.train,
            optim=config.optim,
            resolved=configuration.to_dict(config),
            identity=data_identity | (identity or {}),
            files=lambda folder: _save_config_and_tokenizer(folder, portable, tokenizer),
            primary=primary,
            flops=flops,
            plain=plain,
        )

    def build_strategy(self) -> Strategy:
        """Build the strategy that train.strategy names."""
        train = self.config.train
        return strategies.build_strategy(
            train.strategy, train.precision, self.config.optim, self.device, train.offload, train.deepspeed
        )


@contextmanager
def open_session(config: Any) -> Iterator[Session]:
    """Check that all processes agree, lock the run folder inside, and find the checkpoint to resume from. Raises UserError."""
    check_agreement(config)
    threads = distributed.pin_threads(config.train.threads)
    device = distributed.device()
    folder = RunFolder(config.run)
    folder.open()
    try:
        yield Session(config, folder, find_checkpoint(config.resume, folder), device, threads)
    finally:
        folder.close()


def check_agreement(config: Any) -> None:
    """Refuse processes whose configuration, code or training data differ. Collective. Raises UserError."""
    if distributed.world_size() == 1:
        return
    preflight.require_equal("the configuration", configuration.to_dict(config))
    preflight.require_equal("the code", preflight.code_fingerprint())
    train = config.data.train
    if train != "synthetic":
        preflight.require_equal(
            "data.train",
            lambda: preflight.data_fingerprint([path for source in resolve_sources(train, "data.train") for path in source.shards]),
        )


def find_checkpoint(resume: str, folder: RunFolder) -> Path | None:
    """Find the checkpoint to resume from, the same on every process; None = begin. Collective. Raises UserError."""
    return on_main(lambda: _find_checkpoint(resume, folder))


def _find_checkpoint(resume: str, folder: RunFolder) -> Path | None:
    complete = store.list_complete(folder.checkpoints)
    if resume == "never":
        if complete or (folder.path / "metrics.jsonl").exists():
            raise ConfigError(f"resume=never would overwrite the run in {folder.path}; give this one another run=NAME")
        return None
    if resume != "auto":
        return store.find(resume)
    newest = store.find_newest(folder.checkpoints, log_info)
    if newest is None and complete:
        raise UserError(f"no checkpoint in {folder.checkpoints} can be used (named above); resume=PATH goes on from another")
    return newest


def _save_config_and_tokenizer(folder: Path, config: ModelSchema, tokenizer: Any) -> None:
    """Write what belongs beside the weights of a checkpoint."""
    configuration.save(config, folder / "config.yaml")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder / loading.TOKENIZER)


# ---------------------------------------------------------------------------------------------------------------------
# Encoders and data


def build_encoders(config: Any) -> tuple[Any, DualEncoder]:
    """Build the tokenizer (None: a model without texts) and the encoders, with the same weights on every process.

    Seeds torch's generator. Looks for data.val first: not after the first thousand steps. Raises UserError.
    """
    if config.data.val is not None:
        resolve_sources(config.data.val, "data.val")
    tokenizer = warm_start.choose_tokenizer(config.init, config.text) if config.text is not None else None
    torch.manual_seed(config.seed)
    return tokenizer, models.build(models.tower_configs(config), config.model, tokenizer)


def build_train_decoders(config: Any, tokenizer: Any, encoders: DualEncoder) -> dict[str, Any]:
    """Build the decoders by modality for training: augmented images, drawn captions."""
    data = config.data
    return models.build_decoders(config, tokenizer, encoders, data.caption, data.augment, data.draw)


def build_eval_decoders(config: Any, tokenizer: Any, encoders: DualEncoder) -> dict[str, Any]:
    """Build the decoders by modality for evaluation: nothing is augmented or drawn."""
    return models.build_decoders(config, tokenizer, encoders, evaluation_caption(vars(config.data)))


def build_loader(config: Any, decoders: dict[str, Any]) -> Loader:
    """Build this process's loader of the training data."""
    return loaders.build_loader(
        config.data,
        decoders,
        seed=config.seed,
        rank=distributed.rank(),
        world=distributed.world_size(),
        nodes=distributed.nodes(),
    )


# ---------------------------------------------------------------------------------------------------------------------
# --dry-run


def print_summary(config: Any, parameter_counts: dict[str, dict[str, int]], loader: Loader) -> None:
    """Print what would run, on one process: configuration, parameters by part of the model, shards, samples, steps."""
    size, epoch = config.data.batch_size, loader.order.epoch_size
    total = config.train.total_steps(size, loader.order)
    if not distributed.is_main():
        return
    print(configuration.to_yaml(config))
    for name, counts in parameter_counts.items():
        print(f"{name:12} {counts['total']:>14,} parameters, {counts['trainable']:,} trainable")
    print(f"{'data':12} {loader.shard_count:>14,} shards, {epoch:,} samples an epoch")
    print(f"{'run':12} {total:>14,} steps of {size:,} samples, {total * size / epoch:.2f} epochs")
