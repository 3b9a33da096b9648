"""GPUs by name: memory and peak throughput, from the vendor's data sheets. For MFU and for `clipfuse plan`."""

from __future__ import annotations

from typing import NamedTuple


class GPU(NamedTuple):
    """One kind of GPU."""

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
"""By the word of `clipfuse plan --gpu`."""

DEVICE_NAMES = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "NVIDIA A100-SXM4-80GB": "a100"}
"""torch.cuda.get_device_name() -> a key of GPUS, where it is known."""


def peak_flops(device_name: str) -> float:
    """Dense bf16 operations a second of a GPU by torch's name for it; 0 where it is not known."""
    known = DEVICE_NAMES.get(device_name)
    return GPUS[known].tflops * 1e12 if known else 0.0
