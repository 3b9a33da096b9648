"""Hard negatives against written-out references, in one process and in two."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.tasks import hard_negatives, per_item
from pretrain.runtime import distributed
from tests.support import world

B = 12


def test_a_row_is_drawn_as_often_as_the_softmax_says() -> None:
    """One row, 10,000 evenly spaced draws; the softmax is written out over what is left."""
    logits = torch.tensor([2.0, 0.5, -1.0, 3.0, 1.0], dtype=torch.float64)
    same = torch.tensor([False, False, True, False, False])
    n, own = 10_000, 3
    draw = (torch.arange(n) + 0.5) / n
    similarity = logits.expand(n, 5)
    found = [hard_negatives.mine(similarity[i : i + 1], same[None], draw[i : i + 1], own).row.item() for i in range(0, n, 10)]
    weight = [math.exp(2.0), math.exp(0.5), 0.0, 0.0, math.exp(1.0)]
    for column, expected in enumerate(weight):
        assert found.count(column) / len(found) == pytest.approx(expected / sum(weight), abs=0.002)


@pytest.mark.parametrize("draw", [0.0, 0.5, 1 - 2**-24])
def test_what_is_right_is_never_drawn(draw: float) -> None:
    """However much more similar it is, and at both ends of the draw."""
    g = torch.Generator().manual_seed(0)
    same = torch.rand(200, 200, generator=g) < 0.7
    similarity = torch.randn(200, 200, generator=g) * 50 + 1e4 * same
    found = hard_negatives.mine(similarity, same, torch.full((200,), draw))
    rows = torch.arange(200)
    assert found.valid.all()
    assert not same[rows, found.row].any()
    assert (found.row != rows).all()


def test_a_row_without_a_negative_is_marked_and_nothing_breaks() -> None:
    same = torch.tensor([[True, True, True], [False, False, False], [True, False, True]])
    found = hard_negatives.mine(torch.zeros(3, 3), same, torch.tensor([0.9, 0.9, 0.9]))
    assert found.valid.tolist() == [False, True, True]
    assert found.row.tolist() == [0, 2, 1]
    alone = hard_negatives.mine(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.bool), torch.zeros(1))
    assert (alone.row.tolist(), alone.valid.tolist()) == ([0], [False])


def test_a_diverged_model_does_not_crash_here() -> None:
    for value in (math.nan, math.inf, -math.inf):
        found = hard_negatives.mine(torch.full((4, 4), value), torch.zeros(4, 4, dtype=torch.bool), torch.rand(4))
        assert ((found.row >= 0) & (found.row < 4) & (found.row != torch.arange(4))).all()


def test_ids_in_common() -> None:
    ids = torch.tensor([[1, 7], [2, 8], [3, 7], [1, 9]])
    expected = [[i == j or bool(set(a) & set(b)) for j, b in enumerate(ids.tolist())] for i, a in enumerate(ids.tolist())]
    assert hard_negatives.same_ids(ids).tolist() == expected


def test_a_sample_and_its_caption_have_ids_of_their_own() -> None:
    ids = hard_negatives.sample_ids(["a/1", "a/2", "a/1"], torch.tensor([5, 5, 6]))
    assert ids[:, 1].tolist() == [5, 5, 6]
    assert ids[0, 0] == ids[2, 0] != ids[1, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Two processes


def mined() -> dict[str, Any]:
    """Each rank's part of everything, from data that all of them can draw."""
    g = torch.Generator().manual_seed(0)
    image, text = torch.randn(2, B, 4, generator=g, dtype=torch.float64).requires_grad_()
    states = torch.randn(B, 5, 3, generator=g, dtype=torch.float64).requires_grad_()
    mask = torch.rand(B, 5, generator=g) < 0.5
    ids = torch.tensor([[0, 0], [0, 1], [1, 1]]).repeat(B // 3, 1)  # those in the middle share one with all
    b = B // distributed.world_size()
    own = slice(distributed.rank() * b, (distributed.rank() + 1) * b)
    torch.manual_seed(distributed.rank())
    first, second = hard_negatives.draws(b, 2, torch.device("cpu"))
    same = hard_negatives.same_ids(ids[own])
    forth = hard_negatives.mine(3 * image[own] @ text.T, same, first, distributed.rank() * b)
    back = hard_negatives.mine(3 * text[own] @ image.T, same, second, distributed.rank() * b)
    got, got_mask = distributed.gather_rows([states[own], mask[own]], forth.row)
    loss = per_item((got.square() * (forth.row[:, None, None] + 1)).sum((1, 2)), forth.valid.double())
    loss.backward()
    grad = states.grad
    assert grad is not None
    return {
        "draws": torch.stack([first, second], 1), "rows": torch.stack([forth.row, back.row], 1),
        "valid": torch.stack([forth.valid, back.valid], 1), "got": got.detach(), "mask": got_mask,
        "loss": distributed.mean(loss.detach()), "grad": distributed.mean(grad),
    }  # fmt: skip


def test_two_processes_draw_and_fetch_what_one_does() -> None:
    whole = mined()
    assert 0 < whole["valid"].sum() < 2 * B  # both kinds of rows are met
    parts = world.run(mined, 2)
    for name in ("draws", "rows", "valid", "got", "mask"):
        joined: Tensor = torch.cat([part[name] for part in parts])
        assert torch.equal(joined, whole[name]), name
    for part in parts:
        assert part["loss"].item() == pytest.approx(whole["loss"].item(), rel=1e-12)
        torch.testing.assert_close(part["grad"], whole["grad"], rtol=1e-12, atol=1e-14)
