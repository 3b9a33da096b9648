"""Scores from rows rounded to bfloat16, which are half the bytes of float32, and a bound on what they are wrong by.

The bound. Let a be a row and q a query, both of unit length, b and p the same in bfloat16, and s what `score_rows` returns for
b.p. A rounded number differs by at most u = 2^-8 of its amount, so that |a - b| <= u |a| in length. With Cauchy-Schwarz:

    |a.q - b.p| <= |(a - b).q| + |b.(q - p)| <= u + (1 + u) |q - p|          |q - p| is computed from the query

b.p is summed in float32, in any order. The products are exact in it, since each factor has 8 bits. With v = 2^-23, which
allows sums that are cut instead of rounded, and D numbers, the sum t differs by at most (Higham, section 3.1)

    |b.p - t| <= D v / (1 - D v) sum |b_i p_i| <= D v / (1 - D v) (1 + u)^2

and its rounding to bfloat16 by |t - s| <= u |s|. Numbers, products and sums below 2^-126 may count as 0, which is below
D 2^-120. Norms differ from 1 by less than 2^-20, and exact scores are rounded to float32: 2^-20 covers all of these. In sum:

    |a.q - s| <= c + u |s|,   c = u + (1 + u) |q - p| + (1 + u)^2 D v / (1 - D v) + 2^-20

At least k rows score s_k - c - u |s_k| or more, s_k being the k-th highest s. So a row whose s + c + u |s| is lower is not
among the best k: what remains is compared exactly. That the processor sums in float32, as oneDNN documents, is checked on
these rows, see nearest.py.

Legend: n = rows, t = rows of a tile, q = queries, D = width.
"""

from __future__ import annotations

import sys

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
Rounded = NDArray[np.uint16]
"""The upper halves of float32 numbers, which are bfloat16."""
_TILE = 1 << 25
"""Bytes of rows that are compared at a time, and of their scores."""
_UNIT = 2.0**-8


def is_fast() -> bool:
    """Return whether torch is there already, and multiplies bfloat16 by instructions of this processor.

    Importing torch takes longer than many searches. Without the instructions, products of bfloat16 are slower than of float32.
    """
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cpu._is_avx512_bf16_supported())


def round_rows(vectors: Vectors) -> Rounded:
    """Round finite numbers to bfloat16, to nearest, ties to even; the shape stays."""
    bits = np.ascontiguousarray(vectors, np.float32).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def widen(rounded: Rounded) -> Vectors:
    """Return bfloat16 numbers as float32."""
    return (rounded.astype(np.uint32) << 16).view(np.float32)


def bound_error(queries: Vectors) -> NDArray[np.float64]:
    """Return c (q,) of the bound above."""
    width = queries.shape[1]
    if width >= 1 << 20:
        raise ValueError(f"queries have {width} numbers, and the bound is for less than {1 << 20}")
    lost = np.linalg.norm(queries.astype(np.float64) - widen(round_rows(queries)), axis=1)
    of_sum = width * 2.0**-23 / (1 - width * 2.0**-23)
    return np.asarray(_UNIT + (1 + _UNIT) * lost + (1 + _UNIT) ** 2 * of_sum + 2.0**-20)


def is_within(scores: Vectors, exact: NDArray[np.float64], constant: float) -> bool:
    """Return whether scores (m,) keep to the bound: c + u |s|."""
    return bool((np.abs(exact - scores) <= constant + _UNIT * np.abs(scores)).all())


def find_candidates(
    queries: Vectors, rounded: Rounded, mask: NDArray[np.bool_], k: int, most: int
) -> list[tuple[NDArray[np.int64], Vectors] | None]:
    """Return for each query the rows among which its best k are, in order, and their rounded scores; None if above `most`.

    Args:
        queries: (q, D) of unit length.
        rounded: (n, D) rows of unit length, rounded.
        mask: (n,) which rows may be found; at least k.
        k: results of a query.
        most: rows that are worth comparing again.
    """
    constants, factors = bound_error(queries), round_rows(queries)
    lowest = np.full(len(queries), np.finfo(np.float32).min)
    empty = (np.zeros(0, np.int64), np.zeros(0, np.float32))
    found: list[tuple[NDArray[np.int64], Vectors] | None] = [empty] * len(queries)
    step = max(1024, min(_TILE // (2 * rounded.shape[1]), _TILE // (4 * len(queries))))
    for begin in range(0, len(rounded), step):
        scores = score_rows(rounded[begin : begin + step], factors)
        scores[:, ~mask[begin : begin + step]] = -np.inf
        for i, so_far in enumerate(found):
            if so_far is None:
                continue
            new = np.flatnonzero(scores[i] >= lowest[i])
            rows, values = np.concatenate([so_far[0], begin + new]), np.concatenate([so_far[1], scores[i, new]])
            if len(rows) >= k:
                lowest[i] = _find_lowest(float(np.partition(values, -k)[-k]), constants[i])
                is_kept = values >= lowest[i]
                rows, values = rows[is_kept], values[is_kept]
            found[i] = (rows, values) if len(rows) <= most or len(rows) < k else None
        if all(so_far is None for so_far in found):
            break
    return found


def _find_lowest(kth: float, constant: float) -> np.float32:
    """Return the lowest rounded score that may belong to the best k: s + c + u |s| >= s_k - c - u |s_k|."""
    least = kth - _UNIT * abs(kth) - 2 * constant
    least /= 1 + _UNIT if least >= 0 else 1 - _UNIT
    return np.float32(np.nextafter(np.float32(least), np.float32(-np.inf)))


def score_rows(rounded: Rounded, factors: Rounded) -> Vectors:
    """Return the products (q, t) of rounded rows (t, D) and rounded queries (q, D), which are rounded, too."""
    import torch

    rows, columns = (torch.from_numpy(np.asarray(_Mapped(numbers))).view(torch.bfloat16) for numbers in (rounded, factors))
    # one column alone goes to a faster kernel; of several, rows first is twice as fast as queries first
    products = torch.mv(rows, columns[0])[None] if len(factors) == 1 else torch.mm(rows, columns.T).T.contiguous()
    return widen(products.view(torch.int16).numpy().view(np.uint16))


class _Mapped:
    """Numbers from a file that is mapped for reading: torch has no such tensors, and would warn. Nothing writes to them."""

    def __init__(self, numbers: Rounded) -> None:
        self.numbers = numbers.view(np.int16)
        address, _ = self.numbers.__array_interface__["data"]
        self.__array_interface__ = {**self.numbers.__array_interface__, "data": (address, False)}
