"""The divergence of the student's similarities from a teacher's in tiles, so that no b x B matrix is held in memory.

A first pass over the tiles collects the log-sum-exp of every row, of both. A second computes each tile again, sums the
divergence, and turns it into gradients at once: the gradient of a logit, softmax of the student minus softmax of the teacher,
needs the log-sum-exps only. The backward pass multiplies what was kept, (b, D) and (B, D), by the gradient of the loss.

Together: four products of size b x B x D and two of b x B x E; the dense formula needs three and one.

Shapes: b = local rows, B = all columns, D and E = widths of student and teacher.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.losses.products import add_product_, tensor_core_precision, transposed_product
from pretrain.losses.tiles import PairLabels, Settings, Tile, TileIterator, finish_gradients, to_float32

MASKED = -1e30
"""Logit of what is left out: its exponential is 0, and a row of nothing else is still finite."""


class TeacherSimilarities(NamedTuple):
    """What a teacher says of the rows and columns."""

    rows: Tensor
    """(b, E), of unit length, divided by the temperature."""
    columns: Tensor
    """(B, E), of unit length."""
    row_weights: Tensor
    """(b,), 0 for rows without an embedding."""
    is_left_out: Tensor
    """(B,) uint8: 1 for columns without an embedding."""
    own_column: int | None
    """Column of row 0 itself, which is left out, as are those of the rows after it; None = no column is a row's own."""


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, teacher: TeacherSimilarities, settings: Settings
    ) -> Tensor:
        ctx.dtypes = rows.dtype, columns.dtype, scale.dtype
        rows, columns, factor = to_float32(rows), to_float32(columns), to_float32(scale)
        offset = len(columns) if teacher.own_column is None else teacher.own_column
        matrix = TileIterator(rows, columns, offset, PairLabels(is_padding=teacher.is_left_out), settings)
        weights = teacher.row_weights / max(1, len(rows))
        needs_gradients = any(ctx.needs_input_grad)
        with tensor_core_precision(rows.device, settings.precision):
            lse_student, lse_target = _sum_exponentials(matrix, rows * factor, columns, teacher)
            divergences = torch.zeros_like(weights)
            grad_rows, grad_columns = (torch.zeros_like(x if needs_gradients else x[:0]) for x in (rows, columns))
            for t in matrix:
                student, target = _logits(matrix, t, rows * factor, columns, teacher)
                student -= lse_student[t.i, None]
                target -= lse_target[t.i, None]
                probabilities = target.exp()
                difference = _leave_out(target.sub_(student), t, 0.0)
                divergences[t.i] += difference.mul_(probabilities).sum(dim=1)
                if needs_gradients:
                    grad = _leave_out(student.exp_().sub_(probabilities), t, 0.0).mul_(weights[t.i, None])
                    grad_rows[t.i].add_(transposed_product(grad, columns[t.j].t(), matrix.precision))
                    add_product_(grad_columns[t.j], grad.t(), rows[t.i], matrix.precision)
        ctx.save_for_backward(rows, factor, grad_rows, grad_columns)
        return (weights * divergences).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, scale, grad_rows, grad_columns = ctx.saved_tensors
        return *finish_gradients(ctx, rows, scale, grad_rows.clone(), grad_columns.clone(), grads[0]), None, None


def _sum_exponentials(
    matrix: TileIterator, rows: Tensor, columns: Tensor, teacher: TeacherSimilarities
) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp of each row (b,) of the student's and of the teacher's logits. rows: multiplied by the scale."""
    sums = [torch.full_like(rows[:, 0], -math.inf) for _ in range(2)]
    for t in matrix:
        for lse, logits in zip(sums, _logits(matrix, t, rows, columns, teacher), strict=True):
            lse[t.i] = torch.logaddexp(lse[t.i], logits.logsumexp(dim=1))
    return sums[0], sums[1]


def _logits(
    matrix: TileIterator, t: Tile, rows: Tensor, columns: Tensor, teacher: TeacherSimilarities
) -> tuple[Tensor, Tensor]:
    """Return the logits (h, w) of a tile, of the student and of the teacher; MASKED for what is left out."""
    student = matrix.product(rows[t.i], columns[t.j])[0]
    target = matrix.product(teacher.rows[t.i], teacher.columns[t.j])[0]
    return _leave_out(student, t, MASKED), _leave_out(target, t, MASKED)


def _leave_out(values: Tensor, t: Tile, value: float) -> Tensor:
    """Set the entries of a tile that are left out, in place."""
    if t.duplicates is not None:
        values.masked_fill_(t.duplicates, value)
    if t.partners is not None:
        values[t.partners] = value
    return values


def divergence(rows: Tensor, columns: Tensor, scale: Tensor, teacher: TeacherSimilarities, settings: Settings) -> Tensor:
    """Return the weighted mean over rows of KL(softmax of the teacher || softmax of the student), ().

    rows: (b, D). columns: (B, D), gathered with gradient. scale: (1,).
    """
    loss: Tensor = _Divergence.apply(rows, columns, scale, teacher, settings)
    return loss
