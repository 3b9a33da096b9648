"""Memory and peak throughput of GPUs, from the vendor's data sheets, for MFU and `clipfuse plan`."""

from __future__ import annotations

from typing import NamedTuple


class GPU(NamedTuple):
    """Memory and peak throughput of one GPU model."""

    memory_gb: int
    """Memory in GB (10^9 bytes)."""
    tflops: int
    """Dense bf16 operations in TFLOP/s; fp16 on v100 and t4, which have no bf16."""


GPUS = {
    "h100": GPU(80, 989),
    "h200": GPU(141, 989),
    "b200": GPU(180, 2250),
    "a100": GPU(80, 312),
    "a100-40": GPU(40, 312),
    "l40s": GPU(48, 362),
    "a10": GPU(24, 125),
    "4090": GPU(24, 165),
    "v100": GPU(32, 125),
    "t4": GPU(16, 65),
}
"""By the value of `clipfuse plan --gpu`."""

DEVICE_NAMES = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "NVIDIA A100-SXM4-80GB": "a100"}
"""torch.cuda.get_device_name() -> key of GPUS."""


def peak_flops(device_name: str) -> float:
    """Return the dense bf16 FLOP/s of a GPU by its torch.cuda.get_device_name(); 0 for an unknown one."""
    key = DEVICE_NAMES.get(device_name)
    return GPUS[key].tflops * 1e12 if key else 0.0
