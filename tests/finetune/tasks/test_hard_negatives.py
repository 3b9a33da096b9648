"""Hard negatives against explicit references, in one process and in two."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.tasks import global_weighted_mean, hard_negatives
from pretrain.runtime import distributed
from tests.support import world

B = 12


def test_columns_are_drawn_with_the_probabilities_of_the_softmax() -> None:
    """Compare 1,000 evenly spaced draws with the softmax over the columns that are not masked."""
    logits = torch.tensor([2.0, 0.5, -1.0, 3.0, 1.0], dtype=torch.float64)
    positives = torch.tensor([False, False, True, False, False])
    n, own_column = 10_000, 3
    draw = (torch.arange(n) + 0.5) / n
    similarity = logits.expand(n, 5)
    columns = [
        hard_negatives.draw_negatives(similarity[i : i + 1], positives[None], draw[i : i + 1], own_column).row.item()
        for i in range(0, n, 10)
    ]
    weight = [math.exp(2.0), math.exp(0.5), 0.0, 0.0, math.exp(1.0)]
    for column, expected in enumerate(weight):
        assert columns.count(column) / len(columns) == pytest.approx(expected / sum(weight), abs=0.002)


@pytest.mark.parametrize("draw", [0.0, 0.5, 1 - 2**-24])
def test_positives_are_never_drawn(draw: float) -> None:
    """Even if they are much more similar, and at both ends of the range of draws."""
    g = torch.Generator().manual_seed(0)
    positives = torch.rand(200, 200, generator=g) < 0.7
    similarity = torch.randn(200, 200, generator=g) * 50 + 1e4 * positives
    negatives = hard_negatives.draw_negatives(similarity, positives, torch.full((200,), draw))
    rows = torch.arange(200)
    assert negatives.valid.all()
    assert not positives[rows, negatives.row].any()
    assert (negatives.row != rows).all()


def test_a_row_without_a_negative_is_marked() -> None:
    positives = torch.tensor([[True, True, True], [False, False, False], [True, False, True]])
    negatives = hard_negatives.draw_negatives(torch.zeros(3, 3), positives, torch.tensor([0.9, 0.9, 0.9]))
    assert negatives.valid.tolist() == [False, True, True]
    assert negatives.row.tolist() == [0, 2, 1]
    alone = hard_negatives.draw_negatives(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.bool), torch.zeros(1))
    assert (alone.row.tolist(), alone.valid.tolist()) == ([0], [False])


def test_similarities_that_are_not_finite_give_valid_rows() -> None:
    for value in (math.nan, math.inf, -math.inf):
        negatives = hard_negatives.draw_negatives(torch.full((4, 4), value), torch.zeros(4, 4, dtype=torch.bool), torch.rand(4))
        assert ((negatives.row >= 0) & (negatives.row < 4) & (negatives.row != torch.arange(4))).all()


def test_samples_that_share_an_id() -> None:
    ids = torch.tensor([[1, 7], [2, 8], [3, 7], [1, 9]])
    expected = [[i == j or bool(set(a) & set(b)) for j, b in enumerate(ids.tolist())] for i, a in enumerate(ids.tolist())]
    assert hard_negatives.shares_id(ids).tolist() == expected


def test_ids_are_a_hash_of_the_key_and_the_caption_id() -> None:
    ids = hard_negatives.hash_sample_ids(["a/1", "a/2", "a/1"], torch.tensor([5, 5, 6]))
    assert ids[:, 1].tolist() == [5, 5, 6]
    assert ids[0, 0] == ids[2, 0] != ids[1, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Two processes


def draw_and_fetch() -> dict[str, Any]:
    """Draw and fetch negatives for this rank's slice of data that every rank can generate."""
    g = torch.Generator().manual_seed(0)
    image, text = torch.randn(2, B, 4, generator=g, dtype=torch.float64).requires_grad_()
    states = torch.randn(B, 5, 3, generator=g, dtype=torch.float64).requires_grad_()
    mask = torch.rand(B, 5, generator=g) < 0.5
    ids = torch.tensor([[0, 0], [0, 1], [1, 1]]).repeat(B // 3, 1)  # the second of each three shares an id with every row
    b = B // distributed.world_size()
    local = slice(distributed.rank() * b, (distributed.rank() + 1) * b)
    torch.manual_seed(distributed.rank())
    first, second = hard_negatives.draw_uniform(b, 2, torch.device("cpu"))
    positives = hard_negatives.shares_id(ids[local])
    wrong_text = hard_negatives.draw_negatives(3 * image[local] @ text.T, positives, first, distributed.rank() * b)
    wrong_image = hard_negatives.draw_negatives(3 * text[local] @ image.T, positives, second, distributed.rank() * b)
    fetched, fetched_mask = distributed.gather_rows([states[local], mask[local]], wrong_text.row)
    loss = global_weighted_mean((fetched.square() * (wrong_text.row[:, None, None] + 1)).sum((1, 2)), wrong_text.valid.double())
    loss.backward()
    grad = states.grad
    assert grad is not None
    return {
        "draws": torch.stack([first, second], 1), "rows": torch.stack([wrong_text.row, wrong_image.row], 1),
        "valid": torch.stack([wrong_text.valid, wrong_image.valid], 1), "fetched": fetched.detach(), "mask": fetched_mask,
        "loss": distributed.mean(loss.detach()), "grad": distributed.mean(grad),
    }  # fmt: skip


def test_two_processes_draw_and_fetch_the_rows_of_one() -> None:
    single = draw_and_fetch()
    assert 0 < single["valid"].sum() < 2 * B  # some rows have a negative, some have none
    ranks = world.run(draw_and_fetch, 2)
    for name in ("draws", "rows", "valid", "fetched", "mask"):
        joined: Tensor = torch.cat([rank[name] for rank in ranks])
        assert torch.equal(joined, single[name]), name
    for rank in ranks:
        assert rank["loss"].item() == pytest.approx(single["loss"].item(), rel=1e-12)
        torch.testing.assert_close(rank["grad"], single["grad"], rtol=1e-12, atol=1e-14)
