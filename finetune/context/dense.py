"""Dense attention: every query attends to every token."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from finetune.attention.multihead import Keys, attend, broadcast_over_heads
from finetune.attention.trace import Weights
from finetune.context import Context, Queries


@dataclass
class Config:
    """Dense attention: time grows with Q x N, memory (fast path) with Q + N."""

    name: str = "dense"
    """This file."""


class Dense(Context):
    """softmax(q k^T / sqrt(D)) v over all keys."""

    def forward(self, queries: Queries, keys: Keys, exact: bool = False) -> tuple[Tensor, Weights | None]:
        """See Context."""
        out, used = attend(queries.q, *keys.project_all(), mask=broadcast_over_heads(keys.tokens.mask), exact=exact)
        return out, None if used is None else Weights(used)


def build(config: Config, width: int) -> Dense:
    """Build the context; `width` is unused, because dense attention has no parameters of its own."""
    return Dense()
