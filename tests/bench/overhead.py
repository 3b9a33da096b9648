"""Measures what one step costs besides its operators: Python, autograd, dispatch to devices. Prints JSON lines.

    python -m tests.bench.overhead [--strategies single ddp fsdp2 zero1] [--steps 60]

A tiny model (32 wide, 2 blocks a tower, 16 pairs a step), on which operators take microseconds. The figures are milliseconds of
CPU time of the training process, so that other processes on the machine change them little; each is the smallest of many.

    step         one step of the training loop, from one to the next: the loader's share in this process, forward and backward
                 passes, clipping, optimizer
    operators    the step's operators (recorded below autograd, with copies of their arguments) called again, one after the
                 other, by a loop of Python. So a part of the dispatch, about a microsecond a call, counts as operators.
                 Collectives are left out
    overhead     step - operators
    plain        what a script would write: the same forward and backward passes, clip_grad_norm_, torch's fused AdamW. What
                 plain has beyond operators is the share of timm, transformers and autograd
    python_calls calls of Python and C functions in one step, as cProfile counts them: the same on any machine

The strategies run in one process.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from launch import cli
from pretrain.training import loop
from tests.support import make_small

WARMUP = 20


class RecordOperators(TorchDispatchMode):
    """Records every operator below autograd, with copies of its arguments; no collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace not in ("c10d", "_c10d_functional", "profiler", "fsdp"):
            self.calls.append((func, *tree_map(copy_tensor, (args, kwargs))))
        return func(*args, **kwargs)


def copy_tensor(value: Any) -> Any:
    """Return a copy of a tensor, of a shard what it holds; anything else unchanged."""
    if not isinstance(value, torch.Tensor):
        return value
    with torch.no_grad():
        return (value.to_local() if hasattr(value, "to_local") else value).detach().clone()


def time_operators(calls: list[tuple[Any, Any, Any]]) -> float:
    """Return the smallest CPU milliseconds of calling recorded operators again."""
    times = []
    with torch.no_grad():
        for _ in range(30):
            begin = time.process_time()
            for func, args, kwargs in calls:
                func(*args, **kwargs)
            times.append(1e3 * (time.process_time() - begin))
    return min(times)


def time_plain(arguments: tuple[Any, ...], steps: int) -> float:
    """Return the smallest CPU milliseconds of a step that a script would write. arguments: those of train_step()."""
    strategy, objective, batch = arguments[:3]
    model = strategy.module
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True)
    times = []
    for _ in range(steps):
        begin = time.process_time()
        loss, _ = objective.loss(objective.encode(model, batch), batch.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(1e3 * (time.process_time() - begin))
    return min(times)


def measure(settings: list[str], steps: int, has_plain: bool) -> dict[str, Any]:
    """Run a training in this process; return its figures."""
    train_step = loop.train_step
    begins: list[float] = []
    figures: dict[str, Any] = {}
    profile = cProfile.Profile()

    def time_and_step(*args: Any) -> Any:
        begins.append(time.process_time())
        if len(begins) == steps + 1:
            profile.enable()
        if len(begins) < steps + 6:
            return train_step(*args)
        profile.disable()
        figures["python_calls"] = sum(entry.callcount for entry in profile.getstats()) / 5
        with RecordOperators() as recorder:  # the last step
            out = train_step(*args)
        figures.update(operators_ms=time_operators(recorder.calls), operator_calls=len(recorder.calls))
        if has_plain:
            figures["plain_ms"] = time_plain(args, steps)
        return out

    loop.train_step = time_and_step
    try:
        code = cli.main(["pretrain", "scenes", *settings, f"train.steps={steps + 6}"])
    finally:
        loop.train_step = train_step
    assert code == 0, code
    step = 1e3 * min(b - a for a, b in pairwise(begins[WARMUP : steps + 1]))
    return {"step_ms": step, **figures, "overhead_ms": step - figures["operators_ms"]}


def main() -> None:
    """Measure each strategy and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", default=["single", "ddp", "fsdp2", "zero1"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("settings", nargs="*", help="key=value settings of the runs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        small = make_small(Path(name) / "small")
        for strategy in args.strategies:
            more = ["data.train=synthetic", "data.workers=1", "train.log_every=1000", f"train.strategy={strategy}"]
            settings = small.settings(Path(name) / strategy, *more, *args.settings)
            figures = measure(settings, args.steps, strategy == "single")
            rounded = {key: round(value, 3) for key, value in figures.items()}
            print(json.dumps({"bench": "overhead", "strategy": strategy, **rounded}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
