"""Contrastive losses over pairs of modalities, and what they share.

    clip.py    softmax cross-entropy in both directions (CLIP)
    siglip.py  a sigmoid for each pair (SigLIP)
    tiles.py   both losses computed in tiles, without the b x B matrix of logits

A loss is one file with a Config, LOGIT_SCALE, LOGIT_BIAS and build(config) -> Loss, where

    Loss.forward(features {modality: (b, D)}, scale (1,), bias (1,) | None, targets) -> (loss (), report {name: ()})

A loss is given the b rows of this process. It gathers the rows it needs from other processes itself, with gradient. It
returns the mean over LOCAL rows: this is exact under every strategy that averages gradients over ranks.

May import pretrain.runtime, pretrain.ops and pretrain.errors.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from pretrain.errors import ConfigError
from pretrain.runtime import distributed

DENSE_LIMIT = 1 << 17
"""Number of logits (b times B) up to which the dense formula is used; above it, tiles are faster.

Measured: as fast as tiles at 256 rows, slower at 512."""

PairLoss = Callable[[Tensor, Tensor, Tensor, Tensor, int, "tuple[Tensor, Tensor] | None"], tuple[Tensor, Tensor]]
"""The loss of one pair of modalities.

(rows (b, D), columns (b, D), all rows (B, D), all columns (B, D), offset, caption ids) -> (loss (), whether each row's
partner scores best (b,) bool). Row i's partner is column i + offset."""


def average_over_pairs(
    features: dict[str, Tensor], targets: dict[str, Any], same_caption: str, pair_loss: PairLoss, needs_all_rows: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean of `pair_loss` over all pairs of modalities, and a report.

    One collective gathers all features.

    features: {modality: (b, D)}; pairs are taken in the order of its keys.
    needs_all_rows: whether `pair_loss` reads all rows too. If not, only the second modality of each pair is gathered.

    The report holds, for each pair, the fraction of rows whose partner scores best among all columns
    (`image_to_text_accuracy`).
    """
    features = {name: x.to(torch.promote_types(x.dtype, torch.float32)) for name, x in features.items()}
    pairs = list(combinations(features, 2))
    if not pairs:
        raise ValueError(f"a contrastive loss needs two modalities, got {list(features)}")
    names = list(features) if needs_all_rows else sorted({second for _, second in pairs}, key=list(features).index)
    gathered = dict(zip(names, distributed.gather_many([features[name] for name in names]), strict=True))
    ids = gather_caption_ids(targets, same_caption)
    b = next(iter(features.values())).shape[0]
    losses, report = [], {}
    for first, second in pairs:
        rows, columns = features[first], features[second]
        loss, is_best = pair_loss(rows, columns, gathered.get(first, rows), gathered[second], distributed.rank() * b, ids)
        losses.append(loss)
        report[f"{first}_to_{second}_accuracy"] = is_best.detach().float().mean()
    return torch.stack(losses).mean(), report


def gather_caption_ids(targets: dict[str, Any], same_caption: str) -> tuple[Tensor, Tensor] | None:
    """Return the caption hashes of local rows (b,) and all columns (B,); None for same_caption=keep."""
    if same_caption == "keep":
        return None
    if "caption_id" not in targets:
        raise ConfigError(
            "loss.same_caption=ignore compares captions, but this batch has no caption ids; use loss.same_caption=keep"
        )
    ids: Tensor = targets["caption_id"]
    return ids, distributed.gather_without_grad(ids)


def duplicate_mask(ids: tuple[Tensor, Tensor], offset: int) -> Tensor:
    """Return where a row and a column have the same caption but are not partners: (b, B) bool.

    ids: caption hashes of the local rows (b,) and of all columns (B,).
    """
    is_same = ids[0][:, None] == ids[1][None]
    rows = torch.arange(len(ids[0]), device=is_same.device)
    is_same[rows, rows + offset] = False
    return is_same


def is_tiled(b: int, tile: int) -> bool:
    """Whether the loss of b local rows against all columns is computed in tiles.

    It is if `tile` > 0, or if the dense formula would need more than DENSE_LIMIT logits.
    """
    return tile > 0 or b * b * distributed.world_size() > DENSE_LIMIT
