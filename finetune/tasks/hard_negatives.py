"""Hard negatives: for each picture a caption that is like its own and is not, for each caption such a picture.

Drawn from the softmax of the contrastive similarities over the whole batch, across processes (ALBEF, arXiv 2107.07651,
section 3.2), one for each row. What is known to be right (the same sample, the same caption) is masked BEFORE the softmax;
a row that is left with nothing is marked and given itself, so that shapes never depend on the data.

A draw is one uniform number a row, the same whatever the number of processes, so that a step on several is the step of one.
Shapes: b = rows of this process, B = b * world, I = ids a sample, N = tokens, C = width of a token.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.runtime import distributed
from pretrain.towers import TokenSequence


class Negatives(NamedTuple):
    """One negative for each local row."""

    row: Tensor
    """(b,) int64: which of the B rows; the row itself where there is none."""
    valid: Tensor
    """(b,) bool: whether there is one."""
    ahead: Tensor
    """(b,): its logit less that of the row itself."""


def mine(similarity: Tensor, same: Tensor, draw: Tensor, offset: int = 0) -> Negatives:
    """A negative for each row, the likelier the more similar it is.

    Args:
        similarity: (b, B) logits: what the contrastive softmax sees, scale included. No gradient goes through it.
        same: (b, B) bool, True where the column is no negative. A row's own column never is.
        draw: (b,) uniform in [0, 1).
        offset: the column that belongs to the first row.
    """
    with torch.no_grad():
        own = torch.arange(len(similarity), device=similarity.device) + offset
        same = same.scatter(1, own[:, None], True)
        valid = ~same.all(dim=1)
        logits = similarity.double().nan_to_num(0.0, 0.0, 0.0).masked_fill(same, -math.inf)
        logits = torch.where(valid[:, None], logits, 0.0)  # a row of -inf would be a row of NaN
        below = logits.softmax(dim=1).cumsum(dim=1)
        # The first column whose cumulated share lies above the draw: its own share is above zero, so it is not masked.
        # Draws have fewer bits than the sums, so that the product stays below the last of them.
        drawn = torch.searchsorted(below, draw.float().double()[:, None] * below[:, -1:], right=True)[:, 0]
        row = torch.where(valid, drawn.clamp(max=same.shape[1] - 1), own)
        chosen, right = (similarity.gather(1, which[:, None])[:, 0] for which in (row, own))
        return Negatives(row, valid, chosen - right)


def same_ids(ids: Tensor) -> Tensor:
    """(b, I) int64, the ids of local samples -> (b, B) bool: which samples of all processes share any of them. Collective."""
    everyone = distributed.gather_without_grad(ids)
    return (ids[:, None] == everyone[None]).any(dim=2)


@torch.compiler.disable
def draws(b: int, count: int, device: torch.device) -> list[Tensor]:
    """`count` tensors (b,) uniform in [0, 1): this process's part of numbers that all processes have in common. Collective.

    They follow from rank 0's generator, which a step seeds with its number: another world draws the same ones.
    """
    seed = distributed.gather_without_grad(torch.randint(1 << 62, (1,)))[0]
    generator = torch.Generator().manual_seed(int(seed))
    every = torch.rand(count, b * distributed.world_size(), generator=generator)
    mine = every[:, distributed.rank() * b : (distributed.rank() + 1) * b]
    return list(mine.to(device))


def sample_ids(keys: Sequence[str], caption_id: Tensor) -> Tensor:
    """(b, 2) int64: a hash of each sample's key (a batch may hold a sample twice), and that of its caption."""
    hashed = [hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest() for key in keys]
    own = torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in hashed], dtype=torch.int64)
    return torch.stack([own.to(caption_id.device), caption_id], dim=1)


@torch.compiler.disable
def fetch(tokens: TokenSequence, row: Tensor) -> TokenSequence:
    """(b, N, C), (q,) rows of all B -> (q, N, C), with gradient: only these travel. N is the same everywhere. Collective."""
    states, mask, pooled = distributed.gather_rows([tokens.states, tokens.mask, tokens.pooled], row)
    return tokens._replace(states=states, mask=mask, pooled=pooled)


@torch.compiler.disable
def longest(tokens: TokenSequence) -> int:
    """N of the process that has most: what a batch in one process would be padded to. Collective."""
    return int(distributed.maximum(torch.tensor(tokens.states.shape[1])))


def padded(tokens: TokenSequence, length: int) -> TokenSequence:
    """(b, N, C) -> (b, length, C): what `fetch` needs of words."""
    more = length - tokens.states.shape[1]
    if not more:
        return tokens
    return tokens._replace(states=F.pad(tokens.states, (0, 0, 0, more)), mask=F.pad(tokens.mask, (0, more), value=False))
