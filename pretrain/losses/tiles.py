"""The CLIP and SigLIP losses in tiles, so that the B x B matrix of logits is never held in memory.

Softmax (CLIP): the forward pass collects the log-sum-exp of every row and of every column; one tile serves both directions.
The backward pass recomputes each tile and turns it into gradients at once. Together: four products of size B x B x D
instead of six.

Sigmoid (SigLIP): the gradient of a logit depends on that logit only, so a single pass gives the loss and the gradients.

With W ranks of b = B / W rows, each rank takes ITS rows of the first modality against ALL columns of the second. Only the
second modality is gathered. A column's sum over all rows is combined from one partial sum of each rank, by a maximum and a
sum over ranks of B numbers each. So each entry of the B x B matrix is computed on one rank only. Numbers transferred per
rank: B D forward and B D backward, plus 2 B for the sums. Gathering both modalities would need twice that, and twice the
products.

The loss is the mean over local rows, and its gradients are exact under a strategy that averages gradients over ranks.

Shapes: b = local rows, B = all columns, D = width of an embedding; h, w = rows and columns of a tile. Row i's partner is
column i + offset. Arithmetic is in float32 at least (float64 stays float64), outside autocast.
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

CPU_ROWS, CPU_COLUMNS = 1024, 2048
"""Size of a tile on the CPU: 8 MiB in float32, which stays in the last-level cache between the product and its use."""
ACCELERATOR_SIDE = 8192
"""Side of a tile on an accelerator: 256 MiB in float32, so large that the fixed cost of a kernel is negligible."""


class Tile(NamedTuple):
    """One tile of the matrix of logits: its rows i, its columns j, and which of its entries are special."""

    i: slice
    j: slice
    partners: tuple[Tensor, Tensor] | None
    """(rows, columns) inside the tile of the entries that are partners; None where the tile has none."""
    duplicates: Tensor | None
    """(h, w) bool: entries that are not negatives, because the two captions are the same; None where all captions count."""


class TileIterator:
    """Iterates over the tiles of a b x B matrix, one block of rows after the other.

    ids: caption hashes of the rows (b,) and of the columns (B,), to leave out duplicates. tile: side of a tile; 0 chooses
    it by device.
    """

    def __init__(self, rows: Tensor, columns: Tensor, offset: int, ids: tuple[Tensor, Tensor] | None, tile: int) -> None:
        self.b, self.B, self.offset, self.ids = rows.shape[0], columns.shape[0], offset, ids
        is_cpu = rows.device.type == "cpu"
        self.height = min(self.b, tile or (CPU_ROWS if is_cpu else ACCELERATOR_SIDE))
        self.width = min(self.B, tile or (CPU_COLUMNS if is_cpu else ACCELERATOR_SIDE))
        self.scratch = rows.new_empty(self.height * self.width)

    def __iter__(self) -> Iterator[Tile]:
        for top in range(0, self.b, self.height):
            i = slice(top, min(top + self.height, self.b))
            for left in range(0, self.B, self.width):
                yield self._tile(i, slice(left, min(left + self.width, self.B)))

    def _tile(self, i: slice, j: slice) -> Tile:
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
        return Tile(i, j, partners, duplicates)

    def product(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows columns^T: (h, D), (w, D) -> (h, w), and a scratch tensor (h, w) that every call shares."""
        size = rows.shape[0], columns.shape[0]
        return _matmul_transposed(rows, columns), self.scratch[: size[0] * size[1]].view(size)


def _matmul_transposed(x: Tensor, y: Tensor) -> Tensor:
    """Return x y^T without gradient: (n, k), (m, k) -> (n, m)."""
    if ops.ONEDNN and x.dtype == torch.float32 and x.device.type == "cpu":
        return ops.product(x, y)
    return x @ y.t()


# ---------------------------------------------------------------------------------------------------------------------
# Softmax in both directions


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, offset: int, ids: Any, tile: int
    ) -> tuple[Tensor, Tensor]:
        ctx.dtypes = rows.dtype, columns.dtype, scale.dtype
        rows, columns, factor = _to_float32(rows), _to_float32(columns), _to_float32(scale)
        matrix = TileIterator(rows, columns, offset, ids, tile)
        positives = factor * _row_dots(rows, columns[offset : offset + matrix.b])
        is_bounded = _is_bounded(rows, columns, factor)
        logsumexp = _logsumexp_bounded if is_bounded else _logsumexp
        lse_rows, lse_columns, is_best = logsumexp(matrix, rows, columns, factor, positives)
        lse_columns = distributed.logsumexp(lse_columns)
        lse_partners = lse_columns[offset : offset + matrix.b]
        loss = ((lse_rows - positives) + (lse_partners - positives)).mean() / 2
        ctx.save_for_backward(rows, columns, factor, lse_rows, lse_columns)
        ctx.offset, ctx.ids, ctx.tile, ctx.is_bounded = offset, ids, tile, is_bounded
        ctx.mark_non_differentiable(is_best)
        return loss, is_best

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, scale, lse_rows, lse_columns = ctx.saved_tensors
        matrix = TileIterator(rows, columns, ctx.offset, ctx.ids, ctx.tile)
        grad_rows, grad_columns = torch.zeros_like(rows), torch.zeros_like(columns)
        for t in matrix:
            # The gradient of the tile's logits, times 2 b: softmax over the row plus softmax over the column.
            grad, scratch = matrix.product(rows[t.i] * scale, columns[t.j])
            row, column = lse_rows[t.i, None], lse_columns[None, t.j]
            if ctx.is_bounded:
                grad.exp_().mul_(torch.add((-row).exp(), (-column).exp(), out=scratch))
            else:
                torch.sub(grad, column, out=scratch).exp_()
                grad.sub_(row).exp_().add_(scratch)
            if t.duplicates is not None:
                grad.masked_fill_(t.duplicates, 0)
            if t.partners is not None:
                grad[t.partners] -= 2
            grad_rows[t.i].add_(_matmul_transposed(grad, columns[t.j].t()))
            grad_columns[t.j].addmm_(grad.t(), rows[t.i])
        return *_finish_gradients(ctx, rows, scale, grad_rows, grad_columns, grads[0] / (2 * matrix.b)), None, None, None


def _logsumexp_bounded(
    matrix: TileIterator, rows: Tensor, columns: Tensor, scale: Tensor, positives: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log-sum-exp of rows (b,) and columns (B,), and whether each partner scores best (b,).

    The logits must satisfy `_is_bounded`: their exponentials neither overflow nor vanish. One exponential for each entry
    then serves both its row and its column.
    """
    sums_rows, sums_columns = torch.zeros_like(positives), torch.zeros_like(columns[:, 0])
    largest, at_partner = torch.zeros_like(sums_rows), torch.zeros_like(sums_rows)
    for t in matrix:
        exponentials = matrix.product(rows[t.i] * scale, columns[t.j])[0].exp_()
        if t.duplicates is not None:
            exponentials.masked_fill_(t.duplicates, 0)
        sums_rows[t.i] += exponentials.sum(dim=1)
        sums_columns[t.j] += exponentials.sum(dim=0)
        largest[t.i] = torch.maximum(largest[t.i], exponentials.amax(dim=1))
        if t.partners is not None:
            at_partner[t.i][t.partners[0]] = exponentials[t.partners]
    return sums_rows.log(), sums_columns.log(), at_partner >= largest


def _logsumexp(
    matrix: TileIterator, rows: Tensor, columns: Tensor, scale: Tensor, positives: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `_logsumexp_bounded` does, for logits of any size, by running maxima.

    Source: Milakov and Gimelshein, arXiv:1805.02867.
    """
    max_rows, sums_rows = positives.clone(), torch.zeros_like(positives)
    max_columns = torch.full_like(columns[:, 0], -math.inf)
    max_columns[matrix.offset : matrix.offset + matrix.b] = positives
    sums_columns = torch.zeros_like(max_columns)
    largest, at_partner = torch.full_like(positives, -math.inf), torch.zeros_like(positives)
    for t in matrix:
        logits, scratch = matrix.product(rows[t.i] * scale, columns[t.j])
        if t.duplicates is not None:
            logits.masked_fill_(t.duplicates, -math.inf)
        if t.partners is not None:
            at_partner[t.i][t.partners[0]] = logits[t.partners]
        tile_max = logits.amax(dim=1)
        largest[t.i] = torch.maximum(largest[t.i], tile_max)
        _add_tile(max_rows[t.i], sums_rows[t.i], tile_max, logits, scratch, 1)
        _add_tile(max_columns[t.j], sums_columns[t.j], logits.amax(dim=0), logits, scratch, 0)
    return sums_rows.log() + max_rows, sums_columns.log() + max_columns, at_partner >= largest


def _add_tile(running_max: Tensor, sums: Tensor, tile_max: Tensor, logits: Tensor, scratch: Tensor, dim: int) -> None:
    """Add a tile's exponentials along `dim` to the running sums and update the running maxima, in place."""
    # Clamped, because a column of duplicates only has the maximum -inf, and -inf - -inf is not a number.
    new_max = torch.maximum(running_max, tile_max).clamp_(min=torch.finfo(running_max.dtype).min)
    sums.mul_((running_max - new_max).exp_()).add_(torch.sub(logits, new_max.unsqueeze(dim), out=scratch).exp_().sum(dim=dim))
    running_max.copy_(new_max)


def _is_bounded(rows: Tensor, columns: Tensor, scale: Tensor) -> bool:
    """Whether the exponentials of all logits and their sums are sure to be finite; False on accelerators.

    The bound is four fifths of the largest argument of exp(). On an accelerator the check would wait for the device.
    """
    if rows.device.type != "cpu":
        return False
    bound = scale.abs() * rows.norm(dim=1).max() * columns.norm(dim=1).max()
    return bool(bound <= 0.79 * math.log(torch.finfo(rows.dtype).max))


def softmax_loss(
    rows: Tensor, columns: Tensor, scale: Tensor, offset: int = 0, ids: tuple[Tensor, Tensor] | None = None, tile: int = 0
) -> tuple[Tensor, Tensor]:
    """Return CLIP's symmetric cross-entropy (Radford et al., arXiv:2103.00020, figure 3).

    rows: (b, D). columns: (B, D), gathered with gradient. scale: (1,). offset: column of row 0's partner.
    ids: (b,) and (B,) int64; a row and a column with the same id are not negatives of each other. tile: side, 0 chooses.

    Returns the loss () over local rows and columns, and whether each row's partner scores best (b,) bool.
    """
    with torch.autocast(rows.device.type, enabled=False):
        loss, is_best = _Softmax.apply(rows, columns, scale, offset, ids, tile)
    return loss, is_best


# ---------------------------------------------------------------------------------------------------------------------
# Sigmoid


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, offset: int, ids: Any, tile: int
    ) -> tuple[Tensor, Tensor]:
        ctx.dtypes = rows.dtype, columns.dtype, scale.dtype, bias.dtype
        rows, columns, factor, shift = _to_float32(rows), _to_float32(columns), _to_float32(scale), _to_float32(bias)
        matrix = TileIterator(rows, columns, offset, ids, tile)
        needs_grad = any(ctx.needs_input_grad[:4])
        grad_rows = torch.zeros_like(rows) if needs_grad else rows
        grad_columns = torch.zeros_like(columns) if needs_grad else columns
        total = torch.zeros((), dtype=torch.float64, device=rows.device)
        grad_bias = torch.zeros_like(total)
        largest, at_partner = torch.full_like(rows[:, 0], -math.inf), torch.zeros_like(rows[:, 0])
        for t in matrix:
            # `entries` holds in turn: the logits, with the sign of partners reversed; their sigmoid; their gradient.
            entries, scratch = matrix.product(rows[t.i] * factor, columns[t.j])
            entries.add_(shift)
            if t.duplicates is not None:
                entries.masked_fill_(t.duplicates, -math.inf)
            largest[t.i] = torch.maximum(largest[t.i], entries.amax(dim=1))
            if t.partners is not None:
                at_partner[t.i][t.partners[0]] = entries[t.partners]
                entries[t.partners] = -entries[t.partners]
            total -= F.logsigmoid(torch.neg(entries, out=scratch)).sum()
            if not needs_grad:
                continue
            entries.sigmoid_()
            if t.partners is not None:
                entries[t.partners] = -entries[t.partners]
            grad_rows[t.i].add_(_matmul_transposed(entries, columns[t.j].t()))
            grad_columns[t.j].addmm_(entries.t(), rows[t.i])
            grad_bias += entries.sum()
        is_best = at_partner >= largest
        if needs_grad:
            ctx.save_for_backward(rows, factor, grad_rows, grad_columns, grad_bias.to(shift.dtype))
        ctx.mark_non_differentiable(is_best)
        return (total / matrix.b).to(rows.dtype), is_best

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, scale, grad_rows, grad_columns, grad_bias = ctx.saved_tensors
        grad_rows, grad_columns = grad_rows.clone(), grad_columns.clone()  # a second backward pass reads the saved tensors
        factor = grads[0] / rows.shape[0]
        bias = (grad_bias * factor).reshape(1).to(ctx.dtypes[3])
        return *_finish_gradients(ctx, rows, scale, grad_rows, grad_columns, factor), bias, None, None, None


def sigmoid_loss(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor,
    offset: int = 0,
    ids: tuple[Tensor, Tensor] | None = None,
    tile: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return SigLIP's loss: the sum over all pairs divided by the rows.

    Source: Zhai et al., arXiv:2303.15343, algorithm 1.

    bias: (1,). The other arguments and the results are those of `softmax_loss`.
    """
    with torch.autocast(rows.device.type, enabled=False):
        loss, is_best = _Sigmoid.apply(rows, columns, scale, bias, offset, ids, tile)
    return loss, is_best


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic of both losses


def _to_float32(x: Tensor) -> Tensor:
    """Return x detached and contiguous, in float32 or, if it is float64, unchanged in type."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def _row_dots(x: Tensor, y: Tensor) -> Tensor:
    """Return the dot product of each pair of rows: (n, D), (n, D) -> (n,).

    It needs no temporary tensor of size (n, D).
    """
    return torch.cat([(a * b).sum(dim=1) for a, b in zip(x.split(CPU_ROWS), y.split(CPU_ROWS), strict=True)])


def _finish_gradients(
    ctx: Any, rows: Tensor, scale: Tensor, grad_rows: Tensor, grad_columns: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of rows (b, D), columns (B, D) and scale (1,), in the types of the inputs.

    grad_rows = G C and grad_columns = G^T R, where factor G_ij = d loss / d logit_ij; both are overwritten.
    d loss / d scale = factor sum_ij G_ij <r_i, c_j> = factor sum_i <r_i, (G C)_i>, so the tiles need not be computed again.
    """
    grad_scale = (_row_dots(rows, grad_rows).sum() * factor).reshape(1)
    factor = scale * factor
    dtypes = ctx.dtypes
    return grad_rows.mul_(factor).to(dtypes[0]), grad_columns.mul_(factor).to(dtypes[1]), grad_scale.to(dtypes[2])
