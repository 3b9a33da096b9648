"""Out of memory: one line with the measured peak and the three settings that help most in this configuration."""

from __future__ import annotations

import resource
import sys
from typing import Any

import torch

from pretrain.errors import UserError

GIB = 2**30
MATRICES = 2**28
"""Bytes from which on the similarities (they, their softmax, their gradient) are worth a word."""


def peak_bytes(device: torch.device) -> int:
    """The most this process held so far: of the GPU's allocator, or resident where there is no GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's allocator, Python's, and torch's CPU allocator (a RuntimeError that says so)."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in said or "out of memory" in said)


def explain_out_of_memory(
    error: BaseException, resolved: dict[str, Any], step: int, world: int, device: torch.device
) -> UserError | None:
    """The line for an error that is one of memory, else None. resolved: the whole configuration as plain values."""
    if not is_out_of_memory(error):
        return None
    peak = peak_bytes(device) / GIB
    has = ""
    if device.type == "cuda":
        has = f" of {torch.cuda.get_device_properties(device).total_memory / GIB:.1f}"
    helps = "; ".join(suggest_settings(resolved, world, device.type == "cuda")[:3])
    return UserError(
        f"out of memory after step {step}: peak {peak:.2f}{has} GiB on this process; what helps most: {helps} "
        "(clipfuse plan CONFIG shows what takes how much)"
    )


def suggest_settings(resolved: dict[str, Any], world: int, gpu: bool) -> list[str]:
    """Settings that would lower the peak, the most effective without changing a result first; at least three."""
    train, batch = resolved["train"], resolved["data"]["batch_size"]
    towers = [name for name, part in resolved.items() if isinstance(part, dict) and "checkpointing" in part]
    share, chunks = batch // world, train["chunks"]
    found = []
    if share >= 2 * chunks and share % (2 * chunks) == 0:
        found.append(f"train.chunks={2 * chunks} (activations of {share // (2 * chunks)} samples at a time, the same gradient)")
    off = [name for name in towers if not resolved[name]["checkpointing"]]
    if off:
        found.append(f"{' '.join(f'{name}.checkpointing=true' for name in off)} (activations again in the backward pass)")
    if gpu and train["precision"] == "fp32":
        found.append("train.precision=bf16 (half the activations)")
    if world > 1 and train["strategy"] == "ddp":
        found.append(f"train.strategy=fsdp2 (weights, gradients and moments spread over {world} processes)")
    if resolved.get("loss", {}).get("tile") == 0 and 3 * 4 * share * batch > MATRICES:
        found.append("loss.tile=1024 (the similarity matrix never whole)")
    found.append(f"data.batch_size={max(1, batch // 2)} (another training: fewer negatives a step)")
    if resolved["data"].get("workers"):
        found.append(f"data.workers={resolved['data']['workers'] // 2} (host memory only)")
    found.append("more processes for the same data.batch_size")
    return found
