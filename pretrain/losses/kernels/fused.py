# mypy: disable-error-code="no-untyped-def"
"""Triton kernels for the tiles of both losses: a product whose results are used before they leave the chip.

The plain path writes a tile of logits to memory and reads it up to a dozen times. Here the forward pass of the softmax writes
only the log-sum-exp of each row and column of each block of 128 x 128; these are combined afterwards. The backward pass, and
the sigmoid, write each entry of the gradient once; cuBLAS multiplies it by the features. Nothing is added atomically, so
results are the same in every run.

float32 features only. Masks of partners and duplicates are computed inside. Tested in Triton's interpreter against the plain
path; block sizes are conventional and have not been tuned on a GPU (tests/bench/loss.py --device cuda measures them).

Pointers are to contiguous tensors. Shapes: h rows, w columns of a tile; D = width of an embedding.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain.losses.tiles import Tile, TileIterator

if TYPE_CHECKING:
    tl: Any
    triton: Any
else:
    import triton
    import triton.language as tl

BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, WARPS = 128, 128, 32, 8
INPUT_PRECISION = {"fp32": "ieee", "tf32": "tf32", "bf16": "tf32"}
"""Triton's `input_precision` by loss.precision; bf16 factors are multiplied as such."""


@triton.jit
def _positions(h, w, offset, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Return this program's rows and columns, and which of its entries are inside the tile, and which are partners."""
    i = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    j = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    is_inside = (i[:, None] < h) & (j[None, :] < w)
    return i, j, is_inside, is_inside & (i[:, None] + offset == j[None, :])


@triton.jit
def _logits(rows, columns, scale, i, j, h, w, D, PRECISION: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Return scale <row, column> for rows i and columns j: (BLOCK_ROWS, BLOCK_COLUMNS) float32."""
    total = tl.zeros((i.shape[0], j.shape[0]), dtype=tl.float32)
    for begin in range(0, D, BLOCK_WIDTH):
        k = begin + tl.arange(0, BLOCK_WIDTH)
        x = tl.load(rows + i[:, None] * D + k[None, :], mask=(i[:, None] < h) & (k[None, :] < D), other=0.0)
        y = tl.load(columns + j[None, :] * D + k[:, None], mask=(j[None, :] < w) & (k[:, None] < D), other=0.0)
        total = tl.dot(x, y, total, input_precision=PRECISION)
    return total * tl.load(scale)


@triton.jit
def _is_duplicate(row_ids, column_ids, i, j, h, w, is_partner):
    """Return where row and column have the same caption but are not partners."""
    row = tl.load(row_ids + i, mask=i < h, other=0)
    column = tl.load(column_ids + j, mask=j < w, other=0)
    return (row[:, None] == column[None, :]) & (is_partner == 0)


@triton.jit
def _store_partner(at_partner, logits, is_partner, i, h):
    """Store each row's logit at its partner, if the partner is in this block."""
    has_partner = tl.sum(is_partner.to(tl.int32), axis=1) > 0
    tl.store(at_partner + i, tl.sum(tl.where(is_partner, logits, 0.0), axis=1), mask=(i < h) & has_partner)


@triton.jit
def _log_sum_exp(logits, largest, AXIS: tl.constexpr):
    """Return the log-sum-exp along an axis, -inf where all are; largest: the maximum along it."""
    finite = tl.where(largest == -float("inf"), 0.0, largest)
    return finite + tl.log(tl.sum(tl.exp(logits - tl.expand_dims(finite, AXIS)), axis=AXIS))


@triton.jit
def _softmax_sums_kernel(
    rows,
    columns,
    scale,
    row_ids,
    column_ids,
    lse_rows,  # (column blocks, h)
    max_rows,  # (column blocks, h)
    lse_columns,  # (row blocks, w)
    at_partner,  # (h,)
    h,
    w,
    D,
    offset,
    HAS_IDS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    i, j, is_inside, is_partner = _positions(h, w, offset, BLOCK_ROWS, BLOCK_COLUMNS)
    logits = _logits(rows, columns, scale, i, j, h, w, D, PRECISION, BLOCK_WIDTH)
    is_counted = is_inside
    if HAS_IDS:
        is_counted = is_inside & (_is_duplicate(row_ids, column_ids, i, j, h, w, is_partner) == 0)
    logits = tl.where(is_counted, logits, -float("inf"))
    largest = tl.max(logits, axis=1)
    tl.store(max_rows + tl.program_id(1) * h + i, largest, mask=i < h)
    tl.store(lse_rows + tl.program_id(1) * h + i, _log_sum_exp(logits, largest, 1), mask=i < h)
    tl.store(lse_columns + tl.program_id(0) * w + j, _log_sum_exp(logits, tl.max(logits, axis=0), 0), mask=j < w)
    _store_partner(at_partner, logits, is_partner, i, h)


@triton.jit
def _softmax_gradient_kernel(
    rows,
    columns,
    scale,
    row_ids,
    column_ids,
    lse_rows,  # (h,)
    lse_columns,  # (w,)
    grad,  # (h, w)
    h,
    w,
    D,
    offset,
    HAS_IDS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    i, j, is_inside, is_partner = _positions(h, w, offset, BLOCK_ROWS, BLOCK_COLUMNS)
    logits = _logits(rows, columns, scale, i, j, h, w, D, PRECISION, BLOCK_WIDTH)
    row = tl.load(lse_rows + i, mask=i < h, other=0.0)
    column = tl.load(lse_columns + j, mask=j < w, other=0.0)
    entries = tl.exp(logits - row[:, None]) + tl.exp(logits - column[None, :])
    if HAS_IDS:
        entries = tl.where(_is_duplicate(row_ids, column_ids, i, j, h, w, is_partner), 0.0, entries)
    entries = tl.where(is_partner, entries - 2.0, entries)
    tl.store(grad + i[:, None] * w + j[None, :], entries, mask=is_inside)


@triton.jit
def _sigmoid_kernel(
    rows,
    columns,
    scale,
    bias,
    row_ids,
    column_ids,
    losses,  # (row blocks, column blocks)
    grads_bias,  # (row blocks, column blocks)
    max_rows,  # (column blocks, h)
    at_partner,  # (h,)
    grad,  # (h, w)
    h,
    w,
    D,
    offset,
    HAS_IDS: tl.constexpr,
    NEEDS_GRAD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    i, j, is_inside, is_partner = _positions(h, w, offset, BLOCK_ROWS, BLOCK_COLUMNS)
    logits = _logits(rows, columns, scale, i, j, h, w, D, PRECISION, BLOCK_WIDTH) + tl.load(bias)
    is_counted = is_inside
    if HAS_IDS:
        is_counted = is_inside & (_is_duplicate(row_ids, column_ids, i, j, h, w, is_partner) == 0)
    largest = tl.max(tl.where(is_counted, logits, -float("inf")), axis=1)
    tl.store(max_rows + tl.program_id(1) * h + i, largest, mask=i < h)
    _store_partner(at_partner, logits, is_partner, i, h)

    # -log sigmoid(-x) = max(x, 0) + log(1 + exp(-|x|)), where x is the logit, or for partners its negative
    x = tl.where(is_partner, -logits, logits)
    e = tl.exp(-tl.abs(x))
    # the series of log(1 + e), because 1 + e loses the digits of a small e
    log1p = tl.where(e < 0.02, e * (1.0 - e * (0.5 - e * (0.33333333 - e * (0.25 - e * 0.2)))), tl.log(1.0 + e))
    terms = tl.where(is_counted, tl.maximum(x, 0.0) + log1p, 0.0)
    place = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(losses + place, tl.sum(tl.sum(terms, axis=1), axis=0))
    if NEEDS_GRAD:
        entries = tl.where(x >= 0, 1.0, e) / (1.0 + e)
        entries = tl.where(is_counted, tl.where(is_partner, -entries, entries), 0.0)
        tl.store(grads_bias + place, tl.sum(tl.sum(entries, axis=1), axis=0))
        tl.store(grad + i[:, None] * w + j[None, :], entries, mask=is_inside)


# ---------------------------------------------------------------------------------------------------------------------
# Calls of the kernels for a tile


def _factor(x: Tensor, matrix: TileIterator) -> Tensor:
    """Return rows of features in the type that the kernels multiply.

    Triton's interpreter, which runs on the CPU, multiplies no bfloat16: there the rounded values are float32.
    """
    if matrix.precision != "bf16":
        return x
    return x.bfloat16() if x.device.type == "cuda" else x.bfloat16().float()


def _launch(kernel: Any, grid: tuple[int, int], matrix: TileIterator, t: Tile, *args: Any, **constants: Any) -> None:
    kernel[grid](
        *args,
        t.i.stop - t.i.start,
        t.j.stop - t.j.start,
        offset=matrix.offset + t.i.start - t.j.start,
        HAS_IDS=matrix.ids is not None,
        PRECISION=INPUT_PRECISION[matrix.precision],
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_COLUMNS=BLOCK_COLUMNS,
        BLOCK_WIDTH=BLOCK_WIDTH,
        num_warps=WARPS,
        **constants,
    )


def _grid(t: Tile) -> tuple[int, int]:
    """Return the number of blocks of rows and of columns in a tile."""
    return math.ceil((t.i.stop - t.i.start) / BLOCK_ROWS), math.ceil((t.j.stop - t.j.start) / BLOCK_COLUMNS)


def _ids(matrix: TileIterator, t: Tile) -> tuple[Tensor, Tensor]:
    """Return the caption hashes of a tile's rows and columns; without hashes, tensors that no kernel reads."""
    return (matrix.scratch, matrix.scratch) if matrix.ids is None else (matrix.ids[0][t.i], matrix.ids[1][t.j])


def softmax_sums(
    matrix: TileIterator, rows: Tensor, columns: Tensor, scale: Tensor, positives: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log-sum-exps of rows and columns, partners' logits and largest logits, as softmax_tiles.py describes."""
    x, y = _factor(rows, matrix), _factor(columns, matrix)
    lse_rows, lse_columns = torch.full_like(positives, -math.inf), torch.full_like(columns[:, 0], -math.inf)
    at_partner, largest = torch.zeros_like(positives), torch.full_like(positives, -math.inf)
    for t in matrix:
        grid = _grid(t)
        by_column_block = positives.new_empty(2, grid[1], t.i.stop - t.i.start)
        by_row_block = positives.new_empty(grid[0], t.j.stop - t.j.start)
        outputs = by_column_block[0], by_column_block[1], by_row_block, at_partner[t.i]
        args = x[t.i], y[t.j], scale, *_ids(matrix, t), *outputs
        _launch(_softmax_sums_kernel, grid, matrix, t, *args, D=rows.shape[1])
        lse_rows[t.i] = torch.logaddexp(lse_rows[t.i], by_column_block[0].logsumexp(dim=0))
        lse_columns[t.j] = torch.logaddexp(lse_columns[t.j], by_row_block.logsumexp(dim=0))
        largest[t.i] = torch.maximum(largest[t.i], by_column_block[1].amax(dim=0))
    return lse_rows, lse_columns, at_partner, largest


def softmax_gradient(
    matrix: TileIterator, t: Tile, rows: Tensor, columns: Tensor, scale: Tensor, lse_rows: Tensor, lse_columns: Tensor
) -> Tensor:
    """Return the gradient of a tile's logits (h, w), times 2 b, in memory that the next tile overwrites."""
    h, w = t.i.stop - t.i.start, t.j.stop - t.j.start
    grad = matrix.scratch[: h * w].view(h, w)
    x, y = _factor(rows[t.i], matrix), _factor(columns[t.j], matrix)
    args = x, y, scale, *_ids(matrix, t), lse_rows[t.i], lse_columns[t.j], grad
    _launch(_softmax_gradient_kernel, _grid(t), matrix, t, *args, D=rows.shape[1])
    return grad


def sigmoid_tile(
    matrix: TileIterator, t: Tile, rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, sums: Any
) -> Tensor:
    """Add a tile's loss, gradient of the bias, largest and partners' logits to `sums`; return the gradient of its logits.

    sums: see sigmoid_tiles.py. The gradient (h, w) is in memory that the next tile overwrites; undefined where not needed.
    """
    h, w, grid = t.i.stop - t.i.start, t.j.stop - t.j.start, _grid(t)
    grad = matrix.scratch[: h * w].view(h, w)
    by_block, max_rows = rows.new_empty(2, *grid), rows.new_empty(grid[1], h)
    x, y = _factor(rows[t.i], matrix), _factor(columns[t.j], matrix)
    outputs = by_block[0], by_block[1], max_rows, sums.at_partner[t.i], grad
    args = x, y, scale, bias, *_ids(matrix, t), *outputs
    _launch(_sigmoid_kernel, grid, matrix, t, *args, D=rows.shape[1], NEEDS_GRAD=sums.needs_grad)
    sums.largest[t.i] = torch.maximum(sums.largest[t.i], max_rows.amax(dim=0))
    sums.loss += by_block[0].sum(dtype=torch.float64)
    if sums.needs_grad:
        sums.grad_bias += by_block[1].sum(dtype=torch.float64)
    return grad
