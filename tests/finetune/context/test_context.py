"""Every context against loops over what it lets a query see; equal to dense where it should be."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finetune.attention.multihead import Attention, Keys, Tokens
from finetune.context import Asking, Context, build_contexts, coarse_to_fine, dense, local, pooled
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


def setting(
    grid: tuple[int, int], beside: int = 0, masked: bool = False, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Attention, Tokens]:
    """An attention and a picture, with `beside` tokens after it, some hidden where `masked`."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    n = grid[0] * grid[1] + beside
    mask = torch.rand(2, n, generator=generator) < 0.7 if masked else None
    states = torch.randn(2, n, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    return Attention(WIDTH, heads=2).to(dtype), Tokens(states, mask, grid)


def ask(
    context: Context, attention: Attention, tokens: Tokens, queries: Tensor | None, exact: bool, **who: Any
) -> tuple[Tensor, Tensor | None, Keys]:
    """(B, H, Q, D), the spread weights (B, H, Q, K), and the keys; without queries the picture asks itself."""
    keys = attention.keys(tokens)
    states = tokens.states[:, : keys.picture] if queries is None else queries
    asking = Asking(attention.queries(states), home=queries is None, **who)
    out, weights = context(asking, keys, exact)
    return out, None if weights is None else weights.spread(weights.used), keys


def everything(tokens: Tokens, heads: int = 2) -> Tensor:
    B, K, _ = tokens.states.shape
    mask = torch.ones(B, K, dtype=torch.bool) if tokens.mask is None else tokens.mask
    return mask[:, None, None].expand(B, heads, K, K)


# ---------------------------------------------------------------------------------------------------------------------
# Tiling


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.booleans())
@settings(max_examples=60, deadline=None)
def test_split_and_join_are_inverse_and_neighbours_are_neighbours(h: int, w: int, side: int, shifted: bool) -> None:
    tiling = Tiling((h, w), side, shifted)
    x = torch.arange(2 * h * w * 3).view(2, 1, h * w, 3)
    assert torch.equal(tiling.join(tiling.split(x)), x)
    cells = tiling.split(torch.arange(1, h * w + 1).view(1, 1, -1, 1)).flatten(1, 3)[0].flatten()
    assert torch.equal(cells[tiling.places(x.device)], torch.arange(1, h * w + 1))
    valid = tiling.valid(None, x.device)[0]
    together = tiling.together(x.device)
    sees = torch.zeros(h * w, h * w, dtype=torch.bool)
    for r in range(valid.shape[0]):
        ids = cells.view(valid.shape)[r] - 1
        for i, a in enumerate(ids.tolist()):
            for j, b in enumerate(ids.tolist()):
                if valid[r, i] and valid[r, j] and (together is None or together[r, i, j]):
                    sees[a, b] = True
    assert torch.equal(sees, windows((h, w), side, side // 2 if shifted else 0))


# ---------------------------------------------------------------------------------------------------------------------
# Local


@pytest.mark.parametrize("grid", [(6, 6), (5, 7), (2, 9)])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("beside", [0, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_local_is_dense_attention_under_a_window_mask(grid: tuple[int, int], layer: int, beside: int, masked: bool) -> None:
    attention, tokens = setting(grid, beside, masked)
    context = local.Local(local.Config(window=3))
    n = grid[0] * grid[1]
    seen = everything(tokens).clone()
    seen[:, :, :n, :n] &= windows(grid, 3, 1 if layer else 0)
    for exact in (False, True):
        out, spread, keys = ask(context, attention, tokens, None, exact, layer=layer)
        q = attention.queries(tokens.states[:, :n])
        want, weights = naive_attention(q, *keys.projected(), seen[:, :, :n])
        torch.testing.assert_close(out, want, rtol=0, atol=1e-10)
        if spread is not None:
            torch.testing.assert_close(spread, weights, rtol=0, atol=1e-10)


def test_local_is_dense_for_words_and_with_one_window() -> None:
    attention, tokens = setting((5, 7), 3)
    words = torch.randn(2, 4, WIDTH, dtype=torch.float64)
    for queries, window in ((words, 3), (None, 7), (None, 99)):
        context = local.Local(local.Config(window=window))
        want = ask(dense.Dense(), attention, tokens, queries, False, layer=1)[0]
        torch.testing.assert_close(ask(context, attention, tokens, queries, False, layer=1)[0], want)


# ---------------------------------------------------------------------------------------------------------------------
# Coarse to fine: dense attention to a picture whose unopened regions are blurred to their mean


def blurred(tokens: Tokens, grid: tuple[int, int], side: int, opened: set[int]) -> Tensor:
    """The picture's states (N, C) of one sample, every region but the opened ones replaced by its mean over real cells."""
    states, mask = tokens.states[0].clone(), everything(tokens)[0, 0, 0]
    of = regions(grid, side)
    for r in set(of.tolist()) - opened:
        cells = [i for i, region in enumerate(of.tolist()) if region == r and mask[i]]
        if cells:
            states[cells] = states[cells].mean(dim=0)
    return states


def best(attention: Attention, tokens: Tokens, grid: tuple[int, int], side: int, q_HUD: Tensor, keep: int) -> set[int]:
    """The regions whose cells, blurred, draw the most attention, summed over heads and queries."""
    mask, of = everything(tokens)[0, 0, 0], regions(grid, side)
    n, R = len(of), int(of.max()) + 1
    k = attention.keys(Tokens(blurred(tokens, grid, side, set())[None, :n])).projected()[0][0]
    drawn = torch.zeros(R, dtype=torch.float64)
    for head in range(q_HUD.shape[0]):
        for q in q_HUD[head]:
            score = (k[head] @ q / math.sqrt(len(q))).exp() * mask[:n]
            drawn += torch.zeros(R, dtype=torch.float64).index_add(0, of, score / score.sum())
    return set(drawn.topk(min(keep, R)).indices.tolist())


@pytest.mark.parametrize(
    ("grid", "beside", "masked"), [((6, 6), 0, False), ((5, 7), 0, True), ((5, 7), 3, False), ((4, 9), 3, True)]
)
@pytest.mark.parametrize("keep", [0, 2, 3])
@pytest.mark.parametrize("who", ["text", "word", "home"])
def test_coarse_to_fine_is_dense_on_a_blurred_picture(
    grid: tuple[int, int], beside: int, masked: bool, keep: int, who: str
) -> None:
    attention, tokens = setting(grid, beside, masked, seed=3)
    n, side = grid[0] * grid[1], 2
    context = coarse_to_fine.CoarseToFine(
        coarse_to_fine.Config(region=side, keep=keep, choose="word" if who == "word" else "text")
    )
    words = torch.randn(2, 4, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    queries = None if who == "home" else words
    fast, _, _ = ask(context, attention, tokens, queries, exact=False)
    out, spread, _ = ask(context, attention, tokens, queries, exact=True)
    torch.testing.assert_close(fast, out, rtol=0, atol=1e-10)
    assert spread is not None

    of = regions(grid, side)
    groups = {
        "text": [list(range(4))],
        "word": [[i] for i in range(4)],
        "home": [(of == r).nonzero().flatten().tolist() for r in range(int(of.max()) + 1)],
    }[who]
    for b in (0, 1):
        one = Tokens(tokens.states[b : b + 1], None if tokens.mask is None else tokens.mask[b : b + 1], grid)
        seen = everything(one)
        states = one.states[0, :n] if queries is None else words[b]
        for group in groups:
            q_HUD = attention.queries(states[None, group])[0]
            real = seen[0, 0, 0, group] if who == "home" else torch.ones(len(group), dtype=torch.bool)
            choosing = q_HUD[:, real]
            if who == "home":  # the mean query of a region's real cells chooses
                choosing = choosing.sum(dim=1, keepdim=True) / real.sum().clamp(min=1)
            opened = best(attention, one, grid, side, choosing, keep)
            k, v = attention.keys(Tokens(blurred(one, grid, side, opened)[None])).projected()
            want, weights = naive_attention(q_HUD[None], k, v, seen[:, :, : len(group)])
            torch.testing.assert_close(out[b : b + 1, :, group], want, rtol=0, atol=1e-10)
            torch.testing.assert_close(spread[b : b + 1, :, group], weights, rtol=0, atol=1e-10)


@pytest.mark.parametrize("home", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_coarse_to_fine_with_every_region_opened_is_dense(home: bool, masked: bool) -> None:
    attention, tokens = setting((5, 7), 3, masked)
    queries = None if home else torch.randn(2, 4, WIDTH, dtype=torch.float64)
    context = coarse_to_fine.CoarseToFine(coarse_to_fine.Config(region=2, keep=99))
    want = ask(dense.Dense(), attention, tokens, queries, False)[0]
    torch.testing.assert_close(ask(context, attention, tokens, queries, False)[0], want, rtol=0, atol=1e-10)


def test_what_is_not_opened_still_has_a_gradient_and_no_more_is_projected_than_needed() -> None:
    attention, tokens = setting((8, 8))
    states = tokens.states.requires_grad_()
    words = torch.randn(2, 4, WIDTH, dtype=torch.float64)
    context = coarse_to_fine.CoarseToFine(coarse_to_fine.Config(region=2, keep=1))
    projected: list[int] = []
    attention.k.register_forward_hook(lambda module, inputs, output: projected.append(inputs[0].shape[1]))
    out, _, _ = ask(context, attention, tokens, words, False)
    assert projected == [16, 4]  # the means of 16 regions, and the cells of one; not 64
    (gradient,) = torch.autograd.grad(out.square().sum(), [states])
    assert (gradient.abs().sum(dim=2) > 0).all()


def test_padding_does_not_choose_and_texts_choose_apart() -> None:
    attention, tokens = setting((6, 6))
    context = coarse_to_fine.CoarseToFine(coarse_to_fine.Config(region=2, keep=2))
    words = torch.randn(2, 8, WIDTH, dtype=torch.float64)
    mask = torch.tensor([True, True, True, False] * 2).expand(2, 8)
    both = ask(context, attention, tokens, words, False, mask=mask, rows=2)[0]
    for i in (0, 1):
        one = ask(context, attention, tokens, words[:, 4 * i : 4 * i + 3], False)[0]
        torch.testing.assert_close(both[:, :, 4 * i : 4 * i + 3], one, rtol=0, atol=1e-10)


# ---------------------------------------------------------------------------------------------------------------------
# Pooled


@pytest.mark.parametrize("masked", [False, True])
def test_summaries_are_read_from_the_picture_and_their_maps_compose(masked: bool) -> None:
    _, tokens = setting((5, 7), masked=masked)
    context = pooled.Pooled(pooled.Config(latents=4, heads=2), WIDTH).double()
    summary, read = context.summarize(tokens, exact=True)
    assert read is not None
    assert summary.states.shape == (2, 4, WIDTH)
    assert summary.grid is None
    latents = context.norm(context.latents)[None].expand(2, -1, -1)
    seen = everything(tokens)[:, :, :4]
    heads, weights = naive_attention(context.read.queries(latents), *context.read.keys(tokens).projected(), seen)
    states = context.latents + context.read.merge(heads)
    torch.testing.assert_close(summary.states, context.out_norm(states + context.think(states)))
    torch.testing.assert_close(read.matrix(), weights.mean(dim=1))
    torch.testing.assert_close(read.matrix().sum(dim=2), torch.ones(2, 4, dtype=torch.float64))
    fast, none = context.summarize(tokens)
    assert none is None
    torch.testing.assert_close(fast.states, summary.states)


# ---------------------------------------------------------------------------------------------------------------------
# All of them


def build(name: str, dtype: torch.dtype = torch.float64) -> Context:
    part = registry.get_component("context", name)
    made: Context = part.build(part.Config(**SMALL.get(name, {})), WIDTH)
    return made.to(dtype)


@pytest.mark.parametrize("name", registry.component_names("context"))
@pytest.mark.parametrize("home", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_both_paths_agree_forward_and_backward(name: str, home: bool, device: str) -> None:
    attention, tokens = setting((5, 7), 3, masked=True, dtype=torch.float32)
    attention, context = attention.to(device), build(name, torch.float32).to(device)
    states = tokens.states.to(device).requires_grad_()
    mask = tokens.mask.to(device)
    mask[1] = False  # a picture of which nothing can be seen
    tokens = Tokens(states, mask, tokens.grid)
    words = None if home else torch.randn(2, 4, WIDTH, device=device)
    found = []
    for exact in (False, True):
        asked, _ = context.summarize(tokens, exact)
        keys = attention.keys(asked)
        own = states[:, :35] if words is None else words
        out, weights = context(Asking(attention.queries(own), home=home), keys, exact)
        assert torch.isfinite(out).all()
        parameters = [*attention.parameters(), *context.parameters()]
        direction = torch.arange(out.numel(), device=device).view(out.shape) % 7 - 3.0
        gradients = torch.autograd.grad((out * direction).sum(), [states, *parameters], allow_unused=True)
        found.append((out, *(g for g in gradients if g is not None)))
        if weights is not None:
            rows = weights.matrix().sum(dim=2)[0]
            torch.testing.assert_close(rows, torch.ones_like(rows))
    for fast, exact_ in zip(*found, strict=True):
        torch.testing.assert_close(fast, exact_, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", registry.component_names("context"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", DEVICES)
def test_half_precision(name: str, dtype: torch.dtype, device: str) -> None:
    attention, tokens = setting((5, 7), 3, masked=True, dtype=torch.float32)
    context = build(name, torch.float32)
    tokens.mask[1] = False
    want: list[Tensor] = []
    for kind, place in ((torch.float32, "cpu"), (dtype, device)):
        attention, context = attention.to(place, kind), context.to(place, kind)
        asked, _ = context.summarize(Tokens(tokens.states.to(place, kind), tokens.mask.to(place), tokens.grid))
        out, _ = context(Asking(attention.queries(tokens.states[:, :35].to(place, kind)), home=True), attention.keys(asked))
        want.append(out.float().cpu())
    assert torch.isfinite(want[1]).all()
    assert (want[0] - want[1]).abs().mean() < 0.02 * want[0].abs().mean() + torch.finfo(dtype).eps


def test_pictures_get_the_context_and_words_are_asked_densely() -> None:
    made = build_contexts(coarse_to_fine.Config(), {"text": 8, "image": 16}, ["image"], ["text"], "cross")
    assert type(made["text"]).__name__ == "Dense"
    assert type(made["image"]).__name__ == "CoarseToFine"


def test_a_context_that_would_change_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"context.name=local has no meaning with fusion.name=cross: only text attends"):
        build_contexts(local.Config(), {"text": 8, "image": 16}, ["image"], ["text"], "cross")
    with pytest.raises(ConfigError, match=r"context.name=pooled needs a picture; text and audio have no grid"):
        build_contexts(pooled.Config(), {"text": 8, "audio": 16}, ["image"], ["text"], "cross")
    build_contexts(local.Config(), {"image": 8, "text": 16}, ["image"], ["image"], "cross")


@pytest.mark.parametrize("name", ["local", "coarse_to_fine"])
def test_a_broken_grid_is_a_clear_error(name: str) -> None:
    attention, tokens = setting((5, 7))
    with pytest.raises(ConfigError, match="patch dropout breaks it"):
        build(name)(Asking(attention.queries(tokens.states), home=True), attention.keys(tokens._replace(grid=None)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (local.Config(window=0), "context.window=0"),
        (coarse_to_fine.Config(region=0), "context.region=0"),
        (coarse_to_fine.Config(keep=-1), "context.keep=-1"),
        (pooled.Config(latents=0), "context.latents=0"),
    ],
)
def test_impossible_settings(config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.check()
