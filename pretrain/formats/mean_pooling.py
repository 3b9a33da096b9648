"""Mean pooling written as one more attention layer, for formats that only pool at the end token.

A causal text tower that pools by the mean gives  P mean_t(g x_t + b).  Here x_t are its normalized states, g and b the scale
and shift of its last norm, and P the projection. The last position attends to all others, so attention with equal weights
there is the mean. One layer is therefore added whose queries and keys are zero. Its values are x_t and the constants 1 and
-1, written into additional channels; g, b and P together become the new projection. The last norm multiplies the whole
vector by a positive factor, which normalizing the embedding removes: the result is exact up to rounding.

The additional channels make the tower wider (2C and one head, from C), so that its norms average over more channels. What
the old layers write is therefore centered (norms subtract the mean anyway), and their scales shrink by sqrt(C / width).

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


def to_attention_layer(spec: TextSpec, weights: Weights) -> tuple[TextSpec, Weights]:
    """Turn a causal text tower that pools by the mean into an equivalent one that pools at the end token.

    Args:
        spec: its architecture.
        weights: under open_clip's names, with text_projection (C, D).

    Returns:
        Architecture and weights of the new tower: W wide, one layer deeper, with text_projection (W, D).
    """
    C, d = spec.width, spec.width // spec.heads
    W = 2 * C + max(d, 2)
    assert W % d == 0
    new = replace(spec, width=W, heads=W // d, depth=spec.depth + 1, eps=spec.eps * C / W)
    shrink = math.sqrt(C / W)
    out: Weights = {}
    for name, value in weights.items():
        suffix, kind = name.removeprefix(BLOCKS).partition(".")[2], name.rpartition(".")[2]
        if name in ("token_embedding.weight", "positional_embedding"):
            out[name] = F.pad(_center(value, 1), (0, W - C))
        elif suffix in ("attn.out_proj.weight", "mlp.c_proj.weight"):
            value = _center(value, 0)
            columns = W if suffix.startswith("attn") else value.shape[1]
            out[name] = _pad_to(value, (W, columns))
        elif suffix in ("attn.out_proj.bias", "mlp.c_proj.bias"):
            out[name] = F.pad(_center(value, 0), (0, W - C))
        elif suffix in ("attn.in_proj_weight", "attn.in_proj_bias"):
            shape = (W, W) if kind == "in_proj_weight" else (W,)
            out[name] = torch.cat([_pad_to(rows, shape) for rows in value.chunk(3)])
        elif suffix == "mlp.c_fc.weight":
            out[name] = _pad_to(value, (spec.hidden, W))
        elif suffix.startswith("ln_"):
            out[name] = F.pad(value * shrink if kind == "weight" else value, (0, W - C))
        else:
            out[name] = value  # mlp.c_fc.bias; the last norm and the projection are replaced below
    return new, out | _build_mean_layer(spec.depth, C, W, spec.hidden, shrink) | _build_end(weights, C, W)


def _build_mean_layer(number: int, C: int, W: int, hidden: int, shrink: float) -> Weights:
    """Build the layer that writes the mean of x into channels C to 2C, and 1 and -1 into the next two."""
    scale, shift = torch.zeros(W), torch.zeros(W)
    scale[:C] = shrink
    shift[2 * C], shift[2 * C + 1] = 1, -1
    in_proj, out_proj = torch.zeros(3 * W, W), torch.zeros(W, W)
    in_proj[2 * W :] = torch.eye(W)
    out_proj[C : 2 * C, :C] = torch.eye(C)
    out_proj[2 * C, 2 * C] = out_proj[2 * C + 1, 2 * C + 1] = 1
    layer = {
        "ln_1.weight": scale,
        "ln_1.bias": shift,
        "attn.in_proj_weight": in_proj,
        "attn.in_proj_bias": torch.zeros(3 * W),
        "attn.out_proj.weight": out_proj,
        "attn.out_proj.bias": torch.zeros(W),
        "ln_2.weight": torch.ones(W),
        "ln_2.bias": torch.zeros(W),
        "mlp.c_fc.weight": torch.zeros(hidden, W),
        "mlp.c_fc.bias": torch.zeros(hidden),
        "mlp.c_proj.weight": torch.zeros(W, hidden),
        "mlp.c_proj.bias": torch.zeros(W),
    }
    return {f"{BLOCKS}{number}.{name}": value for name, value in layer.items()}


def _build_end(weights: Weights, C: int, W: int) -> Weights:
    """Build the last norm with scale 1 and shift 0, and the projection that contains the old ones."""
    scale, shift, project = weights["ln_final.weight"], weights["ln_final.bias"], weights["text_projection"]
    new = torch.zeros(W, project.shape[1])
    new[C : 2 * C] = scale[:, None] * project
    new[2 * C] = shift @ project
    return {"ln_final.weight": torch.ones(W), "ln_final.bias": torch.zeros(W), "text_projection": new}


def _center(value: Tensor, dim: int) -> Tensor:
    """Subtract the mean over `dim`, the channels that a layer writes."""
    return value - value.mean(dim, keepdim=True)


def _pad_to(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return zeros of the given shape, with `value` at the beginning of every dimension."""
    out = torch.zeros(shape)
    out[tuple(slice(0, size) for size in value.shape)] = value
    return out
