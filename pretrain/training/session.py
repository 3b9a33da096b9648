"""What pretraining and fine-tuning runs share: from a configuration to the arguments of fit().

    with open_session(config) as session:      # the run folder is locked, the checkpoint to resume from is known
        ...                                    # model, loader and objective, which only the trainer knows
        plan = session.build_plan(loader, checkpoint_config, tokenizer, "image_to_text_R@1", model=model)
        return fit(plan, session.folder, session.build_strategy(), model, objective, loader, evaluate, session.checkpoint)

`config` is a PretrainConfig or a FinetuneConfig everywhere in this file, which reads only the fields that both have.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain import config as configuration
from pretrain import model as models
from pretrain import strategies
from pretrain.checkpoints import loading, remote, resuming, rotation, store, warm_start, writing
from pretrain.data import loader as loaders
from pretrain.data.batch import allow_missing
from pretrain.data.config import check_sources, count_samples_once, evaluation_caption, list_shards_once
from pretrain.data.images import ImageDecoder
from pretrain.data.loader import Loader
from pretrain.data.reinforced.decoders import ReinforcedImageDecoder
from pretrain.data.sample_filter import read_skip_list
from pretrain.data.shards.stores import is_store
from pretrain.data.teacher_settings import SAMPLES
from pretrain.data.text import TextDecoder
from pretrain.data.training_captions import TrainingCaptions
from pretrain.errors import ConfigError, UserError
from pretrain.model import DualEncoder, ModelSchema
from pretrain.printable import format_count, hide_secrets_in
from pretrain.runtime import distributed, performance, preflight
from pretrain.runtime.agree import on_main
from pretrain.runtime.console import log_info
from pretrain.strategies import Strategy
from pretrain.training import run_tokenizer
from pretrain.training.config import RunPlan
from pretrain.training.flops import FlopCounter
from pretrain.training.run_dir import RunFolder
from pretrain.training.stages import RunStages, resolve, stage_configs


def check_batch_and_evaluation(config: Any) -> None:
    """Refuse batches that do not divide evenly, and evaluation without data. Raises ConfigError."""
    if config.data.batch_size % (distributed.world_size() * config.train.chunks):
        raise ConfigError(
            f"data.batch_size={config.data.batch_size} must be divisible by processes x train.chunks = "
            f"{distributed.world_size()} x {config.train.chunks}"
        )
    if config.train.eval_every and not config.data.val:
        raise ConfigError(f"train.eval_every={config.train.eval_every} needs data.val, the shards to evaluate on")


def choose_evaluation_interval(config: Any, stages: RunStages) -> int:
    """Return the steps between evaluations, and log them where train.eval_every leaves them open; 0 = only at the end.

    Collective. Raises UserError where the samples of data.val cannot be counted.
    """
    train, data = config.train, config.data
    if train.eval_every is not None or not data.val:
        return train.eval_every or 0
    counts = count_samples_once(list_shards_once(data.val, "data.val"), data.build_cache(), "data.val")
    samples = min(sum(counts), config.eval.max_samples or sum(counts))
    interval: int = train.evaluation_interval(stages.total_steps, stages.total_samples, samples)
    times = (
        f"every {format_count(interval, 'step')}" if interval else "at the end only; train.eval_every=N evaluates more often"
    )
    log_info(f"evaluates on {format_count(samples, 'sample')} {times}")
    return interval


# ---------------------------------------------------------------------------------------------------------------------
# Opening a run


@dataclass
class Session:
    """What one process of a run starts from: run folder, checkpoint to resume from, and device."""

    config: Any
    folder: RunFolder
    checkpoint: Path | None
    """The checkpoint to resume from; None = a run that begins."""
    device: torch.device
    threads: int

    def _write_config(self, model: nn.Module) -> None:
        """Write config.yaml and environment.json into the run folder."""
        if distributed.is_main():
            configuration.save(self.config, self.folder.path / "config.yaml")
        self.folder.write_environment(self.threads, performance.read_settings() | models.read_performance(model))

    def build_plan(
        self,
        loader: Loader,
        checkpoint_config: ModelSchema,
        tokenizer: Any,
        primary_metric: str,
        *,
        model: nn.Module | None = None,
        identity: dict[str, Any] | None = None,
        flops: FlopCounter | None = None,
        convert_weights: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    ) -> RunPlan:
        """Collect what fit() needs besides model, objective and loader.

        Args:
            checkpoint_config: the configuration that checkpoints hold.
            primary_metric: the evaluation metric, higher is better, that decides which checkpoint is best.
            model: whose settings environment.json records; None = the run folder gets neither this file nor config.yaml.
            identity: what must not change when the run is resumed, besides seed, batch size and data.
            flops: counts the operations of a batch, for MFU.
            convert_weights: turns trained weights into those that model.safetensors holds.
        """
        config = self.config
        stages = resolve(config, loader.order.epoch_size)
        data_identity = {
            "seed": config.seed,
            "data.batch_size": config.data.batch_size,
            "train.stages": stages.identity(),
            **loader.filter_identity(),
            "data": loader.digest(),
        }
        return RunPlan(
            seed=config.seed,
            stages=stages,
            eval_every=choose_evaluation_interval(config, stages),
            train=config.train,
            optim=config.optim,
            resolved_config=hide_secrets_in(configuration.to_dict(config)),
            identity=data_identity | (identity or {}),
            write_config=(lambda: self._write_config(model)) if model is not None else lambda: None,
            save_files=lambda folder: _save_config_and_tokenizer(folder, checkpoint_config, tokenizer),
            primary_metric=primary_metric,
            flops=flops,
            convert_weights=convert_weights,
        )

    def build_strategy(self) -> Strategy:
        """Build the strategy that train.strategy names."""
        train = self.config.train
        return strategies.build_strategy(
            train.strategy,
            train.precision,
            self.config.optim,
            self.device,
            train.offload,
            train.deepspeed,
            train.replicas,
            train.gradient_compression,
        )


@contextmanager
def open_session(config: Any) -> Iterator[Session]:
    """Check that processes agree, lock the run folder, and find the checkpoint to resume from.

    Where no tokenizer is named, text.tokenizer is set to the run's own. Collective. The lock is released when the `with` block
    ends. Raises UserError.
    """
    check_agreement(config)
    threads = distributed.pin_threads(config.train.threads)
    device = distributed.device()
    folder = RunFolder(config.run)
    folder.open()
    try:
        with performance.process_settings(config.performance, config.train.deterministic):
            on_main(lambda: writing.recover(folder.checkpoints))
            checkpoint = find_checkpoint(config, folder)
            if checkpoint is not None:
                config.data.resume_streams(resuming.read_config(checkpoint).get("data", {}))
            check_sources(config.data.train, config.data.val)
            run_tokenizer.set_tokenizer(config, folder.path, checkpoint)
            yield Session(config, folder, checkpoint, device, threads)
    except BaseException:
        folder.remove_empty()
        raise
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
            lambda: preflight.data_fingerprint(list_shards_once(train, "data.train")),
        )
    skip = config.data.skip
    if skip is not None:
        preflight.require_equal("data.skip", lambda: read_skip_list(skip).describe())


def find_checkpoint(config: Any, folder: RunFolder) -> Path | None:
    """Find the checkpoint to resume from, the same on every process; None = a run that begins.

    config.resume: "auto", "never", or a checkpoint folder. Collective. Raises UserError.

    A command with resume=PATH may be repeated, as schedulers do after a stop: where the folder holds checkpoints that the same
    configuration has saved since, it goes on from the newest. So does resume=never where a launcher repeats it.
    """
    return on_main(lambda: _find_checkpoint(config, folder))


def _find_checkpoint(config: Any, folder: RunFolder) -> Path | None:
    if config.resume == "auto":
        return _find_newest(folder)
    settings = json.dumps(configuration.to_dict(config), sort_keys=True, default=str)
    command = hashlib.blake2b(settings.encode(), digest_size=16).hexdigest()
    begun = folder.step_begun_by(command)
    if config.resume == "never":
        if begun is not None and _is_restart():
            return _find_newest(folder)
        if store.list_folders(folder.checkpoints) or (folder.path / "metrics.jsonl").exists():
            raise ConfigError(f"resume=never would overwrite the run in {folder.path}; choose another run=NAME for this run")
    elif begun is not None:
        newest = store.find_newest(folder.checkpoints, log_info)
        if newest is not None and store.parse_step(newest) >= begun:
            log_info(
                f"resume={config.resume}: this command has begun before, and goes on; with another run=NAME it begins anew"
            )
            return newest
    if is_store(config.resume):
        rotation.refuse_foreign_origin(folder.checkpoints, config.resume)
        folder.new_command = command
        return remote.download(config.resume, folder.checkpoints)
    origin = None if config.resume == "never" else store.find(config.resume)
    if origin is not None:
        rotation.refuse_foreign_origin(folder.checkpoints, origin)
    folder.new_command = command
    return origin


def _find_newest(folder: RunFolder) -> Path | None:
    """Return the newest usable checkpoint of a run folder; None where none was saved. Raises UserError where all are lost."""
    newest = store.find_newest(folder.checkpoints, log_info)
    if newest is None and store.list_folders(folder.checkpoints):
        raise UserError(
            f"no checkpoint in {folder.checkpoints} can be used (the reasons are above); resume=PATH resumes from another, "
            "run=NEW starts anew"
        )
    if newest is None and folder.saved_step():
        raise UserError(
            f"the run in {folder.path} reached step {folder.saved_step()}, but {folder.checkpoints} holds no checkpoint; "
            "resume=PATH resumes from another, run=NEW starts anew"
        )
    return newest


def _is_restart() -> bool:
    """Return whether a launcher or Slurm has started this process anew with the command of an earlier start."""
    return any(os.environ.get(name, "0") not in ("", "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def _save_config_and_tokenizer(folder: Path, config: ModelSchema, tokenizer: Any) -> None:
    """Write config.yaml and tokenizer/ into a checkpoint folder."""
    configuration.save(config, folder / "config.yaml")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder / loading.TOKENIZER)


# ---------------------------------------------------------------------------------------------------------------------
# Encoders and data


def build_encoders(config: Any, has_weights: bool = True) -> tuple[Any, DualEncoder]:
    """Build the tokenizer (None for a model without texts) and the encoders.

    The weights are the same on every process that has them; has_weights=False: see `models.build`. Seeds torch's generator.
    Raises UserError.
    """
    tokenizer = warm_start.choose_tokenizer(config.init, config.text) if config.text is not None else None
    torch.manual_seed(config.seed)
    return tokenizer, models.build(models.tower_configs(config), config.model, tokenizer, has_weights)


def build_train_decoders(config: Any, tokenizer: Any, encoders: DualEncoder) -> dict[str, Any]:
    """Build the decoders for training, by modality: they augment images and draw captions."""
    data = config.data
    decoders = models.build_decoders(config, tokenizer, encoders, data.caption, data.augment, data.draw)
    if data.incomplete == "keep":
        decoders = allow_missing(decoders, train=True)
    text = decoders.get("text")
    if isinstance(text, TextDecoder):
        text.sentences = data.sentences
    if isinstance(text, TextDecoder) and config.train.compile != "false":
        text.trim = False  # compiled models are compiled anew for every length
    if data.teachers == SAMPLES and "image" in decoders:
        if type(decoders["image"]) is not ImageDecoder:
            raise ConfigError(
                f"data.teachers={SAMPLES}: the image tower brings a decoder of its own, which applies no augmentation"
            )
        decoders["image"] = ReinforcedImageDecoder(decoders["image"])
    if data.decode_on == "device":
        if "image" not in decoders:
            raise ConfigError("data.decode_on=device: the model reads no images; leave it out")
        if type(decoders["image"]) is not ImageDecoder:
            raise ConfigError(
                f"data.decode_on=device is for images that no other decoder reads: not with data.teachers={SAMPLES}, nor with "
                "an image tower that brings a decoder of its own"
            )
        try:
            from pretrain.data.device_images import DeviceImageDecoder  # imports torchvision, which takes a second
        except ImportError as error:  # torchvision 0.29 announces that a later version has its decoders elsewhere
            raise ConfigError(f"data.decode_on=device: this torchvision decodes no JPEGs ({error}); use cpu") from error
        decoders["image"] = DeviceImageDecoder(decoders["image"])
    if data.weight is not None or data.negatives is not None:
        if type(text) is not TextDecoder:
            name = "weight" if data.weight is not None else "negatives"
            raise ConfigError(f"data.{name}={getattr(data, name)!r:.80} is read with captions, and the model reads none")
        decoders["text"] = TrainingCaptions(text, data.weight, data.negatives, data.draw_negatives)
    return decoders


def build_eval_decoders(config: Any, tokenizer: Any, encoders: DualEncoder) -> dict[str, Any]:
    """Build the decoders for evaluation, by modality: they neither augment nor draw."""
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
        device=distributed.device(),
        batch_sizes=[changed.data.batch_size for changed in stage_configs(config)],
    )
