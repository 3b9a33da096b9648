"""Pairwise losses without the B x B matrix: walked in tiles, nothing of it kept, products recomputed for the gradient.

softmax: one pass collects the log-sum-exp of every row and every column (the same tile serves both directions), the
backward pass recomputes each tile and turns it into gradients at once: four products of size B x B x D instead of six.
sigmoid: the gradient of an entry needs nothing but the entry, so loss and gradients come from a single pass.

Several processes (W ranks, b = B / W rows each): a rank walks ITS rows of the first modality against ALL columns of the
second, and only the second is gathered. A column's sum over all rows is put together from the ranks' parts (B numbers a
rank), so each entry of the B x B matrix is computed on one rank only. Bytes a rank: B D out and back, plus W B for the
sums; gathering both modalities would be twice that, and twice the products. The loss is the mean over local rows, and the
gradients are those a strategy needs that averages over ranks.

Legend: b = local rows, B = all columns, D = width of an embedding; row i's partner is column i + offset.
Arithmetic is in float32 at least (float64 stays), outside autocast.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pretrain import ops
from pretrain.runtime import distributed

ROWS, COLUMNS = 1024, 2048
"""Size of a tile on the CPU: 8 MiB in float32, which a last-level cache holds between the product and its use."""
ACCELERATOR_SIDE = 8192
"""Side of a tile elsewhere: 256 MiB in float32, so that the fixed cost of a kernel does not count."""


class Tile(NamedTuple):
    """Rows i, columns j of the matrix, and the entries that are partners."""

    i: slice
    j: slice
    diagonal: tuple[Tensor, Tensor] | None
    """(rows, columns) inside the tile, or None when the tile holds no partners."""
    duplicates: Tensor | None
    """(rows, columns) bool: entries that are no negatives, because the two captions are the same."""


class Walk:
    """The tiles of a b x B matrix, row block by row block."""

    def __init__(self, rows: Tensor, columns: Tensor, offset: int, ids: tuple[Tensor, Tensor] | None, tile: int) -> None:
        self.b, self.B, self.offset, self.ids = rows.shape[0], columns.shape[0], offset, ids
        cpu = rows.device.type == "cpu"
        self.height = min(self.b, tile or (ROWS if cpu else ACCELERATOR_SIDE))
        self.width = min(self.B, tile or (COLUMNS if cpu else ACCELERATOR_SIDE))
        self.spare = rows.new_empty(self.height * self.width)

    def __iter__(self) -> Iterator[Tile]:
        for top in range(0, self.b, self.height):
            i = slice(top, min(top + self.height, self.b))
            for left in range(0, self.B, self.width):
                yield self._tile(i, slice(left, min(left + self.width, self.B)))

    def _tile(self, i: slice, j: slice) -> Tile:
        first, last = max(i.start, j.start - self.offset), min(i.stop, j.stop - self.offset)
        diagonal = None
        if first < last:
            steps = torch.arange(first, last, device=self.spare.device)
            diagonal = (steps - i.start, steps + (self.offset - j.start))
        duplicates = None
        if self.ids is not None:
            duplicates = self.ids[0][i, None] == self.ids[1][None, j]
            if diagonal is not None:
                duplicates[diagonal] = False
        return Tile(i, j, diagonal, duplicates)

    def product(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """(h, D), (w, D) -> their product (h, w) and a second tensor of that size to work in, which is reused."""
        size = rows.shape[0], columns.shape[0]
        return _times(rows, columns), self.spare[: size[0] * size[1]].view(size)


def _times(x: Tensor, y: Tensor) -> Tensor:
    """(n, k), (m, k) -> x y^T (n, m), without gradient."""
    if ops.ONEDNN and x.dtype == torch.float32 and x.device.type == "cpu":
        return ops.product(x, y)
    return x @ y.t()


# ---------------------------------------------------------------------------------------------------------------------
# Softmax, both directions


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, offset: int, ids: Any, tile: int
    ) -> tuple[Tensor, Tensor]:
        ctx.dtypes = rows.dtype, columns.dtype, scale.dtype
        rows, columns, factor = _wide(rows), _wide(columns), _wide(scale)
        walk = Walk(rows, columns, offset, ids, tile)
        positives = factor * _dots(rows, columns[offset : offset + walk.b])
        bounded = _bounded(rows, columns, factor)
        collect = _sums_bounded if bounded else _sums
        lse_rows, lse_columns, best = collect(walk, rows, columns, factor, positives)
        parts = distributed.gather_without_grad(lse_columns[None])
        lse_columns = parts.logsumexp(dim=0)
        own = lse_columns[offset : offset + walk.b]
        loss = ((lse_rows - positives) + (own - positives)).mean() / 2
        ctx.save_for_backward(rows, columns, factor, lse_rows, lse_columns)
        ctx.offset, ctx.ids, ctx.tile, ctx.bounded = offset, ids, tile, bounded
        ctx.mark_non_differentiable(best)
        return loss, best

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, scale, lse_rows, lse_columns = ctx.saved_tensors
        walk = Walk(rows, columns, ctx.offset, ctx.ids, ctx.tile)
        grad_rows, grad_columns = torch.zeros_like(rows), torch.zeros_like(columns)
        for t in walk:
            part, spare = walk.product(rows[t.i] * scale, columns[t.j])
            row, column = lse_rows[t.i, None], lse_columns[None, t.j]
            if ctx.bounded:
                part.exp_().mul_(torch.add((-row).exp(), (-column).exp(), out=spare))
            else:
                torch.sub(part, column, out=spare).exp_()
                part.sub_(row).exp_().add_(spare)
            if t.duplicates is not None:
                part.masked_fill_(t.duplicates, 0)
            if t.diagonal is not None:
                part[t.diagonal] -= 2
            grad_rows[t.i].add_(_times(part, columns[t.j].t()))
            grad_columns[t.j].addmm_(part.t(), rows[t.i])
        return *_grads(ctx, rows, scale, grad_rows, grad_columns, grads[0] / (2 * walk.b)), None, None, None


def _sums_bounded(walk: Walk, rows: Tensor, columns: Tensor, scale: Tensor, positives: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log-sum-exp of rows (b,) and columns (B,), and whether a row's partner is its best (b,) bool; logits so bounded that
    their exponentials neither overflow nor vanish: one exponential an entry serves rows and columns."""
    sums_rows, sums_columns = torch.zeros_like(positives), torch.zeros_like(columns[:, 0])
    largest, own = torch.zeros_like(sums_rows), torch.zeros_like(sums_rows)
    for t in walk:
        part = walk.product(rows[t.i] * scale, columns[t.j])[0].exp_()
        if t.duplicates is not None:
            part.masked_fill_(t.duplicates, 0)
        sums_rows[t.i] += part.sum(dim=1)
        sums_columns[t.j] += part.sum(dim=0)
        largest[t.i] = torch.maximum(largest[t.i], part.amax(dim=1))
        if t.diagonal is not None:
            own[t.i][t.diagonal[0]] = part[t.diagonal]
    return sums_rows.log(), sums_columns.log(), own >= largest


def _sums(walk: Walk, rows: Tensor, columns: Tensor, scale: Tensor, positives: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same for logits of any size, by running maxima (Milakov and Gimelshein, arXiv:1805.02867)."""
    peak_rows, sums_rows = positives.clone(), torch.zeros_like(positives)
    peak_columns = torch.full_like(columns[:, 0], -math.inf)
    peak_columns[walk.offset : walk.offset + walk.b] = positives
    sums_columns = torch.zeros_like(peak_columns)
    largest, own = torch.full_like(positives, -math.inf), torch.zeros_like(positives)
    for t in walk:
        part, spare = walk.product(rows[t.i] * scale, columns[t.j])
        if t.duplicates is not None:
            part.masked_fill_(t.duplicates, -math.inf)
        if t.diagonal is not None:
            own[t.i][t.diagonal[0]] = part[t.diagonal]
        top = part.amax(dim=1)
        largest[t.i] = torch.maximum(largest[t.i], top)
        _merge(peak_rows[t.i], sums_rows[t.i], top, part, spare, 1)
        _merge(peak_columns[t.j], sums_columns[t.j], part.amax(dim=0), part, spare, 0)
    return sums_rows.log() + peak_rows, sums_columns.log() + peak_columns, own >= largest


def _merge(peak: Tensor, sums: Tensor, top: Tensor, part: Tensor, spare: Tensor, dim: int) -> None:
    """Takes a tile's entries into running maximum and sum along `dim`, in place."""
    new = torch.maximum(peak, top).clamp_(min=torch.finfo(peak.dtype).min)  # a column of nothing but duplicates
    sums.mul_((peak - new).exp_()).add_(torch.sub(part, new.unsqueeze(dim), out=spare).exp_().sum(dim=dim))
    peak.copy_(new)


def _bounded(rows: Tensor, columns: Tensor, scale: Tensor) -> bool:
    """Whether no logit can exceed four fifths of what exp() holds: the rest is room for sums. CPU only: on an
    accelerator the question would stop the queue."""
    if rows.device.type != "cpu":
        return False
    bound = scale.abs() * rows.norm(dim=1).max() * columns.norm(dim=1).max()
    return bool(bound <= 0.79 * math.log(torch.finfo(rows.dtype).max))


def softmax_loss(
    rows: Tensor, columns: Tensor, scale: Tensor, offset: int = 0, ids: tuple[Tensor, Tensor] | None = None, tile: int = 0
) -> tuple[Tensor, Tensor]:
    """Symmetric cross-entropy of CLIP (Radford et al., arXiv:2103.00020, figure 3).

    rows (b, D), columns (B, D) gathered with gradient, scale (1,) -> loss () over local rows and columns, and for each
    row whether its partner scores best, (b,) bool. ids: (b,) and (B,) int64; equal ones are no negatives of each other.
    """
    with torch.autocast(rows.device.type, enabled=False):
        loss, best = _Softmax.apply(rows, columns, scale, offset, ids, tile)
    return loss, best


# ---------------------------------------------------------------------------------------------------------------------
# Sigmoid


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, offset: int, ids: Any, tile: int
    ) -> tuple[Tensor, Tensor]:
        ctx.dtypes = rows.dtype, columns.dtype, scale.dtype, bias.dtype
        rows, columns, factor, shift = _wide(rows), _wide(columns), _wide(scale), _wide(bias)
        walk = Walk(rows, columns, offset, ids, tile)
        wanted = any(ctx.needs_input_grad[:4])
        grad_rows = torch.zeros_like(rows) if wanted else rows
        grad_columns = torch.zeros_like(columns) if wanted else columns
        total = torch.zeros((), dtype=torch.float64, device=rows.device)
        grad_bias = torch.zeros_like(total)
        largest, own = torch.full_like(rows[:, 0], -math.inf), torch.zeros_like(rows[:, 0])
        for t in walk:
            part, spare = walk.product(rows[t.i] * factor, columns[t.j])
            part.add_(shift)
            if t.duplicates is not None:
                part.masked_fill_(t.duplicates, -math.inf)
            largest[t.i] = torch.maximum(largest[t.i], part.amax(dim=1))
            if t.diagonal is not None:
                own[t.i][t.diagonal[0]] = part[t.diagonal]
                part[t.diagonal] = -part[t.diagonal]
            total -= F.logsigmoid(torch.neg(part, out=spare)).sum()
            if not wanted:
                continue
            part.sigmoid_()
            if t.diagonal is not None:
                part[t.diagonal] = -part[t.diagonal]
            grad_rows[t.i].add_(_times(part, columns[t.j].t()))
            grad_columns[t.j].addmm_(part.t(), rows[t.i])
            grad_bias += part.sum()
        best = own >= largest
        if wanted:
            ctx.save_for_backward(rows, factor, grad_rows, grad_columns, grad_bias.to(shift.dtype))
        ctx.mark_non_differentiable(best)
        return (total / walk.b).to(rows.dtype), best

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, scale, grad_rows, grad_columns, grad_bias = ctx.saved_tensors
        grad_rows, grad_columns = grad_rows.clone(), grad_columns.clone()  # what is saved may be asked for again
        factor = grads[0] / rows.shape[0]
        bias = (grad_bias * factor).reshape(1).to(ctx.dtypes[3])
        return *_grads(ctx, rows, scale, grad_rows, grad_columns, factor), bias, None, None, None


def sigmoid_loss(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor,
    offset: int = 0,
    ids: tuple[Tensor, Tensor] | None = None,
    tile: int = 0,
) -> tuple[Tensor, Tensor]:
    """SigLIP's loss (Zhai et al., arXiv:2303.15343, algorithm 1): the sum over all pairs, divided by the rows.

    Arguments and results as softmax_loss; bias (1,).
    """
    with torch.autocast(rows.device.type, enabled=False):
        loss, best = _Sigmoid.apply(rows, columns, scale, bias, offset, ids, tile)
    return loss, best


# ---------------------------------------------------------------------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def _dots(x: Tensor, y: Tensor) -> Tensor:
    """(n, D), (n, D) -> (n,): row by row, without a product of that size in between."""
    return torch.cat([(a * b).sum(dim=1) for a, b in zip(x.split(ROWS), y.split(ROWS), strict=True)])


def _grads(
    ctx: Any, rows: Tensor, scale: Tensor, grad_rows: Tensor, grad_columns: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """From sums over G_ij = d loss / d logit_ij, still without `factor`, to the gradients of rows, columns and scale.

    In place: grad_rows and grad_columns are used up.
    d loss / d scale = sum_ij G_ij <r_i, c_j> = sum_i <r_i, (G C)_i>: it needs no further look at the matrix.
    """
    grad_scale = (_dots(rows, grad_rows).sum() * factor).reshape(1)
    factor = scale * factor
    kinds = ctx.dtypes
    return grad_rows.mul_(factor).to(kinds[0]), grad_columns.mul_(factor).to(kinds[1]), grad_scale.to(kinds[2])
