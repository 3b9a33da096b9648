"""Linear layers whose products run through oneDNN on the CPU, in float32: a tenth of an image tower's time on AMD.

torch asks MKL for float32 products, and MKL gives AMD's processors their second-best code. The layer stays an nn.Linear in
name, weights and state; everywhere else (accelerators, other precisions, compiled, exported) it is torch's own. For inputs
of a constant shape only: oneDNN compiles a kernel a shape, so length-sorted texts would gain nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of each channel, red, green, blue, in 0 to 1: what CLIP's published models normalize images with."""

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
"""Whether torch has oneDNN's product for the CPU."""


def product(x: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., k), (m, k), (m,) -> x y^T + bias (..., m), without gradient. float32 on the CPU."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, y, bias, "none", [], "")
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grads[0]
        flat = grad.reshape(-1, grad.shape[-1])
        wanted = ctx.needs_input_grad
        return (
            product(grad, weight.t()) if wanted[0] else None,
            flat.t() @ x.reshape(-1, x.shape[-1]) if wanted[1] else None,  # here MKL is as fast
            flat.sum(dim=0) if wanted[2] else None,
        )


class Linear(nn.Linear):
    """nn.Linear by another route."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        plain = input.dtype == self.weight.dtype == torch.float32 and input.device.type == "cpu"
        if not plain or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return F.linear(input, self.weight, self.bias)
        out: Tensor = _Linear.apply(input, self.weight, self.bias)
        return out


def use_onednn(model: nn.Module) -> None:
    """Changes every plain nn.Linear of a model into one of ours, in place."""
    for module in model.modules() if ONEDNN else ():
        if type(module) is nn.Linear:
            module.__class__ = Linear
