"""The comparison of vectors in bfloat16 and float32: its bound, and results that are those of float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from finetune.search import nearest, rounded
from finetune.search.nearest import find_nearest
from finetune.search.rounded import bound_error, find_candidates, round_rows, score_rows, widen
from tests.support.vectors import FAMILIES, draw, order

needs_bfloat16 = pytest.mark.skipif(not rounded.is_fast(), reason="this processor does not multiply bfloat16")


def test_rounding_is_that_of_torch() -> None:
    rows = np.concatenate([draw(family, 50, 64, 0) for family in FAMILIES])
    rows[0, :4] = [0, -0.0, 1 + 2.0**-8, 1 + 3 * 2.0**-8]
    np.testing.assert_array_equal(widen(round_rows(rows)), torch.from_numpy(rows).bfloat16().float().numpy())


@needs_bfloat16
@pytest.mark.parametrize("width", [1, 7, 64, 512, 1031])
def test_the_bound_holds(width: int) -> None:
    rows = np.concatenate([draw(family, 300, width, 1) for family in FAMILIES])
    queries = np.concatenate([draw(family, 3, width, 2) for family in FAMILIES] + [rows[::300], -rows[::300]])
    exact = queries.astype(np.float64) @ rows.astype(np.float64).T
    together = score_rows(round_rows(rows), round_rows(queries))
    alone = np.concatenate([score_rows(round_rows(rows), round_rows(query[None])) for query in queries])
    for scores in (together, alone):
        limits = bound_error(queries)[:, None] + 2.0**-8 * np.abs(scores)
        ratios = np.abs(exact - scores) / limits
        assert ratios.max() <= 1
        assert ratios.max() > 0.1 or width == 1  # it is no more than ten times what occurs


@needs_bfloat16
@pytest.mark.parametrize("family", FAMILIES)
def test_the_nearest_are_those_of_float64(family: str) -> None:
    width, count = 48, 4000
    rows = draw(family, count, width, 3)
    queries = np.concatenate([draw(family, 2, width, 4), draw("normal", 2, width, 5), rows[7:8]])
    rng = np.random.default_rng(6)
    tolerance = 2 * width * 2.0**-24  # of sums in float32, where the copy leaves too many rows
    for share in (1.0, 0.5, 0.1):
        mask = rng.random(count) < share
        for k in (1, 10, count // 64, count // 20):
            expected_rows, expected_scores = order(queries, rows, mask, k)
            for part in (slice(None), slice(0, 1), slice(4, 5)):
                of_part = queries[part]
                found, scores = find_nearest(of_part, rows, mask, k, round_rows(rows))
                np.testing.assert_allclose(scores, expected_scores[part], rtol=0, atol=tolerance)
                exact = np.einsum("qd,qkd->qk", of_part.astype(np.float64), rows[found].astype(np.float64))
                np.testing.assert_allclose(exact, expected_scores[part], rtol=0, atol=tolerance)
                assert mask[found].all()
                assert all(len(set(of_query)) == k for of_query in found.tolist())
                if family in ("normal", "huge and tiny", "duplicates") and share > 0.3 and k <= 10:
                    # few rows are left, and compared again in float64
                    np.testing.assert_array_equal(found, expected_rows[part])
                    np.testing.assert_array_equal(scores, expected_scores[part])


@needs_bfloat16
def test_a_copy_is_used_where_it_leaves_few_rows() -> None:
    mask = np.ones(4000, np.bool_)
    few, many = draw("normal", 4000, 48, 7), draw("near-equal", 4000, 48, 7)
    queries = draw("normal", 2, 48, 8)
    found = find_candidates(queries, round_rows(few), mask, 10, 125)
    assert all(candidates is not None and 10 <= len(candidates[0]) <= 125 for candidates in found)
    assert find_candidates(queries, round_rows(many), mask, 10, 125) == [None, None]
    assert not nearest.can_use_rounded(mask, 63)
    assert not nearest.can_use_rounded(np.arange(4000) % 5 == 0, 10)
    # products that are not what the bound assumes are noticed, and all vectors compared
    found_rows, scores = find_nearest(queries, few, mask, 10, round_rows(few * np.float32(0.9)))
    expected_rows, expected_scores = order(queries, few, mask, 10)
    np.testing.assert_array_equal(found_rows, expected_rows)
    np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=3e-7)
