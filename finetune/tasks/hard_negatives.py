"""Hard negatives: a similar but wrong caption for each image, and such an image for each caption.

One negative per row is drawn from the softmax of the contrastive similarities over the batch of all processes (ALBEF,
arXiv 2107.07651, section 3.2). Known positives (the same sample, the same caption) are masked BEFORE the softmax. A row
without any negative is marked and given itself, so that shapes never depend on the data.

A draw is one uniform number per row. It does not depend on the number of processes, so that a step on several processes
equals the step of one.

Shapes: b = rows of this process, B = b * world size, I = ids per sample, N = tokens, C = width of a token, q = requested rows.
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
from pretrain.runtime.device_copy import copy_async
from pretrain.towers import TokenSequence


class Negatives(NamedTuple):
    """One negative for each row of this process."""

    row: Tensor
    """(b,) int64: index of the negative among the B rows; the row's own index where it has no negative."""
    valid: Tensor
    """(b,) bool: whether the row has a negative."""
    logit_margin: Tensor
    """(b,): contrastive logit of the negative minus that of the row's own pair."""


def draw_negatives(similarity: Tensor, positives: Tensor, draw: Tensor, offset: int = 0) -> Negatives:
    """Draw a negative for each row from the softmax over all columns that are not positives.

    Args:
        similarity: (b, B) logits as in the contrastive softmax, scale included. No gradient flows through it.
        positives: (b, B) bool, True where the column is not a negative. A row's own column never is one.
        draw: (b,) uniform in [0, 1).
        offset: the column that belongs to the first row.
    """
    with torch.no_grad():
        own_column = torch.arange(len(similarity), device=similarity.device) + offset
        positives = positives.scatter(1, own_column[:, None], True)
        valid = ~positives.all(dim=1)
        logits = similarity.double().nan_to_num(0.0, 0.0, 0.0).masked_fill(positives, -math.inf)
        logits = torch.where(valid[:, None], logits, 0.0)  # the softmax of a row of -inf would be NaN
        cumulative = logits.softmax(dim=1).cumsum(dim=1)
        # The first column whose cumulative probability exceeds the draw has a probability above zero: it is not masked.
        # Draws have fewer bits than the sums, so that the product stays below the last of them.
        drawn = torch.searchsorted(cumulative, draw.float().double()[:, None] * cumulative[:, -1:], right=True)[:, 0]
        row = torch.where(valid, drawn.clamp(max=positives.shape[1] - 1), own_column)
        negative, positive = (similarity.gather(1, column[:, None])[:, 0] for column in (row, own_column))
        return Negatives(row, valid, negative - positive)


def shares_id(ids: Tensor) -> Tensor:
    """Return (b, B) bool: whether a local sample shares an id with a sample of any process. Collective.

    `ids` are the ids (b, I) int64 of the local samples.
    """
    all_ids = distributed.gather_without_grad(ids)
    return (ids[:, None] == all_ids[None]).any(dim=2)


def draw_uniform(b: int, count: int, device: torch.device) -> list[Tensor]:
    """Draw `count` tensors (b,) uniform in [0, 1), slices of numbers common to all processes. Collective.

    They follow from rank 0's generator, which a step seeds with its number: another world size draws the same numbers.
    """
    seed = distributed.gather_without_grad(torch.randint(1 << 62, (1,)))[0]
    generator = torch.Generator().manual_seed(int(seed))
    numbers = torch.rand(count, b * distributed.world_size(), generator=generator)
    local = numbers[:, distributed.rank() * b : (distributed.rank() + 1) * b]
    return list(copy_async(local, device))


def hash_sample_ids(keys: Sequence[str], caption_id: Tensor) -> Tensor:
    """Return ids (b, 2) int64: a hash of each sample's key, and the id of its caption.

    The key's hash makes a sample that a batch holds twice a positive of itself.
    """
    digests = [hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest() for key in keys]
    key_ids = torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests], dtype=torch.int64)
    return torch.stack([copy_async(key_ids, caption_id.device), caption_id], dim=1)


def fetch_tokens(tokens: TokenSequence, row: Tensor) -> TokenSequence:
    """Fetch the tokens (q, N, C) of rows (q,) among all B, with gradient; only these are sent. Collective.

    `tokens` are the local ones (b, N, C); N must be the same on every process.
    """
    states, mask, pooled = distributed.gather_rows([tokens.states, tokens.mask, tokens.pooled], row)
    return tokens._replace(states=states, mask=mask, pooled=pooled)


def max_token_count(tokens: TokenSequence) -> int:
    """Return the largest N of all processes, to which a batch in one process would be padded. Collective."""
    return int(distributed.maximum(torch.tensor(tokens.states.shape[1])))


def pad_tokens(tokens: TokenSequence, length: int) -> TokenSequence:
    """Pad (b, N, C) to (b, length, C): `fetch_tokens` needs texts of equal length on every process."""
    missing = length - tokens.states.shape[1]
    if not missing:
        return tokens
    return tokens._replace(states=F.pad(tokens.states, (0, 0, 0, missing)), mask=F.pad(tokens.mask, (0, missing), value=False))
