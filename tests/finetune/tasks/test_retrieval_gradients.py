"""Retrieval on two processes has the gradients and metrics of one, with both kinds of negatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from finetune import model as models
from finetune.adapt.freeze import freeze_unused
from finetune.model import FusionModel
from finetune.tasks import EvalConfig, EvalSetup, hard_negatives, retrieval
from pretrain import registry
from pretrain.data.batch import Batch
from pretrain.data.images import ImageDecoder
from pretrain.data.text import TextDecoder, load_tokenizer
from pretrain.optim import OptimConfig
from pretrain.runtime import distributed
from pretrain.strategies import build_strategy
from pretrain.training.step import derive_seed
from tests.support import Small, tiny, world

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
EXACT = {"ddp": 1e-10, "fsdp2": 1e-10, "zero2": 1e-5}
"""Largest relative error by strategy; DeepSpeed refuses float64."""
B, NEGATIVES = 8, 2


def build_model_and_task(dtype: torch.dtype) -> tuple[FusionModel, retrieval.Retrieval]:
    """Build the same weights at each call.

    Zero-initialized layers are randomized, and weights that the loss does not use are frozen as in a run.
    """
    task = retrieval.build(retrieval.Config(foils="foils", draw=NEGATIVES, contrastive=0.7, matching=1.3), None)
    model = models.build(
        tiny.build_model("clip"),
        registry.get_component("fusion", "cross").Config(layers=1, heads=2),
        None,
        tower_copies=["text"],
    )
    torch.manual_seed(1)
    model.head = task.build_head(model)
    with torch.no_grad():
        for p in [*model.fusion.parameters(), *model.head.parameters()]:  # type: ignore[union-attr]
            p.add_(0.2 * torch.randn_like(p))
    model = model.to(dtype)
    freeze_unused(model, [task.loss(task.encode(model, build_batch().slice(0, 2)), build_batch().slice(0, 2).targets)[0]])
    return model.train(), task


def build_batch() -> Batch:
    """Build a batch with equal captions, fewer negative captions and shorter texts in the second process."""
    images, negatives = tiny.build_batch(0, B), tiny.build_batch(1, B * NEGATIVES)
    text, mask = images.inputs["text"], images.masks["text"].clone()
    mask[B // 2 :, 8:] = False
    negative_mask = torch.ones(B, NEGATIVES, dtype=torch.bool)
    negative_mask[5:, 1] = negative_mask[6, 0] = False
    ids = torch.arange(B)
    ids[6] = ids[1]
    inputs = {"image": images.inputs["image"], "text": text, "foils": negatives.inputs["text"].unflatten(0, (B, NEGATIVES))}
    masks = {"text": mask, "foils": negatives.masks["text"].unflatten(0, (B, NEGATIVES))}
    return Batch(inputs, masks, images.keys, {"caption_id": ids, "negative_mask": negative_mask})


def build_local_batch() -> Batch:
    """Return this process's slice of the batch, trimmed as its loader would."""
    b = B // distributed.world_size()
    local = build_batch().slice(b * distributed.rank(), b * (distributed.rank() + 1))
    longest = int(local.masks["text"].sum(dim=1).max())
    local.inputs["text"], local.masks["text"] = local.inputs["text"][:, :longest], local.masks["text"][:, :longest]
    return local


def compute_reference() -> tuple[float, dict[str, Tensor], int]:
    """Compute loss, gradients and number of pairs in one process in float64, pair by pair."""
    model, _ = build_model_and_task(torch.float64)
    batch, head = build_batch(), model.head
    texts, text = model.tokens_and_embedding("text", batch.inputs["text"], batch.masks["text"])
    images, image = model.tokens_and_embedding("image", batch.inputs["image"])
    negative_texts, negative_embedding = model.tokens_and_embedding("text", batch.inputs["foils"], batch.masks["foils"])
    assert text is not None
    assert image is not None
    assert negative_embedding is not None

    # -- contrastive: samples with equal captions are not negatives of each other
    s = model.encoder.logit_scale.exp() * image @ text.T
    ids = batch.targets["caption_id"]
    in_softmax = (ids[:, None] != ids[None]) | torch.eye(B, dtype=torch.bool)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(B):
        total = (
            total
            - (s[i, i] - s[i][in_softmax[i]].exp().sum().log()) / 2
            - (s[i, i] - s[:, i][in_softmax[i]].exp().sum().log()) / 2
        )

    # -- matching: negative pairs are weighted by their difficulty for the embeddings
    def difficulty(negative: Tensor, positive: Tensor) -> Tensor:
        return 2 / (1 + (positive - negative).detach().exp())

    negative_logits = model.encoder.logit_scale.exp() * negative_embedding @ image.T
    torch.manual_seed(derive_seed(0, 0, 0, 0))
    first, second = hard_negatives.draw_uniform(B, 2, torch.device("cpu"))
    wrong_text, wrong_image = (
        hard_negatives.draw_negatives(s.detach(), ~in_softmax, first),
        hard_negatives.draw_negatives(s.detach().T, ~in_softmax, second),
    )

    def pick(tokens: Any, i: int) -> Any:
        return tokens._replace(states=tokens.states[i : i + 1], mask=tokens.mask[i : i + 1], pooled=tokens.pooled[i : i + 1])

    terms, weights = [], []
    for i in range(B):
        j, k = int(wrong_text.row[i]), int(wrong_image.row[i])
        pairs = [(pick(texts, i), i, None), (pick(texts, j), i, s[i, j]), (pick(texts, i), k, s[k, i])]
        pairs += [
            (pick(negative_texts, j), i, negative_logits[j, i])
            for j in range(i * NEGATIVES, (i + 1) * NEGATIVES)
            if batch.targets["negative_mask"].flatten()[j]
        ]
        for tokens, image_row, negative in pairs:
            p = head.match(model, tokens, pick(images, image_row)).sigmoid()  # type: ignore[operator]
            terms.append(-p.log() if negative is None else -(1 - p).log())
            weights.append(torch.zeros(()) if negative is None else difficulty(negative, s[i, i]))
        weights[-len(pairs)] = sum(weights[-len(pairs) :])  # a positive pair has the weight of its negatives
    value = 0.7 * total / B + 1.3 * (torch.cat(terms) * torch.stack(weights)).sum() / sum(weights)
    value.backward()
    return value.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, len(terms)


def evaluate_tiny(small: Small) -> dict[str, float]:
    """Compute the metrics of seven images, of which two processes hold three and four."""
    encoder = tiny.build_model("clip", text={"args": {"vocab_size": 512}})
    task = retrieval.build(retrieval.Config(rerank=3), None)
    model = models.build(encoder, registry.get_component("fusion", "cross").Config(layers=1, heads=2), None)
    torch.manual_seed(2)
    model.head = task.build_head(model)
    with torch.no_grad():
        for p in [*model.fusion.parameters(), *model.head.parameters()]:  # type: ignore[union-attr]
            p.add_(0.2 * torch.randn_like(p))
    decoders = {"image": ImageDecoder(16), "text": TextDecoder(load_tokenizer(small.tokenizer), tiny.LENGTH, "captions")}
    config = EvalConfig(batch_size=2, workers=0, max_samples=7)
    return task.evaluate(model, small.val, EvalSetup(task.build_decoders(decoders), torch.device("cpu"), config=config))


def measure_errors(small: Small) -> tuple[dict[str, tuple[float, str, float]], dict[str, float]]:
    """Return by strategy: worst gradient error, its parameter, error of the loss; and the metrics."""
    value, expected, _ = reference_in_world_of_one()
    results: dict[str, tuple[float, str, float]] = {}
    for name, bound in EXACT.items():
        strategy = build_strategy(name, "fp32", OptimConfig(clip_norm=0.0), torch.device("cpu"))
        model, task = build_model_and_task(torch.float64 if bound < 1e-6 else torch.float32)
        strategy.setup(model)
        strategy.model.train()
        loss, gradients = tiny.run_one_step(strategy, task, build_local_batch(), 1, (0, 0, distributed.rank()))
        where, worst = max(tiny.gradient_errors(gradients, expected).items(), key=lambda item: item[1])
        results[name] = (worst, where, abs(loss - value) / value)
    return results, evaluate_tiny(small)


def reference_in_world_of_one() -> tuple[float, dict[str, Tensor], int]:
    """Compute the reference as a single process would, inside one of two."""
    functions = distributed.world_size, distributed.rank
    distributed.world_size, distributed.rank = lambda: 1, lambda: 0
    try:
        return compute_reference()
    finally:
        distributed.world_size, distributed.rank = functions


def test_gradients_and_metrics_of_two_processes(small: Small) -> None:
    pytest.importorskip("deepspeed")
    pairs = compute_reference()[2]
    assert pairs == 3 * B + 12  # every sample has hard negatives, and there are 12 of 16 negative captions
    alone = evaluate_tiny(small)
    assert alone["captions"] > alone["samples"] == 7
    for results, metrics in world.run(measure_errors, 2, small):
        assert len(results) == len(EXACT)
        for name, (worst, where, error) in results.items():
            assert worst <= EXACT[name], (name, where, worst)
            assert error <= EXACT[name], (name, error)
        same = {name: value for name, value in metrics.items() if name != "rerank_ms"}
        assert same == pytest.approx({name: value for name, value in alone.items() if name != "rerank_ms"})
