"""Attention against torch's own module, against loops, and its two paths against each other."""

import pytest
import torch
from torch import Tensor, nn

from finetune.attention.multihead import Attention, Tokens, ZeroInitLinear, attend
from pretrain.errors import ConfigError
from tests.support.attention_reference import DEVICES, naive_attention


def heads(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def ragged(B: int, H: int, Q: int, K: int) -> Tensor:
    """Masks with holes; some rows see everything, some one key, some nothing."""
    mask = torch.rand(B, H, Q, K, generator=torch.Generator().manual_seed(5)) < 0.5
    mask[0, 0, 0], mask[0, 0, 1], mask[-1, -1, -1] = True, False, False
    mask[0, 0, 2] = torch.arange(K) == K - 1
    return mask


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_attend_is_the_formula(exact: bool, device: str) -> None:
    q, k, v = (heads(2, 3, n, 8, seed=i, dtype=torch.float64) for i, n in enumerate((4, 6, 6)))
    mask = ragged(2, 3, 4, 6)
    want, weights = naive_attention(q, k, v, mask)
    out, used = attend(q.to(device), k.to(device), v.to(device), mask.to(device), exact)
    torch.testing.assert_close(out.cpu(), want, rtol=0, atol=1e-12)
    if exact:
        assert used is not None
        torch.testing.assert_close(used.cpu(), weights, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["bool", "float", "keys only", "none"])
@pytest.mark.parametrize("groups", [(), (3,)])
@pytest.mark.parametrize("device", DEVICES)
def test_fast_and_exact_agree_with_gradients(kind: str, groups: tuple[int, ...], device: str) -> None:
    parts = [heads(2, *groups, 3, n, 8, seed=i).to(device).requires_grad_() for i, n in enumerate((4, 6, 6))]
    mask: Tensor | None = ragged(2, 3, 4, 6).to(device)
    if kind == "keys only":
        mask = torch.tensor([[True] * 4 + [False] * 2, [False] * 6], device=device)[:, None, None]
    if kind == "none":
        mask = None
    if mask is not None and groups:
        mask = mask[:, None]
    if kind == "float":
        assert mask is not None
        mask = torch.zeros(mask.shape, device=device).masked_fill(~mask, float("-inf"))
    results = []
    for exact in (False, True):
        out, weights = attend(*parts, mask=mask, exact=exact)
        assert (weights is not None) == exact
        direction = heads(*out.shape, seed=9).to(device)
        results.append((out, *torch.autograd.grad((out * direction).sum(), parts)))
    for fast, exact_ in zip(*results, strict=True):
        assert torch.isfinite(fast).all()
        torch.testing.assert_close(fast, exact_, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", DEVICES)
def test_half_precision_with_rows_that_see_nothing(dtype: torch.dtype, device: str) -> None:
    """Both paths are within half a unit in the last place of the truth, times what the values can add up to."""
    parts = [(3 * heads(2, 3, n, 8, seed=i)).to(dtype) for i, n in enumerate((4, 6, 6))]
    mask = ragged(2, 3, 4, 6)
    want, weights = naive_attention(*(p.double() for p in parts), seen=mask)
    dead = ~mask.any(dim=-1)
    moved = [p.to(device).requires_grad_() for p in parts]
    for exact, units in ((True, 0.51), (False, 2.0)):  # the fused kernel also rounds the weights
        out, used = attend(*moved, mask=mask.to(device), exact=exact)
        assert out.dtype == dtype
        assert (out.cpu()[dead] == 0).all()
        gradients = torch.autograd.grad(out.float().sum(), moved)
        assert all(torch.isfinite(g).all() for g in gradients)
        largest = parts[2].abs().max().item()
        assert (out.cpu().double() - want).abs().max() <= units * torch.finfo(dtype).eps * largest
        if used is not None:
            torch.testing.assert_close(used.cpu().double(), weights, rtol=0, atol=1e-5)


def test_autocast_leaves_the_exact_path_exact() -> None:
    q, k, v = (heads(1, 2, 3, 8, seed=i) for i in range(3))
    plain, _ = attend(q, k, v, exact=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, weights = attend(q, k, v, exact=True)
    assert torch.equal(plain, inside)
    assert weights is not None
    assert weights.dtype == torch.float32


@pytest.mark.parametrize("widths", [(24, 24), (24, 40)])
@pytest.mark.parametrize("exact", [False, True])
def test_equals_multihead_attention_on_the_same_weights(widths: tuple[int, int], exact: bool) -> None:
    torch.manual_seed(0)
    width, context_width = widths
    theirs = nn.MultiheadAttention(width, 4, kdim=context_width, vdim=context_width, batch_first=True)
    nn.init.normal_(theirs.in_proj_bias)
    ours = Attention(width, context_width, heads=4)
    with torch.no_grad():
        if theirs.in_proj_weight is not None:
            weights = theirs.in_proj_weight.chunk(3)
        else:
            weights = (theirs.q_proj_weight, theirs.k_proj_weight, theirs.v_proj_weight)
        for linear, weight, bias in zip((ours.q, ours.k, ours.v), weights, theirs.in_proj_bias.chunk(3), strict=True):
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
        ours.out.load_state_dict(theirs.out_proj.state_dict())
    x, context = torch.randn(3, 5, width), torch.randn(3, 7, context_width)
    mask = torch.arange(7) < torch.tensor([7, 4, 1])[:, None]
    want, want_weights = theirs(x, context, context, key_padding_mask=~mask, average_attn_weights=False)
    out, weights_ = ours(x, context, mask, exact=exact)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    if exact:
        assert weights_ is not None
        torch.testing.assert_close(weights_, want_weights, rtol=1e-5, atol=1e-5)


def test_a_smaller_inner_width_and_no_context() -> None:
    attention = Attention(24, inner=8, heads=2)
    x = torch.randn(2, 5, 24)
    out, weights = attention(x, exact=True)
    assert out.shape == x.shape
    assert weights.shape == (2, 2, 5, 5)
    assert sum(p.numel() for p in attention.parameters()) == 4 * 24 * 8 + 3 * 8 + 24


def test_a_mask_for_each_query() -> None:
    attention = Attention(24, heads=2)
    x = torch.randn(2, 5, 24)
    earlier = torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 5, 5)
    out, _ = attention(x, mask=earlier)
    changed = x.clone()
    changed[:, 3:] = 0
    torch.testing.assert_close(attention(changed, mask=earlier)[0][:, :3], out[:, :3])


def test_keys_are_projected_once() -> None:
    attention = Attention(24, heads=2)
    keys = attention.keys(Tokens(torch.randn(2, 5, 24)))
    assert keys.projected() is keys.projected()
    assert keys.picture == 0


def test_gates_start_closed_and_learn_at_once() -> None:
    attention = Attention(24, heads=2, gated=True)
    assert isinstance(attention.out, ZeroInitLinear)
    x = torch.randn(2, 5, 24)
    out, _ = attention(x)
    assert (out == 0).all()
    (out - 1).square().mean().backward()
    assert (attention.out.weight.grad != 0).all()


def test_heads_that_do_not_divide_the_inner_width() -> None:
    with pytest.raises(ConfigError, match=r"fusion.heads=5 does not divide .* 24"):
        Attention(24, heads=5)


def test_a_frozen_module_still_has_gradients_of_its_weights() -> None:
    attention = Attention(24, heads=2).requires_grad_(False)
    out, weights = attention(torch.randn(2, 5, 24), exact=True)
    (gradient,) = torch.autograd.grad(out.sum(), [weights])
    assert gradient.abs().sum() > 0


def test_matched_projections_keep_what_resembles_what() -> None:
    """With one head the weights are those of the plain products of queries and keys; a new one knows nothing of them."""
    x, y = heads(2, 4, 16, seed=1), heads(2, 6, 16, seed=2)
    plain = (x @ y.transpose(1, 2) / 16**0.5).softmax(dim=-1)
    torch.manual_seed(0)
    attention = Attention(16, 16, heads=1)
    assert (attention(x, y, exact=True)[1] - plain[:, None]).abs().max() > 0.1
    attention.tie_query_key_()
    torch.testing.assert_close(attention(x, y, exact=True)[1], plain[:, None], rtol=0, atol=1e-6)
    beside = Attention(16, 20, heads=1)  # four channels that the queries do not have: where things stand
    beside.tie_query_key_()
    wide = torch.cat([y, heads(2, 6, 4, seed=3)], dim=2)
    torch.testing.assert_close(beside(x, wide, exact=True)[1], plain[:, None], rtol=0, atol=1e-6)
    narrow = Attention(16, 16, inner=8, heads=2)
    narrow.tie_query_key_()
    assert torch.equal(narrow.q.weight, narrow.k.weight)
    torch.testing.assert_close(narrow.q.weight @ narrow.q.weight.T, torch.eye(8), rtol=0, atol=1e-6)
