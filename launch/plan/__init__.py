"""clipfuse plan CONFIG --gpus N [--gpu h100]: memory a GPU by part, bytes over the network a step, steps to an epoch.

What the towers need is found by one pass without contents (footprint.py); weights, gradients, moments, loss and network
follow from how each strategy spreads them. tests/bench/plan.py holds the estimate against measured runs: within 10% on the
CPU for single, ddp and fsdp2. What CUDA and NCCL keep for themselves is a flat allowance, not measured.

Legend: P = parameters, T = trainable ones, W = processes, b = samples a process, B = b W, D = width of an embedding,
M = modalities; everything in bytes, float32 = 4.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from launch.plan.footprint import Footprint, footprint
from pretrain import model as models
from pretrain.checkpoints import warm_start
from pretrain.config import find_config
from pretrain.data.config import sources_of
from pretrain.data.shards.paths import counts
from pretrain.errors import ConfigError, UserError
from pretrain.losses import tiled, tiles
from pretrain.runtime import distributed
from pretrain.runtime.gpus import GPUS
from pretrain.strategies import WORDS
from pretrain.strategies.deepspeed import BUCKET
from pretrain.strategies.fsdp2 import blocks
from pretrain.train import PretrainConfig, load_config
from pretrain.training import flops

GIB = 2**30
OVERHEAD = 1.5 * GIB
"""CUDA's context, cuBLAS workspaces, NCCL's buffers and fragments of the allocator: an allowance."""
USAGE = 0.4
"""Share of the peak that a well-fed GPU reaches, for the time estimate."""


@dataclass(frozen=True)
class Model:
    """What an estimate needs to know of the model; built once."""

    total: int
    """P."""
    trainable: int
    """T."""
    buffers: int
    """Bytes."""
    block: int
    """Parameters of the largest repeated layer."""
    root: int
    """Parameters outside of the repeated layers."""
    modalities: int
    foot: Footprint


@dataclass
class Estimate:
    """For one GPU and one step."""

    strategy: str
    chunks: int
    share: int
    """b, samples a GPU."""
    memory: dict[str, int]
    """Bytes by part."""
    network: dict[str, int]
    """Bytes that each GPU sends a step."""
    flops: float
    """Operations a step and GPU, the second forward pass of a cached step included."""

    @property
    def total(self) -> int:
        """Bytes of memory."""
        return sum(self.memory.values())


# ---------------------------------------------------------------------------------------------------------------------
# The formulae


def estimate(config: PretrainConfig, model: Model, world: int, overhead: bool = True) -> Estimate:
    """Of one process of `world`. overhead: with what CUDA and NCCL keep, which a CPU has not."""
    train, word = config.train, config.train.strategy
    share = config.data.batch_size // world
    memory = {
        "weights": _weights(word, model, world, train.precision) + model.buffers,
        "gradients": _gradients(word, model, world, train.chunks),
        "optimizer": _optimizer(word, model, world, train.offload),
        "average": _average(word, model, world) if config.optim.average else 0,
        "activations": model.foot.at(share // train.chunks),
        "loss": _loss(config, model, share, world),
        "gathered features": _gathered(config, model, share, world),
        "CUDA and NCCL": round(OVERHEAD) if overhead else 0,
    }
    if word == "single":
        # Gradients come as activations go: the pass peaks below the sum of both, and the optimizer step needs no activations.
        peak = max(model.foot.at(share // train.chunks, gradients=True), memory["gradients"])
        memory["activations"] = peak - memory["gradients"]
    passes = 3 if train.chunks == 1 else 4
    return Estimate(
        strategy=word,
        chunks=train.chunks,
        share=share,
        memory=memory,
        network=_network(config, model, share, world),
        flops=model.foot.flops * share * passes / 3,
    )


def _weights(word: str, model: Model, world: int, precision: str) -> int:
    if word == "fsdp2":  # shares, the root whole, and two blocks gathered at a time
        low = 4 if precision == "fp32" else 2
        return 4 * model.total // world + 4 * model.root + 2 * low * model.block
    if word == "zero3":  # shares twice (for the pass, and the master copy), and what is gathered ahead of use
        return (4 * model.total + 4 * model.trainable) // world + 4 * min(model.total, 2 * BUCKET)
    master = 4 * model.trainable // world if word.startswith("zero") else 0
    return 4 * model.total + master


def _gradients(word: str, model: Model, world: int, chunks: int) -> int:
    whole = 4 * model.trainable
    if word in ("single", "ddp", "zero1") or (chunks > 1 and word != "single"):
        return whole  # chunks add up before anything is sent, so that every strategy holds them whole
    if word == "fsdp2":  # the share, and what waits to be sent: the root's and two blocks'
        return whole // world + 4 * model.root + 8 * model.block
    return whole // world + 4 * min(model.trainable, 2 * BUCKET)


def _optimizer(word: str, model: Model, world: int, offload: bool) -> int:
    if offload:
        return 0
    return 8 * model.trainable // (1 if word in ("single", "ddp") else world)


def _average(word: str, model: Model, world: int) -> int:
    return 4 * model.trainable // (1 if word in ("single", "ddp") else world)


def _loss(config: PretrainConfig, model: Model, share: int, world: int) -> int:
    B, D, pairs = share * world, config.model.dim, model.modalities * (model.modalities - 1) // 2
    with distributed.planned(world, 1, True):
        tile = tiled(share, config.loss.tile) if hasattr(config.loss, "tile") else True
    if not tile:
        return pairs * 4 * 4 * share * B  # two directions, logits and their softmax
    side = getattr(config.loss, "tile", 0) or tiles.ACCELERATOR
    return pairs * (2 * 4 * min(share, side) * min(B, side) + 4 * (share + B) * D)


def _gathered(config: PretrainConfig, model: Model, share: int, world: int) -> int:
    """Features of this process, and of all: with gradients of the same size."""
    own = model.modalities * 4 * share * config.model.dim
    return 2 * own * (1 + world if world > 1 else 1)


def _network(config: PretrainConfig, model: Model, share: int, world: int) -> dict[str, int]:
    """Bytes sent by a GPU in rings: an all-gather or reduce-scatter of n bytes sends n (W - 1) / W."""
    word, chunks = config.train.strategy, config.train.chunks
    ring = (world - 1) / world
    low = 4 if config.train.precision == "fp32" else 2
    gathers = {"fsdp2": 2 if chunks == 1 else 3 * chunks, "zero3": 2 if chunks == 1 else 3 * chunks}.get(word, 0)
    each = low * (model.total - model.root) + 4 * model.root if word == "fsdp2" else 4 * model.total
    weights = ring * gathers * each + (ring * 4 * model.trainable if word in ("zero1", "zero2") else 0)
    gradients = ring * 4 * model.trainable * (2 if word in ("single", "ddp", "zero1") else 1)
    if word == "zero1":
        gradients /= 2
    everyone = (
        world * share * config.model.dim * 4 * (model.modalities - 1 if share * share * world > 1 << 17 else model.modalities)
    )
    return {"gradients": round(gradients), "weights": round(weights), "features": round(2 * ring * everyone)}


# ---------------------------------------------------------------------------------------------------------------------
# The model


class AnyTokenizer:
    """Stands in where the tokenizer is not on this machine: a vocabulary of CLIP's size."""

    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


def measure(config: PretrainConfig) -> tuple[Model, list[str]]:
    """Builds the model on the CPU, without published weights, and takes its measures; and what was assumed."""
    notes = []
    towers = {}
    for name, tower in models.tower_configs(config).items():
        changes: dict[str, Any] = {"pretrained": False} if hasattr(tower, "pretrained") else {}
        if hasattr(tower, "groups"):
            changes["groups"] = 1  # grouping by length is for CPUs, and depends on the texts
        towers[name] = replace(tower, **changes)
    tokenizer: Any = None
    if config.text is not None:
        try:
            tokenizer = warm_start.tokenizer(config.init, config.text)
        except UserError:
            size = int(config.text.args.get("vocab_size", 49408))
            tokenizer = AnyTokenizer(size)
            notes.append(f"tokenizer {config.text.tokenizer!r} is not here: a vocabulary of {size:,} is assumed")
    built = models.build(towers, config.model, tokenizer)
    sample = flops.one_sample(
        config.image.size if config.image is not None else None,
        config.text.length if config.text is not None else None,
        config.data.draw,
    )
    if config.text is not None:
        notes.append(f"every text has the full length of {config.text.length} tokens: trimmed batches need less")
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.train.precision]
    repeated = [_count(block) for block in blocks(built)]
    model = Model(
        total=_count(built),
        trainable=sum(p.numel() for p in built.parameters() if p.requires_grad),
        buffers=sum(b.numel() * b.element_size() for b in built.buffers()),
        block=max(repeated, default=0),
        root=_count(built) - sum(repeated),
        modalities=len(towers),
        foot=footprint(built, sample, torch.bfloat16 if dtype is torch.float16 else dtype),
    )
    return model, notes


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# The answer


@dataclass
class Plan:
    """What is printed."""

    config: PretrainConfig
    gpus: int
    gpu: str
    chosen: Estimate
    others: list[Estimate]
    samples: int | None
    """In an epoch; None where the shards are not here."""
    parameters: int
    notes: list[str] = field(default_factory=list)

    @property
    def capacity(self) -> int:
        """Bytes of memory of the GPU."""
        return GPUS[self.gpu][0] * 10**9

    def seconds(self) -> float:
        """Of a step's computation, at USAGE of the peak."""
        slower = {"fp32": 0.5}.get(self.config.train.precision, 1.0)  # TF32
        return self.chosen.flops / (GPUS[self.gpu][1] * 1e12 * USAGE * slower)

    def to_dict(self) -> dict[str, Any]:
        """ViTSpec values, bytes and samples."""
        total = self.config.data.batch_size
        return {
            "gpus": self.gpus,
            "gpu": self.gpu,
            "gpu_bytes": self.capacity,
            "parameters": self.parameters,
            "batch_size": total,
            "samples_per_epoch": self.samples,
            "steps_per_epoch": None if self.samples is None else -(-self.samples // total),
            "seconds_per_step": self.seconds(),
            "chosen": _plain(self.chosen),
            "others": [_plain(other) for other in self.others],
            "notes": self.notes,
        }

    def lines(self) -> Iterator[str]:
        """The table."""
        chosen, train = self.chosen, self.config.train
        yield (
            f"{self.parameters:,} parameters on {self.gpus} {self.gpu}, train.strategy={chosen.strategy} "
            f"train.precision={train.precision}: {chosen.share:,} of {self.config.data.batch_size:,} samples a GPU, "
            + (f"in {chosen.chunks} chunks" if chosen.chunks > 1 else "at once")
        )
        yield ""
        yield "memory a GPU            GiB"
        for name, size in chosen.memory.items():
            if size:
                yield f"  {name:18} {size / GIB:8.2f}"
        fits = "fits" if chosen.total <= self.capacity else "does NOT fit"
        yield f"  {'together':18} {chosen.total / GIB:8.2f}   of {self.capacity / GIB:.1f}: {fits}"
        yield ""
        yield "network a GPU and step   MB"
        for name, size in chosen.network.items():
            yield f"  {name:18} {size / 1e6:8.1f}"
        yield ""
        rate = self.config.data.batch_size / self.seconds()
        yield f"computation: {self.seconds():.3f} s a step at {USAGE:.0%} of the peak, {rate:,.0f} samples/s on all GPUs"
        sent = sum(chosen.network.values())
        if sent:
            yield f"network: {sent / 50e9:.3f} s a step at 50 GB/s a GPU (400 Gb/s), {sent / 1.25e9:.2f} s at 1.25 (10 Gb/s)"
        yield self._length()
        yield ""
        chunks = sorted({other.chunks for other in self.others})
        yield f"{'GiB by train.chunks':24}" + "".join(f"{count:>8}" for count in chunks) + "     MB sent"
        for word in dict.fromkeys(other.strategy for other in self.others):
            row = [other for other in self.others if other.strategy == word]
            cells = [f"{one.total / GIB:.2f}{' ' if one.total <= self.capacity else '!'}" for one in row]
            least, most = (sum(one.network.values()) / 1e6 for one in (row[0], row[-1]))
            each = f"{least:10,.0f}" + (f" to {most:,.0f}" if most > least else "")
            yield f"  train.strategy={word:8}" + "".join(f"{cell:>8}" for cell in cells) + f"  {each}"
        yield f"  (! does not fit in {self.capacity / GIB:.1f})"
        for note in self.notes:
            yield f"note: {note}"

    def _length(self) -> str:
        train, batch = self.config.train, self.config.data.batch_size
        if self.samples is None:
            return "epoch: the shards are not here; give --samples N for the steps of an epoch"
        epoch = -(-self.samples // batch)
        total = train.steps or math.ceil((train.samples or train.epochs * self.samples) / batch)
        hours = total * self.seconds() / 3600
        return f"epoch: {self.samples:,} samples = {epoch:,} steps; the run: {total:,} steps, {hours:,.1f} h of computation"


def _plain(one: Estimate) -> dict[str, Any]:
    return {
        "strategy": one.strategy,
        "chunks": one.chunks,
        "samples_per_gpu": one.share,
        "memory_bytes": one.memory,
        "memory_total_bytes": one.total,
        "network_bytes": one.network,
    }


def plan(config: str, settings: list[str], gpus: int, gpu: str, samples: int | None = None) -> Plan:
    """The plan of a configuration. Raises ConfigError for one that could not run on so many GPUs."""
    if gpu not in GPUS:
        raise ConfigError(f"--gpu {gpu}: the choices are {', '.join(GPUS)}")
    if gpus < 1:
        raise ConfigError(f"--gpus {gpus} must be at least 1")
    with distributed.planned(gpus, max(1, gpus // 8), True):
        loaded = load_config(find_config(config, "pretrain"), settings)
    model, notes = measure(loaded)
    if loaded.train.compile:
        notes.append("train.compile=true fuses operations: activations are usually a third less than this")
    return Plan(
        config=loaded,
        gpus=gpus,
        gpu=gpu,
        chosen=estimate(loaded, model, gpus),
        others=list(_others(loaded, model, gpus)),
        samples=samples if samples is not None else _samples(loaded),
        parameters=model.total,
        notes=notes,
    )


def _others(config: PretrainConfig, model: Model, gpus: int) -> Iterator[Estimate]:
    """Strategies and chunks that this batch allows."""
    share = config.data.batch_size // gpus
    for word in [word for word in WORDS if (word == "single") == (gpus == 1)]:
        for chunks in (1, 2, 4, 8, 16, 32):
            if share % chunks == 0:
                changed = replace(config.train, strategy=word, chunks=chunks)
                yield estimate(replace(config, train=changed), model, gpus)


def _samples(config: PretrainConfig) -> int | None:
    if config.data.train == "synthetic":
        return None
    try:
        given = sources_of(config.data.train, "data.train")
        return sum(counts([path for source in given for path in source.shards], config.data.store()))
    except UserError:
        return None


def report(made: Plan, as_json: bool) -> None:
    """Prints it."""
    print(json.dumps(made.to_dict()) if as_json else "\n".join(made.lines()))
