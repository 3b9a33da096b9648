"""Greedy search, beam search and nucleus sampling with any next-token model; images do not occur here.

    step(ids (n, t)) -> (n, V): log-probabilities of the token at position t; n is b, or b k with a sample's beams adjacent

A sequence ends with the token `end` or after `length` new tokens. Its score is the sum of the log-probabilities of its new
tokens, `end` included. Shapes: b = samples, t = tokens so far, V = tokens in the vocabulary, k = beams.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Step = Callable[[Tensor], Tensor]


@dataclass
class Generated:
    """The generated sequences of b samples and their scores."""

    ids: list[list[int]]
    """The new tokens of each sample, without `end`."""
    scores: Tensor
    """(b,) sums of log-probabilities."""


def greedy_search(step: Step, start: Tensor, end: int, length: int) -> Generated:
    """Append the most likely token at each position. start is (b, t) int64."""
    return _generate(step, start, end, length, lambda scores, _: scores.argmax(dim=-1))


def nucleus_sampling(
    step: Step, start: Tensor, end: int, length: int, uniform: Tensor, top_p: float = 0.9, temperature: float = 1.0
) -> Generated:
    """Sample from the nucleus: the most likely tokens whose probabilities add up to top_p.

    Source: Holtzman et al. 2020, arXiv 1904.09751.

    Args:
        step: the next-token model, see the module.
        start: (b, t) int64, the tokens that every sequence starts with.
        end: the token that ends a sequence.
        length: maximum number of new tokens.
        uniform: (b, length) numbers in [0, 1), the only source of randomness: a sample depends on its own row alone.
        top_p: total probability to sample from, above 0 and at most 1.
        temperature: divides the logits; scores are those of the model's own distribution.
    """

    def choose(scores: Tensor, t: int) -> Tensor:
        probabilities, order = nucleus_probabilities(scores / temperature, top_p).sort(dim=-1, descending=True)
        cumulative = probabilities.cumsum(dim=-1)
        position = (cumulative <= uniform[:, t, None] * cumulative[:, -1:]).sum(dim=-1, keepdim=True)
        last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1  # rounding must not choose a token of probability 0
        return order.gather(-1, torch.minimum(position, last))[:, 0]

    return _generate(step, start, end, length, choose)


def nucleus_probabilities(scores: Tensor, top_p: float) -> Tensor:
    """Turn logits (b, V) into float64 probabilities (b, V) that are 0 outside the nucleus and sum to 1."""
    probabilities, order = scores.double().softmax(dim=-1).sort(dim=-1, descending=True)
    before = probabilities.cumsum(dim=-1) - probabilities  # the token that crosses top_p still belongs to the nucleus
    probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter(-1, order, probabilities)


def _generate(step: Step, start: Tensor, end: int, length: int, choose: Callable[[Tensor, int], Tensor]) -> Generated:
    """Append one chosen token at a time until every sequence has ended."""
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
    return Generated(_tokens_before_end(ids[:, start.shape[1] :], end), total)


def beam_search(step: Step, start: Tensor, end: int, length: int, beams: int, penalty: float = 1.0) -> Generated:
    """Find the sequence with the highest score / (new tokens ** penalty) by beam search with k = `beams`.

    Each step continues the k most likely unfinished sequences; each of them that ends is a candidate. The search stops when
    no unfinished sequence can exceed the best finished one.
    """
    b, t0 = start.shape
    best = start.new_full((b,), 0).float() - torch.inf  # score over length ** penalty
    best_total = best.clone()  # the same without the penalty
    best_ids = start.new_full((b, length), end)
    ids, total = start[:, None], torch.zeros(b, 1, device=start.device)  # (b, k, t), (b, k): one beam at first
    for t in range(length):
        k = ids.shape[1]
        scores = step(ids.flatten(0, 1)).float()
        total_all = total[..., None] + scores.view(b, k, -1)  # (b, k, V)
        is_last = t == length - 1
        if is_last:
            ended, token = total_all.max(dim=-1)  # cut off here, whatever the token
        else:
            ended, token = total_all[..., end], torch.full((b, k), end, device=start.device)

        # -- the best of the sequences that end here
        ended_total, beam = ended.max(dim=1)
        value = ended_total / (t + 1) ** penalty
        better = value > best
        rows = ids[torch.arange(b, device=ids.device), beam][:, t0:]
        rows = torch.cat([rows, token.gather(1, beam[:, None])], dim=1)
        best_ids[better] = end
        best_ids[better, : t + 1] = rows[better]
        best, best_total = torch.where(better, value, best), torch.where(better, ended_total, best_total)
        if is_last:
            break

        # -- the k most likely of the unfinished sequences
        total_all[..., end] = -torch.inf
        vocabulary = total_all.shape[-1]
        total, flat = total_all.flatten(1).topk(min(beams, k * vocabulary), dim=1)
        source = (flat // vocabulary)[..., None].expand(-1, -1, ids.shape[2])
        ids = torch.cat([ids.gather(1, source), (flat % vocabulary)[..., None]], dim=2)
        bound = total.amax(dim=1) / (length**penalty if penalty > 0 else 1)  # scores only fall; lengths only grow
        if bool((bound <= best).all()):
            break
    return Generated(_tokens_before_end(best_ids, end), best_total)


def _tokens_before_end(ids: Tensor, end: int) -> list[list[int]]:
    """Cut each row before its first `end`."""
    return [row[: row.index(end)] if end in row else row for row in ids.tolist()]
