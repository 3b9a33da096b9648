"""Mean pooling written as one more layer of attention, for formats that only know how to pool where a text ends.

A causal text tower that pools by the mean gives  P mean_t(g x_t + b),  x_t = its normalised states, g and b = the scale and
shift of its last norm, P = the projection. The last position sees all others: attention with equal weights there is the
mean. So one layer is added whose queries and keys are zero, whose values are x_t and the constants 1 and -1, written into
channels of their own; g, b and P together become the new projection. What the last norm does to the whole vector is a
positive factor, which normalising the embedding takes out again: the result is exact but for rounding.

The channels of their own are why this is wider (2C and one head, from C): the norms then average over more channels, so
what the old layers write is centred (norms take the mean out anyway) and their scales shrink by sqrt(C / width).

Legend: C = old width, W = new width, d = width of a head, D = width of the shared space. Names are open_clip's.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.formats.block_weights import Weights
from pretrain.formats.text_weights import TextSpec
from pretrain.formats.vit_weights import BLOCKS


def to_attention_layer(made: TextSpec, weights: Weights) -> tuple[TextSpec, Weights]:
    """A causal tower that pools by the mean, with its text_projection (C, D) -> one that pools where the text ends."""
    C, d = made.width, made.width // made.heads
    W = 2 * C + max(d, 2)
    assert W % d == 0
    new = replace(made, width=W, heads=W // d, depth=made.depth + 1, eps=made.eps * C / W)
    shrink = math.sqrt(C / W)
    out: Weights = {}
    for name, value in weights.items():
        part, kind = name.removeprefix(BLOCKS).partition(".")[2], name.rpartition(".")[2]
        if name in ("token_embedding.weight", "positional_embedding"):
            out[name] = F.pad(_centred(value, 1), (0, W - C))
        elif part in ("attn.out_proj.weight", "mlp.c_proj.weight"):
            value = _centred(value, 0)
            columns = W if part.startswith("attn") else value.shape[1]
            out[name] = _put(value, (W, columns))
        elif part in ("attn.out_proj.bias", "mlp.c_proj.bias"):
            out[name] = F.pad(_centred(value, 0), (0, W - C))
        elif part in ("attn.in_proj_weight", "attn.in_proj_bias"):
            shape = (W, W) if kind == "in_proj_weight" else (W,)
            out[name] = torch.cat([_put(rows, shape) for rows in value.chunk(3)])
        elif part == "mlp.c_fc.weight":
            out[name] = _put(value, (made.hidden, W))
        elif part.startswith("ln_"):
            out[name] = F.pad(value * shrink if kind == "weight" else value, (0, W - C))
        else:
            out[name] = value  # mlp.c_fc.bias; the last norm and the projection are replaced below
    return new, out | _layer(made.depth, C, W, made.hidden, shrink) | _end(weights, C, W)


def _layer(number: int, C: int, W: int, hidden: int, shrink: float) -> Weights:
    """The layer that writes the mean of x into channels C..2C, and 1 and -1 into the two after them."""
    scale, shift = torch.zeros(W), torch.zeros(W)
    scale[:C] = shrink
    shift[2 * C], shift[2 * C + 1] = 1, -1
    values, write = torch.zeros(3 * W, W), torch.zeros(W, W)
    values[2 * W :] = torch.eye(W)
    write[C : 2 * C, :C] = torch.eye(C)
    write[2 * C, 2 * C] = write[2 * C + 1, 2 * C + 1] = 1
    parts = {
        "ln_1.weight": scale,
        "ln_1.bias": shift,
        "attn.in_proj_weight": values,
        "attn.in_proj_bias": torch.zeros(3 * W),
        "attn.out_proj.weight": write,
        "attn.out_proj.bias": torch.zeros(W),
        "ln_2.weight": torch.ones(W),
        "ln_2.bias": torch.zeros(W),
        "mlp.c_fc.weight": torch.zeros(hidden, W),
        "mlp.c_fc.bias": torch.zeros(hidden),
        "mlp.c_proj.weight": torch.zeros(W, hidden),
        "mlp.c_proj.bias": torch.zeros(W),
    }
    return {f"{BLOCKS}{number}.{name}": value for name, value in parts.items()}


def _end(weights: Weights, C: int, W: int) -> Weights:
    """The last norm, without scale and shift of its own, and the projection that has them instead."""
    scale, shift, project = weights["ln_final.weight"], weights["ln_final.bias"], weights["text_projection"]
    new = torch.zeros(W, project.shape[1])
    new[C : 2 * C] = scale[:, None] * project
    new[2 * C] = shift @ project
    return {"ln_final.weight": torch.ones(W), "ln_final.bias": torch.zeros(W), "text_projection": new}


def _centred(value: Tensor, dim: int) -> Tensor:
    """Without its mean over the channels a layer writes."""
    return value - value.mean(dim, keepdim=True)


def _put(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zeros of a shape, with `value` at their beginning."""
    out = torch.zeros(shape)
    out[tuple(slice(0, size) for size in value.shape)] = value
    return out
