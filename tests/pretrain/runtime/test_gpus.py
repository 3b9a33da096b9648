"""The table of GPUS against names that NVIDIA's driver reports, and against rules that data sheets follow."""

import pytest

from pretrain.runtime.gpus import GPUS, find_gpu, peak_flops

NAMES = {
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H100 NVL": "h100-nvl",
    "NVIDIA H200": "h200",
    "NVIDIA H200 NVL": "h200-nvl",
    "NVIDIA GH200 480GB": "gh200",
    "NVIDIA GH200 144G HBM3e": "gh200-144",
    "NVIDIA B200": "b200",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA A100-SXM4-40GB": "a100-40",
    "A100-SXM4-40GB": "a100-40",
    "NVIDIA A100 80GB PCIe": "a100-pcie",
    "NVIDIA A100-PCIE-40GB": "a100-pcie-40",
    "NVIDIA L40S": "l40s",
    "NVIDIA L4": "l4",
    "NVIDIA A10": "a10",
    "NVIDIA GeForce RTX 4090": "4090",
    "NVIDIA GeForce RTX 3090": "3090",
    "Tesla V100-SXM2-32GB": "v100",
    "Tesla V100-SXM2-16GB": "v100-16",
    "Tesla V100-PCIE-16GB": "v100-pcie-16",
    "Tesla T4": "t4",
}


@pytest.mark.parametrize(("name", "key"), NAMES.items())
def test_a_device_is_found_by_the_name_that_its_driver_reports(name: str, key: str) -> None:
    assert find_gpu(name) == key


@pytest.mark.parametrize(
    "name",
    ["NVIDIA A100-SXM4-80GB MIG 3g.40gb", "NVIDIA A10G", "NVIDIA L40", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A1000",
     "AMD Instinct MI300X"],
)  # fmt: skip
def test_other_devices_are_unknown(name: str) -> None:
    assert find_gpu(name) is None


def test_the_peak_is_that_of_the_precision() -> None:
    """NVIDIA's data sheets of H100 SXM and A100."""
    assert [peak_flops("h100", *use) / 1e12 for use in (("bf16", True), ("fp32", True), ("fp32", False))] == [989, 494, 67]
    assert [peak_flops("a100", *use) / 1e12 for use in (("fp16", False), ("fp32", True), ("fp32", False))] == [312, 156, 19.5]
    assert all(gpu.half_tflops > gpu.tf32_tflops >= gpu.fp32_tflops for gpu in GPUS.values())
