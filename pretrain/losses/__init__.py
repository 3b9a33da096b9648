"""Losses over pairs of embeddings. A loss is ONE file with a Config, LOGIT_SCALE, LOGIT_BIAS and build(config) -> Loss.

    Loss.forward(features {modality: (b, D)}, scale (1,), bias (1,) | None, targets) -> (loss (), report {name: ()})

A loss sees this process's b rows and gathers what it needs of the others itself, with gradient; it returns the mean over
LOCAL rows, which is exact under every strategy that averages gradients over ranks. clip.py: softmax; siglip.py: sigmoid;
tiles.py computes both without holding the B x B matrix. May import pretrain.config, registry and dist.
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
"""Up to so many entries (b times B) the plain formula is as fast as tiles (measured: 256 rows are, 512 are not)."""

PairLoss = Callable[[Tensor, Tensor, Tensor, Tensor, int, "tuple[Tensor, Tensor] | None"], tuple[Tensor, Tensor]]
"""(rows (b,D), columns (b,D), all rows (B,D), all columns (B,D), offset, ids) -> (loss (), partner is best (b,) bool)."""


def average_over_pairs(
    features: dict[str, Tensor], targets: dict[str, Any], same_caption: str, one: PairLoss, both: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean of `one` over all pairs of modalities, in the order of `features`; one collective gathers them all.

    both: whether `one` reads all rows too; if not, only second partners travel. Reports the share of rows whose partner
    scores best, `image_to_text_accuracy`, among all columns.
    """
    features = {name: x.to(torch.promote_types(x.dtype, torch.float32)) for name, x in features.items()}
    pairs = list(combinations(features, 2))
    if not pairs:
        raise ValueError(f"a contrastive loss needs two modalities, got {list(features)}")
    needed = list(features) if both else sorted({second for _, second in pairs}, key=list(features).index)
    everyone = dict(zip(needed, distributed.gather_many([features[name] for name in needed]), strict=True))
    ids = caption_ids(targets, same_caption)
    b = next(iter(features.values())).shape[0]
    losses, report = [], {}
    for first, second in pairs:
        rows, columns = features[first], features[second]
        loss, best = one(rows, columns, everyone.get(first, rows), everyone[second], distributed.rank() * b, ids)
        losses.append(loss)
        report[f"{first}_to_{second}_accuracy"] = best.detach().float().mean()
    return torch.stack(losses).mean(), report


def caption_ids(targets: dict[str, Any], same_caption: str) -> tuple[Tensor, Tensor] | None:
    """The caption hashes of local rows (b,) and of all columns (B,) when duplicates are to be left out, else None."""
    if same_caption == "keep":
        return None
    if "caption_id" not in targets:
        raise ConfigError("loss.same_caption=ignore needs captions to compare, and this batch names none")
    ids: Tensor = targets["caption_id"]
    return ids, distributed.gather_without_grad(ids)


def duplicate_mask(ids: tuple[Tensor, Tensor], offset: int) -> Tensor:
    """(b,), (B,) -> (b, B) bool: entries whose captions are equal, partners left out."""
    same = ids[0][:, None] == ids[1][None]
    rows = torch.arange(len(ids[0]), device=same.device)
    same[rows, rows + offset] = False
    return same


def is_tiled(b: int, tile: int) -> bool:
    """Whether a loss over b local rows and all columns is computed in tiles: as configured, or by size."""
    return tile > 0 or b * b * distributed.world_size() > DENSE_LIMIT
