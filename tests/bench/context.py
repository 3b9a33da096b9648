"""Time and memory of each context against dense attention, forward and backward, by the number of patches.

    python -m tests.bench.context [--patches 256 1024 4096 16384] [--device cpu|cuda]

`self`: the picture asks itself; `cross`: 32 words ask it. One picture, width 256, 8 heads, float32; projections are
counted, and for `pooled` reading the summaries. Prints a JSON line a case: the median seconds of a forward and
backward pass (on the CPU the time of one core, which other work on the machine hardly changes), the peak memory it
adds in MiB (resident set on the CPU, each case in a process of its own; allocated bytes on CUDA), and both as shares
of dense attention's. `region` is the setting a large grid wants: its side grows with the grid's, so that regions stay
few.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from math import isqrt
from typing import Any

import torch

from finetune.attention.multihead import Attention, Tokens
from finetune.context import Queries
from pretrain import registry

WIDTH, HEADS, WORDS = 256, 8, 32
CASES = [("self", name) for name in ("dense", "local", "coarse_to_fine", "pooled")]
CASES += [("cross", name) for name in ("dense", "coarse_to_fine", "pooled")]


def settings(name: str, what: str, patches: int) -> dict[str, Any]:
    """The context's settings for a case."""
    if name == "coarse_to_fine":
        return {"region": 4 if what == "cross" or patches <= 1024 else 8, "keep": 8 if what == "cross" else 4}
    return {"local": {"window": 8}, "pooled": {"latents": 64}}.get(name, {})


def prepare(what: str, name: str, patches: int, device: str) -> Callable[[], None]:
    """One forward and backward pass."""
    torch.manual_seed(0)
    side = isqrt(patches)
    part = registry.get_component("context", name)
    attention = Attention(WIDTH, heads=HEADS).to(device)
    context = part.build(part.Config(**settings(name, what, patches)), WIDTH).to(device)
    picture = torch.randn(1, side * side, WIDTH, device=device, requires_grad=True)
    words = torch.randn(1, WORDS, WIDTH, device=device, requires_grad=True)

    def step() -> None:
        seen, _ = context.summarize(Tokens(picture, None, (side, side)))
        queries = attention.project_queries(picture if what == "self" else words)
        out, _ = context(Queries(queries, is_self=what == "self"), attention.build_keys(seen))
        attention.project_output(out).square().mean().backward()
        for leaf in (picture, words, *attention.parameters(), *context.parameters()):
            leaf.grad = None

    return step


def measure(what: str, name: str, patches: int, device: str, seconds: float) -> dict[str, float]:
    """Median time of a pass, and the peak of memory over what stood there before the first."""
    step = prepare(what, name, patches, device)
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    else:
        before = _resident_mib()
    clock = time.perf_counter if device == "cuda" else time.process_time
    times, start = [], clock()
    while not times or (clock() - start < seconds and len(times) < 50):
        begun = clock()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - begun)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else _resident_mib()
    return {"seconds": statistics.median(times[1:] or times), "mib": peak - before}


def _resident_mib() -> float:
    """The highest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patches", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=2.0, help="time spent on each case, at least one pass")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for patches in args.patches:
        dense: dict[str, dict[str, float]] = {}
        for what, name in CASES:
            case = (what, name, patches, args.device, args.seconds)
            if args.device == "cuda":
                measure(what, name, patches, args.device, 0)
                figures = measure(*case)
            else:  # torch has not computed anything in this process yet, so it may fork
                with multiprocessing.get_context("fork").Pool(1) as pool:
                    figures = pool.apply(measure, case)
            if name == "dense":
                dense[what] = figures
            line = {
                "bench": "context",
                "device": args.device,
                "patches": patches,
                "what": what,
                "context": name,
                **settings(name, what, patches),
                "seconds": round(figures["seconds"], 5),
                "mib": round(figures["mib"], 1),
                "time_of_dense": round(figures["seconds"] / dense[what]["seconds"], 3),
                "memory_of_dense": round(figures["mib"] / max(dense[what]["mib"], 0.1), 3),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
