"""Compares memory and time of our loss with open_clip's; prints one JSON line per batch size.

    python -m tests.bench.loss [--batch 4096 16384 65536] [--dim 512] [--threads 2] [--rounds 2] [--loss clip] [--tile 0]
        [--device cuda] [--precision fp32]

Each measurement runs in a process of its own, in float32: one process has the whole batch and computes the loss and the
gradients of both features and of the scale. The two losses take turns.

- `memory_mib`: by how much the resident memory grows at its peak, in MiB, without the features and with the gradients. With
  --device cuda it is the peak of what torch allocates.
- `fused_memory_mib`, `fused_seconds`: the same with --device cuda and loss.kernel=fused, where Triton is installed.
- `seconds`: the best of the rounds.
- On a GPU a measurement is the last of three passes in its process, so that memory is allocated and kernels are compiled.
- Ratios are ours divided by open_clip's; null if open_clip's loss does not fit into the free memory of the machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def run_once(args: argparse.Namespace) -> dict[str, float]:
    """Compute loss and gradients once, in this process; return memory in MiB, seconds and the loss."""
    from pretrain import registry

    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    g = torch.Generator().manual_seed(0)
    features = {
        name: F.normalize(torch.randn(args.batch[0], args.dim, generator=g), dim=1).to(device).requires_grad_()
        for name in ("image", "text")
    }
    module = registry.get_component("losses", args.loss)
    scale = torch.full((1,), module.LOGIT_SCALE, device=device).exp().requires_grad_()
    bias = None if module.LOGIT_BIAS is None else torch.full((1,), module.LOGIT_BIAS, device=device).requires_grad_()
    compute_loss = _build_loss(args, module)
    warm = {name: x[:400].detach().requires_grad_() for name, x in features.items()}
    compute_loss(warm, scale, bias).backward()  # starts threads and loads libraries, for tiles as well
    leaves = [x for x in (*features.values(), scale, bias) if x is not None]
    for _ in range(3 if device.type == "cuda" else 1):
        for leaf in leaves:
            leaf.grad = None
        _synchronize(device)
        before = _read_memory(device)
        start = time.perf_counter()
        loss = compute_loss(features, scale, bias)
        loss.backward()
        _synchronize(device)
        seconds = time.perf_counter() - start
    return {"memory": _read_memory(device, peak=True) - before, "seconds": seconds, "loss": float(loss.detach())}


def _synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def _build_loss(args: argparse.Namespace, module: Any) -> Any:
    """Return our loss or open_clip's as a function of (features, scale, bias)."""
    if args.who != "peer":
        kernel = "fused" if args.who == "fused" else "plain"
        our_loss = module.build(module.Config(tile=args.tile, precision=args.precision, kernel=kernel))
        our_loss.max_logit = 102.0  # DualEncoder.max_logit()
        return lambda features, scale, bias: our_loss(features, scale, bias, {})[0]
    from open_clip.loss import ClipLoss, SigLipLoss

    peer_loss = {"clip": ClipLoss, "siglip": SigLipLoss}[args.loss]()

    def compute_peer_loss(features: dict[str, Tensor], scale: Tensor, bias: Tensor | None) -> Tensor:
        loss: Tensor = peer_loss(features["image"], features["text"], scale, bias)
        return loss

    return compute_peer_loss


def _read_memory(device: torch.device, peak: bool = False) -> float:
    """Return the memory in use now in MiB, and reset the peak; or return the peak since then."""
    if device.type == "cuda":
        if not peak:
            torch.cuda.reset_peak_memory_stats()
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**20
    if not peak:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak to the current resident memory
    words = Path("/proc/self/status").read_text().split()
    return int(words[words.index("VmHWM:" if peak else "VmRSS:") + 1]) / 2**10


def run_in_process(who: str, batch: int, args: argparse.Namespace) -> dict[str, float] | None:
    """Call `run_once` in a fresh process; return None if it fails, for example because memory ran out."""
    options = ["--who", who, "--batch", batch, "--dim", args.dim, "--threads", args.threads, "--loss", args.loss]
    command = [sys.executable, "-m", "tests.bench.loss", *map(str, options), "--tile", str(args.tile)]
    command += ["--precision", args.precision]
    process = subprocess.run([*command, "--device", args.device], capture_output=True, text=True)
    if process.returncode:
        return None
    figures: dict[str, float] = json.loads(process.stdout.splitlines()[-1])
    return figures


def fits(batch: int, device: str) -> bool:
    """Return whether the four B x B float32 matrices of open_clip's loss fit into memory.

    Measured: 4,152 MiB at B = 16,384.
    """
    if device == "cuda":
        return 4.2 * 4 * batch**2 < torch.cuda.get_device_properties(0).total_memory
    words = Path("/proc/meminfo").read_text().split()
    free = int(words[words.index("MemAvailable:") + 1]) * 1024
    return 4.5 * 4 * batch**2 < free


def measure(batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Measure both losses in turn and return the figures of a batch size, each the best of the rounds."""
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "peer": [], "fused": []}
    has_kernels = args.device == "cuda" and importlib.util.find_spec("triton") is not None
    for _ in range(args.rounds):
        for who in ["ours", *(["peer"] if fits(batch, args.device) else []), *(["fused"] if has_kernels else [])]:
            figures = run_in_process(who, batch, args)
            if figures is None and who == "ours":
                raise SystemExit(f"our loss failed at a batch of {batch}")
            runs[who] += [figures] if figures else []
    ours, peer, fused = (
        {key: min(run[key] for run in results) for key in results[0]} if results else None for results in runs.values()
    )
    assert ours is not None
    line: dict[str, Any] = {"batch": batch, "dim": args.dim, "loss": args.loss, "threads": args.threads}
    line |= {"memory_mib": round(ours["memory"], 1), "seconds": round(ours["seconds"], 3), "value": round(ours["loss"], 5)}
    for key, name in (("memory", "memory_ratio"), ("seconds", "time_ratio")):
        line[name] = None if peer is None else round(ours[key] / peer[key], 4)
    if args.device == "cuda":
        line |= {"device": torch.cuda.get_device_name(), "precision": args.precision}
        line["fused_memory_mib"] = None if fused is None else round(fused["memory"], 1)
        line["fused_seconds"] = None if fused is None else round(fused["seconds"], 5)
        line["seconds"] = round(ours["seconds"], 5)
    if peer is not None:
        line |= {"peer_memory_mib": round(peer["memory"], 1), "peer_seconds": round(peer["seconds"], 5)}
        line["peer_value"] = round(peer["loss"], 5)
    return line


def main() -> None:
    """Measure each batch size and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", help="default: 1024 4096 16384; 4096 to 65536 on a GPU")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--loss", default="clip")
    parser.add_argument("--tile", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default="fp32", help="of our products, on a GPU")
    parser.add_argument("--who", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.who:
        print(json.dumps(run_once(args)))
        return
    for batch in args.batch or ([4096, 8192, 16384, 32768, 65536] if args.device == "cuda" else [1024, 4096, 16384]):
        print(json.dumps(measure(batch, args)), flush=True)


if __name__ == "__main__":
    main()
