"""Measures what a save costs the step that it falls into. Prints JSON lines.

    python -m tests.bench.saving [--millions 100 500] [--saves 3] [--folder DIR]

A plain model of square linear layers, float32 weights with AdamW's two moments (12 bytes a parameter), is trained on the CPU by
the strategy `single`, and saved as a run saves it. With train.background_saves, the save needs another 12 bytes a parameter for
its copies: 500 million parameters take 14 GB, a billion 28 GB.

    step_ms      the median step without a save
    pause_ms     what the step with a save took beyond the median, on the main thread: the median of the saves
    during_ms    what a step took beyond the median while a save was written in the background; the CPU does both here
    write_s      from the begin of a save until the checkpoint is complete: written, hashed, flushed to disk, renamed
    copy_ms      copying the same tensors in memory, alone: what a pause in the background cannot go below
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from pretrain.optim import OptimConfig
from pretrain.runtime import distributed
from pretrain.strategies.single import Single
from pretrain.training.config import RunPlan, TrainConfig
from pretrain.training.run_dir import RunFolder
from pretrain.training.run_state import Run
from pretrain.training.stages import RunStages

WIDTH = 4096
ROWS = 8
STEPS_BEFORE = 5


class Linears(nn.Module):
    """Square linear layers, WIDTH wide, one after the other."""

    def __init__(self, parameters: int) -> None:
        super().__init__()
        count = max(1, round(parameters / WIDTH**2))
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(count))

    def forward(self, rows: Tensor) -> Tensor:
        """Return (ROWS, WIDTH) for (ROWS, WIDTH)."""
        for layer in self.layers:
            rows = rows + layer(rows)
        return rows

    def clamp_(self) -> None:
        """Change nothing; a strategy calls it after each step."""


def build_run(folder: Path, parameters: int, is_background: bool) -> Run:
    """Build a run whose data and evaluation are left out."""
    strategy = Single("fp32", OptimConfig(warmup=0), torch.device("cpu"))
    train = TrainConfig(steps=1000, save_every=1000, keep=1, on_spike="ignore", background_saves=is_background)
    plan = RunPlan(
        seed=0, stages=RunStages.constant(1000, ROWS, strategy.optim), eval_every=0, train=train, optim=strategy.optim,
        resolved_config={}, identity={}, save_files=lambda folder: None,
    )  # fmt: skip
    loader = SimpleNamespace(state_dict=lambda: {"position": 0})
    model, run_folder = Linears(parameters), RunFolder(f"{folder}/run")
    run_folder.checkpoints.mkdir(parents=True)
    run = Run(plan, run_folder, strategy, model, cast(Any, loader), None)
    strategy.setup(model)
    return run


def time_step(run: Run, rows: Tensor, is_saving: bool) -> float:
    """Make one step, with a save at its end if wanted; return its milliseconds."""
    begin = time.perf_counter()
    run.strategy.backward(run.strategy.model(rows).square().mean())
    run.strategy.apply(1e-4)
    run.step += 1
    if is_saving:
        run.save()
    return 1e3 * (time.perf_counter() - begin)


def measure(parameters: int, is_background: bool, saves: int, parent: str | None) -> dict[str, Any]:
    """Train and save; return the figures."""
    rows = torch.randn(ROWS, WIDTH)
    pauses, writes, during = [], [], []
    with tempfile.TemporaryDirectory(dir=parent) as name:
        run = build_run(Path(name), parameters, is_background)
        usual = [time_step(run, rows, False) for _ in range(STEPS_BEFORE)][1:]
        with run.saves:
            for _ in range(saves):
                begin = time.perf_counter()
                pauses.append(time_step(run, rows, True))
                while is_background and not run.saves.is_done():
                    during.append(time_step(run, rows, False))
                run.settle()
                writes.append(time.perf_counter() - begin)
                usual += [time_step(run, rows, False) for _ in range(STEPS_BEFORE)]
        step = statistics.median(usual)
        state = [value for values in run.strategy.optimizer_state().values() for value in values.values()]
        state += run.strategy.full_weights().values()
        begin = time.perf_counter()
        for value in state:
            value.clone()
        copy = 1e3 * (time.perf_counter() - begin)
    return {
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "background": is_background,
        "step_ms": step,
        "pause_ms": statistics.median(pauses) - step,
        "during_ms": statistics.median(during) - step if during else None,
        "write_s": statistics.median(writes),
        "copy_ms": copy,
    }


def main() -> None:
    """Measure each size in turn, without and with saves in the background."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", nargs="+", type=int, default=[100, 500], help="parameters")
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--folder", help="where to write; the system's temporary folder by default")
    args = parser.parse_args()
    distributed.pin_threads(0)
    for millions in args.millions:
        for is_background in (False, True):
            figures = measure(millions * 1_000_000, is_background, args.saves, args.folder)
            rounded = {name: round(value, 3) if isinstance(value, float) else value for name, value in figures.items()}
            print(json.dumps({"bench": "saving", **rounded}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
