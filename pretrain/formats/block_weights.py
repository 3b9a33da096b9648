"""One pre-norm transformer block (LayerNorm, attention, LayerNorm, MLP) under the names that libraries give its weights.

open_clip's names, which are OpenAI's, stand in the middle: timm's and transformers' are translated from and to them.
Legend: C = width of the block; attention keeps queries, keys and values in one (3C, C) matrix, transformers in three.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

TIMM = {
    "norm1.": "ln_1.",
    "attn.qkv.": "attn.in_proj_",
    "attn.proj.": "attn.out_proj.",
    "norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
}
"""timm's Block -> open_clip's ResidualAttentionBlock."""

TRANSFORMERS = {
    "layer_norm1.": "ln_1.",
    "self_attn.out_proj.": "attn.out_proj.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
}
"""transformers' CLIPEncoderLayer and SiglipEncoderLayer -> the same, but for queries, keys and values."""

Weights = dict[str, Tensor]


def rename_blocks(weights: Mapping[str, Tensor], old: str, new: str, table: Mapping[str, str]) -> Weights:
    """Weights whose name is `old`, a block's number, and a beginning in `table` -> under `new`; the others stay."""
    out: Weights = {}
    for name, value in weights.items():
        number, _, rest = name.removeprefix(old).partition(".")
        begin = next((begin for begin in table if rest.startswith(begin)), None)
        known = name.startswith(old) and number.isdigit() and begin is not None
        out[f"{new}{number}.{table[begin]}{rest.removeprefix(begin)}" if known and begin is not None else name] = value
    return out


def from_transformers(weights: Mapping[str, Tensor], old: str, new: str) -> Weights:
    """transformers' names below `old` -> open_clip's below `new`: q_proj, k_proj, v_proj of each block become in_proj."""
    out = dict(weights)
    for name in weights:
        head, found, kind = name.partition("self_attn.q_proj.")
        parts = [f"{head}self_attn.{part}_proj.{kind}" for part in "qkv"]
        if found and name.startswith(old) and all(part in out for part in parts):
            out[f"{head}attn.in_proj_{kind}"] = torch.cat([out.pop(part) for part in parts])
    return rename_blocks(out, old, new, TRANSFORMERS | {"attn.in_proj_": "attn.in_proj_"})


def to_transformers(weights: Mapping[str, Tensor], old: str, new: str) -> Weights:
    """open_clip's names below `old` -> transformers' below `new`."""
    out: Weights = {}
    for name, value in weights.items():
        head, found, kind = name.partition("attn.in_proj_")
        if found and name.startswith(old):
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                out[f"{head}self_attn.{part}_proj.{kind}"] = rows.clone()
        else:
            out[name] = value
    kept = {f"self_attn.{part}_proj.": f"self_attn.{part}_proj." for part in "qkv"}
    return rename_blocks(out, old, new, invert(TRANSFORMERS) | kept)


def invert(table: Mapping[str, str]) -> dict[str, str]:
    """A table read the other way."""
    return {new: old for old, new in table.items()}


def compute_mlp_ratio(hidden: int, width: int) -> float:
    """The mlp_ratio r with int(width * r) == hidden: that is how libraries read it."""
    exact = hidden / width
    return exact if int(width * exact) == hidden else (hidden + 0.5) / width
