"""Compares estimates of `clipfuse plan` with runs on the CPU; prints one JSON line per case.

    python -m tests.bench.plan [--quick]

Each case trains two steps on constant random samples of full length, in processes of its own.

- `measured_mib`: the peak of what torch has allocated since before the model was built, from the allocator's memory events
  in the profiler.
- `resident_mib`: by how much the resident memory of the process grows at its peak; it includes the kernels' workspaces.
- `estimated_mib`: the plan's total without its allowance for CUDA and NCCL.
- `error`: estimated / measured - 1.
"""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

MIB = 2**20
BASE = [
    "image.size=96",
    "image.args={patch_size: 8, embed_dim: 192, depth: 4, num_heads: 3, global_pool: avg, fc_norm: false}",
    "text.args={model_type: clip_text_model, vocab_size: 8192, hidden_size: 192, intermediate_size: 768, "
    "num_hidden_layers: 3, num_attention_heads: 3}",
    "text.length=48",
    "text.groups=1",
    "text.tokenizer=none",
    "data.train=synthetic",
    "data.val=null",
    "train.eval_every=0",
    "train.steps=2",
    "train.threads=1",
]
WIDE = [
    "image.args={patch_size: 16, embed_dim: 512, depth: 6, num_heads: 8, global_pool: avg, fc_norm: false}",
    "text.args={model_type: clip_text_model, vocab_size: 8192, hidden_size: 512, intermediate_size: 2048, "
    "num_hidden_layers: 6, num_attention_heads: 8}",
]
"""40 million parameters and few tokens: weights dominate memory, not activations."""
LARGE_BATCH = ["image.size=32", "image.args.depth=1", "text.args.num_hidden_layers=1", "text.length=8", "model.dim=512"]
"""Small towers and a large batch: the loss dominates memory."""
CASES: dict[str, tuple[int, list[str]]] = {
    "single": (1, ["data.batch_size=48"]),
    "single, 4 chunks": (1, ["data.batch_size=96", "train.chunks=4"]),
    "single, checkpointing": (1, ["data.batch_size=48", "image.checkpointing=true", "text.checkpointing=true"]),
    "single, bf16": (1, ["data.batch_size=48", "train.precision=bf16"]),
    "single, frozen images": (1, ["data.batch_size=48", "image.trainable_blocks=0"]),
    "single, wide": (1, [*WIDE, "data.batch_size=8"]),
    "single, convolutions": (1, ["data.batch_size=16", "image.name=resnet18", "image.args={}"]),
    "single, batch of 2048": (1, [*LARGE_BATCH, "data.batch_size=2048"]),
    "ddp": (2, ["data.batch_size=64", "train.strategy=ddp"]),
    "ddp, wide": (2, [*WIDE, "data.batch_size=16", "train.strategy=ddp"]),
    "fsdp2": (2, ["data.batch_size=64", "train.strategy=fsdp2"]),
    "fsdp2, wide": (2, [*WIDE, "data.batch_size=16", "train.strategy=fsdp2"]),
    "fsdp2, wide, 2 chunks": (2, [*WIDE, "data.batch_size=16", "train.strategy=fsdp2", "train.chunks=2"]),
    "zero1, wide": (2, [*WIDE, "data.batch_size=16", "train.strategy=zero1"]),
    "zero2, wide": (2, [*WIDE, "data.batch_size=16", "train.strategy=zero2"]),
    "zero3, wide": (2, [*WIDE, "data.batch_size=16", "train.strategy=zero3"]),
}
QUICK = ("single", "single, 4 chunks", "single, checkpointing", "single, wide", "ddp, wide")


def load_configuration(settings: list[str]) -> Any:
    """Return the configuration of a case."""
    from pretrain.config import find_config
    from pretrain.train import load_config

    return load_config(find_config("scenes", "pretrain"), [*BASE, *settings])


def estimate(settings: list[str], world: int) -> float:
    """Return the plan's estimate for one process in MiB."""
    from launch import plan
    from launch.plan.measure import measure_model
    from pretrain.runtime import distributed

    with distributed.assume_world(world, 1, False):
        config = load_configuration(settings)
    model, _ = measure_model(config)
    return plan.estimate(config, model, world, overhead=False).total / MIB


def measure(settings: list[str]) -> dict[str, float]:
    """Train two steps in this process, which may be one of a group, and return peak memory in MiB."""
    from launch.plan.measure import PlaceholderTokenizer
    from pretrain import model as models
    from pretrain import registry, strategies
    from pretrain.data.batch import Batch
    from pretrain.runtime import distributed
    from pretrain.training import flops, objective
    from pretrain.training.step import train_step

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    config = load_configuration(settings)
    tokenizer: Any = PlaceholderTokenizer(8192)
    batch_size = config.data.batch_size // distributed.world_size()
    sample = flops.build_sample(config.image.size, config.text.length)
    inputs = {name: x.expand(batch_size, *x.shape[1:]).contiguous() for name, x in sample.inputs.items()}
    masks = {name: x.expand(batch_size, *x.shape[1:]).contiguous() for name, x in sample.masks.items()}
    batch = Batch(inputs, masks, [str(i) for i in range(batch_size)])
    train = config.train
    before = _read_peak_resident(reset=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss = registry.get_component("losses", config.loss.name)
        scaled = replace(config.model, logit_scale=loss.LOGIT_SCALE, logit_bias=loss.LOGIT_BIAS)
        model = models.build(models.tower_configs(config), scaled, tokenizer)
        strategy = strategies.build_strategy(train.strategy, train.precision, config.optim, torch.device("cpu"))
        strategy.setup(model)
        strategy.model.train()
        task = objective.Contrastive(loss.build(config.loss))
        for step in range(2):
            train_step(strategy, task, batch, train.chunks, 1e-4, (0, step, distributed.rank()))
    resident = _read_peak_resident() - before
    events = profile.profiler.kineto_results.events()
    sizes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    allocated = peak = 0
    for _, size in sizes:
        allocated += size
        peak = max(peak, allocated)
    return {"measured_mib": peak / MIB, "resident_mib": resident / MIB}


def _read_peak_resident(reset: bool = False) -> int:
    """Return the peak of resident bytes since the last reset. After a reset it is the current number."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def run_case(name: str) -> dict[str, Any]:
    """Measure and estimate one case, each in processes of its own."""
    from tests.support import world

    processes, settings = CASES[name]
    figures = world.run(measure, processes, settings, timeout=1500.0)[0]
    estimated = estimate(settings, processes)
    return {"case": name, "estimated_mib": estimated, **figures, "error": estimated / figures["measured_mib"] - 1}


def main() -> None:
    """Run the cases and print their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="run only five cases")
    parser.add_argument("--case", action="append", choices=list(CASES))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in args.case or (QUICK if args.quick else CASES):
        print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in run_case(name).items()}), flush=True)


if __name__ == "__main__":
    main()
