"""Measures what one step costs besides its operators: Python, autograd, dispatch to devices. Prints JSON lines.

    python -m tests.bench.overhead [--strategies single ddp fsdp2 zero1] [--steps 60]

A tiny model (32 wide, 2 blocks a tower, 16 pairs a step), on which operators take microseconds. The figures are milliseconds of
CPU time of the training process, so that other processes on the machine change them little:

    step        one step of the training loop, from one to the next: the loader's share in this process, forward and backward,
                clipping, optimizer, average, metrics every ten steps. The median over steps 20 and later
    operators   the step's operators (recorded below autograd, with their arguments) called again, one after the other, by a loop
                of Python. This counts some of the overhead as operators: a call costs about a microsecond
    overhead    step - operators
    plain       the same forward and backward pass, clip_grad_norm_ and torch's fused AdamW as a script would write them: what
                remains of the overhead is that of timm, transformers and autograd

The strategies run in one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from launch import cli
from pretrain.training import loop
from tests.support import make_small

WARMUP = 20


class RecordOperators(TorchDispatchMode):
    """Records every operator below autograd, with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def time_operators(calls: list[tuple[Any, Any, Any]]) -> float:
    """Return the CPU milliseconds of calling recorded operators again: the median of 20 times."""
    times = []
    with torch.no_grad():
        for _ in range(20):
            begin = time.process_time()
            for func, args, kwargs in calls:
                func(*args, **kwargs)
            times.append(1e3 * (time.process_time() - begin))
    return statistics.median(times)


def time_plain(arguments: tuple[Any, ...], steps: int) -> float:
    """Return the CPU milliseconds of a step that a script would write. arguments: those of train_step()."""
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
    return statistics.median(times[steps // 3 :])


def measure(settings: list[str], steps: int, has_plain: bool) -> dict[str, Any]:
    """Run a training in this process; return its figures in milliseconds of CPU time."""
    train_step = loop.train_step
    begins: list[float] = []
    figures: dict[str, Any] = {}

    def time_and_step(*args: Any) -> Any:
        begins.append(time.process_time())
        if len(begins) < steps:
            return train_step(*args)
        with RecordOperators() as recorder:  # the last step
            out = train_step(*args)
        figures.update(operators_ms=time_operators(recorder.calls), operator_calls=len(recorder.calls))
        if has_plain:
            figures["plain_ms"] = time_plain(args, steps)
        return out

    loop.train_step = time_and_step
    try:
        code = cli.main(["pretrain", "scenes", *settings, f"train.steps={steps}"])
    finally:
        loop.train_step = train_step
    assert code == 0, code
    step = 1e3 * statistics.median(b - a for a, b in zip(begins[WARMUP:], begins[WARMUP + 1 :], strict=False))
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
            more = ["data.train=synthetic", "data.workers=1", "train.log_every=10", f"train.strategy={strategy}", *args.settings]
            settings = small.settings(Path(name) / strategy, *more)
            rows = measure(settings, args.steps, strategy == "single")
            print(json.dumps({"bench": "overhead", "strategy": strategy, **{k: round(v, 3) for k, v in rows.items()}}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
