"""Products of matrices of embeddings, in the precision of `loss.precision`; sums are in float32 in every case.

    fp32   exact to float32's rounding, also where TF32 is allowed elsewhere
    tf32   factors rounded to 11 bits by the tensor cores of a GPU; on the CPU the same as fp32
    bf16   factors rounded to 8 bits; on the CPU the factors are rounded and then multiplied in float32

A logit is scale times a cosine, so a factor rounded to n bits moves a logit by up to scale / 2^n: at scale 100 by 0.05 in tf32
and by 0.4 in bf16. Rounding is independent between features, so typical errors are smaller by the root of the width.

float64 features are multiplied in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from pretrain import ops

Precision = Literal["fp32", "tf32", "bf16"]


@contextmanager
def tensor_core_precision(device: torch.device, precision: Precision) -> Iterator[None]:
    """Make float32 products on a GPU use TF32, or not use it, inside the block."""
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    previous = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = previous


def transposed_product(x: Tensor, y: Tensor, precision: Precision = "fp32") -> Tensor:
    """Return x y^T without gradient: (n, k), (m, k) -> (n, m)."""
    if precision == "bf16" and x.dtype == torch.float32:
        return _bf16_product(x, y.t())
    if ops.ONEDNN and x.dtype == torch.float32 and x.device.type == "cpu":
        return ops.product(x, y)
    return x @ y.t()


def add_product_(out: Tensor, x: Tensor, y: Tensor, precision: Precision = "fp32") -> None:
    """Add x y to `out`, in place: (n, m) += (n, k) (k, m)."""
    if precision == "bf16" and x.dtype == torch.float32:
        out.add_(_bf16_product(x, y))
    else:
        out.addmm_(x, y)


def _bf16_product(x: Tensor, y: Tensor) -> Tensor:
    """Return x y in float32, of factors rounded to bfloat16."""
    x, y = x.bfloat16(), y.bfloat16()
    return torch.mm(x, y, out_dtype=torch.float32) if x.device.type == "cuda" else x.float() @ y.float()
