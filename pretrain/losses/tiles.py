"""The matrix of logits in tiles, so that it is never held in memory: what both tiled losses share.

With W ranks of b = B / W rows, each rank takes ITS rows of the first modality against ALL columns of the second, so each entry
of the B x B matrix is computed on one rank only. The columns come in one of two ways (`loss.exchange`):

    gather  Every rank holds all columns. Numbers transferred per rank: B D forward and B D backward.
    ring    A rank holds the block of one rank at a time (ring.py). For the softmax as many numbers, twice as many backward;
            for the sigmoid all of them forward.

Gathering both modalities would need twice that, and twice the products.

The loss is the mean over local rows, and its gradients are exact under a strategy that averages gradients over ranks.

Shapes: b = local rows, B = all columns or the columns of a block, D = width of an embedding; h, w = rows and columns of a
tile. Row i's partner is column i + offset. Arithmetic is in float32 at least (float64 stays float64), outside autocast.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pretrain.losses.products import Precision, transposed_product

CPU_ROWS, CPU_COLUMNS = 1024, 2048
"""Size of a tile on the CPU: 8 MiB in float32, which stays in the last-level cache between the product and its use."""
ACCELERATOR_SIDE = 8192
"""Side of a tile on an accelerator: 256 MiB in float32, so large that the fixed cost of a kernel is negligible."""

Method = Literal["auto", "single_exp", "half_exp", "running_max"]


class Settings(NamedTuple):
    """How a tiled loss is computed; the result is the same to rounding, except for `precision`."""

    tile: int = 0
    """Side of a tile; 0 chooses it by device."""
    precision: Precision = "fp32"
    """Precision of products (products.py)."""
    is_fused: bool = False
    """Whether the kernels of kernels/fused.py compute the tiles."""
    is_ring: bool = False
    """Whether blocks of columns travel between ranks. The columns, and ids of columns, are then those of this rank."""
    max_logit: float | None = None
    """Bound of the absolute value of every logit, guaranteed by the caller; None = no guarantee."""
    method: Method = "auto"
    """How the softmax keeps exponentials finite; auto chooses (softmax_tiles.py)."""


class PairLabels(NamedTuple):
    """What a loss knows of its rows and columns besides their features. Columns after the first B are negatives of all rows."""

    ids: tuple[Tensor, Tensor] | None = None
    """Caption hashes of rows and columns, to leave out duplicates; None where all captions count."""
    weights: tuple[Tensor, Tensor] | None = None
    """Weights of the samples of rows and columns, at least 0, whose mean over all ranks is 1; None = all are 1."""
    is_padding: Tensor | None = None
    """uint8: 1 for columns that stand for no text, and are left out; None where there are none."""
    num_negatives: int = 0
    """Number of columns, at the end, that are no row's partner."""

    def of_columns(self) -> list[Tensor]:
        """Return what is known of the columns, which travels with a block of them."""
        pairs = [pair[1] for pair in (self.ids, self.weights) if pair is not None]
        return pairs if self.is_padding is None else [*pairs, self.is_padding]

    def with_columns(self, tensors: Sequence[Tensor]) -> PairLabels:
        """Return the labels of the same rows and of other columns, of which `tensors` is what `of_columns` returns."""
        remaining = iter(tensors)
        ids = None if self.ids is None else (self.ids[0], next(remaining))
        weights = None if self.weights is None else (self.weights[0], next(remaining))
        return PairLabels(ids, weights, None if self.is_padding is None else next(remaining), self.num_negatives)

    def select(self, rows: Tensor, columns: Tensor) -> PairLabels:
        """Return the labels of some rows (b,) bool and columns (B,) bool, with weights that have the mean 1 over those columns.

        All negatives are among the columns.
        """
        ids = None if self.ids is None else (self.ids[0][rows], self.ids[1][columns])
        weights = None
        if self.weights is not None:
            kept = self.weights[1][columns]
            samples = kept[: len(kept) - self.num_negatives]
            factor = len(samples) / samples.sum().clamp_min(torch.finfo(samples.dtype).tiny)
            weights = self.weights[0][rows] * factor, kept * factor
        is_padding = None if self.is_padding is None else self.is_padding[columns]
        return PairLabels(ids, weights, is_padding, self.num_negatives)


class Tile(NamedTuple):
    """One tile of the matrix of logits: its rows i, its columns j, and which of its entries are special."""

    i: slice
    j: slice
    partners: tuple[Tensor, Tensor] | None
    """(rows, columns) inside the tile of the entries that are partners; None where the tile has none."""
    duplicates: Tensor | None
    """(h, w) bool: entries that are not negatives, because the two captions are the same or the column is padding; None where
    all entries count."""


class TileIterator:
    """Iterates over the tiles of a b x B matrix, one block of rows after the other.

    offset: column of row 0's partner; B where no column is a partner.
    """

    def __init__(self, rows: Tensor, columns: Tensor, offset: int, labels: PairLabels, settings: Settings) -> None:
        self.b, self.B, self.offset = rows.shape[0], columns.shape[0], offset
        self.labels, self.ids = labels, labels.ids
        self.precision, self.is_fused = settings.precision, settings.is_fused
        is_cpu = rows.device.type == "cpu"
        self.height = min(max(1, self.b), settings.tile or (CPU_ROWS if is_cpu else ACCELERATOR_SIDE))
        self.width = min(max(1, self.B), settings.tile or (CPU_COLUMNS if is_cpu else ACCELERATOR_SIDE))
        self.scratch = rows.new_empty(self.height * self.width)

    def __iter__(self) -> Iterator[Tile]:
        for top in range(0, self.b, self.height):
            i = slice(top, min(top + self.height, self.b))
            for left in range(0, self.B, self.width):
                yield self._tile(i, slice(left, min(left + self.width, self.B)))

    def _tile(self, i: slice, j: slice) -> Tile:
        if self.is_fused:  # the kernels compare positions and ids themselves
            return Tile(i, j, None, None)
        first, last = max(i.start, j.start - self.offset), min(i.stop, j.stop - self.offset)
        partners = None
        if first < last:
            rows = torch.arange(first, last, device=self.scratch.device)
            partners = (rows - i.start, rows + (self.offset - j.start))
        duplicates = None
        if self.ids is not None:
            duplicates = self.ids[0][i, None] == self.ids[1][None, j]
            if partners is not None:
                duplicates[partners] = False
        if self.labels.is_padding is not None:
            padding = self.labels.is_padding[None, j].bool().expand(i.stop - i.start, -1)
            duplicates = padding if duplicates is None else duplicates | padding
        return Tile(i, j, partners, duplicates)

    def product(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows columns^T: (h, D), (w, D) -> (h, w), and a scratch tensor (h, w) that every call shares."""
        size = rows.shape[0], columns.shape[0]
        return transposed_product(rows, columns, self.precision), self.scratch[: size[0] * size[1]].view(size)


def block_tiles(
    rows: Tensor, block: Sequence[Tensor], step: int, offset: int, labels: PairLabels, settings: Settings
) -> TileIterator:
    """Return the tiles of all rows against a block [columns, *labels.of_columns()]. Partners are in the block of step 0."""
    return TileIterator(rows, block[0], offset if step == 0 else len(block[0]), labels.with_columns(block[1:]), settings)


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic of both losses


def to_float32(x: Tensor) -> Tensor:
    """Return x detached and contiguous, in float32 or, if it is float64, unchanged in type."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def row_dots(x: Tensor, y: Tensor) -> Tensor:
    """Return the dot product of each pair of rows: (n, D), (n, D) -> (n,).

    It needs no temporary tensor of size (n, D).
    """
    return torch.cat([(a * b).sum(dim=1) for a, b in zip(x.split(CPU_ROWS), y.split(CPU_ROWS), strict=True)])


def finish_gradients(
    ctx: Any, rows: Tensor, scale: Tensor, grad_rows: Tensor, grad_columns: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of rows (b, D), columns (B, D) and scale (1,), in the types of the inputs.

    grad_rows = G C and grad_columns = G^T R, where factor G_ij = d loss / d logit_ij; both are overwritten.
    d loss / d scale = factor sum_ij G_ij <r_i, c_j> = factor sum_i <r_i, (G C)_i>, so the tiles need not be computed again.
    """
    grad_scale = (row_dots(rows, grad_rows).sum() * factor).reshape(1)
    factor = scale * factor
    dtypes = ctx.dtypes
    return grad_rows.mul_(factor).to(dtypes[0]), grad_columns.mul_(factor).to(dtypes[1]), grad_scale.to(dtypes[2])
