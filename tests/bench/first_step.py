"""Measures the time from typing `clipfuse pretrain` to the first step of a small run. Prints one JSON line.

    python -m tests.bench.first_step [--rounds 3] [--strategy single]

A tiny model on drawn scenes, one step, in a fresh interpreter. Each figure is the smallest of the rounds:

    seconds      wall time from the command to the first line of metrics.jsonl: interpreter, imports, model, data, one step
    cpu          CPU seconds of the whole command, which also saves a checkpoint. Other processes change it less
    torch_cpu    CPU seconds of `python -c "import torch"` in the same round
    ratio        cpu / torch_cpu, the median of the rounds: comparable between machines
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.support import ROOT, environment, make_small, read_jsonl


def run_child(*command: str, cwd: Path) -> float:
    """Run this interpreter and return the CPU seconds of the process and its children."""
    env = environment()
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # compiled modules are kept, as on a user's machine
    process = subprocess.Popen([sys.executable, *command], cwd=cwd, env=env, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(errors.decode(errors="replace")[-2000:])
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Measure and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--strategy", default="single")
    args = parser.parse_args()
    seconds, cpu, torch_cpu = [], [], []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        run, small = root / "run", make_small(root / "small")
        settings = small.settings(run, "train.steps=1", "train.trackers=[tensorboard]", f"train.strategy={args.strategy}")
        for number in range(args.rounds + 1):
            shutil.rmtree(run, ignore_errors=True)
            torch_used = run_child("-c", "import torch", cwd=root)
            begin = time.time()
            used = run_child("-m", "launch.cli", "pretrain", str(ROOT / "configs/pretrain/scenes.yaml"), *settings, cwd=root)
            if number:  # the first round fills the caches
                seconds.append(float(read_jsonl(run / "metrics.jsonl")[0]["time"]) - begin)
                cpu.append(used)
                torch_cpu.append(torch_used)
    ratios = [used / of_torch for used, of_torch in zip(cpu, torch_cpu, strict=True)]
    line = {"seconds": min(seconds), "cpu": min(cpu), "torch_cpu": min(torch_cpu), "ratio": statistics.median(ratios)}
    rounded = {key: round(value, 2) for key, value in line.items()}
    print(json.dumps({"bench": "first_step", "strategy": args.strategy, "rounds": args.rounds, **rounded}))


if __name__ == "__main__":
    sys.exit(main())
