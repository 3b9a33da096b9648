"""Maps compared with hand-computed cases, with explicit matrices, and between equivalent contexts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.attention.trace import Trace
from finetune.explain.attribution import METHODS, compute_attention_maps, propagate_relevance, propagate_rollout
from pretrain import registry
from pretrain.errors import ConfigError
from tests.finetune.fusion.test_fusion import PAIRS, SMALL
from tests.support.attention_reference import WIDTHS, randomize_zero_init, tokens

T, P = "text", "image"


def m(*rows: list[float]) -> Tensor:
    """Return a batch of one matrix, given by its rows."""
    return torch.tensor([rows], dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# The rules of Chefer et al., two layers by hand


def test_relevance_by_hand_with_text_queries() -> None:
    """Two words, two patches. Equation numbers as in arXiv 2103.15679."""
    steps = [
        ("self", {(T, T): m([0, 1], [0, 0])}),
        # (6) R_tt = I + A = [1 1; 0 1]                                  (7) R_ti = 0
        ("cross", {(T, P): m([1, 0], [0, 2])}),
        # (8, 9) norm R_tt = I + [0 1; 0 0]/rows [1, 0] = [1 1; 0 1]
        # (10) R_ti = [1 0; 1 1][1 0; 0 2] = [1 0; 1 2]                 (11) R_tt += A R_it = 0
        ("self", {(T, T): m([0, 0], [2, 0])}),
        # (6) R_tt = [1 1; 0 1] + [0 0; 2 2] = [1 1; 2 3]               (7) R_ti = [1 0; 1 2] + [0 0; 2 0] = [1 0; 3 2]
        ("cross", {(T, P): m([0, 3], [1, 0])}),
        # (8, 9) norm R_tt = I + [0 1; 2 2]/rows [1, 4] = [1 1; .5 1.5]
        # (10) R_ti += [1 .5; 1 1.5][0 3; 1 0] = [.5 3; 1.5 3]
    ]
    R = propagate_relevance(steps)
    torch.testing.assert_close(R[T, P], m([1.5, 3], [4.5, 5]))
    torch.testing.assert_close(R[T, T], m([1, 1], [2, 3]))


def test_relevance_by_hand_with_queries_of_both_modalities() -> None:
    steps = [
        ("self", {(T, T): m([0, 1], [0, 0]), (P, P): m([0, 0], [1, 0])}),
        # R_tt = [1 1; 0 1], R_ii = [1 0; 1 1]; their norms are themselves
        ("cross", {(T, P): m([1, 0], [0, 2]), (P, T): m([0, 1], [1, 0])}),
        # (10) R_ti = [1 0; 1 1][1 0; 0 2][1 0; 1 1] = [1 0; 3 2], R_it = [1 1; 0 1][0 1; 1 0][1 1; 0 1] = [1 2; 1 1]
        # (11) adds nothing: R_it = R_ti = 0 before this step
        ("self", {(T, T): m([0, 0], [2, 0]), (P, P): m([0, 1], [0, 0])}),
        # R_tt = [1 1; 2 3], R_ti = [1 0; 5 2], R_ii = [2 1; 1 1], R_it = [2 3; 1 1]
        ("cross", {(T, P): m([0, 1], [1, 0]), (P, T): m([1, 0], [0, 1])}),
        # norm R_tt = I + [0 1; 2 2]/[1, 4] = [1 1; .5 1.5], norm R_ii = I + [1 1; 1 0]/[2, 1] = [1.5 .5; 1 1]
        # (10) R_ti += [1 .5; 1 1.5][0 1; 1 0][1.5 .5; 1 1] = [1.75 1.25; 3.25 1.75]
        #      R_it += [1.5 1; .5 1][1 1; .5 1.5] = [2 3; 1 2]
        # (11) R_tt += [0 1; 1 0][2 3; 1 1] = [1 1; 2 3], R_ii += [1 0; 5 2]
    ]
    R = propagate_relevance(steps)
    torch.testing.assert_close(R[T, P], m([2.75, 1.25], [8.25, 3.75]))
    torch.testing.assert_close(R[P, T], m([4, 6], [2, 3]))
    torch.testing.assert_close(R[T, T], m([2, 2], [4, 6]))
    torch.testing.assert_close(R[P, P], m([3, 1], [6, 3]))


def test_relevance_by_hand_in_one_stream() -> None:
    """One word, two patches: only rule (6), on the 3 x 3 matrix of all tokens."""
    steps = [
        ("joint", {(T, T): m([0]), (T, P): m([1, 0]), (P, T): m([0], [1]), (P, P): m([0, 1], [0, 0])}),
        # R = I + A = [1 1 0; 0 1 1; 1 0 1]
        ("joint", {(T, T): m([0]), (T, P): m([0, 2]), (P, T): m([0], [0]), (P, P): m([0, 0], [1, 0])}),
        # R += [0 0 2; 0 0 0; 0 1 0] R = [2 0 2; 0 0 0; 0 1 1]  ->  [3 1 2; 0 1 1; 1 1 2]
    ]
    R = propagate_relevance(steps)
    torch.testing.assert_close(R[T, P], m([1, 2]))
    torch.testing.assert_close(R[T, T], m([3]))
    torch.testing.assert_close(R[P, P], m([1, 1], [1, 2]))


# ---------------------------------------------------------------------------------------------------------------------
# Real fusions compared with matrices over all tokens


def run_fusion(
    name: str, context_name: str = "dense", settings: dict[str, Any] | None = None, **config: Any
) -> tuple[Trace, Tensor]:
    """Return the trace of a fusion with random weights, and a score (B,)."""
    torch.manual_seed(0)
    module, context_module = registry.get_component("fusion", name), registry.get_component("context", context_name)
    context = context_module.Config(**(SMALL.get(context_name, {}) if settings is None else settings))
    fusion = module.build(module.Config(**{"layers": 2, "heads": 2, "inner": 16, **config}), WIDTHS, context).double()
    randomize_zero_init(fusion)
    trace = Trace()
    fused = fusion(tokens(dtype=torch.float64), trace=trace)
    weights = torch.linspace(-1, 1, 24, dtype=torch.float64)
    return trace, (fused[T].pooled * weights).sum(dim=1)


def assemble_matrix(trace: Trace, blocks: dict[tuple[str, str], Tensor], diagonal: float) -> Tensor:
    """Join blocks into a matrix over (text, image); `diagonal` is for modalities that were no query."""
    out = torch.zeros(2, 40, 40, dtype=torch.float64)
    spans = {T: slice(0, 5), P: slice(5, 40)}
    for name in (T, P):
        if not any(s == name for s, _ in blocks):
            out[:, spans[name], spans[name]] = diagonal * torch.eye(trace.sizes[name], dtype=torch.float64)
    for (s, q), block in blocks.items():
        out[:, spans[s], spans[q]] = block
    return out


@pytest.mark.parametrize("name", registry.component_names("fusion"))
def test_rollout_is_a_product_of_matrices(name: str) -> None:
    trace, _ = run_fusion(name)
    product = torch.eye(40, dtype=torch.float64).expand(2, -1, -1)
    for step in trace.steps:
        A = assemble_matrix(trace, trace.split_matrices(step), diagonal=1.0)
        product = (0.5 * torch.eye(40, dtype=torch.float64) + 0.5 * A) @ product
    maps = compute_attention_maps(trace, "rollout")
    torch.testing.assert_close(maps.flatten(2), product[:, :5, 5:])
    total = propagate_rollout([(step.kind, trace.split_matrices(step)) for step in trace.steps])
    rows = total[T, T].sum(dim=2) + total[T, P].sum(dim=2)
    torch.testing.assert_close(rows, torch.ones_like(rows))


@pytest.mark.parametrize("name", registry.component_names("fusion"))
def test_relevance_and_gradcam_sample_by_sample(name: str) -> None:
    """Apply the published procedure to one sample, with that sample's gradients and explicit matrices."""
    trace, score = run_fusion(name)
    maps = {method: compute_attention_maps(trace, method, score).flatten(2) for method in ("relevance", "gradcam")}
    for b in (0, 1):
        cams: list[tuple[str, dict[tuple[str, str], Tensor]]] = []
        for step in trace.steps:
            blocks: dict[tuple[str, str], Tensor] = {}
            for record in step.records:
                used = record.weights.used
                (gradient,) = torch.autograd.grad(score[b], used, retain_graph=True, allow_unused=True)
                gradient = torch.zeros_like(used) if gradient is None else gradient
                cam = torch.relu(used * gradient)[b].mean(dim=0).detach()
                first = 0
                for context in record.contexts:
                    blocks[record.query, context] = cam[:, first : first + trace.sizes[context]]
                    first += trace.sizes[context]
            cams.append((step.kind, blocks))
        R = {(T, T): torch.eye(5).double(), (P, P): torch.eye(35).double()}
        R[T, P], R[P, T] = torch.zeros(5, 35).double(), torch.zeros(35, 5).double()
        for kind, A in cams:
            old = dict(R)
            for s, q in ((T, P), (P, T)):
                if kind == "joint":
                    for u in (T, P):
                        R[s, u] = old[s, u] + A[s, s] @ old[s, u] + A[s, q] @ old[q, u]
                elif (s, s) in A:
                    R[s, s], R[s, q] = old[s, s] + A[s, s] @ old[s, s], old[s, q] + A[s, s] @ old[s, q]
                elif (s, q) in A:
                    R[s, q] = old[s, q] + norm(old[s, s]).T @ A[s, q] @ norm(old[q, q])
                    R[s, s] = old[s, s] + A[s, q] @ old[q, s]
        torch.testing.assert_close(maps["relevance"][b], R[T, P])
        crossing = [A[T, P] for _, A in cams if (T, P) in A]
        torch.testing.assert_close(maps["gradcam"][b], sum(crossing) / len(crossing))


def norm(R: Tensor) -> Tensor:
    rest = R - torch.eye(len(R), dtype=R.dtype)
    sums = rest.sum(dim=1, keepdim=True)
    sums[sums == 0] = 1
    return rest / sums + torch.eye(len(R), dtype=R.dtype)


def test_raw_is_the_mean_over_heads_row_by_row_on_the_grid() -> None:
    trace, _ = run_fusion("cross")
    maps = compute_attention_maps(trace, "raw", layer=-1)
    used = trace.steps[-1].records[0].weights.used
    for row, col in ((0, 0), (1, 2), (4, 6)):
        torch.testing.assert_close(maps[:, :, row, col], used[:, :, :, 7 * row + col].mean(dim=1).detach())
    layers = [compute_attention_maps(trace, "raw", layer=i) for i in (0, 1)]
    torch.testing.assert_close(compute_attention_maps(trace, "raw"), sum(layers) / 2)


# ---------------------------------------------------------------------------------------------------------------------
# Every fusion, every context, every method


@pytest.mark.parametrize(("name", "context"), PAIRS)
@pytest.mark.parametrize("method", METHODS)
def test_every_word_has_a_map_on_the_images_grid(name: str, context: str, method: str) -> None:
    trace, score = run_fusion(name, context)
    maps = compute_attention_maps(trace, method, score)
    assert maps.shape == (2, 5, 5, 7)
    assert torch.isfinite(maps).all()
    assert (maps >= 0).all()
    assert (maps[:, 0].flatten(1).std(dim=1) > 0).all()
    assert not maps.requires_grad
    if method == "raw" and name != "merged":
        torch.testing.assert_close(maps.sum(dim=(2, 3)), torch.ones(2, 5, dtype=torch.float64))


COVERS_ALL: dict[str, dict[str, int]] = {"local": {"window": 9}, "coarse_to_fine": {"region": 2, "keep": 99}}


@pytest.mark.parametrize(("name", "context"), [pair for pair in PAIRS if pair[1] in COVERS_ALL])
def test_contexts_that_cover_every_token_have_dense_maps(name: str, context: str) -> None:
    for method in METHODS:
        (trace, score), (other, other_score) = run_fusion(name), run_fusion(name, context, COVERS_ALL[context])
        torch.testing.assert_close(
            compute_attention_maps(other, method, other_score), compute_attention_maps(trace, method, score)
        )


def test_with_image_queries_alone_a_words_map_is_the_attention_to_it() -> None:
    trace, _ = run_fusion("cross", query="image", context="text")
    raw = compute_attention_maps(trace, "raw", layer=-1)
    used = trace.steps[-1].records[0].weights.used
    torch.testing.assert_close(raw[:, :, 1, 2], used[:, :, 9].mean(dim=1).detach())
    assert compute_attention_maps(trace, "rollout").shape == (2, 5, 5, 7)


def test_several_texts_about_one_image_have_separate_maps() -> None:
    module, context_module = registry.get_component("fusion", "cross"), registry.get_component("context", "pooled")
    torch.manual_seed(0)
    fusion = module.build(module.Config(layers=2, heads=2), WIDTHS, context_module.Config(latents=4, heads=2))
    randomize_zero_init(fusion)
    texts, images = tokens(batch=4)["text"], tokens(batch=2)["image"]
    trace = Trace()
    score = fusion({"text": texts, "image": images}, trace=trace)["text"].pooled.sum(dim=1)
    together = compute_attention_maps(trace, "relevance", score)
    assert together.shape == (4, 5, 5, 7)
    text = type(texts)(texts.states[3:], texts.mask[3:], None, texts.pooled[3:])
    image = type(texts)(images.states[1:], images.mask[1:], images.grid, images.pooled[1:])
    alone = compute_attention_maps(
        trace, "relevance", fusion({"text": text, "image": image}, trace=trace)["text"].pooled.sum(dim=1)
    )
    torch.testing.assert_close(together[3:], alone, rtol=1e-4, atol=1e-5)


def test_a_frozen_fusion_has_maps() -> None:
    module = registry.get_component("fusion", "cross")
    fusion = module.build(module.Config(layers=2, heads=2), WIDTHS).eval()
    randomize_zero_init(fusion)
    fusion.requires_grad_(False)
    trace = Trace()
    score = fusion(tokens(), trace=trace)["text"].pooled.sum(dim=1)
    assert compute_attention_maps(trace, "relevance", score).sum() > 0


# ---------------------------------------------------------------------------------------------------------------------
# Refused arguments


def test_errors_name_the_wrong_argument() -> None:
    trace, score = run_fusion("cross")
    for method, wrong_score, message in (
        ("rolout", None, "did you mean 'rollout'"),
        ("gradcam", None, "need `score`"),
        ("relevance", score.detach(), "not under torch.no_grad"),
    ):
        with pytest.raises(ConfigError, match=message):
            compute_attention_maps(trace, method, wrong_score)
    with pytest.raises(ConfigError, match="no 'audio' in this trace; it has text, image"):
        compute_attention_maps(trace, "raw", text="audio")
    with pytest.raises(ConfigError, match="text has no grid"):
        compute_attention_maps(trace, "raw", text="image", image="text")
    with pytest.raises(ConfigError, match="no layer 2: the trace has 2"):
        compute_attention_maps(trace, "raw", layer=2)
    with pytest.raises(ConfigError, match="pass it to a fusion"):
        compute_attention_maps(Trace(), "raw")
