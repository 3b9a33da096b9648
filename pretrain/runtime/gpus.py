"""Memory, peak throughput and links of GPUs, for MFU and `clipfuse plan`.

The figures are dense (without sparsity) and from NVIDIA's data sheets and architecture papers: H100, H200, GH200, B200 (HGX),
A100, L40S, L4, A10, V100, T4, and the Ada and Ampere GA102 papers for 4090 and 3090. Those of 4090, 3090 and A10 are with
float32 sums, as training uses them.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class GPU(NamedTuple):
    """Data sheet of one GPU model."""

    names: str
    """Regular expression that matches the whole of torch.cuda.get_device_name(), without "NVIDIA" or "Tesla" before it."""
    memory_gb: int
    """Memory in GB (10^9 bytes)."""
    half_tflops: float
    """Dense bf16 operations in TFLOP/s; fp16 on v100 and t4, which have no bf16."""
    tf32_tflops: float
    """TF32 operations in TFLOP/s; those of fp32 where the GPU has no TF32."""
    fp32_tflops: float
    """Float32 operations outside of tensor cores, in TFLOP/s."""
    bandwidth: float
    """Of the memory, in GB/s."""
    link: float
    """To other GPUs of the node, in GB/s in each direction: NVLink, or PCIe where there is none."""


GPUS = {
    "b200": GPU(r"(HGX |DGX )?B200( .*)?", 180, 2250, 1125, 75, 7700, 900),
    "gh200": GPU(r"GH200 (120GB|480GB|96GB).*|GH200", 96, 989, 494, 67, 4000, 450),
    "gh200-144": GPU(r"GH200 144G.*", 144, 989, 494, 67, 4900, 450),
    "h200-nvl": GPU(r"H200 NVL.*", 141, 835, 417, 60, 4800, 450),
    "h200": GPU(r"H200( .*)?", 141, 989, 494, 67, 4800, 450),
    "h100-nvl": GPU(r"H100 NVL.*", 94, 835, 417, 60, 3900, 300),
    "h100-pcie": GPU(r"H100 PCIe.*", 80, 756, 378, 51, 2000, 300),
    "h100": GPU(r"H100( .*)?", 80, 989, 494, 67, 3350, 450),
    "a100-pcie-40": GPU(r"A100-PCIE-40GB.*", 40, 312, 156, 19.5, 1555, 300),
    "a100-pcie": GPU(r"A100[ -](80GB )?PCIe?(-80GB)?.*", 80, 312, 156, 19.5, 1935, 300),
    "a100-40": GPU(r"A100-SXM\d?-40GB.*", 40, 312, 156, 19.5, 1555, 300),
    "a100": GPU(r"A100([ -].*)?", 80, 312, 156, 19.5, 2039, 300),
    "l40s": GPU(r"L40S( .*)?", 48, 362, 183, 91.6, 864, 32),
    "l4": GPU(r"L4", 24, 121, 60, 30.3, 300, 32),
    "a10": GPU(r"A10", 24, 125, 62.5, 31.2, 600, 32),
    "4090": GPU(r"GeForce RTX 4090", 24, 165, 82.6, 82.6, 1008, 32),
    "3090": GPU(r"GeForce RTX 3090", 24, 71, 35.6, 35.6, 936, 32),
    "v100": GPU(r"V100-SXM\d-32GB.*", 32, 125, 15.7, 15.7, 900, 150),
    "v100-16": GPU(r"V100-SXM\d-16GB.*", 16, 125, 15.7, 15.7, 900, 150),
    "v100-pcie": GPU(r"V100-PCIE-32GB.*", 32, 112, 14, 14, 900, 16),
    "v100-pcie-16": GPU(r"V100-PCIE-16GB.*", 16, 112, 14, 14, 900, 16),
    "t4": GPU(r"T4", 16, 65, 8.1, 8.1, 320, 16),
}
"""By the value of `clipfuse plan --gpu`. The first whose names match is a device's, so special ones stand before general."""


def find_gpu(device_name: str) -> str | None:
    """Return the key in GPUS of a device, by its torch.cuda.get_device_name(); None for an unknown one."""
    if "MIG " in device_name:  # a slice of a GPU, whose share of the peak the name does not tell
        return None
    bare = re.sub(r"^(NVIDIA |Tesla )+", "", device_name)
    return next((key for key, gpu in GPUS.items() if re.fullmatch(gpu.names, bare, re.IGNORECASE)), None)


def peak_flops(gpu: str, precision: str, tf32: bool) -> float:
    """Return the dense peak of a GPU in FLOP/s.

    Args:
        gpu: key of GPUS.
        precision: train.precision: bf16, fp16 or fp32.
        tf32: whether fp32 products may round their factors to TF32.
    """
    sheet = GPUS[gpu]
    if precision != "fp32":
        return sheet.half_tflops * 1e12
    return (sheet.tf32_tflops if tf32 else sheet.fp32_tflops) * 1e12
