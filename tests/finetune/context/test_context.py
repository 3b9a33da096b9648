"""Every context compared with loops over its keys, and with dense attention where they must agree."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finetune.attention.multihead import Attention, Keys, Tokens
from finetune.context import Context, Queries, build_contexts, coarse_to_fine, dense, local, pooled
from finetune.context.tiling import Tiling
from pretrain import registry
from pretrain.errors import ConfigError
from tests.support.attention_reference import DEVICES, naive_attention, regions, windows

WIDTH = 16
SMALL: dict[str, dict[str, Any]] = {
    "local": {"window": 3},
    "coarse_to_fine": {"region": 2, "keep": 2},
    "pooled": {"latents": 4, "heads": 2},
}


def build_inputs(
    grid: tuple[int, int], text: int = 0, masked: bool = False, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Attention, Tokens]:
    """Build an attention, and an image with `text` tokens after it, some masked where `masked`."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    n = grid[0] * grid[1] + text
    mask = torch.rand(2, n, generator=generator) < 0.7 if masked else None
    states = torch.randn(2, n, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    return Attention(WIDTH, heads=2).to(dtype), Tokens(states, mask, grid)


def run_context(
    context: Context, attention: Attention, tokens: Tokens, queries: Tensor | None, exact: bool, **options: Any
) -> tuple[Tensor, Tensor | None, Keys]:
    """Return (B, H, Q, D), dense weights (B, H, Q, K) and the keys; self-attention without `queries`."""
    keys = attention.build_keys(tokens)
    states = tokens.states[:, : keys.grid_size] if queries is None else queries
    projected = Queries(attention.project_queries(states), is_self=queries is None, **options)
    out, weights = context(projected, keys, exact)
    return out, None if weights is None else weights.to_dense(weights.used), keys


def build_dense_mask(tokens: Tokens, heads: int = 2) -> Tensor:
    """Return (B, H, K, K) bool: every query attends to every real token."""
    B, K, _ = tokens.states.shape
    mask = torch.ones(B, K, dtype=torch.bool) if tokens.mask is None else tokens.mask
    return mask[:, None, None].expand(B, heads, K, K)


# ---------------------------------------------------------------------------------------------------------------------
# Tiling


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.booleans())
@settings(max_examples=60, deadline=None)
def test_split_and_join_are_inverse_and_tiles_hold_neighbors(h: int, w: int, side: int, shifted: bool) -> None:
    tiling = Tiling((h, w), side, shifted)
    x = torch.arange(2 * h * w * 3).view(2, 1, h * w, 3)
    assert torch.equal(tiling.join(tiling.split(x)), x)
    cells = tiling.split(torch.arange(1, h * w + 1).view(1, 1, -1, 1)).flatten(1, 3)[0].flatten()
    assert torch.equal(cells[tiling.index_cells(x.device)], torch.arange(1, h * w + 1))
    valid = tiling.build_valid_mask(None, x.device)[0]
    neighbors = tiling.build_neighbor_mask(x.device)
    attends = torch.zeros(h * w, h * w, dtype=torch.bool)
    for r in range(valid.shape[0]):
        ids = cells.view(valid.shape)[r] - 1
        for i, a in enumerate(ids.tolist()):
            for j, b in enumerate(ids.tolist()):
                if valid[r, i] and valid[r, j] and (neighbors is None or neighbors[r, i, j]):
                    attends[a, b] = True
    assert torch.equal(attends, windows((h, w), side, side // 2 if shifted else 0))


# ---------------------------------------------------------------------------------------------------------------------
# Local


@pytest.mark.parametrize("grid", [(6, 6), (5, 7), (2, 9)])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("text", [0, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_local_is_dense_attention_under_a_window_mask(grid: tuple[int, int], layer: int, text: int, masked: bool) -> None:
    attention, tokens = build_inputs(grid, text, masked)
    context = local.Local(local.Config(window=3))
    n = grid[0] * grid[1]
    mask = build_dense_mask(tokens).clone()
    mask[:, :, :n, :n] &= windows(grid, 3, 1 if layer else 0)
    for exact in (False, True):
        out, dense_weights, keys = run_context(context, attention, tokens, None, exact, layer=layer)
        q = attention.project_queries(tokens.states[:, :n])
        want, weights = naive_attention(q, *keys.project_all(), mask[:, :, :n])
        torch.testing.assert_close(out, want, rtol=0, atol=1e-10)
        if dense_weights is not None:
            torch.testing.assert_close(dense_weights, weights, rtol=0, atol=1e-10)


def test_local_is_dense_for_words_and_with_one_window() -> None:
    attention, tokens = build_inputs((5, 7), 3)
    words = torch.randn(2, 4, WIDTH, dtype=torch.float64)
    for queries, window in ((words, 3), (None, 7), (None, 99)):
        context = local.Local(local.Config(window=window))
        want = run_context(dense.Dense(), attention, tokens, queries, False, layer=1)[0]
        torch.testing.assert_close(run_context(context, attention, tokens, queries, False, layer=1)[0], want)


# ---------------------------------------------------------------------------------------------------------------------
# Coarse to fine: the reference is dense attention to an image whose unopened regions are replaced by their mean


def blur(tokens: Tokens, grid: tuple[int, int], side: int, opened: set[int]) -> Tensor:
    """Return the states (N, C) of one sample, unopened regions replaced by the mean of their real cells."""
    states, mask = tokens.states[0].clone(), build_dense_mask(tokens)[0, 0, 0]
    region_of = regions(grid, side)
    for r in set(region_of.tolist()) - opened:
        cells = [i for i, region in enumerate(region_of.tolist()) if region == r and mask[i]]
        if cells:
            states[cells] = states[cells].mean(dim=0)
    return states


def select_best(attention: Attention, tokens: Tokens, grid: tuple[int, int], side: int, q_HUD: Tensor, keep: int) -> set[int]:
    """Return the regions whose blurred cells get the most attention, summed over heads and queries."""
    mask, region_of = build_dense_mask(tokens)[0, 0, 0], regions(grid, side)
    n, R = len(region_of), int(region_of.max()) + 1
    k = attention.build_keys(Tokens(blur(tokens, grid, side, set())[None, :n])).project_all()[0][0]
    attention_R = torch.zeros(R, dtype=torch.float64)
    for head in range(q_HUD.shape[0]):
        for q in q_HUD[head]:
            score = (k[head] @ q / math.sqrt(len(q))).exp() * mask[:n]
            attention_R += torch.zeros(R, dtype=torch.float64).index_add(0, region_of, score / score.sum())
    return set(attention_R.topk(min(keep, R)).indices.tolist())


@pytest.mark.parametrize(
    ("grid", "text", "masked"), [((6, 6), 0, False), ((5, 7), 0, True), ((5, 7), 3, False), ((4, 9), 3, True)]
)
@pytest.mark.parametrize("keep", [0, 2, 3])
@pytest.mark.parametrize("case", ["text", "word", "self"])
def test_coarse_to_fine_is_dense_attention_to_a_blurred_image(
    grid: tuple[int, int], text: int, masked: bool, keep: int, case: str
) -> None:
    attention, tokens = build_inputs(grid, text, masked, seed=3)
    n, side = grid[0] * grid[1], 2
    context = coarse_to_fine.CoarseToFine(
        coarse_to_fine.Config(region=side, keep=keep, choose="word" if case == "word" else "text")
    )
    words = torch.randn(2, 4, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    queries = None if case == "self" else words
    fast, _, _ = run_context(context, attention, tokens, queries, exact=False)
    out, dense_weights, _ = run_context(context, attention, tokens, queries, exact=True)
    torch.testing.assert_close(fast, out, rtol=0, atol=1e-10)
    assert dense_weights is not None

    region_of = regions(grid, side)
    groups = {
        "text": [list(range(4))],
        "word": [[i] for i in range(4)],
        "self": [(region_of == r).nonzero().flatten().tolist() for r in range(int(region_of.max()) + 1)],
    }[case]
    for b in (0, 1):
        one = Tokens(tokens.states[b : b + 1], None if tokens.mask is None else tokens.mask[b : b + 1], grid)
        mask = build_dense_mask(one)
        states = one.states[0, :n] if queries is None else words[b]
        for group in groups:
            q_HUD = attention.project_queries(states[None, group])[0]
            real = mask[0, 0, 0, group] if case == "self" else torch.ones(len(group), dtype=torch.bool)
            selecting = q_HUD[:, real]
            if case == "self":  # the mean query of a region's real cells selects
                selecting = selecting.sum(dim=1, keepdim=True) / real.sum().clamp(min=1)
            opened = select_best(attention, one, grid, side, selecting, keep)
            k, v = attention.build_keys(Tokens(blur(one, grid, side, opened)[None])).project_all()
            want, weights = naive_attention(q_HUD[None], k, v, mask[:, :, : len(group)])
            torch.testing.assert_close(out[b : b + 1, :, group], want, rtol=0, atol=1e-10)
            torch.testing.assert_close(dense_weights[b : b + 1, :, group], weights, rtol=0, atol=1e-10)


@pytest.mark.parametrize("is_self", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_coarse_to_fine_with_every_region_opened_is_dense(is_self: bool, masked: bool) -> None:
    attention, tokens = build_inputs((5, 7), 3, masked)
    queries = None if is_self else torch.randn(2, 4, WIDTH, dtype=torch.float64)
    context = coarse_to_fine.CoarseToFine(coarse_to_fine.Config(region=2, keep=99))
    want = run_context(dense.Dense(), attention, tokens, queries, False)[0]
    torch.testing.assert_close(run_context(context, attention, tokens, queries, False)[0], want, rtol=0, atol=1e-10)


def test_unopened_regions_have_gradients_and_only_needed_tokens_are_projected() -> None:
    attention, tokens = build_inputs((8, 8))
    states = tokens.states.requires_grad_()
    words = torch.randn(2, 4, WIDTH, dtype=torch.float64)
    context = coarse_to_fine.CoarseToFine(coarse_to_fine.Config(region=2, keep=1))
    projected: list[int] = []
    attention.k.register_forward_hook(lambda module, inputs, output: projected.append(inputs[0].shape[1]))
    out, _, _ = run_context(context, attention, tokens, words, False)
    assert projected == [16, 4]  # the means of 16 regions and the cells of one, not all 64 cells
    (gradient,) = torch.autograd.grad(out.square().sum(), [states])
    assert (gradient.abs().sum(dim=2) > 0).all()


def test_padding_does_not_select_and_each_text_selects_its_own_regions() -> None:
    attention, tokens = build_inputs((6, 6))
    context = coarse_to_fine.CoarseToFine(coarse_to_fine.Config(region=2, keep=2))
    words = torch.randn(2, 8, WIDTH, dtype=torch.float64)
    mask = torch.tensor([True, True, True, False] * 2).expand(2, 8)
    both = run_context(context, attention, tokens, words, False, mask=mask, rows=2)[0]
    for i in (0, 1):
        one = run_context(context, attention, tokens, words[:, 4 * i : 4 * i + 3], False)[0]
        torch.testing.assert_close(both[:, :, 4 * i : 4 * i + 3], one, rtol=0, atol=1e-10)


# ---------------------------------------------------------------------------------------------------------------------
# Pooled


@pytest.mark.parametrize("masked", [False, True])
def test_summaries_attend_to_the_image_and_their_weights_compose(masked: bool) -> None:
    _, tokens = build_inputs((5, 7), masked=masked)
    context = pooled.Pooled(pooled.Config(latents=4, heads=2), WIDTH).double()
    summary, summary_weights = context.summarize(tokens, exact=True)
    assert summary_weights is not None
    assert summary.states.shape == (2, 4, WIDTH)
    assert summary.grid is None
    latents = context.norm(context.latents)[None].expand(2, -1, -1)
    mask = build_dense_mask(tokens)[:, :, :4]
    heads, weights = naive_attention(
        context.read.project_queries(latents), *context.read.build_keys(tokens).project_all(), mask
    )
    states = context.latents + context.read.project_output(heads)
    torch.testing.assert_close(summary.states, context.out_norm(states + context.think(states)))
    torch.testing.assert_close(summary_weights.to_matrix(), weights.mean(dim=1))
    torch.testing.assert_close(summary_weights.to_matrix().sum(dim=2), torch.ones(2, 4, dtype=torch.float64))
    fast, no_weights = context.summarize(tokens)
    assert no_weights is None
    torch.testing.assert_close(fast.states, summary.states)


# ---------------------------------------------------------------------------------------------------------------------
# Every context


def build(name: str, dtype: torch.dtype = torch.float64) -> Context:
    module = registry.get_component("context", name)
    context: Context = module.build(module.Config(**SMALL.get(name, {})), WIDTH)
    return context.to(dtype)


@pytest.mark.parametrize("name", registry.component_names("context"))
@pytest.mark.parametrize("is_self", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_both_paths_agree_forward_and_backward(name: str, is_self: bool, device: str) -> None:
    attention, tokens = build_inputs((5, 7), 3, masked=True, dtype=torch.float32)
    attention, context = attention.to(device), build(name, torch.float32).to(device)
    states = tokens.states.to(device).requires_grad_()
    mask = tokens.mask.to(device)
    mask[1] = False  # an image whose tokens are all masked
    tokens = Tokens(states, mask, tokens.grid)
    words = None if is_self else torch.randn(2, 4, WIDTH, device=device)
    results = []
    for exact in (False, True):
        summary, _ = context.summarize(tokens, exact)
        keys = attention.build_keys(summary)
        query_states = states[:, :35] if words is None else words
        out, weights = context(Queries(attention.project_queries(query_states), is_self=is_self), keys, exact)
        assert torch.isfinite(out).all()
        parameters = [*attention.parameters(), *context.parameters()]
        direction = torch.arange(out.numel(), device=device).view(out.shape) % 7 - 3.0
        gradients = torch.autograd.grad((out * direction).sum(), [states, *parameters], allow_unused=True)
        results.append((out, *(g for g in gradients if g is not None)))
        if weights is not None:
            rows = weights.to_matrix().sum(dim=2)[0]
            torch.testing.assert_close(rows, torch.ones_like(rows))
    for fast, exact_ in zip(*results, strict=True):
        torch.testing.assert_close(fast, exact_, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", registry.component_names("context"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", DEVICES)
def test_half_precision(name: str, dtype: torch.dtype, device: str) -> None:
    attention, tokens = build_inputs((5, 7), 3, masked=True, dtype=torch.float32)
    context = build(name, torch.float32)
    tokens.mask[1] = False
    outputs: list[Tensor] = []
    for kind, target in ((torch.float32, "cpu"), (dtype, device)):
        attention, context = attention.to(target, kind), context.to(target, kind)
        summary, _ = context.summarize(Tokens(tokens.states.to(target, kind), tokens.mask.to(target), tokens.grid))
        out, _ = context(
            Queries(attention.project_queries(tokens.states[:, :35].to(target, kind)), is_self=True),
            attention.build_keys(summary),
        )
        outputs.append(out.float().cpu())
    assert torch.isfinite(outputs[1]).all()
    assert (outputs[0] - outputs[1]).abs().mean() < 0.02 * outputs[0].abs().mean() + torch.finfo(dtype).eps


def test_images_get_the_configured_context_and_text_is_dense() -> None:
    contexts = build_contexts(coarse_to_fine.Config(), {"text": 8, "image": 16}, ["image"], ["text"], "cross")
    assert type(contexts["text"]).__name__ == "Dense"
    assert type(contexts["image"]).__name__ == "CoarseToFine"


def test_context_that_would_change_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"context.name=local has no meaning with fusion.name=cross: only text attends"):
        build_contexts(local.Config(), {"text": 8, "image": 16}, ["image"], ["text"], "cross")
    with pytest.raises(ConfigError, match=r"context.name=pooled needs an image; text and audio have no grid"):
        build_contexts(pooled.Config(), {"text": 8, "audio": 16}, ["image"], ["text"], "cross")
    build_contexts(local.Config(), {"image": 8, "text": 16}, ["image"], ["image"], "cross")


@pytest.mark.parametrize("name", ["local", "coarse_to_fine"])
def test_tokens_without_a_grid_are_refused(name: str) -> None:
    attention, tokens = build_inputs((5, 7))
    with pytest.raises(ConfigError, match="patch dropout breaks it"):
        build(name)(
            Queries(attention.project_queries(tokens.states), is_self=True), attention.build_keys(tokens._replace(grid=None))
        )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (local.Config(window=0), "context.window=0"),
        (coarse_to_fine.Config(region=0), "context.region=0"),
        (coarse_to_fine.Config(keep=-1), "context.keep=-1"),
        (pooled.Config(latents=0), "context.latents=0"),
    ],
)
def test_settings_out_of_range_are_refused(config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.check()
