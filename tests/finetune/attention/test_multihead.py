"""Attention compared with PyTorch's module and with loops, and its two paths with each other."""

import pytest
import torch
from torch import Tensor, nn

from finetune.attention.multihead import Attention, Tokens, ZeroInitLinear, attend
from pretrain.errors import ConfigError
from tests.support.attention_reference import DEVICES, naive_attention


def random_heads(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def build_ragged_mask(B: int, H: int, Q: int, K: int) -> Tensor:
    """Return a mask with holes; some rows have every key, one row a single key, others no key."""
    mask = torch.rand(B, H, Q, K, generator=torch.Generator().manual_seed(5)) < 0.5
    mask[0, 0, 0], mask[0, 0, 1], mask[-1, -1, -1] = True, False, False
    mask[0, 0, 2] = torch.arange(K) == K - 1
    return mask


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_attend_computes_the_formula(exact: bool, device: str) -> None:
    q, k, v = (random_heads(2, 3, n, 8, seed=i, dtype=torch.float64) for i, n in enumerate((4, 6, 6)))
    mask = build_ragged_mask(2, 3, 4, 6)
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
    inputs = [random_heads(2, *groups, 3, n, 8, seed=i).to(device).requires_grad_() for i, n in enumerate((4, 6, 6))]
    mask: Tensor | None = build_ragged_mask(2, 3, 4, 6).to(device)
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
        out, weights = attend(*inputs, mask=mask, exact=exact)
        assert (weights is not None) == exact
        direction = random_heads(*out.shape, seed=9).to(device)
        results.append((out, *torch.autograd.grad((out * direction).sum(), inputs)))
    for fast, exact_ in zip(*results, strict=True):
        assert torch.isfinite(fast).all()
        torch.testing.assert_close(fast, exact_, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", DEVICES)
def test_half_precision_with_rows_without_keys(dtype: torch.dtype, device: str) -> None:
    """Errors stay below 0.51 (exact) or 2 (fast) times the machine epsilon, times the largest value."""
    inputs = [(3 * random_heads(2, 3, n, 8, seed=i)).to(dtype) for i, n in enumerate((4, 6, 6))]
    mask = build_ragged_mask(2, 3, 4, 6)
    want, weights = naive_attention(*(p.double() for p in inputs), mask)
    no_key = ~mask.any(dim=-1)
    on_device = [p.to(device).requires_grad_() for p in inputs]
    for exact, units in ((True, 0.51), (False, 2.0)):  # the fused kernel also rounds the weights
        out, used = attend(*on_device, mask=mask.to(device), exact=exact)
        assert out.dtype == dtype
        assert (out.cpu()[no_key] == 0).all()
        gradients = torch.autograd.grad(out.float().sum(), on_device)
        assert all(torch.isfinite(g).all() for g in gradients)
        largest = inputs[2].abs().max().item()
        assert (out.cpu().double() - want).abs().max() <= units * torch.finfo(dtype).eps * largest
        if used is not None:
            torch.testing.assert_close(used.cpu().double(), weights, rtol=0, atol=1e-5)


def test_autocast_leaves_the_exact_path_exact() -> None:
    q, k, v = (random_heads(1, 2, 3, 8, seed=i) for i in range(3))
    plain, _ = attend(q, k, v, exact=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast, weights = attend(q, k, v, exact=True)
    assert torch.equal(plain, autocast)
    assert weights is not None
    assert weights.dtype == torch.float32


@pytest.mark.parametrize("widths", [(24, 24), (24, 40)])
@pytest.mark.parametrize("exact", [False, True])
def test_attention_equals_torch_multihead_attention_on_the_same_weights(widths: tuple[int, int], exact: bool) -> None:
    torch.manual_seed(0)
    width, context_width = widths
    reference = nn.MultiheadAttention(width, 4, kdim=context_width, vdim=context_width, batch_first=True)
    nn.init.normal_(reference.in_proj_bias)
    attention = Attention(width, context_width, heads=4)
    with torch.no_grad():
        if reference.in_proj_weight is not None:
            weights = reference.in_proj_weight.chunk(3)
        else:
            weights = (reference.q_proj_weight, reference.k_proj_weight, reference.v_proj_weight)
        for linear, weight, bias in zip(
            (attention.q, attention.k, attention.v), weights, reference.in_proj_bias.chunk(3), strict=True
        ):
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
        attention.out.load_state_dict(reference.out_proj.state_dict())
    x, context = torch.randn(3, 5, width), torch.randn(3, 7, context_width)
    mask = torch.arange(7) < torch.tensor([7, 4, 1])[:, None]
    want, want_weights = reference(x, context, context, key_padding_mask=~mask, average_attn_weights=False)
    out, attention_weights = attention(x, context, mask, exact=exact)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    if exact:
        assert attention_weights is not None
        torch.testing.assert_close(attention_weights, want_weights, rtol=1e-5, atol=1e-5)


def test_smaller_inner_width_without_context() -> None:
    attention = Attention(24, inner=8, heads=2)
    x = torch.randn(2, 5, 24)
    out, weights = attention(x, exact=True)
    assert out.shape == x.shape
    assert weights.shape == (2, 2, 5, 5)
    assert sum(p.numel() for p in attention.parameters()) == 4 * 24 * 8 + 3 * 8 + 24


def test_mask_may_differ_between_queries() -> None:
    attention = Attention(24, heads=2)
    x = torch.randn(2, 5, 24)
    earlier = torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 5, 5)
    out, _ = attention(x, mask=earlier)
    changed = x.clone()
    changed[:, 3:] = 0
    torch.testing.assert_close(attention(changed, mask=earlier)[0][:, :3], out[:, :3])


def test_keys_are_projected_once() -> None:
    attention = Attention(24, heads=2)
    keys = attention.build_keys(Tokens(torch.randn(2, 5, 24)))
    assert keys.project_all() is keys.project_all()
    assert keys.grid_size == 0


def test_output_projection_starts_at_zero_and_has_gradients_at_once() -> None:
    attention = Attention(24, heads=2, gated=True)
    assert isinstance(attention.out, ZeroInitLinear)
    x = torch.randn(2, 5, 24)
    out, _ = attention(x)
    assert (out == 0).all()
    (out - 1).square().mean().backward()
    assert (attention.out.weight.grad != 0).all()


def test_heads_that_do_not_divide_the_inner_width_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"fusion.heads=5 does not divide .* 24"):
        Attention(24, heads=5)


def test_attention_weights_of_a_frozen_module_have_gradients() -> None:
    attention = Attention(24, heads=2).requires_grad_(False)
    out, weights = attention(torch.randn(2, 5, 24), exact=True)
    (gradient,) = torch.autograd.grad(out.sum(), [weights])
    assert gradient.abs().sum() > 0


def test_tied_projections_keep_the_products_of_queries_and_keys() -> None:
    """With one head the tied weights are the softmax of the plain products; those of a new module are not."""
    x, y = random_heads(2, 4, 16, seed=1), random_heads(2, 6, 16, seed=2)
    plain = (x @ y.transpose(1, 2) / 16**0.5).softmax(dim=-1)
    torch.manual_seed(0)
    attention = Attention(16, 16, heads=1)
    assert (attention(x, y, exact=True)[1] - plain[:, None]).abs().max() > 0.1
    attention.tie_query_key_()
    torch.testing.assert_close(attention(x, y, exact=True)[1], plain[:, None], rtol=0, atol=1e-6)
    extended = Attention(16, 20, heads=1)  # four channels that the queries do not have: position encodings
    extended.tie_query_key_()
    wide = torch.cat([y, random_heads(2, 6, 4, seed=3)], dim=2)
    torch.testing.assert_close(extended(x, wide, exact=True)[1], plain[:, None], rtol=0, atol=1e-6)
    narrow = Attention(16, 16, inner=8, heads=2)
    narrow.tie_query_key_()
    assert torch.equal(narrow.q.weight, narrow.k.weight)
    torch.testing.assert_close(narrow.q.weight @ narrow.q.weight.T, torch.eye(8), rtol=0, atol=1e-6)
