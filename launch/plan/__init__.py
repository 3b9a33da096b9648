"""clipfuse plan CONFIG --gpus N [--gpu h100]: memory of a GPU by part, bytes sent per step, steps per epoch.

measure.py      the sizes of the model; footprint.py: its activations, by one pass on tensors without contents
estimate.py     memory and network traffic, from those sizes and the strategy

Weights, gradients, optimizer state, loss and network follow from how each strategy spreads them. A bench in tests/bench
compares the estimate with measured runs. What CUDA and NCCL keep for themselves is a fixed allowance, not measured.
May import pretrain.

Measured: within 10 % of the real peak on the CPU for single, ddp and fsdp2.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from launch.plan.estimate import GIB, USAGE, Estimate, ModelSize, estimate
from launch.plan.measure import measure_built_stages, measure_stages
from pretrain.config import find_config
from pretrain.data.config import resolve_sources
from pretrain.data.shards.paths import count_samples
from pretrain.errors import ConfigError, UserError
from pretrain.model import DualEncoder
from pretrain.printable import format_count
from pretrain.runtime import distributed
from pretrain.runtime.gpus import GPUS, find_gpu, peak_flops
from pretrain.strategies import STRATEGIES
from pretrain.train import PretrainConfig, load_config
from pretrain.training.stages import RunStages, resolve, stage_configs

MAX_CPU_PARAMETERS = 50_000_000
"""Largest model whose memory `--dry-run` estimates on a machine without a GPU, in a few seconds."""


@dataclass
class Plan:
    """The estimates of a configuration on some GPUs, and how they are printed."""

    config: PretrainConfig
    gpus: int
    gpu: str
    chosen: Estimate
    """Of the stage that needs the most memory."""
    others: list[Estimate]
    samples: int | None
    """Samples per epoch; None if the shards are not on this machine."""
    parameters: int
    notes: list[str] = field(default_factory=list)
    stages: list[Estimate] = field(default_factory=list)
    """Of each stage, where the run has several."""

    @property
    def batch_size(self) -> int:
        """Samples a step on all GPUs."""
        return self.chosen.share * self.gpus

    @property
    def capacity(self) -> int:
        """Bytes of memory of the GPU."""
        return GPUS[self.gpu].memory_gb * 10**9

    def seconds(self) -> float:
        """Seconds of computation per step, at USAGE of the GPU's peak."""
        return self._seconds_of(self.chosen)

    def _seconds_of(self, estimated: Estimate) -> float:
        return estimated.flops / (peak_flops(self.gpu, self.config.train.precision, self.uses_tf32()) * USAGE)

    def uses_tf32(self) -> bool:
        """Whether the run's fp32 products are computed in TF32."""
        return self.config.performance.tf32

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values: bytes, samples, seconds."""
        total = self.batch_size
        return {
            "gpus": self.gpus,
            "gpu": self.gpu,
            "gpu_bytes": self.capacity,
            "parameters": self.parameters,
            "batch_size": total,
            "samples_per_epoch": self.samples,
            "steps_per_epoch": None if self.samples is None else -(-self.samples // self.config.data.batch_size),
            "seconds_per_step": self.seconds(),
            "chosen": _to_dict(self.chosen),
            "others": [_to_dict(other) for other in self.others],
            "notes": self.notes,
        } | ({"stages": list(map(_to_dict, self.stages))} if self.stages else {})

    def lines(self) -> Iterator[str]:
        """Yield the lines of the table."""
        chosen, train = self.chosen, self.config.train
        yield (
            f"{self.parameters:,} parameters on {self.gpus} {self.gpu}, train.strategy={chosen.strategy} "
            f"train.precision={train.precision}: {chosen.share:,} of {self.batch_size:,} samples per GPU, "
            + (f"in {chosen.chunks} chunks" if chosen.chunks > 1 else "at once")
        )
        yield ""
        yield "memory per GPU          GiB"
        for name, size in chosen.memory.items():
            if size:
                yield f"  {name:18} {size / GIB:8.2f}"
        fits = "fits" if chosen.total <= self.capacity else "does NOT fit"
        yield f"  {'total':18} {chosen.total / GIB:8.2f}   of {self.capacity / GIB:.1f}: {fits}"
        yield ""
        yield "network per GPU and step MB"
        for name, size in chosen.network.items():
            yield f"  {name:18} {size / 1e6:8.1f}"
        yield ""
        rate = self.batch_size / self.seconds()
        yield f"computation: {self.seconds():.3f} s per step at {USAGE:.0%} of the peak, {rate:,.0f} samples/s on all GPUs"
        sent = sum(chosen.network.values())
        if sent:
            link = GPUS[self.gpu].link
            node, fast, slow = sent / (link * 1e9), sent / 50e9, sent / 1.25e9
            yield f"network in a node: {node:.3f} s per step at {link:g} GB/s per GPU"
            yield f"network: {fast:.3f} s per step at 50 GB/s per GPU (400 Gb/s), {slow:.2f} s at 1.25 GB/s (10 Gb/s)"
        yield self.describe_length()
        yield from self.describe_stages()
        yield ""
        chunks = sorted({other.chunks for other in self.others})
        yield f"{'GiB by train.chunks':24}" + "".join(f"{count:>8}" for count in chunks) + "     MB sent"
        for word in dict.fromkeys(other.strategy for other in self.others):
            row = [other for other in self.others if other.strategy == word]
            cells = [f"{other.total / GIB:.2f}{' ' if other.total <= self.capacity else '!'}" for other in row]
            least, most = (sum(other.network.values()) / 1e6 for other in (row[0], row[-1]))
            sent_mb = f"{least:10,.0f}" + (f" to {most:,.0f}" if most > least else "")
            yield f"  train.strategy={word:8}" + "".join(f"{cell:>8}" for cell in cells) + f"  {sent_mb}"
        yield f"  (! does not fit in {self.capacity / GIB:.1f})"
        for note in self.notes:
            yield f"note: {note}"

    def describe_length(self) -> str:
        """Return the line on the steps of an epoch and of the run, and on the hours of computation."""
        if self.samples is None:
            return "epoch: the shards are not on this machine; give --samples N for the steps of an epoch"
        run = resolve(self.config, self.samples)
        seconds = [self._seconds_of(estimated) for estimated in self.stages or [self.chosen]]
        hours = sum(stage.steps * cost for stage, cost in zip(run, seconds, strict=True)) / 3600
        samples, steps = format_count(self.samples, "sample"), format_count(-(-self.samples // run[-1].batch_size), "step")
        return f"epoch: {samples} = {steps}; the run: {format_count(run.total_steps, 'step')}, {hours:,.1f} h of computation"

    def describe_stages(self) -> Iterator[str]:
        """Yield a line for each stage; none where the run has one, or its length is not known."""
        if not self.stages or (self.samples is None and not self.config.train.steps):
            return
        run: RunStages = resolve(self.config, self.samples or 0)
        passes = 1 if self.config.train.chunks == 1 else 4 / 3  # a cached step encodes twice
        lines = run.describe([estimated.flops / estimated.share / passes for estimated in self.stages])
        for line, estimated in zip(lines, self.stages, strict=True):
            yield f"{line}; {estimated.total / GIB:.2f} GiB, {self._seconds_of(estimated):.3f} s a step"


def _to_dict(estimated: Estimate) -> dict[str, Any]:
    return {
        "strategy": estimated.strategy,
        "chunks": estimated.chunks,
        "samples_per_gpu": estimated.share,
        "memory_bytes": estimated.memory,
        "memory_total_bytes": estimated.total,
        "network_bytes": estimated.network,
    }


def build_plan(config: str, settings: list[str], gpus: int, gpu: str, samples: int | None = None) -> Plan:
    """Estimate a configuration on `gpus` GPUs of kind `gpu`, and on every other strategy that its batch allows.

    samples: per epoch, where the shards are not on this machine. Raises ConfigError if it could not run on so many GPUs.
    """
    if gpu not in GPUS:
        raise ConfigError(f"--gpu {gpu}: the choices are {', '.join(GPUS)}")
    if gpus < 1:
        raise ConfigError(f"--gpus {gpus} must be at least 1")
    with distributed.assume_world(gpus, max(1, gpus // 8), True):
        loaded = load_config(find_config(config, "pretrain"), settings)
    sizes, notes = measure_stages(loaded)
    configs = stage_configs(loaded)
    estimates = [estimate(changed, size, gpus) for changed, size in zip(configs, sizes, strict=True)]
    largest = _find_largest(estimates)
    if loaded.train.compile != "false":
        notes.append(f"train.compile={loaded.train.compile} fuses operations: activations are usually a third less than this")
    if len(estimates) > 1:
        notes.append(f"memory, network and computation are those of stage {largest + 1} of {len(estimates)}, the largest")
    return Plan(
        config=loaded,
        gpus=gpus,
        gpu=gpu,
        chosen=estimates[largest],
        others=list(_estimate_others(configs, sizes, gpus)),
        samples=samples if samples is not None else _count_samples(loaded),
        parameters=sizes[-1].total,
        notes=notes,
        stages=estimates if len(estimates) > 1 else [],
    )


def _find_largest(estimates: list[Estimate]) -> int:
    """Return the index of the stage that needs the most memory."""
    return max(range(len(estimates)), key=lambda i: estimates[i].total)


def _estimate_others(configs: list[PretrainConfig], sizes: list[ModelSize], gpus: int) -> Iterator[Estimate]:
    """Estimate every strategy and number of chunks that the batches of all stages allow, in the largest stage."""
    shares = [config.data.batch_size // gpus for config in configs]
    for word in [word for word in STRATEGIES if (word == "single") == (gpus == 1)]:
        for chunks in (1, 2, 4, 8, 16, 32):
            if all(share % chunks == 0 for share in shares):
                estimates = [
                    estimate(replace(config, train=replace(config.train, strategy=word, chunks=chunks)), size, gpus)
                    for config, size in zip(configs, sizes, strict=True)
                ]
                yield estimates[_find_largest(estimates)]


def _count_samples(config: PretrainConfig) -> int | None:
    if config.data.train == "synthetic":
        return None
    try:
        given = resolve_sources(config.data.train, "data.train")
        return sum(count_samples([path for source in given for path in source.shards], config.data.build_cache()))
    except UserError:
        return None


def describe_estimate(config: PretrainConfig, model: DualEncoder, processes: int) -> list[str]:
    """Return the lines of `--dry-run` on memory and time, on this machine's device, or why they are not estimated.

    model: built, on the CPU.
    """
    parameters = sum(p.numel() for p in model.parameters())
    if distributed.device().type == "cpu" and parameters > MAX_CPU_PARAMETERS:
        reason = f"{parameters:,} parameters are for a GPU, and none is here"
        return [f"memory and time: not estimated: {reason}; clipfuse plan CONFIG --gpus N estimates them"]
    if distributed.device().type == "cpu":
        capacity, gpu = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // distributed.local_world_size(), None
        where = "of this machine"
    else:
        properties = torch.cuda.get_device_properties(distributed.device())
        capacity, gpu, where = properties.total_memory, find_gpu(properties.name), f"of {properties.name}"
    try:
        sizes, _ = measure_built_stages(model, config)
    except Exception as error:  # towers of anybody's raise what they like on tensors without contents
        return [f"memory and time: not estimated: {type(error).__name__}: {' '.join(str(error).split())[:160]}"]
    pairs = zip(stage_configs(config), sizes, strict=True)
    estimates = [estimate(changed, size, processes, overhead=gpu is not None) for changed, size in pairs]
    estimated = estimates[_find_largest(estimates)]
    parts = ", ".join(f"{name} {value / GIB:.2f}" for name, value in estimated.memory.items() if value >= GIB / 200)
    fits = "fits in" if estimated.total <= capacity else "does NOT fit in"
    memory = f"memory: {estimated.total / GIB:.2f} GiB a process ({parts}) {fits} {capacity / GIB:.1f} GiB {where}"
    if len(estimates) > 1:
        memory += f"; stage {_find_largest(estimates) + 1} needs the most"
    if gpu is None:
        return [memory, "time: not estimated on this device, whose speed is not known; the first lines of a run say it"]
    plan = Plan(config, processes, gpu, estimated, [], _count_samples(config), sizes[-1].total)
    plan.stages = estimates if len(estimates) > 1 else []
    return [memory, f"time: {plan.seconds():.3f} s a step at {USAGE:.0%} of the peak; {plan.describe_length()}"]


def print_plan(plan: Plan, as_json: bool) -> None:
    """Print a plan as a table, or as one JSON object."""
    print(json.dumps(plan.to_dict()) if as_json else "\n".join(plan.lines()))
