"""The Triton kernels against the plain path, in Triton's interpreter on the CPU, and on a GPU where there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.support import ROOT

TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}
"""Relative to the norm. fp32: logits of 100 are rounded to 7.6e-6. bf16: the kernel rounds features, the plain path scale times
features."""


def check_errors(environment: dict[str, str], device: str) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.fused_program", device]
    process = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    lines = [json.loads(line) for line in process.stdout.splitlines()]
    assert len(lines) == 28
    for line in lines:
        assert max(line["errors"]) < TOLERANCE[line["case"][-1]], line


def test_kernels_agree_with_the_plain_path_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    check_errors({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_agree_with_the_plain_path_on_a_gpu() -> None:
    check_errors({}, "cuda")
