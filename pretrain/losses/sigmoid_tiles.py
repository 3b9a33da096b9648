"""The SigLIP loss in tiles.

The gradient of a logit depends on that logit only, so a single pass gives the loss and the gradients: three products of size
B x B x D. With `exchange: ring`, the gradient of a block of columns travels with it in the forward pass (Zhai et al.,
arXiv:2303.15343, section 3.3).

The weight of a pair is the mean of those of its row and its column.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pretrain.losses.products import add_product_, tensor_core_precision, transposed_product
from pretrain.losses.ring import visit_blocks
from pretrain.losses.tiles import PairLabels, Settings, TileIterator, block_tiles, finish_gradients, to_float32


class _Sums:
    """What the pass over the tiles adds up; gradients are those of the sum over pairs, with scale and bias as constants."""

    def __init__(self, rows: Tensor, needs_grad: bool) -> None:
        self.needs_grad = needs_grad
        self.loss = torch.zeros((), dtype=torch.float64, device=rows.device)
        self.grad_bias = torch.zeros_like(self.loss)
        self.grad_rows = torch.zeros_like(rows) if needs_grad else rows
        self.largest, self.at_partner = torch.full_like(rows[:, 0], -math.inf), torch.zeros_like(rows[:, 0])


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        scale: Tensor,
        bias: Tensor,
        offset: int,
        labels: PairLabels,
        settings: Settings,
    ) -> tuple[Tensor, Tensor]:
        ctx.dtypes = rows.dtype, columns.dtype, scale.dtype, bias.dtype
        rows, columns, factor, shift = to_float32(rows), to_float32(columns), to_float32(scale), to_float32(bias)
        sums = _Sums(rows, any(ctx.needs_input_grad[:4]))

        def add_block(step: int, block: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
            matrix = block_tiles(rows, block, step, offset, labels, settings)
            _add_tiles(matrix, rows, block[0], factor, shift, sums, grads[0] if grads else block[0])

        block = [columns, *labels.of_columns()]
        grads: Sequence[Tensor] = [torch.zeros_like(columns)] if sums.needs_grad else []
        with tensor_core_precision(rows.device, settings.precision):
            grads = visit_blocks(block, grads, add_block, settings.is_ring)
        is_best = sums.at_partner >= sums.largest
        if sums.needs_grad:
            ctx.save_for_backward(rows, factor, sums.grad_rows, grads[0], sums.grad_bias.to(shift.dtype))
        ctx.mark_non_differentiable(is_best)
        return (sums.loss / max(1, rows.shape[0])).to(rows.dtype), is_best

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, scale, grad_rows, grad_columns, grad_bias = ctx.saved_tensors
        grad_rows, grad_columns = grad_rows.clone(), grad_columns.clone()  # a second backward pass reads the saved tensors
        factor = grads[0] / max(1, rows.shape[0])
        bias = (grad_bias * factor).reshape(1).to(ctx.dtypes[3])
        return *finish_gradients(ctx, rows, scale, grad_rows, grad_columns, factor), bias, None, None, None


def _add_tiles(
    matrix: TileIterator, rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, sums: _Sums, grad_columns: Tensor
) -> None:
    """Add the loss and the gradients of all rows against a block of columns, in place."""
    for t in matrix:
        if matrix.is_fused:
            from pretrain.losses.kernels import fused  # needs Triton, which not every installation has

            entries = fused.sigmoid_tile(matrix, t, rows, columns, scale, bias, sums)
        else:
            # `entries` holds in turn: the logits, with the sign of partners reversed; their sigmoid; their gradient.
            entries, scratch = matrix.product(rows[t.i] * scale, columns[t.j])
            entries.add_(bias)
            if t.duplicates is not None:
                entries.masked_fill_(t.duplicates, -math.inf)
            sums.largest[t.i] = torch.maximum(sums.largest[t.i], entries.amax(dim=1))
            if t.partners is not None:
                sums.at_partner[t.i][t.partners[0]] = entries[t.partners]
                entries[t.partners] = -entries[t.partners]
            losses = F.logsigmoid(torch.neg(entries, out=scratch))
            weights = None
            if matrix.labels.weights is not None:
                weights = torch.add(matrix.labels.weights[0][t.i, None], matrix.labels.weights[1][None, t.j], out=scratch).div_(
                    2
                )
                losses.mul_(weights)
            sums.loss -= losses.sum()
            if sums.needs_grad:
                entries.sigmoid_()
                if t.partners is not None:
                    entries[t.partners] = -entries[t.partners]
                if weights is not None:
                    entries.mul_(weights)
                sums.grad_bias += entries.sum()
        if sums.needs_grad:
            sums.grad_rows[t.i].add_(transposed_product(entries, columns[t.j].t(), matrix.precision))
            add_product_(grad_columns[t.j], entries.t(), rows[t.i], matrix.precision)


def sigmoid_loss(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor,
    offset: int = 0,
    labels: PairLabels = PairLabels(),  # noqa: B008
    settings: Settings = Settings(),  # noqa: B008
) -> tuple[Tensor, Tensor]:
    """Return SigLIP's loss: the sum over all pairs divided by the rows.

    Source: Zhai et al., arXiv:2303.15343, algorithm 1.

    bias: (1,). The other arguments and the results are those of `softmax_loss`.
    """
    with torch.autocast(rows.device.type, enabled=False):
        loss, is_best = _Sigmoid.apply(rows, columns, scale, bias, offset, labels, settings)
    return loss, is_best
