"""Multi-head attention between two token sequences, with a fast path and one that returns weights.

    out, _ = Attention(512, context_width=768, inner=256)(text_BQC, image_BKC, mask_BK)

The exact path returns the weights; both paths agree to rounding. A query whose keys are all masked gets 0, never NaN. May
import pretrain.errors.

Shapes: B samples, H heads, Q queries, K keys, D width of a head, C width of a token, G groups of queries that share
their keys (windows, regions), N = H W tokens of an image. Masks are True where a query may attend to a key.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.errors import ConfigError

# ---------------------------------------------------------------------------------------------------------------------
# The formula


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, exact: bool = False) -> tuple[Tensor, Tensor | None]:
    """Compute softmax(q k^T / sqrt(D) + mask) v, and with `exact` also the weights, in float32 or wider.

    Args:
        q: (B, [G,] H, Q, D).
        k: (B, [G,] H, K, D), and v likewise.
        mask: broadcasts to (B, [G,] H, Q, K). Bool, True where a query may attend to a key, or a float that is added to
            the scores, -inf where it may not.

    A query with no key gets zeros. Some kernels return NaN for such rows, so no kernel ever sees one: the row is unmasked
    before the call and its output is set to zero after it.
    """
    has_key = None
    if mask is not None:
        visible = mask if mask.dtype == torch.bool else mask > float("-inf")
        has_key = visible.any(dim=-1, keepdim=True)
        mask = mask | ~has_key if mask.dtype == torch.bool else mask.masked_fill(~has_key, 0.0)
    if exact:
        return _attend_exact(q, k, v, mask, has_key)
    out = _attend_fused(q, k, v, mask)
    return (out if has_key is None else out.masked_fill(~has_key, 0.0)), None


def _attend_fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Call PyTorch's fused kernel. It takes four dimensions, so groups are folded into the samples."""
    if q.dim() == 4:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    groups = q.shape[:2]
    if mask is not None:
        mask = mask.expand(*groups, *mask.shape[2:]).flatten(0, 1)
    out = F.scaled_dot_product_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), attn_mask=mask)
    return out.view(*groups, *out.shape[1:])


def _attend_exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, has_key: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute the formula as written, in at least float32 also under autocast, and round once, at the end."""
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        scores = (q.to(wide) * q.shape[-1] ** -0.5) @ k.to(wide).transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.to(wide)
        weights = scores.softmax(dim=-1)
        if has_key is not None:
            weights = weights.masked_fill(~has_key, 0.0)
        if torch.is_grad_enabled() and not weights.requires_grad:
            weights.requires_grad_()  # gradient-based maps of a frozen model need these gradients too
        return (weights @ v.to(wide)).to(v.dtype), weights


# ---------------------------------------------------------------------------------------------------------------------
# The module


class Tokens(NamedTuple):
    """The fields of a TokenSequence that attention reads."""

    states: Tensor
    """(B, K, C)."""
    mask: Tensor | None = None
    """(B, K), or (B, Q, K) for a mask that differs between queries; None where every token may be attended to."""
    grid: tuple[int, int] | None = None
    """(H, W): the first H W tokens are an image, row-major; any further tokens (text) are appended after it."""


class ZeroInitLinear(nn.Linear):
    """The output projection of a residual branch, initialized to zero: at first the branch adds exactly 0.

    A zero matrix learns as fast as an ordinary one, because each of its weights has its own gradient from the first step.

    Measured: one gate per channel after an ordinary projection took 2 to 6 times as many steps on a toy question task. It
    took 580 steps, and 200 with ten times the learning rate for the gates, against 100 with this layer.
    """

    def reset_parameters(self) -> None:
        """Set weight and bias to zero."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class Attention(nn.Module):
    """Multi-head attention with projections q, k, v to `inner` = heads x D channels, and out to `width`.

    A small `inner` keeps wide towers cheap: the attention's own time and memory grow with `inner` alone. With `gated` the
    output projection is a ZeroInitLinear.
    """

    def __init__(
        self, width: int, context_width: int | None = None, inner: int | None = None, heads: int = 8, gated: bool = False
    ) -> None:
        super().__init__()
        context_width, inner = context_width or width, inner or width
        if inner % heads:
            raise ConfigError(f"fusion.heads={heads} does not divide the attention's inner width {inner} (fusion.inner)")
        self.heads = heads
        self.q = nn.Linear(width, inner)
        self.k = nn.Linear(context_width, inner)
        self.v = nn.Linear(context_width, inner)
        self.out = (ZeroInitLinear if gated else nn.Linear)(inner, width)
        for linear in (self.q, self.k, self.v):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    @torch.no_grad()
    def tie_query_key_(self) -> None:
        """Set q and k to one orthogonal projection, so that a query first attends to similar keys.

        For tokens of one shared space: contrastive training has already aligned them, so fusion need not learn anew which
        belong together. The first channels of the context must be those of the space.
        """
        nn.init.orthogonal_(self.q.weight)
        self.k.weight.zero_()  # channels appended to the tokens, their position encodings, are not in the space
        self.k.weight[:, : self.q.in_features].copy_(self.q.weight)

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, exact: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from x (B, Q, C) to context (B, K, C'); without a context this is self-attention on x.

        Returns (B, Q, C), and with `exact` the weights (B, H, Q, K). `mask` is (B, K) or (B, Q, K).
        """
        keys = self.build_keys(Tokens(x if context is None else context, mask))
        out, weights = attend(self.project_queries(x), *keys.project_all(), mask=broadcast_over_heads(mask), exact=exact)
        return self.project_output(out), weights

    def project_queries(self, x: Tensor) -> Tensor:
        """(B, Q, C) -> (B, H, Q, D)."""
        return self._split_heads(self.q(x))

    def build_keys(self, tokens: Tokens) -> Keys:
        """Wrap the tokens to attend to; they are not projected yet."""
        return Keys(self, tokens)

    def project_output(self, out: Tensor) -> Tensor:
        """(B, H, Q, D) -> (B, Q, C)."""
        projected: Tensor = self.out(out.transpose(1, 2).flatten(2))
        return projected

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, x.shape[2] // self.heads).transpose(1, 2)


class Keys:
    """The tokens of one attention's keys and values, projected on demand.

    With few queries the projections are most of the cost, so each context decides which tokens it projects.
    """

    def __init__(self, attention: Attention, tokens: Tokens) -> None:
        self.attention = attention
        self.tokens = tokens
        self._projected: tuple[Tensor, Tensor] | None = None

    @property
    def grid_size(self) -> int:
        """N, the number of tokens on the grid; 0 without a grid."""
        grid = self.tokens.grid
        return grid[0] * grid[1] if grid else 0

    def project(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K, C) -> k and v (B, H, K, D)."""
        attention = self.attention
        return attention._split_heads(attention.k(states)), attention._split_heads(attention.v(states))

    def project_all(self) -> tuple[Tensor, Tensor]:
        """Return k and v of all tokens, which are computed once."""
        if self._projected is None:
            self._projected = self.project(self.tokens.states)
        return self._projected


def broadcast_over_heads(mask: Tensor | None) -> Tensor | None:
    """(B, K) -> (B, 1, 1, K); (B, Q, K) -> (B, 1, Q, K)."""
    if mask is None:
        return None
    return mask[:, None, None] if mask.dim() == 2 else mask[:, None]
