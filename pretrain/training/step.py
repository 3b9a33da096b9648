"""One optimizer step: plain, or cached.

The cached step (GradCache, Gao et al. 2021) gives the gradient of the whole batch while only one chunk's activations are
ever held: encode every chunk without a graph, compute the loss ONCE on all features, keep d loss / d features, then encode
each chunk again with a graph and its own seed and push its share of that gradient through. The scalars' gradient is
pushed once, with the last chunk, which is also the only one whose backward pass synchronises processes.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from pretrain.data.loader import Batch
from pretrain.strategies import Strategy
from pretrain.training.objective import SCALARS, Features, Objective


def seed_of(*numbers: int) -> int:
    """A 63-bit seed from (seed, step, rank, chunk): no generator state is ever saved."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def train_step(
    strategy: Strategy, objective: Objective, batch: Batch, chunks: int, lr: float, seeds: tuple[int, int, int]
) -> dict[str, Tensor]:
    """One step on this process's share of the global batch, which lies on the host.

    seeds: (seed, step, rank). Returns device tensors: loss, grad_norm, skipped and what the objective reports.
    """
    if chunks == 1:
        batch = batch.to(strategy.device)
        with strategy.sync(True):
            loss, report = objective.loss(_encode(strategy, objective, batch, (*seeds, 0)), batch.targets)
            strategy.backward(loss)
    else:
        loss, report = _cached(strategy, objective, batch, chunks, seeds)
    applied = strategy.apply(lr)
    return {"loss": loss.detach(), "grad_norm": applied.grad_norm, "skipped": applied.skipped, **report}


def _encode(strategy: Strategy, objective: Objective, chunk: Batch, seeds: tuple[int, ...]) -> Features:
    torch.manual_seed(seed_of(*seeds))
    with strategy.autocast():
        return objective.encode(strategy.model, chunk)


def _cached(
    strategy: Strategy, objective: Objective, batch: Batch, count: int, seeds: tuple[int, int, int]
) -> tuple[Tensor, dict[str, Tensor]]:
    chunks = batch.chunks(count)
    # -- every chunk's features, no graph
    parts: list[Features] = []
    with torch.no_grad():
        for k, chunk in enumerate(chunks):
            parts.append(_encode(strategy, objective, chunk.to(strategy.device), (*seeds, k)))
    features = {
        name: (parts[0][name] if name in SCALARS else torch.cat([part[name] for part in parts])).requires_grad_()
        for name in parts[0]
    }

    # -- the loss of the whole batch, once
    targets = {name: v.to(strategy.device) if isinstance(v, Tensor) else v for name, v in batch.targets.items()}
    loss, report = objective.loss(features, targets)
    names = list(features)
    grads = dict(zip(names, torch.autograd.grad(loss, [features[name] for name in names], allow_unused=True), strict=True))

    # -- replay each chunk with its share of the gradient
    begin = 0
    for k, chunk in enumerate(chunks):
        last = k == len(chunks) - 1
        with strategy.sync(last):
            replayed = _encode(strategy, objective, chunk.to(strategy.device), (*seeds, k))
            terms = []
            for name, value in replayed.items():
                grad = grads[name]
                if grad is None:
                    continue
                if name in SCALARS:
                    # Zero for all but the last chunk, yet in the graph: every parameter takes part in every backward.
                    terms.append((value * grad * float(last)).sum())
                else:
                    terms.append((value * grad[begin : begin + len(chunk)]).sum())
            strategy.backward(torch.stack(terms).sum())
        begin += len(chunk)
    return loss, report
