"""Attribution: a fusion's trace -> one map per text token, (B, T, H, W) on the image's grid.

    trace = Trace()
    fused = fusion(tokens, trace=trace)
    maps = compute_attention_maps(trace, "relevance", score=head(fused))

raw          attention weights as they are
rollout      weights multiplied through the layers, with an identity for half of each (Abnar & Zuidema, arXiv 2005.00928)
gradcam      weights times their gradient, where the product is positive (ALBEF, arXiv 2107.07651)
relevance    the same products, propagated by the bi-modal rules of Chefer, Gur & Wolf (arXiv 2103.15679)

All methods start at the tokens that leave the towers; each image token stands for its own patch. Values are as the formulas
give them: not normalized, comparable within one map. May import attention/trace.py and pretrain.errors.
Shapes: B samples, T tokens of text, N = H W tokens of the image, Q and K tokens of any two modalities s and u.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from finetune.attention.trace import Step, Trace
from pretrain.errors import ConfigError, closest

Pair = tuple[str, str]
Blocks = dict[Pair, Tensor]
"""(s, u) -> (B, Q, K): the blocks of a matrix over the tokens of all modalities, split by modality."""

METHODS: tuple[str, ...] = ("raw", "rollout", "gradcam", "relevance")


def compute_attention_maps(
    trace: Trace,
    method: str = "relevance",
    score: Tensor | None = None,
    text: str = "text",
    image: str = "image",
    layer: int | None = None,
) -> Tensor:
    """Compute (B, T, H, W): for each token of `text` a map over the cells of `image`.

    Where only the image tokens were queries (cross with query=image), a word's map is the attention of the patches to it.

    Args:
        trace: filled by one forward pass of a fusion.
        method: one of METHODS.
        score: the value to explain (a matching logit, an answer's logit), (B,) or its sum over B, with its graph. gradcam
            and relevance need it; they run one backward pass and keep the graph.
        text: the modality whose tokens get maps.
        image: the modality over whose grid the maps are.
        layer: one layer for raw and gradcam, -1 the last; None averages them.

    Raises:
        ConfigError: a wrong method, layer or modality, or no score where the method needs one.
    """
    if method not in METHODS:
        raise ConfigError(f"no map method {method!r}{closest(method, list(METHODS))}; the choices are {', '.join(METHODS)}")
    grid = _get_grid(trace, text, image)
    if method in ("raw", "rollout"):
        steps = [(step.kind, trace.split_matrices(step)) for step in trace.steps]
    else:
        transform = _build_gradient_weighting(trace, score, method)
        steps = [(step.kind, trace.split_matrices(step, transform)) for step in trace.steps]
    if method in ("raw", "gradcam"):
        maps = _average_layers(trace.steps, [blocks for _, blocks in steps], text, image, layer)
    else:
        flow = propagate_rollout(steps) if method == "rollout" else propagate_relevance(steps)
        maps = flow[text, image] if (text, image) in flow else flow[image, text].transpose(1, 2)
    return maps.detach().reshape(*maps.shape[:2], *grid)


# ---------------------------------------------------------------------------------------------------------------------
# One layer


def _average_layers(steps: list[Step], blocks: list[Blocks], text: str, image: str, layer: int | None) -> Tensor:
    """Return (B, T, N): attention between `text` and `image`, of one layer or the mean over layers."""
    by_layer: dict[int, Tensor] = {}
    for step, matrices in zip(steps, blocks, strict=True):
        if (text, image) in matrices:
            by_layer[step.layer] = matrices[text, image]
        elif (image, text) in matrices:
            by_layer[step.layer] = matrices[image, text].transpose(1, 2)
    if layer is None:
        return torch.stack(list(by_layer.values())).mean(dim=0)
    if not -len(by_layer) <= layer < len(by_layer):
        raise ConfigError(f"no layer {layer}: the trace has {len(by_layer)}, counted from 0, or backwards from -1")
    return list(by_layer.values())[layer]


# ---------------------------------------------------------------------------------------------------------------------
# All layers. R[s, u] is how much each token of u contributes to each token of s. At first R[s, s] = I and all else is 0.
# Such blocks are not stored: a missing R[s, s] is the identity, as for a modality whose tokens are never queries.


def propagate_rollout(steps: Iterable[tuple[str, Blocks]]) -> Blocks:
    """Compute R <- (R + A R) / 2 step by step, for the rows of the modalities that are queries."""
    R: Blocks = {}
    for _, A in steps:
        new = {}
        for s in _query_modalities(A):
            for u in _all_modalities(A, R):
                new[s, u] = (_materialize_block(R, s, u, A) + _multiply_row(A, R, s, u)) / 2
        R.update(new)
    return R


def propagate_relevance(steps: Iterable[tuple[str, Blocks]]) -> Blocks:
    """Apply the rules of Chefer et al., with their numbers; A is the head mean of (weights x gradients)+.

    self and joint:  R[s, u] += A[s, s] R[s, u]            (6, 7; joint: over all modalities in the softmax)
    cross, s to q:   R[s, q] += norm(R[s, s])^T A norm(R[q, q])         (10)
                     R[s, s] += A R[q, s]                               (11)
    norm keeps the identity in R and scales the rows of the rest to sum to 1 (8, 9). Attentions of the same step read the
    same R.
    """
    R: Blocks = {}
    for kind, A in steps:
        new: Blocks = {}
        for s in _query_modalities(A):
            if kind != "cross":
                for u in _all_modalities(A, R):
                    new[s, u] = _materialize_block(R, s, u, A) + _multiply_row(A, R, s, u)
                continue
            (q,) = (q for query, q in A if query == s)
            norms = {(name, name): _normalize_rows(R[name, name]) for name in (s, q) if (name, name) in R}
            from_s = norms[s, s].transpose(1, 2) @ A[s, q] if (s, s) in R else A[s, q]
            new[s, q] = _materialize_block(R, s, q, A) + _multiply_block(from_s, norms, q, q)
            new[s, s] = _materialize_block(R, s, s, A) + _multiply_block(A[s, q], R, q, s)
        R.update(new)
    return R


def _query_modalities(A: Blocks) -> list[str]:
    return list(dict.fromkeys(s for s, _ in A))


def _all_modalities(A: Blocks, R: Blocks) -> list[str]:
    return list(dict.fromkeys(name for pair in (*A, *R) for name in pair))


def _multiply_row(A: Blocks, R: Blocks, s: str, u: str) -> Tensor | float:
    """Return (A R)[s, u]: the sum over the modalities that s attends to."""
    return sum(_multiply_block(A[s, p], R, p, u) for query, p in A if query == s)


def _multiply_block(M: Tensor, R: Blocks, p: str, u: str) -> Tensor | float:
    """Return M R[p, u], without building an identity (N x N for an image that is never a query) or zeros."""
    if (p, u) in R:
        return M @ R[p, u]
    return M if p == u else 0.0


def _materialize_block(R: Blocks, s: str, u: str, A: Blocks) -> Tensor:
    """Return R[s, u] as a tensor, also where it is an identity or zero and not stored."""
    if (s, u) in R:
        return R[s, u]
    sizes = {}
    for (a, b), matrix in (*A.items(), *R.items()):
        sizes[a], sizes[b] = matrix.shape[1:]
    like = next(iter(A.values()))
    if s == u:
        return torch.eye(sizes[s], dtype=like.dtype, device=like.device).expand(len(like), -1, -1)
    return like.new_zeros(len(like), sizes[s], sizes[u])


def _normalize_rows(R: Tensor) -> Tensor:
    """Return I + (R - I) / row sums; a row of R - I that sums to 0 becomes 0."""
    eye = torch.eye(R.shape[1], dtype=R.dtype, device=R.device)
    rest = R - eye
    total = rest.sum(dim=2, keepdim=True)
    return eye + torch.where(total == 0, 0.0, rest / total.masked_fill(total == 0, 1.0))


# ---------------------------------------------------------------------------------------------------------------------
# Reading a trace


def _get_grid(trace: Trace, text: str, image: str) -> tuple[int, int]:
    for name in (text, image):
        if name not in trace.sizes:
            raise ConfigError(f"no {name!r} in this trace; it has {', '.join(trace.sizes) or 'nothing: pass it to a fusion'}")
    grid = trace.grids[image]
    if grid is None:
        raise ConfigError(f"{image} has no grid to draw a map on (patch dropout breaks it: use eval mode)")
    return grid


def _build_gradient_weighting(trace: Trace, score: Tensor | None, method: str) -> Callable[[Tensor], Tensor]:
    """Return the function that maps each weights tensor of the trace to (weights x its gradient)+."""
    if score is None:
        raise ConfigError(f"{method} maps need `score`, the value to explain; raw and rollout do not")
    if not score.requires_grad:
        raise ConfigError(f"{method} maps need a score computed with gradients on, not under torch.no_grad()")
    tensors = trace.list_tensors()
    computed = torch.autograd.grad(score.sum(), tensors, retain_graph=True, allow_unused=True)
    gradients = {id(t): g for t, g in zip(tensors, computed, strict=True)}

    def transform(t: Tensor) -> Tensor:
        gradient = gradients[id(t)]  # None: the score does not depend on it
        return torch.zeros_like(t) if gradient is None else (t * gradient).clamp(min=0).detach()

    return transform
