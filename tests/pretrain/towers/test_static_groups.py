"""Text towers that encode groups of fixed shapes, or packed texts, give the embeddings of transformers, in few graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.data.length_groups import LengthGroups
from pretrain.data.text_packing import TextPacking
from pretrain.towers import Tower
from pretrain.towers.transformers import TextTower
from tests.pretrain.towers.test_towers import LENGTH, PAD, TEXTS, build_tower
from tests.support import tiny

HISTOGRAM = (0, 0, 0, 40, 60, 50, 30, 10, 5, 3, 2, *[0] * 9, 1)
"""Texts of 0 to 20 tokens."""
ROWS = 40


def make_texts(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return random ids (b, LENGTH), each row ended by the end token 59, and their mask."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(LENGTH) < torch.tensor(lengths)[:, None]
    ids = torch.randint(4, 58, mask.shape, generator=g)
    ids[torch.arange(len(ids)), torch.tensor(lengths) - 1] = 59
    return ids.masked_fill(~mask, PAD), mask


def draw_lengths(seed: int, rows: int = ROWS) -> list[int]:
    rng = np.random.default_rng(seed)
    return [int(n) for n in rng.choice(np.repeat(np.arange(LENGTH + 1), HISTOGRAM), rows)]


BATCHES = {"fits": draw_lengths(0), "longer": [6] * ROWS, "longest": [LENGTH] * ROWS}


@pytest.mark.parametrize("fit", list(BATCHES))
@pytest.mark.parametrize("name", [name for name in TEXTS if name not in ("siglip", "fnet")])
def test_groups_of_fixed_shapes_change_nothing(name: str, fit: str) -> None:
    """The whole batch at full length, encoded at once, is the reference."""
    ids, mask = make_texts(BATCHES[fit])
    groups = LengthGroups(HISTOGRAM, 4, group_cost=0).assign(mask.sum(dim=1).numpy())
    assert groups.fit == fit
    assert len(groups.counts) > 2
    results = []
    for encode in (
        lambda tower: tower(ids, mask).pooled,
        lambda tower: tower.pool_groups(ids, mask, groups.sections(LENGTH)),
    ):
        tower = build_tower(name, groups=1).double().eval()
        assert tower.trims
        pooled = encode(tower)
        pooled.square().sum().backward()
        results.append([pooled, *(p.grad for p in tower.parameters() if p.grad is not None)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("fit", list(BATCHES))
@pytest.mark.parametrize("name", list(TEXTS))
def test_packing_changes_nothing_where_a_tower_packs(name: str, fit: str) -> None:
    """The whole batch at full length, encoded at once, is the reference."""
    assert build_tower(name).packs == (name in ("clip", "gpt2"))
    if name not in ("clip", "gpt2"):
        return
    ids, mask = make_texts(BATCHES[fit])
    packed = TextPacking(HISTOGRAM).assign(mask.sum(dim=1).numpy())
    assert (packed.tokens.shape[1] < ROWS / 2) == (fit != "longest")
    results = []
    for encode in (
        lambda tower: tower(ids, mask).pooled,
        lambda tower: tower.pool_packed(ids, mask, packed.tokens, packed.starts),
    ):
        tower = build_tower(name, groups=1).double().eval()
        pooled = encode(tower)
        pooled.square().sum().backward()
        results.append([pooled, *(p.grad for p in tower.parameters() if p.grad is not None)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_a_packed_text_ends_at_its_first_end_token() -> None:
    """A text with an end token inside is read up to there, as forward() does."""
    tower = build_tower("clip", groups=1).double().eval()
    assert isinstance(tower, TextTower)
    tower.end_id = 59
    ids, mask = make_texts(BATCHES["fits"])
    ids[:, 2] = 59
    packed = TextPacking(HISTOGRAM).assign(mask.sum(dim=1).numpy())
    with torch.no_grad():
        pooled = tower.pool_packed(ids, mask, packed.tokens, packed.starts)
        torch.testing.assert_close(pooled, tower(ids[:, :3], mask[:, :3]).pooled, rtol=0, atol=1e-10)


def test_groups_encode_only_their_own_tokens() -> None:
    tower, shapes = build_tower("clip", groups=1), []
    tower.get_submodule("model").register_forward_pre_hook(
        lambda _, __, kw: shapes.append(tuple(kw["input_ids"].shape)), with_kwargs=True
    )
    for seed in range(3):
        ids, mask = make_texts(draw_lengths(seed), seed)
        groups = LengthGroups(HISTOGRAM, 4, group_cost=0).assign(mask.sum(dim=1).numpy())
        assert groups.fit == "fits"
        tower.pool_groups(ids, mask, groups.sections(LENGTH))
    count = len(shapes) // 3
    assert shapes == shapes[:count] * 3  # the same for every batch
    assert sum(rows * tokens for rows, tokens in shapes[:count]) < 0.5 * ROWS * LENGTH


def pooled_by_transformers(tower: Tower, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the end-token states of transformers' own CLIPTextModel, which encodes each text alone, without padding."""
    from transformers import CLIPTextModel

    model = CLIPTextModel(tower.get_submodule("model").config).double().eval()
    model.load_state_dict(tower.get_submodule("model").state_dict(), strict=False)
    rows = [model(input_ids=row[None, :length]) for row, length in zip(ids, mask.sum(dim=1).tolist(), strict=True)]
    return torch.cat([out.last_hidden_state[:, -1] for out in rows])


@pytest.mark.parametrize("fit", list(BATCHES))
def test_a_clip_tower_equals_transformers_and_gives_attention_no_mask(fit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a mask and with is_causal, attention can use the flash kernel."""
    tower = build_tower("clip", groups=1).double().eval()
    ids, mask = make_texts(BATCHES[fit])
    groups = LengthGroups(HISTOGRAM, 4, group_cost=0).assign(mask.sum(dim=1).numpy())
    calls: list[tuple[Any, bool]] = []
    attention: Callable[..., Tensor] = F.scaled_dot_product_attention

    def record(*args: Any, attn_mask: Tensor | None = None, is_causal: bool = False, **more: Any) -> Tensor:
        calls.append((attn_mask, is_causal))
        return attention(*args, attn_mask=attn_mask, is_causal=is_causal, **more)

    with torch.no_grad():
        expected = pooled_by_transformers(tower, ids, mask)
        monkeypatch.setattr(F, "scaled_dot_product_attention", record)
        grouped = tower.pool_groups(ids, mask, groups.sections(LENGTH))
        whole = tower(ids, mask).pooled
        count = len(calls)
        packed = TextPacking(HISTOGRAM).assign(mask.sum(dim=1).numpy())
        in_rows = tower.pool_packed(ids, mask, packed.tokens, packed.starts)
    torch.testing.assert_close(in_rows, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(grouped, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-10)
    assert count == 3 * (len(groups.counts) + 1)  # three layers
    assert all(attn_mask is None and is_causal for attn_mask, is_causal in calls[:count])
    assert len(calls) == count + 3


@pytest.mark.parametrize("fit", list(BATCHES))
def test_the_values_of_a_batch_are_not_read(fit: str) -> None:
    """On the meta device there are none to read: on a GPU nothing would wait."""
    tower = build_tower("clip", groups=1).to("meta")
    ids, mask = make_texts(BATCHES[fit])
    groups = LengthGroups(HISTOGRAM, 4, group_cost=0).assign(mask.sum(dim=1).numpy()).to("meta")
    pooled = tower.pool_groups(ids.to("meta"), mask.to("meta"), groups.sections(LENGTH))
    assert pooled.shape == (ROWS, 24)
    packed = TextPacking(HISTOGRAM).assign(mask.sum(dim=1).numpy()).to("meta")
    assert tower.pool_packed(ids.to("meta"), mask.to("meta"), packed.tokens, packed.starts).shape == (ROWS, 24)


@pytest.mark.parametrize("kind", ["static", "packed"])
def test_a_compiled_model_has_no_more_graphs_after_the_second_step(kind: str) -> None:
    """Batches of different lengths that fit have one graph; those that do not fit add one for each set of lengths."""
    from torch._dynamo.utils import counters

    one_block: dict[str, Any] = {"image": {"args": {"depth": 1}}, "text": {"groups": 1, "args": {"num_hidden_layers": 1}}}
    model = tiny.build_model("clip", **one_block)
    packing = TextPacking((0, 0, 0, 40, 60, 50, 30, 10, 5, 3, 2, 1, 1))
    source = LengthGroups((0, 0, 0, 40, 60, 50, 30, 10, 5, 3, 2, 1, 1), 4, group_cost=0)
    expected = tiny.build_model("clip", **one_block)
    torch._dynamo.reset()
    counters.clear()
    model.compile(backend="aot_eager")
    graphs = []
    fits = ["fits", "fits", "fits", "fits", "fits", "fits", "longest", "fits", "longest"]
    for step, fit in enumerate(fits):
        batch = tiny.build_batch(step)
        lengths = np.random.default_rng(step).integers(3, 6, tiny.SAMPLES) + (step in (1, 4))
        lengths[step] = 8
        if fit == "longest":
            lengths[:] = tiny.LENGTH
        mask = torch.arange(tiny.LENGTH) < torch.from_numpy(lengths)[:, None]
        groups = source.assign(lengths)
        packed = packing.assign(lengths)
        out = model(batch.inputs, {"text": mask}, {"text": groups if kind == "static" else packed})
        (out["text"].sum() + out["image"].sum()).backward()
        plain = expected(batch.inputs, {"text": mask})
        torch.testing.assert_close(out["text"], plain["text"], rtol=0, atol=1e-6)
        graphs.append((groups.fit, counters["stats"]["unique_graphs"]))
    assert [fit for fit, _ in graphs] == fits
    numbers = [number for _, number in graphs]
    assert len(set(numbers[1:6])) == 1, numbers
    assert len(set(numbers[6:])) == 1, numbers
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("fit", list(BATCHES))
def test_on_a_gpu_nothing_waits_and_nothing_changes(fit: str) -> None:
    tower = build_tower("clip", groups=1).cuda().eval()
    ids, mask = (tensor.cuda() for tensor in make_texts(BATCHES[fit]))
    lengths = mask.sum(dim=1).cpu().numpy()
    groups = LengthGroups(HISTOGRAM, 4, group_cost=0).assign(lengths).to("cuda")
    packed = TextPacking(HISTOGRAM).assign(lengths).to("cuda")
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
            whole = tower(ids, mask).pooled
            torch.cuda.set_sync_debug_mode("error")
            try:
                grouped = tower.pool_groups(ids, mask, groups.sections(LENGTH))
                in_rows = tower.pool_packed(ids, mask, packed.tokens, packed.starts)
                (grouped.sum() + in_rows.sum()).backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        for pooled in (grouped, in_rows):
            torch.testing.assert_close(pooled, whole, rtol=tolerance, atol=tolerance)
