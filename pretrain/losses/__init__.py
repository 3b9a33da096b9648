"""Contrastive losses over pairs of modalities, and what they share.

    clip.py           softmax cross-entropy in both directions (CLIP)
    siglip.py         a sigmoid for each pair (SigLIP)
    distill.py        clip, and similarities drawn to those of stored teachers (MobileCLIP)
    tiles.py          the tiles in which both are computed, without the b x B matrix of logits
    softmax_tiles.py  the loss and gradients of clip in tiles
    sigmoid_tiles.py  the loss and gradients of siglip in tiles
    divergence_tiles.py  the divergence of distill from a teacher, and its gradients, in tiles
    products.py       matrix products in the precision of loss.precision
    ring.py           loss.exchange=ring: blocks of features travel, so that no rank holds all of them
    kernels/          Triton kernels for tiles on GPUs

A loss is one file with a Config, LOGIT_SCALE, LOGIT_BIAS and build(config) -> Loss, where

    Loss.forward(features {modality: (b, D)}, scale (1,), bias (1,) | None, targets) -> (loss (), report {name: ()})

A loss may have a constant TAKES, the settings of `data` that it accounts for; a run with another one of them is refused, and
so is one without those in its constant NEEDS:

    weight      targets["weight"] (b,), at least 0, of mean 1 over all processes: multiplies the loss of each pair
    negatives   features["negatives"] (b, F, D), texts that match no image. targets["negative_mask"] (b, F) is False for
                padding, targets["negative_id"] (b, F) has their caption hashes
    incomplete  targets["present"] {modality: (b,) bool}, which samples have it; those that lack it hold a blank in its place
    teachers    targets["teachers"], stored embeddings of images and captions, as pretrain/data/teachers.py describes

A loss is given the b rows of this process. It gathers the rows it needs from other processes itself, with gradient. It
returns the mean over LOCAL rows: this is exact under every strategy that averages gradients over ranks.

A Loss may have an attribute `max_logit` (None, or a bound of every |logit|), which the trainer sets where the model guarantees
normalized features and a largest scale. The clip loss then needs no answer from the GPU to choose its method.

May import pretrain.runtime, pretrain.ops and pretrain.errors.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.config import check_numbers
from pretrain.errors import ConfigError
from pretrain.losses.tiles import PairLabels, Settings
from pretrain.runtime import distributed

DENSE_LIMIT = 1 << 17
"""Number of logits (b times B) up to which the dense formula is used; above it, tiles are faster.

Measured: as fast as tiles at 256 rows, slower at 512."""

NEGATIVES = "negatives"
"""Name of the features of negatives, which are no modality."""

PairLoss = Callable[[Tensor, Tensor, Tensor, Tensor, int, PairLabels], tuple[Tensor, Tensor]]
"""The loss of one pair of modalities.

(rows (b, D), columns (b, D), all rows (B, D), all columns (B, D), offset, labels) -> (loss (), whether each row's
partner scores best (b,) bool). Row i's partner is column i + offset. All columns end with the negatives of `labels`."""


def average_over_pairs(
    features: dict[str, Tensor],
    targets: dict[str, Any],
    same_caption: str,
    pair_loss: PairLoss,
    needs_all_rows: bool,
    is_ring: bool = False,
    widths: Sequence[int] = (),
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean of `pair_loss` over all pairs of modalities and all widths, and a report.

    One collective gathers all features, unless `is_ring`.

    features: {modality: (b, D)}; pairs are taken in the order of its keys. `negatives` (b, F, D) are columns of the pair
    (image, text) only.
    needs_all_rows: whether `pair_loss` reads all rows too. If not, only the second modality of each pair is gathered.
    is_ring: nothing is gathered. `pair_loss` exchanges blocks itself; it is given local rows, columns and labels, and offset 0.
    widths: of PairConfig.matryoshka; the whole embedding counts, too.

    The report holds, for each pair, the fraction of rows whose partner scores best among all columns
    (`image_to_text_accuracy`); with `widths`, also by the first w dimensions of each (`image_to_text_accuracy_w`).
    """
    features = {name: x.to(torch.promote_types(x.dtype, torch.float32)) for name, x in features.items()}
    negatives = features.pop(NEGATIVES, None)
    pairs = list(combinations(features, 2))
    if not pairs:
        raise ValueError(f"a contrastive loss needs two modalities, got {list(features)}")
    names = list(features) if needs_all_rows else sorted({second for _, second in pairs}, key=list(features).index)
    dim, dtype = next(iter(features.values())).shape[1], next(iter(features.values())).dtype
    if negatives is not None:
        features[NEGATIVES] = negatives.flatten(1)  # (b, F D): so one collective gathers them as well
        names.append(NEGATIVES)
    gathered = features if is_ring else dict(zip(names, distributed.gather_many([features[n] for n in names]), strict=True))
    if negatives is not None:
        gathered = {**gathered, NEGATIVES: gathered[NEGATIVES].reshape(-1, dim)}
    labels = build_labels(targets, same_caption, is_ring, dtype)
    labels_with_negatives = labels if negatives is None else add_negatives(labels, targets, is_ring)
    offset = 0 if is_ring else distributed.rank() * len(next(iter(features.values())))
    present = gather_present(targets, pairs, is_ring)
    losses, report = [], {}
    num_pairs_present = next(iter(features.values())).new_zeros(())
    for width in (dim, *(width for width in widths if width < dim)):
        # Prefixes are normalized after the exchange, which sends each embedding once.
        local = {name: cut_to_width(x, width) for name, x in features.items() if name != NEGATIVES}
        others = {name: cut_to_width(x, width) for name, x in gathered.items()}
        suffix = "" if width == dim else f"_{width}"
        for first, second in pairs:
            rows, columns, all_columns, pair_labels = local[first], local[second], others[second], labels
            if negatives is not None and (first, second) == ("image", "text"):
                all_columns, pair_labels = torch.cat([all_columns, others[NEGATIVES]]), labels_with_negatives
            name = f"{first}_to_{second}_accuracy{suffix}"
            if present is None:
                loss, is_best = pair_loss(rows, columns, others.get(first, rows), all_columns, offset, pair_labels)
                losses.append(loss)
                report[name] = is_best.detach().float().mean()
                continue
            have_both = present[first] & present[second]  # (B,)
            loss, accuracy = _average_over_present(
                have_both, offset, rows, columns, others.get(first), all_columns, pair_labels, pair_loss
            )
            losses.append(loss)
            report[name] = accuracy.detach()
            num_pairs_present += have_both.any()
    if present is None:
        return torch.stack(losses).mean(), report
    return torch.stack(losses).sum() / num_pairs_present.clamp(min=1), report


def gather_present(targets: dict[str, Any], pairs: list[tuple[str, str]], is_ring: bool) -> dict[str, Tensor] | None:
    """Return which samples of all processes have each modality, (B,) bool; None where all have all. Collective.

    Raises ConfigError with loss.exchange=ring, whose blocks have fixed sizes.
    """
    if "present" not in targets:
        return None
    if is_ring:
        raise ConfigError("loss.exchange=ring takes no samples that lack a modality (data.incomplete=keep); use gather")
    names = sorted({name for pair in pairs for name in pair})
    local = torch.stack([targets["present"][name] for name in names], dim=1).to(torch.uint8)
    return dict(zip(names, distributed.gather_without_grad(local).bool().unbind(dim=1), strict=True))


def _average_over_present(
    have_both: Tensor,
    offset: int,
    rows: Tensor,
    columns: Tensor,
    all_rows: Tensor | None,
    all_columns: Tensor,
    labels: PairLabels,
    pair_loss: PairLoss,
) -> tuple[Tensor, Tensor]:
    """Return the loss () and the accuracy () of one pair of modalities over the samples that have both.

    Processes have different numbers of such samples, n of N on all W: their means are multiplied by n W / N, so that the mean
    over processes is the mean over samples. The others are neither rows nor negatives.

    have_both: (B,) bool, of all processes. offset: where this process's rows begin in it. Other arguments as for PairLoss.
    """
    is_local = have_both[offset : offset + len(rows)]
    count, total = is_local.sum(), have_both.sum()
    others = torch.ones(len(all_columns) - len(have_both), dtype=torch.bool, device=rows.device)  # negatives
    of_columns = torch.cat([have_both, others])
    loss, is_best = pair_loss(
        rows[is_local],
        columns[is_local],
        rows[is_local] if all_rows is None else all_rows[have_both],
        all_columns[of_columns],
        int(have_both[:offset].sum()),
        labels.select(is_local, of_columns),
    )
    weight = distributed.world_size() / total.clamp(min=1).to(loss.dtype)
    return loss * (count * weight), (is_best.sum() * weight).float()


def cut_to_width(features: Tensor, width: int) -> Tensor:
    """Return the first `width` dimensions of features (b, D), normalized; the features themselves where D is that width."""
    return features if features.shape[1] == width else F.normalize(features[:, :width], dim=1)


def build_labels(targets: dict[str, Any], same_caption: str, is_ring: bool, dtype: torch.dtype) -> PairLabels:
    """Return the labels of local rows and all columns, or local columns if is_ring. dtype: of the weights."""
    gather = _keep if is_ring else distributed.gather_without_grad
    ids = weights = None
    if same_caption != "keep":
        if "caption_id" not in targets:
            raise ConfigError(
                "loss.same_caption=ignore compares captions, but this batch has no caption ids; use loss.same_caption=keep"
            )
        ids = targets["caption_id"], gather(targets["caption_id"])
    if "weight" in targets:
        local_weights = targets["weight"].to(dtype)
        weights = local_weights, gather(local_weights)
    return PairLabels(ids, weights)


def add_negatives(labels: PairLabels, targets: dict[str, Any], is_ring: bool) -> PairLabels:
    """Return the labels with those of the negatives, which are columns after the others."""
    gather = _keep if is_ring else distributed.gather_without_grad
    ids, weights = labels.ids, labels.weights
    mask: Tensor = targets["negative_mask"]  # (b, F)
    is_padding = gather((~mask).to(torch.uint8)).flatten()
    if ids is not None:
        ids = ids[0], torch.cat([ids[1], gather(targets["negative_id"]).flatten()])
    if weights is not None:  # a negative has the weight of its sample
        weights = weights[0], torch.cat([weights[1], weights[1].repeat_interleave(mask.shape[1])])
    captions = torch.zeros(len(is_padding) // mask.shape[1], dtype=torch.uint8, device=mask.device)
    return PairLabels(ids, weights, torch.cat([captions, is_padding]), len(is_padding))


def _keep(values: Tensor) -> Tensor:
    return values


def normalize_weights(weights: Tensor) -> Tensor:
    """Return weights (b, ...) divided by their mean over all processes; zeros where all are 0. Collective.

    A mean over samples of loss times weight is then sum(weight loss) / sum(weight) over the whole batch.
    """
    weights = weights.double()
    all_weights = distributed.gather_without_grad(weights)
    return weights / all_weights.sum().clamp_min(torch.finfo(torch.float64).tiny) * all_weights.numel()


def left_out_mask(labels: PairLabels, offset: int) -> Tensor | None:
    """Return where a row and a column are no negatives of each other: (b, B) bool; None where all are.

    They have the same caption but are not partners, or the column is padding.
    """
    mask = None
    if labels.ids is not None:
        mask = labels.ids[0][:, None] == labels.ids[1][None]
        rows = torch.arange(len(mask), device=mask.device)
        mask[rows, rows + offset] = False
    if labels.is_padding is not None:
        mask = labels.is_padding.bool()[None] if mask is None else mask | labels.is_padding.bool()
    return mask


def is_tiled(b: int, tile: int) -> bool:
    """Whether the loss of b local rows against all columns is computed in tiles.

    It is if `tile` > 0, or if the dense formula would need more than DENSE_LIMIT logits.
    """
    return tile > 0 or b * b * distributed.world_size() > DENSE_LIMIT


@dataclass
class PairConfig:
    """Settings of a loss over pairs that can be computed in tiles."""

    name: str = ""
    """Name of the loss's file."""
    same_caption: Literal["keep", "ignore"] = "keep"
    """Whether samples with the same caption are negatives of each other: keep, they are; ignore, they are left out."""
    tile: int = 0
    """Rows and columns computed at once, so that memory does not grow with the square of the batch; 0 chooses by size."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Precision of the loss's matrix products; sums are float32. fp32 is exact, and also used where train.precision is bf16 or
    TF32 is allowed. tf32 and bf16 are several times faster on a GPU and NOT exact: gradients differ by about 1e-3 and 1e-2."""
    kernel: Literal["auto", "plain", "fused"] = "auto"
    """plain: torch operations on tiles. fused: Triton kernels, on GPUs only. auto: fused on a GPU that has Triton and for tf32
    and bf16, else plain."""
    matryoshka: list[int] = field(default_factory=list)
    """Numbers of dimensions, such as [64, 128]: the loss is the mean over the first dimensions of these widths, each normalized
    again, and the whole embedding. Then the first dimensions alone work as embeddings (`clipfuse index --dim 64`), at the cost
    of a little recall of the whole. [] = the whole embedding alone. Kusupati et al., arXiv:2205.13147."""
    exchange: Literal["gather", "ring"] = "gather"
    """How processes see each other's features. gather: each holds all. ring: each holds those of one process at a time, for
    global batches whose features do not fit; the result is the same to rounding."""

    def check(self) -> None:
        """Raise ConfigError for an impossible value, or a kernel that this installation has not."""
        if self.tile < 0:
            raise ConfigError(f"loss.tile={self.tile} must be 0 (automatic) or a number of rows")
        if self.kernel == "fused" and importlib.util.find_spec("triton") is None:
            raise ConfigError("loss.kernel=fused needs Triton, which is not installed; use loss.kernel=plain")
        if any(width < 1 for width in self.matryoshka) or len(set(self.matryoshka)) < len(self.matryoshka):
            raise ConfigError(f"loss.matryoshka={self.matryoshka} must be different widths of at least 1, such as [64, 128]")
        check_numbers(self, "loss")


def choose_settings(
    config: PairConfig, features: dict[str, Tensor], max_logit: float | None, targets: dict[str, Any]
) -> Settings | None:
    """Return how to compute a loss in tiles, or None where the dense formula serves."""
    sample = next(iter(features.values()))
    is_ring = config.exchange == "ring" and distributed.world_size() > 1
    is_labeled = "weight" in targets or NEGATIVES in features
    if config.kernel == "fused" and is_labeled:
        raise ConfigError("loss.kernel=fused takes neither data.weight nor data.negatives; use loss.kernel=auto")
    can_fuse = sample.device.type == "cuda" and sample.dtype != torch.float64 and importlib.util.find_spec("triton") is not None
    if config.kernel == "fused" and not can_fuse:
        raise ConfigError(
            f"loss.kernel=fused computes float32 features on a GPU, and these are {sample.dtype} on {sample.device.type}; "
            "use loss.kernel=auto"
        )
    # Products of exact float32 do not run on tensor cores, and there cuBLAS is hard to match.
    is_fused = (
        can_fuse and not is_labeled and (config.kernel == "fused" or (config.kernel == "auto" and config.precision != "fp32"))
    )
    # Autograd would run the dense formula's backward pass with TF32 where that is allowed, so GPUs always use tiles.
    is_dense = sample.device.type == "cpu" and config.precision == "fp32" and not is_tiled(len(sample), config.tile)
    if is_dense and not is_ring:
        return None
    return Settings(config.tile, config.precision, is_fused, is_ring, max_logit)
