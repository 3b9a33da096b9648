"""Compares time and memory of each context with dense attention, by the number of patches.

    python -m tests.bench.context [--patches 256 1024 4096 16384] [--device cpu|cuda]

In a case `self`, the image attends to itself; in `cross`, 32 words attend to it. There is one image, width 256, 8 heads,
float32. Projections are included, and for `pooled` also the computation of the latents.

Prints one JSON line per case:

- `seconds`: the median time of a forward and backward pass. On the CPU it is the processor time of one core, which other
  work on the machine hardly changes.
- `mib`: the peak memory that a pass adds, in MiB: resident memory on the CPU, where each case has a process of its own, and
  allocated bytes on CUDA.
- `time_of_dense` and `memory_of_dense`: both as a fraction of dense attention's.

`region` is the setting that suits a large grid: its side grows with the grid's, so that the number of regions stays small.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from math import isqrt
from typing import Any

import torch

from finetune.attention.multihead import Attention, Tokens
from finetune.context import Queries
from pretrain import registry
from tests.support import read_peak_mib

WIDTH, HEADS, WORDS = 256, 8, 32
CASES = [("self", name) for name in ("dense", "local", "coarse_to_fine", "pooled")]
CASES += [("cross", name) for name in ("dense", "coarse_to_fine", "pooled")]


def build_settings(name: str, kind: str, patches: int) -> dict[str, Any]:
    """Return the configuration of the context in a case."""
    if name == "coarse_to_fine":
        return {"region": 4 if kind == "cross" or patches <= 1024 else 8, "keep": 8 if kind == "cross" else 4}
    return {"local": {"window": 8}, "pooled": {"latents": 64}}.get(name, {})


def build_step(kind: str, name: str, patches: int, device: str) -> Callable[[], None]:
    """Return a function that runs one forward and backward pass of a case."""
    torch.manual_seed(0)
    side = isqrt(patches)
    component = registry.get_component("context", name)
    attention = Attention(WIDTH, heads=HEADS).to(device)
    context = component.build(component.Config(**build_settings(name, kind, patches)), WIDTH).to(device)
    image = torch.randn(1, side * side, WIDTH, device=device, requires_grad=True)
    words = torch.randn(1, WORDS, WIDTH, device=device, requires_grad=True)

    def step() -> None:
        summary, _ = context.summarize(Tokens(image, None, (side, side)))
        queries = attention.project_queries(image if kind == "self" else words)
        out, _ = context(Queries(queries, is_self=kind == "self"), attention.build_keys(summary))
        attention.project_output(out).square().mean().backward()
        for leaf in (image, words, *attention.parameters(), *context.parameters()):
            leaf.grad = None

    return step


def measure(kind: str, name: str, patches: int, device: str, seconds: float) -> dict[str, float]:
    """Return the median time of a pass and the peak memory above what was in use before the first pass."""
    step = build_step(kind, name, patches, device)
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    else:
        before = read_peak_mib()
    clock = time.perf_counter if device == "cuda" else time.process_time
    times, start = [], clock()
    while not times or (clock() - start < seconds and len(times) < 50):
        begin = clock()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - begin)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else read_peak_mib()
    return {"seconds": statistics.median(times[1:] or times), "mib": peak - before}


def main() -> None:
    """Measure all cases and print their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patches", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=2.0, help="time spent on each case, at least one pass")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for patches in args.patches:
        dense: dict[str, dict[str, float]] = {}
        for kind, name in CASES:
            case = (kind, name, patches, args.device, args.seconds)
            if args.device == "cuda":
                measure(kind, name, patches, args.device, 0)
                figures = measure(*case)
            else:  # torch has not computed anything in this process yet, so forking is safe
                with multiprocessing.get_context("fork").Pool(1) as pool:
                    figures = pool.apply(measure, case)
            if name == "dense":
                dense[kind] = figures
            line = {
                "bench": "context",
                "device": args.device,
                "patches": patches,
                "what": kind,
                "context": name,
                **build_settings(name, kind, patches),
                "seconds": round(figures["seconds"], 5),
                "mib": round(figures["mib"], 1),
                "time_of_dense": round(figures["seconds"] / dense[kind]["seconds"], 3),
                "memory_of_dense": round(figures["mib"] / max(dense[kind]["mib"], 0.1), 3),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
