"""Multi-head attention between two token sequences of any widths: a fast path, and an exact one that returns the weights.

    out, _ = Attention(512, context_width=768, inner=256)(text_BQC, image_BKC, mask_BK)

Both paths agree to rounding, give 0 where every key is hidden, and never NaN. May import trace.py and pretrain.config.

Shapes: B samples, H heads, Q queries, K keys, D width of a head, C width of a token, G groups of queries that share
their keys (windows, regions), N = H W tokens of a picture. Masks are True where a key may be seen.
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
    """softmax(q k^T / sqrt(D) + mask) v, and with `exact` the weights in float32 or wider.

    q (B, [G,] H, Q, D), k and v (B, [G,] H, K, D); mask broadcasts to (B, [G,] H, Q, K): bool, True where a key may be
    seen, or a float to be added, -inf where it may not. A query that may see nothing gets zeros: whatever a kernel
    does with such rows (some return NaN), it is never asked, because they are opened and their output dropped.
    """
    alive = None
    if mask is not None:
        visible = mask if mask.dtype == torch.bool else mask > float("-inf")
        alive = visible.any(dim=-1, keepdim=True)
        mask = mask | ~alive if mask.dtype == torch.bool else mask.masked_fill(~alive, 0.0)
    if exact:
        return _exact(q, k, v, mask, alive)
    out = _fast(q, k, v, mask)
    return (out if alive is None else out.masked_fill(~alive, 0.0)), None


def _fast(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """torch's fused kernels take four dimensions: groups become samples."""
    if q.dim() == 4:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    groups = q.shape[:2]
    if mask is not None:
        mask = mask.expand(*groups, *mask.shape[2:]).flatten(0, 1)
    out = F.scaled_dot_product_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), attn_mask=mask)
    return out.view(*groups, *out.shape[1:])


def _exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, alive: Tensor | None) -> tuple[Tensor, Tensor]:
    """The formula as written, in at least float32 also under autocast; rounded once, at the end."""
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        scores = (q.to(wide) * q.shape[-1] ** -0.5) @ k.to(wide).transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.to(wide)
        weights = scores.softmax(dim=-1)
        if alive is not None:
            weights = weights.masked_fill(~alive, 0.0)
        if torch.is_grad_enabled() and not weights.requires_grad:
            weights.requires_grad_()  # a frozen model's maps have gradients too
        return (weights @ v.to(wide)).to(v.dtype), weights


# ---------------------------------------------------------------------------------------------------------------------
# The module


class Tokens(NamedTuple):
    """A TokenSequence as attention needs it."""

    states: Tensor
    """(B, K, C)."""
    mask: Tensor | None = None
    """(B, K), or (B, Q, K) where each query has its own; None where every token may be seen."""
    grid: tuple[int, int] | None = None
    """(H, W): the first H W tokens are a picture, row-major; any others stand beside it."""


class ZeroInitLinear(nn.Linear):
    """The last projection of a residual branch, all zero at first: what is added to x is nothing, exactly, until learned.

    A matrix of zeros learns as fast as an ordinary one, because each of its weights has a gradient of its own from the
    first step. A gate a channel behind an ordinary projection took 2 to 6 times the steps on a toy question task
    (100 against 200, with ten times the learning rate for the gates, and 580).
    """

    def reset_parameters(self) -> None:
        """All zero."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class Attention(nn.Module):
    """Queries of one width ask tokens of another: projections q, k, v to `inner` = heads x D, and out, back to `width`.

    A small `inner` keeps wide towers cheap: time and memory of the attention itself grow with it alone. `gated`: the
    projection out is a ZeroInitLinear.
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
        """Makes q and k the same projection, without changing lengths: a query looks first at what resembles it.

        For tokens of one space, which contrastive training has filled; they need not find out anew what belongs together. The
        context's first channels are those of the space.
        """
        nn.init.orthogonal_(self.q.weight)
        self.k.weight.zero_()  # what stands beside the tokens, their places, is none of it
        self.k.weight[:, : self.q.in_features].copy_(self.q.weight)

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, exact: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, Q, C), context (B, K, C'), mask (B, K) or (B, Q, K) -> (B, Q, C), and with `exact` weights (B, H, Q, K).

        Without a context, x asks itself.
        """
        keys = self.keys(Tokens(x if context is None else context, mask))
        out, weights = attend(self.queries(x), *keys.projected(), mask=over_heads(mask), exact=exact)
        return self.merge(out), weights

    def queries(self, x: Tensor) -> Tensor:
        """(B, Q, C) -> (B, H, Q, D)."""
        return self._split(self.q(x))

    def keys(self, tokens: Tokens) -> Keys:
        """What is asked, not yet projected."""
        return Keys(self, tokens)

    def merge(self, out: Tensor) -> Tensor:
        """(B, H, Q, D) -> (B, Q, C)."""
        merged: Tensor = self.out(out.transpose(1, 2).flatten(2))
        return merged

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, x.shape[2] // self.heads).transpose(1, 2)


class Keys:
    """Tokens that are asked. Projecting them is most of the cost where the queries are few, so each context decides what."""

    def __init__(self, attention: Attention, tokens: Tokens) -> None:
        self.attention = attention
        self.tokens = tokens
        self._projected: tuple[Tensor, Tensor] | None = None

    @property
    def picture(self) -> int:
        """N, the tokens on the grid; 0 without one."""
        grid = self.tokens.grid
        return grid[0] * grid[1] if grid else 0

    def project(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K, C) -> k and v (B, H, K, D)."""
        attention = self.attention
        return attention._split(attention.k(states)), attention._split(attention.v(states))

    def projected(self) -> tuple[Tensor, Tensor]:
        """k and v of all tokens, computed once."""
        if self._projected is None:
            self._projected = self.project(self.tokens.states)
        return self._projected


def over_heads(mask: Tensor | None) -> Tensor | None:
    """(B, K) -> (B, 1, 1, K); (B, Q, K) -> (B, 1, Q, K)."""
    if mask is None:
        return None
    return mask[:, None, None] if mask.dim() == 2 else mask[:, None]
