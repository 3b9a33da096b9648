"""The weight names of a pre-norm transformer block in timm, open_clip and transformers.

A block is LayerNorm, attention, LayerNorm and MLP.

Weights are translated by way of open_clip's names, which are OpenAI's: timm's and transformers' from them and to them.
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
"""Beginnings of weight names: timm's Block -> open_clip's ResidualAttentionBlock."""

TRANSFORMERS = {
    "layer_norm1.": "ln_1.",
    "self_attn.out_proj.": "attn.out_proj.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
}
"""Likewise for transformers' CLIPEncoderLayer and SiglipEncoderLayer, without queries, keys and values."""

Weights = dict[str, Tensor]


def rename_blocks(weights: Mapping[str, Tensor], old: str, new: str, table: Mapping[str, str]) -> Weights:
    """Rename the weights of blocks from one library's names to another's; other weights keep theirs.

    Args:
        weights: by name.
        old: the prefix of all blocks, followed by a block's number and by a beginning that `table` lists.
        new: the prefix to put in its place.
        table: beginnings of names within a block, old -> new.
    """
    out: Weights = {}
    for name, value in weights.items():
        number, _, rest = name.removeprefix(old).partition(".")
        prefix = next((prefix for prefix in table if rest.startswith(prefix)), None)
        is_block = name.startswith(old) and number.isdigit() and prefix is not None
        out[f"{new}{number}.{table[prefix]}{rest.removeprefix(prefix)}" if is_block and prefix is not None else name] = value
    return out


def from_transformers(weights: Mapping[str, Tensor], old: str, new: str) -> Weights:
    """Rename blocks from transformers' names below `old` to open_clip's below `new`.

    q_proj, k_proj and v_proj of each block become in_proj.
    """
    out = dict(weights)
    for name in weights:
        block, is_query, kind = name.partition("self_attn.q_proj.")
        names = [f"{block}self_attn.{letter}_proj.{kind}" for letter in "qkv"]
        if is_query and name.startswith(old) and all(name in out for name in names):
            out[f"{block}attn.in_proj_{kind}"] = torch.cat([out.pop(name) for name in names])
    return rename_blocks(out, old, new, TRANSFORMERS | {"attn.in_proj_": "attn.in_proj_"})


def to_transformers(weights: Mapping[str, Tensor], old: str, new: str) -> Weights:
    """Rename blocks from open_clip's names below `old` to transformers' below `new`.

    in_proj of each block becomes q_proj, k_proj and v_proj.
    """
    out: Weights = {}
    for name, value in weights.items():
        block, is_in_proj, kind = name.partition("attn.in_proj_")
        if is_in_proj and name.startswith(old):
            for letter, rows in zip("qkv", value.chunk(3), strict=True):
                out[f"{block}self_attn.{letter}_proj.{kind}"] = rows.clone()
        else:
            out[name] = value
    unchanged = {f"self_attn.{letter}_proj.": f"self_attn.{letter}_proj." for letter in "qkv"}
    return rename_blocks(out, old, new, invert(TRANSFORMERS) | unchanged)


def invert(table: Mapping[str, str]) -> dict[str, str]:
    """Return the table with keys and values exchanged."""
    return {new: old for old, new in table.items()}


def compute_mlp_ratio(hidden: int, width: int) -> float:
    """Return the mlp_ratio r for which int(width * r) == hidden, as libraries compute the hidden width."""
    exact = hidden / width
    return exact if int(width * exact) == hidden else (hidden + 0.5) / width
