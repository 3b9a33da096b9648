"""Images of several sizes in one vision transformer of timm: its positions are resampled in forward(), with gradient.

timm's dynamic_img_size does so with torch's bicubic interpolation, whose backward pass on GPUs adds up in an order that varies
from run to run. Interpolation is linear, and separable in rows and columns. So here it is two products with matrices, whose
gradient has the same bits each time; the result equals timm's up to rounding.

Shapes: H0, W0 = rows and columns of the table of positions, S = rows and columns of the tokens of an image, C = width.
"""

from __future__ import annotations

from contextlib import nullcontext
from math import isqrt
from types import MethodType
from typing import Any

import torch
from torch import Tensor


def has_positions(model: Any) -> bool:
    """Return whether a timm model adds a table of positions that `resample_positions` can resample."""
    return hasattr(type(model), "_pos_embed") and isinstance(getattr(model, "pos_embed", None), Tensor)


def resample_positions(model: Any, tokens: int) -> None:
    """Let a timm model with `has_positions` take images whose patches have `tokens` rows and columns, too.

    Images of the size that it was built for are encoded as before.
    """
    embed = model.patch_embed
    embed.strict_img_size = False
    if getattr(model, "dynamic_img_size", False):  # timm's way to the same
        model.dynamic_img_size, embed.flatten = False, True
    if not hasattr(model, "position_weights"):
        model.position_weights = {}
        model._pos_embed = MethodType(_add_positions, model)
    height, width = embed.grid_size
    model.position_weights[tokens] = bicubic_weights(height, tokens), bicubic_weights(width, tokens)


def bicubic_weights(rows: int, new_rows: int) -> Tensor:
    """Return the matrix (new_rows, rows) of torch's antialiased bicubic interpolation in one dimension; float32, on the CPU."""
    unit_vectors = torch.eye(rows, device="cpu")[None, None]
    size = (new_rows, rows)
    return torch.nn.functional.interpolate(unit_vectors, size, mode="bicubic", antialias=True, align_corners=False)[0, 0]


def resample(table: Tensor, height: Tensor, width: Tensor, first: int) -> Tensor:
    """Return a table of positions (1, first + H0 W0, C) for another grid: (1, first + S S, C), in the same type.

    height, width: (S, H0) and (S, W0), of `bicubic_weights`. first: rows before the grid, which stay as they are.
    """
    with nullcontext() if table.is_meta else torch.autocast(table.device.type, enabled=False):
        grid = table[0, first:].float().reshape(height.shape[1], -1)  # (H0, W0 C)
        rows = (height.to(table.device, non_blocking=True) @ grid).reshape(len(height), width.shape[1], -1)  # (S, W0, C)
        resampled = width.to(table.device, non_blocking=True) @ rows  # (S, S, C)
    return torch.cat([table[:, :first], resampled.reshape(1, -1, table.shape[2]).to(table.dtype)], dim=1)


def _add_positions(model: Any, x: Tensor) -> Any:
    """Replace the method `_pos_embed` of a model: call it with the table of positions that fits the tokens x (b, S S, C)."""
    table: Tensor = model.pos_embed
    patches = model.patch_embed.num_patches
    if x.shape[1] == patches or isqrt(x.shape[1]) not in model.position_weights:
        return type(model)._pos_embed(model, x)
    height, width = model.position_weights[isqrt(x.shape[1])]
    # An entry of __dict__ comes before the parameter of this name, which stays where it is.
    model.__dict__["pos_embed"] = resample(table, height, width, table.shape[1] - patches)
    try:
        return type(model)._pos_embed(model, x)
    finally:
        del model.__dict__["pos_embed"]
