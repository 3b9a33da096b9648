"""The CLIP loss in tiles: softmax over every row and over every column.

The forward pass collects the log-sum-exp of every row and of every column; one tile serves both directions. The backward pass
recomputes each tile and turns it into gradients at once. Together: four products of size B x B x D instead of six.

A column's sum over all rows is combined from one partial sum of each rank. With `exchange: gather` by a maximum and a sum over
ranks, B numbers each; with `ring` it travels with its block.

Three methods keep the exponentials finite; which one is chosen changes the rounding only:

    single_exp   exp(logit) serves row and column. Needs |logit| <= 70 in float32 (four fifths of the largest argument).
    half_exp     exp(logit / 2) serves both: multiplied by exp(-max / 2) of its row or column and squared, it is a term of the
                 sum. Needs |logit| <= 160 in float32: each factor is finite, and the product is at most 1.
    running_max  exp(logit - max) for the row and again for the column. Any logits.

A weight w of a row or column multiplies its terms of the gradient: exp(logit - (lse - log w)) = w exp(logit - lse), so it is
subtracted from the log-sum-exp. The columns of negatives have no loss of their own: their log-sum-exp counts as infinite.

No constant shift could extend the first method to CLIP's largest scale. Logits then range over [-100, 100], and their sums
over e^200, which is more than the e^176 between float32's smallest and largest normal number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.losses.products import add_product_, tensor_core_precision, transposed_product
from pretrain.losses.ring import visit_blocks
from pretrain.losses.tiles import PairLabels, Settings, TileIterator, block_tiles, finish_gradients, row_dots, to_float32
from pretrain.runtime import distributed


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, offset: int, labels: PairLabels, settings: Settings
    ) -> tuple[Tensor, Tensor]:
        ctx.dtypes = rows.dtype, columns.dtype, scale.dtype
        rows, columns, factor = to_float32(rows), to_float32(columns), to_float32(scale)
        b = rows.shape[0]
        positives = factor * row_dots(rows, columns[offset : offset + b])
        lse_rows, is_best, methods = torch.full_like(positives, -math.inf), torch.ones_like(positives, dtype=torch.bool), []
        partner_logits = positives  # replaced by those of the tiles, which round as the other logits do

        def add_block(step: int, block: Sequence[Tensor], sums: Sequence[Tensor]) -> None:
            nonlocal lse_rows, is_best, partner_logits
            matrix = block_tiles(rows, block, step, offset, labels, settings)
            method = choose_method(rows, block[0], factor, settings)
            methods.append(method)
            block_lse, lse_columns, at_partner, largest = _LOGSUMEXP[method](matrix, rows, block[0], factor, positives)
            if step == 0:
                lse_rows, is_best = block_lse, at_partner >= largest
                partner_logits = at_partner.log() if method == "single_exp" else at_partner
                sums[0].copy_(lse_columns)
            else:
                lse_rows = torch.logaddexp(lse_rows, block_lse)
                is_best &= partner_logits >= (largest.log() if method == "single_exp" else largest)
                sums[0].copy_(torch.logaddexp(sums[0], lse_columns))

        block = [columns, *labels.of_columns()]
        sums: Sequence[Tensor] = [torch.full_like(columns[:, 0], -math.inf)]
        with tensor_core_precision(rows.device, settings.precision):
            (lse_columns,) = visit_blocks(block, sums, add_block, settings.is_ring)
            if not settings.is_ring:
                partners = distributed.logsumexp(lse_columns[: len(columns) - labels.num_negatives])
                lse_columns = torch.cat([partners, lse_columns[len(partners) :]]) if labels.num_negatives else partners
        if settings.precision != "fp32":  # so that the loss is that of the rounded factors, and never negative
            positives = partner_logits
        lse_partners = lse_columns[offset : offset + b]
        losses = (lse_rows - positives) + (lse_partners - positives)
        if labels.num_negatives:
            lse_columns[-labels.num_negatives :] = math.inf
        if labels.weights is not None:
            losses = labels.weights[0] * losses
            lse_rows, lse_columns = lse_rows - labels.weights[0].log(), lse_columns - labels.weights[1].log()
        loss = losses.sum() / (2 * max(1, b))  # b may be 0: samples that lack a modality
        ctx.save_for_backward(rows, columns, factor, lse_rows, lse_columns)
        ctx.offset, ctx.labels, ctx.settings, ctx.methods = offset, labels, settings, methods
        ctx.mark_non_differentiable(is_best)
        return loss, is_best

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, scale, lse_rows, lse_columns = ctx.saved_tensors
        grad_rows = torch.zeros_like(rows)

        def add_block(step: int, block: Sequence[Tensor], sums: Sequence[Tensor]) -> None:
            matrix = block_tiles(rows, [block[0], *block[2:]], step, ctx.offset, ctx.labels, ctx.settings)
            _add_gradients(matrix, rows, block[0], scale, lse_rows, block[1], ctx.methods[step], grad_rows, sums[0])

        block = [columns, lse_columns, *ctx.labels.of_columns()]
        sums: Sequence[Tensor] = [torch.zeros_like(columns)]
        with tensor_core_precision(rows.device, ctx.settings.precision):
            (grad_columns,) = visit_blocks(block, sums, add_block, ctx.settings.is_ring)
        factor = grads[0] / (2 * max(1, rows.shape[0]))
        return *finish_gradients(ctx, rows, scale, grad_rows, grad_columns, factor), None, None, None


# ---------------------------------------------------------------------------------------------------------------------
# Forward: (matrix, rows (b, D), columns (B, D), scale (1,), positives (b,)) -> log-sum-exp of rows (b,) and of columns
# (B,), and the value at each row's partner and the largest of each row, both (b,). Both are exponentials where the method
# is single_exp, else logits.

_Sums = tuple[Tensor, Tensor, Tensor, Tensor]


def _single_exp(matrix: TileIterator, rows: Tensor, columns: Tensor, scale: Tensor, positives: Tensor) -> _Sums:
    """Sum the exponentials as they are: they neither overflow nor vanish."""
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
    return sums_rows.log(), sums_columns.log(), at_partner, largest


def _half_exp(matrix: TileIterator, rows: Tensor, columns: Tensor, scale: Tensor, positives: Tensor) -> _Sums:
    """Sum squares of exp((logit - running maximum) / 2), computed as exp(logit / 2) exp(-maximum / 2).

    Maxima of rows and columns below are halved, as the logits in the tiles are.
    """
    half_scale = scale / 2
    max_rows, max_columns = torch.full_like(positives, -math.inf), torch.full_like(columns[:, 0], -math.inf)
    sums_rows, sums_columns = torch.zeros_like(max_rows), torch.zeros_like(max_columns)
    at_partner = torch.zeros_like(positives)
    for t in matrix:
        halves, scratch = matrix.product(rows[t.i] * half_scale, columns[t.j])
        if t.duplicates is not None:
            halves.masked_fill_(t.duplicates, -math.inf)
        if t.partners is not None:
            at_partner[t.i][t.partners[0]] = halves[t.partners]
        tile_max = halves.amax(dim=1), halves.amax(dim=0)
        halves.exp_()
        _add_squares(max_rows[t.i], sums_rows[t.i], tile_max[0], halves, scratch, 1)
        _add_squares(max_columns[t.j], sums_columns[t.j], tile_max[1], halves, scratch, 0)
    return sums_rows.log() + 2 * max_rows, sums_columns.log() + 2 * max_columns, 2 * at_partner, 2 * max_rows


def _add_squares(running_max: Tensor, sums: Tensor, tile_max: Tensor, exponentials: Tensor, scratch: Tensor, dim: int) -> None:
    """Add the squares of a tile's exponentials along `dim` to the running sums and update the running maxima, in place."""
    # Clamped, because a column of duplicates only has the maximum -inf; exp(80) times its exponentials, all 0, is 0.
    new_max = torch.maximum(running_max, tile_max).clamp_(min=-HALF_EXP_LIMIT / 2)
    sums.mul_((2 * (running_max - new_max)).exp_())
    sums.add_(torch.mul(exponentials, (-new_max).exp_().unsqueeze(dim), out=scratch).square_().sum(dim=dim))
    running_max.copy_(new_max)


def _running_max(matrix: TileIterator, rows: Tensor, columns: Tensor, scale: Tensor, positives: Tensor) -> _Sums:
    """Sum exponentials relative to running maxima.

    Source: Milakov and Gimelshein, arXiv:1805.02867.
    """
    max_rows, sums_rows = positives.clone(), torch.zeros_like(positives)
    max_columns = torch.full_like(columns[:, 0], -math.inf)
    if matrix.offset < matrix.B:
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
    return sums_rows.log() + max_rows, sums_columns.log() + max_columns, at_partner, largest


def _add_tile(running_max: Tensor, sums: Tensor, tile_max: Tensor, logits: Tensor, scratch: Tensor, dim: int) -> None:
    """Add a tile's exponentials along `dim` to the running sums and update the running maxima, in place."""
    # Clamped, because a column of duplicates only has the maximum -inf, and -inf - -inf is not a number.
    new_max = torch.maximum(running_max, tile_max).clamp_(min=torch.finfo(running_max.dtype).min)
    sums.mul_((running_max - new_max).exp_()).add_(torch.sub(logits, new_max.unsqueeze(dim), out=scratch).exp_().sum(dim=dim))
    running_max.copy_(new_max)


def _fused(matrix: TileIterator, rows: Tensor, columns: Tensor, scale: Tensor, positives: Tensor) -> _Sums:
    from pretrain.losses.kernels import fused  # needs Triton, which not every installation has

    return fused.softmax_sums(matrix, rows, columns, scale, positives)


_LOGSUMEXP = {"single_exp": _single_exp, "half_exp": _half_exp, "running_max": _running_max, "fused": _fused}
HALF_EXP_LIMIT = 160.0
"""Largest |logit| of half_exp in float32. Its square root e^80 and the reciprocal are normal numbers."""


def choose_method(rows: Tensor, columns: Tensor, scale: Tensor, settings: Settings) -> str:
    """Return how exponentials stay finite: a key of _LOGSUMEXP.

    On the CPU the norms give the bound of the logits. On an accelerator such a check would wait for the device, so the bound
    is `settings.max_logit`, and without one there is none.
    """
    if settings.is_fused:
        return "fused"
    if not len(rows):
        return "running_max"
    if settings.method != "auto":
        return settings.method
    limit = 0.79 * math.log(torch.finfo(rows.dtype).max)
    if rows.device.type == "cpu":
        bound = scale.abs() * rows.norm(dim=1).max() * columns.norm(dim=1).max()
        return "single_exp" if bool(bound <= limit) else "running_max"
    if settings.max_logit is None or settings.max_logit > HALF_EXP_LIMIT:
        return "running_max"
    return "single_exp" if settings.max_logit <= limit else "half_exp"


# ---------------------------------------------------------------------------------------------------------------------
# Backward


def _add_gradients(
    matrix: TileIterator,
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    lse_rows: Tensor,
    lse_columns: Tensor,
    method: str,
    grad_rows: Tensor,
    grad_columns: Tensor,
) -> None:
    """Add G C to grad_rows (b, D) and G^T R to grad_columns (B, D), in place.

    G is the gradient of the logits times 2 b: softmax over the row plus softmax over the column, minus 2 for partners. Weights
    are in the log-sum-exps, and multiply what is subtracted for partners.
    """
    weights = matrix.labels.weights
    for t in matrix:
        row, column = lse_rows[t.i, None], lse_columns[None, t.j]
        if method == "fused":
            from pretrain.losses.kernels import fused

            grad = fused.softmax_gradient(matrix, t, rows, columns, scale, lse_rows, lse_columns)
        elif method == "half_exp":
            # (exp(logit / 2) sqrt(exp(-row) + exp(-column)))^2; hypot takes the root without overflow.
            grad, scratch = matrix.product(rows[t.i] * (scale / 2), columns[t.j])
            torch.hypot((-row / 2).exp_(), (-column / 2).exp_(), out=scratch)
            grad.exp_().mul_(scratch).square_()
        else:
            grad, scratch = matrix.product(rows[t.i] * scale, columns[t.j])
            if method == "single_exp":
                grad.exp_().mul_(torch.add((-row).exp(), (-column).exp(), out=scratch))
            else:
                torch.sub(grad, column, out=scratch).exp_()
                grad.sub_(row).exp_().add_(scratch)
        if t.duplicates is not None:
            grad.masked_fill_(t.duplicates, 0)
        if t.partners is not None:
            grad[t.partners] -= 2 if weights is None else 2 * weights[0][t.i][t.partners[0]]
        grad_rows[t.i].add_(transposed_product(grad, columns[t.j].t(), matrix.precision))
        add_product_(grad_columns[t.j], grad.t(), rows[t.i], matrix.precision)


def softmax_loss(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    offset: int = 0,
    labels: PairLabels = PairLabels(),  # noqa: B008
    settings: Settings = Settings(),  # noqa: B008
) -> tuple[Tensor, Tensor]:
    """Return CLIP's symmetric cross-entropy (Radford et al., arXiv:2103.00020, figure 3).

    rows: (b, D). columns: (B, D), gathered with gradient, or this rank's (b, D) with settings.is_ring; then the negatives of
    `labels`. scale: (1,). offset: column of row 0's partner. labels: a row and a column with the same id are not negatives of
    each other; weights multiply the losses of rows and columns.

    With settings.is_ring, the gradient passed to the loss must be equal on all ranks.

    Returns the loss () over local rows and columns, and whether each row's partner scores best (b,) bool.
    """
    with torch.autocast(rows.device.type, enabled=False):
        loss, is_best = _Softmax.apply(rows, columns, scale, offset, labels, settings)
    return loss, is_best
