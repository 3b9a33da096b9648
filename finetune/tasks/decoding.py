"""Sequences out of a model of the next token: greedy, beam search, nucleus sampling. Nothing here knows of pictures.

    step(ids (n, t)) -> (n, V) logarithms of probabilities of the token at t; n is b, or b k, a sample's beams in a row

A sequence ends with the token `end` or after `length` new tokens; its score is the sum of the logarithms of its new tokens,
`end` included. Shapes: b samples, t tokens so far, V tokens in the vocabulary, k beams.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Step = Callable[[Tensor], Tensor]


@dataclass
class Generated:
    """b sequences."""

    ids: list[list[int]]
    """The new tokens of each, without `end`."""
    scores: Tensor
    """(b,)."""


def greedy(step: Step, start: Tensor, end: int, length: int) -> Generated:
    """The likeliest token each time. start (b, t) int64."""
    return _grow(step, start, end, length, lambda scores, _: scores.argmax(dim=-1))


def nucleus(
    step: Step, start: Tensor, end: int, length: int, uniform: Tensor, top_p: float = 0.9, temperature: float = 1.0
) -> Generated:
    """Drawn from the likeliest tokens whose probabilities together reach top_p (Holtzman et al. 2020, arXiv 1904.09751).

    uniform (b, length) in [0, 1) is all the chance there is: a sample's sequence depends on its own row alone. Scores are
    of the model's own distribution.
    """

    def choose(scores: Tensor, t: int) -> Tensor:
        shares, order = kept(scores / temperature, top_p).sort(dim=-1, descending=True)
        upto = shares.cumsum(dim=-1)
        place = (upto <= uniform[:, t, None] * upto[:, -1:]).sum(dim=-1, keepdim=True)
        last = (shares > 0).sum(dim=-1, keepdim=True) - 1  # rounding never leads to a token of probability 0
        return order.gather(-1, torch.minimum(place, last))[:, 0]

    return _grow(step, start, end, length, choose)


def kept(scores: Tensor, top_p: float) -> Tensor:
    """(b, V) logits -> (b, V) float64 probabilities of what nucleus sampling draws from, 0 elsewhere, summing to 1."""
    shares, order = scores.double().softmax(dim=-1).sort(dim=-1, descending=True)
    before = shares.cumsum(dim=-1) - shares  # the token that crosses top_p is still in
    shares = shares.masked_fill(before >= top_p, 0.0)
    shares = shares / shares.sum(dim=-1, keepdim=True)
    return torch.zeros_like(shares).scatter(-1, order, shares)


def _grow(step: Step, start: Tensor, end: int, length: int, choose: Callable[[Tensor, int], Tensor]) -> Generated:
    """One token after the other, until every sequence has ended."""
    ids, alive = start, torch.ones(len(start), dtype=torch.bool, device=start.device)
    total: Tensor | None = None
    for t in range(length):
        scores = step(ids)
        new = choose(scores, t).masked_fill(~alive, end)
        gained = scores.gather(-1, new[:, None])[:, 0].masked_fill(~alive, 0.0)
        total = gained if total is None else total + gained
        ids = torch.cat([ids, new[:, None]], dim=1)
        alive = alive & (new != end)
        if not bool(alive.any()):
            break
    assert total is not None, "length must be at least 1"
    return Generated(_upto(ids[:, start.shape[1] :], end), total)


def beam(step: Step, start: Tensor, end: int, length: int, beams: int, penalty: float = 1.0) -> Generated:
    """The best sequence found with k beams; best by its score over (new tokens ** penalty).

    Each step continues the k likeliest unfinished sequences; every one of them that ends is a candidate. It stops when no
    unfinished one can become better than the best finished one.
    """
    b, t0 = start.shape
    best = start.new_full((b,), 0).float() - torch.inf
    raw = best.clone()
    found = start.new_full((b, length), end)
    ids, total = start[:, None], torch.zeros(b, 1, device=start.device)  # (b, k, t), (b, k): one beam at first
    for t in range(length):
        k = ids.shape[1]
        scores = step(ids.flatten(0, 1)).float()
        total_all = total[..., None] + scores.view(b, k, -1)  # (b, k, V)
        last = t == length - 1
        if last:
            ended, token = total_all.max(dim=-1)  # cut off here, whatever comes
        else:
            ended, token = total_all[..., end], torch.full((b, k), end, device=start.device)

        # -- the best of those that end here
        reached, which = ended.max(dim=1)
        value = reached / (t + 1) ** penalty
        better = value > best
        rows = ids[torch.arange(b, device=ids.device), which][:, t0:]
        rows = torch.cat([rows, token.gather(1, which[:, None])], dim=1)
        found[better] = end
        found[better, : t + 1] = rows[better]
        best, raw = torch.where(better, value, best), torch.where(better, reached, raw)
        if last:
            break

        # -- the k likeliest of those that go on
        total_all[..., end] = -torch.inf
        vocabulary = total_all.shape[-1]
        total, flat = total_all.flatten(1).topk(min(beams, k * vocabulary), dim=1)
        source = (flat // vocabulary)[..., None].expand(-1, -1, ids.shape[2])
        ids = torch.cat([ids.gather(1, source), (flat % vocabulary)[..., None]], dim=2)
        hope = total.amax(dim=1) / (length**penalty if penalty > 0 else 1)  # scores only fall; lengths only grow
        if bool((hope <= best).all()):
            break
    return Generated(_upto(found, end), raw)


def _upto(ids: Tensor, end: int) -> list[list[int]]:
    """Each row before its first `end`."""
    return [row[: row.index(end)] if end in row else row for row in ids.tolist()]
