"""Memory and time of the softmax loss with its gradients, ours and open_clip's ClipLoss; one JSON line a size.

    python -m tests.bench.loss [--batch 4096 16384 65536] [--dim 512] [--threads 2] [--rounds 2] [--loss clip] [--tile 0]

Each measurement runs in a process of its own: float32, one process's whole batch, loss and gradients of both features and
the scale. `memory` is by how much the process's resident memory grows at its peak (features excluded, gradients included),
in MiB; `seconds` the best of the rounds, the two taking turns. Ratios are ours over theirs; null where theirs does not fit
into the machine's free memory. With --device cuda memory is what torch allocated at the peak.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def one(arguments: argparse.Namespace) -> dict[str, float]:
    """Loss and gradients once, in this process."""
    from pretrain import registry

    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    g = torch.Generator().manual_seed(0)
    features = {
        name: F.normalize(torch.randn(arguments.batch[0], arguments.dim, generator=g), dim=1).to(device).requires_grad_()
        for name in ("image", "text")
    }
    module = registry.get_component("losses", arguments.loss)
    scale = torch.full((1,), module.LOGIT_SCALE, device=device).exp().requires_grad_()
    bias = None if module.LOGIT_BIAS is None else torch.full((1,), module.LOGIT_BIAS, device=device).requires_grad_()
    score = _score(arguments, module)
    warm = {name: x[:400].detach().requires_grad_() for name, x in features.items()}
    score(warm, scale, bias).backward()  # threads, libraries, in tiles as well
    before = _memory(device)
    start = time.perf_counter()
    loss = score(features, scale, bias)
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return {"memory": _memory(device, peak=True) - before, "seconds": seconds, "loss": float(loss.detach())}


def _score(arguments: argparse.Namespace, module: Any) -> Any:
    if arguments.who == "ours":
        ours = module.build(module.Config(tile=arguments.tile))
        return lambda features, scale, bias: ours(features, scale, bias, {})[0]
    from open_clip.loss import ClipLoss, SigLipLoss

    peer = {"clip": ClipLoss, "siglip": SigLipLoss}[arguments.loss]()

    def theirs(features: dict[str, Tensor], scale: Tensor, bias: Tensor | None) -> Tensor:
        loss: Tensor = peer(features["image"], features["text"], scale, bias)
        return loss

    return theirs


def _memory(device: torch.device, peak: bool = False) -> float:
    """MiB held now, from where the peak is counted anew; or that peak."""
    if device.type == "cuda":
        if not peak:
            torch.cuda.reset_peak_memory_stats()
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**20
    if not peak:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark falls to what is resident
    words = Path("/proc/self/status").read_text().split()
    return int(words[words.index("VmHWM:" if peak else "VmRSS:") + 1]) / 2**10


def spawn(who: str, batch: int, arguments: argparse.Namespace) -> dict[str, float] | None:
    """`one` in a fresh process; None where it ran out of memory."""
    words = ["--who", who, "--batch", batch, "--dim", arguments.dim, "--threads", arguments.threads, "--loss", arguments.loss]
    command = [sys.executable, "-m", "tests.bench.loss", *map(str, words), "--tile", str(arguments.tile)]
    done = subprocess.run([*command, "--device", arguments.device], capture_output=True, text=True)
    if done.returncode:
        return None
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def fits(batch: int, device: str) -> bool:
    """Whether open_clip's four matrices of B x B float32 fit (measured: 4,152 MiB at 16,384)."""
    if device == "cuda":
        return 4.2 * 4 * batch**2 < torch.cuda.get_device_properties(0).total_memory
    words = Path("/proc/meminfo").read_text().split()
    free = int(words[words.index("MemAvailable:") + 1]) * 1024
    return 4.5 * 4 * batch**2 < free


def measure(batch: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Both, in turn, the best of the rounds."""
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
    for _ in range(arguments.rounds):
        for who in ["ours", *(["theirs"] if fits(batch, arguments.device) else [])]:
            found = spawn(who, batch, arguments)
            if found is None and who == "ours":
                raise SystemExit(f"our loss failed at a batch of {batch}")
            runs[who] += [found] if found else []
    ours, theirs = ({k: min(run[k] for run in part) for k in part[0]} if part else None for part in runs.values())
    assert ours is not None
    line: dict[str, Any] = {"batch": batch, "dim": arguments.dim, "loss": arguments.loss, "threads": arguments.threads}
    line |= {"memory_mib": round(ours["memory"], 1), "seconds": round(ours["seconds"], 3), "value": round(ours["loss"], 5)}
    for key, name in (("memory", "memory_ratio"), ("seconds", "time_ratio")):
        line[name] = None if theirs is None else round(ours[key] / theirs[key], 4)
    if theirs is not None:
        line |= {"peer_memory_mib": round(theirs["memory"], 1), "peer_seconds": round(theirs["seconds"], 3)}
        line["peer_value"] = round(theirs["loss"], 5)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--loss", default="clip")
    parser.add_argument("--tile", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--who", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.who:
        print(json.dumps(one(arguments)))
        return
    for batch in arguments.batch:
        print(json.dumps(measure(batch, arguments)), flush=True)


if __name__ == "__main__":
    main()
