"""Float32 products and linear layers through oneDNN on the CPU; CLIP's image mean and std; colors of image borders.

torch computes float32 products with MKL, and MKL runs slower code on AMD's processors than on Intel's. `product` calls
oneDNN instead. `Linear` is an nn.Linear with the same parameter names and state_dict that computes through `product`. On
accelerators, in other precisions, compiled or exported, it computes as nn.Linear does. It suits inputs of a constant shape
only: oneDNN compiles one kernel per shape, so texts sorted by length would gain nothing.

Measured: on an AMD CPU, an image tower takes a tenth less time.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from PIL import ImageColor
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pretrain.errors import ConfigError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of red, green and blue, in 0 to 1, with which CLIP's published models normalize images."""

Color = tuple[int, int, int]
"""Red, green and blue, each 0 to 255."""

WHITE: Color = (255, 255, 255)


def parse_color(text: str, mean: Sequence[float] = CLIP_MEAN) -> Color:
    """Return the color that `image.pad_color` names.

    Args:
        text: a CSS name ("white"), "#rrggbb", or "mean".
        mean: of the channels, 0 to 1, which "mean" stands for: it becomes 0 when images are normalized.

    Raises:
        ConfigError: no such color.
    """
    if text == "mean":
        red, green, blue = (round(255 * value) for value in mean)
        return red, green, blue
    values: tuple[int, ...] = ()
    with suppress(ValueError):  # an unknown name
        values = ImageColor.getrgb(text)
    if len(values) != 3:  # 4: a color with transparency
        raise ConfigError(f"image.pad_color={text!r} must be a color's name (white), #rrggbb, or mean")
    return values[0], values[1], values[2]


ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
"""Whether this torch can call oneDNN's product on the CPU."""


def product(x: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x y^T + bias with oneDNN, without gradient, float32 on the CPU.

    (..., k), (m, k), (m,) -> (..., m).
    """
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, y, bias, "none", [], "")
    return out


class _OneDNNLinear(torch.autograd.Function):
    """x W^T + b with gradients, for x (b, k); the result and the gradient of x are computed with oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grads[0]
        return (
            product(grad, weight.t()) if ctx.needs_input_grad[0] else None,
            grad.t() @ x if ctx.needs_input_grad[1] else None,  # here MKL is as fast
            grad.sum(dim=0) if ctx.needs_input_grad[2] else None,
        )


class Linear(nn.Linear):
    """An nn.Linear that computes float32 products on the CPU with oneDNN, and otherwise as nn.Linear does."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer: (..., in_features) -> (..., out_features)."""
        is_cpu_float32 = input.dtype == self.weight.dtype == torch.float32 and input.device.type == "cpu"
        if not is_cpu_float32 or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return F.linear(input, self.weight, self.bias)
        # Rows as a matrix: oneDNN's result of more than two axes is a view, and autograd allows no function of our own to
        # return a view that is then changed in place, as SwinV2 and NaFlexViT do.
        out: Tensor = _OneDNNLinear.apply(input.reshape(-1, self.in_features), self.weight, self.bias)
        return out.reshape(*input.shape[:-1], self.out_features)


def use_onednn(model: nn.Module) -> None:
    """Turn every nn.Linear of a model (no subclasses) into a `Linear`, in place, if oneDNN is available."""
    for module in model.modules() if ONEDNN else ():
        if type(module) is nn.Linear:
            module.__class__ = Linear
