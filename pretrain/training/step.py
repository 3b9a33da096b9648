"""One optimizer step: plain, or cached.

The cached step (GradCache, Gao et al. 2021) computes the gradient of the whole batch while it holds the activations of one
chunk only:

    1. Encode every chunk without a graph.
    2. Compute the loss ONCE, on all features, and keep d loss / d features.
    3. Encode each chunk again, with a graph and the same seed, and backpropagate its rows of that gradient.

The gradient of scalars (logit_scale, logit_bias) is backpropagated once, with the last chunk. That chunk is also the only one
whose backward pass synchronizes processes.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from pretrain.data.loader import Batch
from pretrain.strategies import Strategy
from pretrain.training.objective import SCALARS, Features, Objective


def derive_seed(*numbers: int) -> int:
    """Return a 63-bit seed from (seed, step, rank, chunk), so that no generator state is ever saved."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed torch's generators of the CPU and of `device`.

    torch.manual_seed would also note the seed, with the call stack as text, for every kind of device that is not there.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def train_step(
    strategy: Strategy, objective: Objective, batch: Batch, chunks: int, lr: float, seeds: tuple[int, int, int]
) -> dict[str, Tensor]:
    """Take one step on this process's part of the global batch. The host does not wait for a GPU.

    batch: on the strategy's device; one that lies elsewhere is copied first. seeds: (seed, step, rank). Returns device
    tensors: loss, grad_norm, skipped, and what the objective reports.
    """
    strategy.begin_step()
    batch = batch.to(strategy.device, non_blocking=True)
    if chunks == 1:
        with strategy.sync_gradients(True):
            loss, report = objective.loss(_encode(strategy, objective, batch, (*seeds, 0)), batch.targets)
            strategy.backward(loss)
    else:
        loss, report = _backward_cached(strategy, objective, batch, chunks, seeds)
    applied = strategy.apply(lr)
    return {"loss": loss.detach(), "grad_norm": applied.grad_norm, "skipped": applied.skipped, **report}


def _encode(strategy: Strategy, objective: Objective, chunk: Batch, seeds: tuple[int, ...]) -> Features:
    """Seed torch from (seed, step, rank, chunk) and encode a chunk under autocast."""
    seed_generators(derive_seed(*seeds), strategy.device)
    with strategy.autocast():
        return objective.encode(strategy.model, chunk)


def _backward_cached(
    strategy: Strategy, objective: Objective, batch: Batch, count: int, seeds: tuple[int, int, int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run forward and backward passes over `count` chunks, which are views of the batch; return its loss and report."""
    # -- encode every chunk, without a graph
    chunks: list[Batch] = []
    chunk_features: list[Features] = []
    with torch.no_grad():
        for k, chunk in enumerate(batch.iterate_chunks(count)):
            chunks.append(chunk)
            chunk_features.append(_encode(strategy, objective, chunk, (*seeds, k)))
    features = {
        name: (
            chunk_features[0][name] if name in SCALARS else torch.cat([values[name] for values in chunk_features])
        ).requires_grad_()
        for name in chunk_features[0]
    }

    # -- the loss of the whole batch, once
    loss, report = objective.loss(features, batch.targets)
    names = list(features)
    grads = dict(zip(names, torch.autograd.grad(loss, [features[name] for name in names], allow_unused=True), strict=True))

    # -- encode each chunk again, with a graph, and backpropagate its rows of the gradient
    begin = 0
    for k, chunk in enumerate(chunks):
        is_last = k == len(chunks) - 1
        with strategy.sync_gradients(is_last):
            features_again = _encode(strategy, objective, chunk, (*seeds, k))
            terms = []
            for name, value in features_again.items():
                grad = grads[name]
                if grad is None:
                    continue
                if name in SCALARS:
                    # Zero for all but the last chunk, yet in the graph: every parameter takes part in every backward pass.
                    terms.append((value * grad * float(is_last)).sum())
                else:
                    terms.append((value * grad[begin : begin + len(chunk)]).sum())
            strategy.backward(torch.stack(terms).sum())
        begin += len(chunk)
    return loss, report
