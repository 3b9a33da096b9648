"""Peak memory, and an out-of-memory error that names the peak and the settings that help most."""

from __future__ import annotations

import resource
import sys
from typing import Any

import torch

from pretrain.errors import UserError

GIB = 2**30
SIMILARITY_BYTES = 2**28
"""Size of the similarity matrix, its softmax and its gradient above which loss.tile is suggested."""


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory of this process in bytes: of the GPU's allocator, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether CUDA, Python or torch's CPU allocator (RuntimeError) ran out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    message = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in message or "out of memory" in message)


def explain_out_of_memory(
    error: BaseException, resolved: dict[str, Any], step: int, world: int, device: torch.device
) -> UserError | None:
    """Return a UserError with the peak and advice if `error` is out of memory, else None.

    resolved: the whole configuration as plain values; step: steps done; world: processes.
    """
    if not is_out_of_memory(error):
        return None
    peak = peak_bytes(device) / GIB
    capacity = ""
    if device.type == "cuda":
        capacity = f" of {torch.cuda.get_device_properties(device).total_memory / GIB:.1f}"
    advice = "; ".join(suggest_settings(resolved, world, device.type == "cuda")[:3])
    return UserError(
        f"out of memory after step {step}: peak {peak:.2f}{capacity} GiB on this process; what helps most: {advice} "
        "(clipfuse plan CONFIG lists the memory of each part)"
    )


def suggest_settings(resolved: dict[str, Any], world: int, gpu: bool) -> list[str]:
    """Return at least three settings that lower the peak, the most effective first.

    Settings that change the results come last.
    """
    train, batch = resolved["train"], resolved["data"]["batch_size"]
    towers = [name for name, section in resolved.items() if isinstance(section, dict) and "checkpointing" in section]
    share, chunks = batch // world, train["chunks"]
    advice = []
    if share >= 2 * chunks and share % (2 * chunks) == 0:
        advice.append(
            f"train.chunks={2 * chunks} (activations of {share // (2 * chunks)} samples at a time, the same gradient)"
        )
    without = [name for name in towers if not resolved[name]["checkpointing"]]
    if without:
        advice.append(
            f"{' '.join(f'{name}.checkpointing=true' for name in without)} (recomputes activations in the backward pass)"
        )
    if gpu and train["precision"] == "fp32":
        advice.append("train.precision=bf16 (half the activations)")
    if world > 1 and train["strategy"] == "ddp":
        advice.append(f"train.strategy=fsdp2 (shards weights, gradients and optimizer state over {world} processes)")
    if resolved.get("loss", {}).get("tile") == 0 and 3 * 4 * share * batch > SIMILARITY_BYTES:
        advice.append("loss.tile=1024 (the similarity matrix is never held whole)")
    advice.append(f"data.batch_size={max(1, batch // 2)} (changes the training: fewer negatives a step)")
    if resolved["data"].get("workers"):
        advice.append(f"data.workers={resolved['data']['workers'] // 2} (host memory only)")
    advice.append("more processes for the same data.batch_size")
    return advice
