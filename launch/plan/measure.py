"""The sizes of the model that a configuration describes, found by building it on the CPU without published weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from launch.plan.estimate import ModelSize
from launch.plan.footprint import measure_footprint
from pretrain import model as models
from pretrain.checkpoints import warm_start
from pretrain.errors import UserError
from pretrain.model import DualEncoder
from pretrain.strategies.blocks import find_blocks
from pretrain.train import PretrainConfig
from pretrain.training import flops, stages


class PlaceholderTokenizer:
    """Takes the place of a tokenizer that is not on this machine: it has a vocabulary size and special tokens."""

    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


def measure_model(config: PretrainConfig) -> tuple[ModelSize, list[str]]:
    """Return the sizes of the model in the last stage of its run, and notes on what was assumed."""
    sizes, notes = measure_stages(config)
    return sizes[-1], notes


def measure_stages(config: PretrainConfig) -> tuple[list[ModelSize], list[str]]:
    """Return the sizes of the model in each stage, built without weights where its towers can be, and notes."""
    notes = []
    towers = {}
    for name, tower in models.tower_configs(stages.build_config(config)).items():
        changes: dict[str, Any] = {"pretrained": False} if hasattr(tower, "pretrained") else {}
        if hasattr(tower, "weights"):
            changes["weights"] = None
        towers[name] = replace(tower, **changes)
    tokenizer: Any = None
    if config.text is not None:
        try:
            tokenizer = warm_start.choose_tokenizer(config.init, config.text)
        except UserError:
            vocabulary = int(config.text.args.get("vocab_size", 49408))
            tokenizer = PlaceholderTokenizer(vocabulary)
            name = f"tokenizer {config.text.tokenizer!r} is not here" if config.text.tokenizer else "no tokenizer is named"
            notes.append(f"{name}: a vocabulary of {vocabulary:,} is assumed")
    built = models.build(towers, config.model, tokenizer, has_weights=False)
    stages.prepare_model(built, config)
    sizes, more = measure_built_stages(built, config)
    return sizes, notes + more


def measure_built_stages(built: DualEncoder, config: PretrainConfig) -> tuple[list[ModelSize], list[str]]:
    """Return the sizes of a model, as `measure_built` does, in each stage of train.stages, and the notes of the last."""
    sizes: list[ModelSize] = []
    notes: list[str] = []
    for changed in stages.stage_configs(config):
        if config.train.stages:
            stages.set_patch_dropout(built, getattr(changed.image, "patch_dropout", None))
        size, notes = measure_built(built, changed)
        sizes.append(size)
    return sizes, notes


def measure_built(built: DualEncoder, config: PretrainConfig) -> tuple[ModelSize, list[str]]:
    """Return the sizes of a model on the CPU or without weights, and notes on what was assumed. It does not change."""
    notes = []
    sample = flops.build_sample(
        config.image.size if config.image is not None else None,
        config.text.length if config.text is not None else None,
        config.data.draw + (config.data.draw_negatives if config.data.negatives is not None else 0),
        getattr(built.tower("audio"), "samples", None) if "audio" in built.towers else None,
    )
    if config.text is not None:
        notes.append(f"every text has the full length of {config.text.length} tokens: trimmed batches need less")
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.train.precision]
    repeated = [_count(block) for block in find_blocks(built)]
    with _without_groups(built):
        recomputes = any(getattr(tower, "checkpointing", False) for tower in models.tower_configs(config).values())
        footprint = measure_footprint(built, sample, torch.bfloat16 if dtype is torch.float16 else dtype, recomputes)
    counter = flops.FlopCounter(built)
    counter.add(sample)
    size = ModelSize(
        total=_count(built),
        trainable=sum(p.numel() for p in built.parameters() if p.requires_grad),
        buffers=sum(b.numel() * b.element_size() for b in built.buffers()),
        block=max(repeated, default=0),
        root=_count(built) - sum(repeated),
        modalities=len(built.towers),
        footprint=footprint,
        flops=counter.take(),
        sample=sum(tensor.nbytes for tensor in sample.tensors()),
    )
    return size, notes


@contextmanager
def _without_groups(model: DualEncoder) -> Iterator[None]:
    """Encode texts as a whole inside the block: grouping by length is for CPUs, and depends on the texts."""
    towers: list[Any] = [tower for tower in model.towers.values() if isinstance(getattr(tower, "groups", None), int)]
    groups = [tower.groups for tower in towers]
    for tower in towers:
        tower.groups = 1
    try:
        yield
    finally:
        for tower, count in zip(towers, groups, strict=True):
            tower.groups = count


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
