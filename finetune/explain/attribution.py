"""What each word looked at: a fusion's trace -> one map a token, (B, T, H, W) on the picture's own grid.

    trace = Trace()
    fused = fusion(tokens, trace=trace)
    maps = attention_maps(trace, "relevance", score=head(fused))

raw          attention weights as they are
rollout      weights multiplied through the layers, half of each layer passing by (Abnar & Zuidema, arXiv 2005.00928)
gradcam      weights times the positive part of their gradient (ALBEF, arXiv 2107.07651)
relevance    the same products, propagated by the bi-modal rules of Chefer, Gur & Wolf (arXiv 2103.15679)

All start at the tokens that the towers gave, each of which counts as its own patch. Values are as the formulae give
them: not normalised, comparable within one map. May import trace.py and pretrain.config.
Shapes: B samples, T tokens of text, N = H W tokens of the picture, Q and K tokens of any two modalities s and u.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from finetune.attention.trace import Step, Trace
from pretrain.errors import ConfigError, closest

Pair = tuple[str, str]
Blocks = dict[Pair, Tensor]
"""(s, u) -> (B, Q, K): a matrix over the tokens of all modalities, cut by modality."""

METHODS: tuple[str, ...] = ("raw", "rollout", "gradcam", "relevance")


def attention_maps(
    trace: Trace,
    method: str = "relevance",
    score: Tensor | None = None,
    text: str = "text",
    image: str = "image",
    layer: int | None = None,
) -> Tensor:
    """(B, T, H, W): a row for each token of `text`, a map over the cells of `image`.

    `score` is what is to be explained, (B,) or a sum over B (a matching logit, an answer's logit), with its graph:
    gradcam and relevance need it, and read it in one backward pass that leaves the graph in place. `layer` picks one
    for raw and gradcam, -1 the last; None averages them. Where only the picture asked (cross with query=image), a
    word's map is what the patches gave to that word. Raises ConfigError for a wrong method, layer or modality.
    """
    if method not in METHODS:
        raise ConfigError(f"no map method {method!r}{closest(method, list(METHODS))}; the choices are {', '.join(METHODS)}")
    grid = _grid(trace, text, image)
    if method in ("raw", "rollout"):
        steps = [(step.kind, trace.blocks(step)) for step in trace.steps]
    else:
        weigh = _positive_products(trace, score, method)
        steps = [(step.kind, trace.blocks(step, weigh)) for step in trace.steps]
    if method in ("raw", "gradcam"):
        maps = _mean(trace.steps, [blocks for _, blocks in steps], text, image, layer)
    else:
        flow = rollout(steps) if method == "rollout" else relevance(steps)
        maps = flow[text, image] if (text, image) in flow else flow[image, text].transpose(1, 2)
    return maps.detach().reshape(*maps.shape[:2], *grid)


# ---------------------------------------------------------------------------------------------------------------------
# One layer


def _mean(steps: list[Step], blocks: list[Blocks], text: str, image: str, layer: int | None) -> Tensor:
    """(B, T, N): the mean over the layers in which one asked the other, or one of them."""
    found: dict[int, Tensor] = {}
    for step, matrices in zip(steps, blocks, strict=True):
        if (text, image) in matrices:
            found[step.layer] = matrices[text, image]
        elif (image, text) in matrices:
            found[step.layer] = matrices[image, text].transpose(1, 2)
    if layer is None:
        return torch.stack(list(found.values())).mean(dim=0)
    if not -len(found) <= layer < len(found):
        raise ConfigError(f"no layer {layer}: the trace has {len(found)}, from 0, or from -1 backwards")
    return list(found.values())[layer]


# ---------------------------------------------------------------------------------------------------------------------
# All layers: R[s, u] says how much of each token of u is in each token of s. Nobody is in anybody at first: R[s, s] = I,
# and stays so, unwritten, for a modality that never asks.


def rollout(steps: Iterable[tuple[str, Blocks]]) -> Blocks:
    """R <- (R + A R) / 2 for those who ask, step by step."""
    R: Blocks = {}
    for _, A in steps:
        new = {}
        for s in _askers(A):
            for u in _names(A, R):
                new[s, u] = (_block(R, s, u, A) + _through(A, R, s, u)) / 2
        R.update(new)
    return R


def relevance(steps: Iterable[tuple[str, Blocks]]) -> Blocks:
    """The rules of Chefer et al., numbered as there; A is the head mean of the positive part of weights x gradients.

    self and joint:  R[s, u] += A[s, s] R[s, u]            (6, 7; joint: over all modalities in the softmax)
    cross, s asks q: R[s, q] += norm(R[s, s])^T A norm(R[q, q])         (10)
                     R[s, s] += A R[q, s]                               (11)
    norm leaves the identity in R and makes the rows of the rest sum to 1 (8, 9). What was added at once reads the
    same R.
    """
    R: Blocks = {}
    for kind, A in steps:
        new: Blocks = {}
        for s in _askers(A):
            if kind != "cross":
                for u in _names(A, R):
                    new[s, u] = _block(R, s, u, A) + _through(A, R, s, u)
                continue
            (q,) = (q for query, q in A if query == s)
            norms = {(name, name): _normalised(R[name, name]) for name in (s, q) if (name, name) in R}
            from_s = norms[s, s].transpose(1, 2) @ A[s, q] if (s, s) in R else A[s, q]
            new[s, q] = _block(R, s, q, A) + _after(from_s, norms, q, q)
            new[s, s] = _block(R, s, s, A) + _after(A[s, q], R, q, s)
        R.update(new)
    return R


def _askers(A: Blocks) -> list[str]:
    return list(dict.fromkeys(s for s, _ in A))


def _names(A: Blocks, R: Blocks) -> list[str]:
    return list(dict.fromkeys(name for pair in (*A, *R) for name in pair))


def _through(A: Blocks, R: Blocks, s: str, u: str) -> Tensor | float:
    """(A R)[s, u]: the sum over everybody whom s asks."""
    return sum(_after(A[s, p], R, p, u) for query, p in A if query == s)


def _after(M: Tensor, R: Blocks, p: str, u: str) -> Tensor | float:
    """M R[p, u], without writing out an identity (N x N for a picture that never asks) or a zero."""
    if (p, u) in R:
        return M @ R[p, u]
    return M if p == u else 0.0


def _block(R: Blocks, s: str, u: str, A: Blocks) -> Tensor:
    """R[s, u], written out."""
    if (s, u) in R:
        return R[s, u]
    sizes = {}
    for (a, b), matrix in (*A.items(), *R.items()):
        sizes[a], sizes[b] = matrix.shape[1:]
    like = next(iter(A.values()))
    if s == u:
        return torch.eye(sizes[s], dtype=like.dtype, device=like.device).expand(len(like), -1, -1)
    return like.new_zeros(len(like), sizes[s], sizes[u])


def _normalised(R: Tensor) -> Tensor:
    """I + (R - I) with its rows summing to 1; a row without anything stays 0."""
    eye = torch.eye(R.shape[1], dtype=R.dtype, device=R.device)
    rest = R - eye
    total = rest.sum(dim=2, keepdim=True)
    return eye + torch.where(total == 0, 0.0, rest / total.masked_fill(total == 0, 1.0))


# ---------------------------------------------------------------------------------------------------------------------
# What is asked of a trace


def _grid(trace: Trace, text: str, image: str) -> tuple[int, int]:
    for name in (text, image):
        if name not in trace.sizes:
            raise ConfigError(f"no {name!r} in this trace; it has {', '.join(trace.sizes) or 'nothing: hand it to a fusion'}")
    grid = trace.grids[image]
    if grid is None:
        raise ConfigError(f"{image} has no grid to draw a map on (patch dropout breaks it: use eval mode)")
    return grid


def _positive_products(trace: Trace, score: Tensor | None, method: str) -> Callable[[Tensor], Tensor]:
    """used -> (used x its gradient)+, for every weights tensor of the trace."""
    if score is None:
        raise ConfigError(f"{method} maps need `score`, the value to explain; raw and rollout do without")
    if not score.requires_grad:
        raise ConfigError(f"{method} maps need a score computed with gradients on, not under torch.no_grad()")
    used = trace.tensors()
    found = torch.autograd.grad(score.sum(), used, retain_graph=True, allow_unused=True)
    gradients = {id(t): g for t, g in zip(used, found, strict=True)}

    def weigh(t: Tensor) -> Tensor:
        gradient = gradients[id(t)]  # None: the score does not depend on it
        return torch.zeros_like(t) if gradient is None else (t * gradient).clamp(min=0).detach()

    return weigh
