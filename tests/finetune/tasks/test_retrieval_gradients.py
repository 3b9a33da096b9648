"""Retrieval on two processes: the gradient of one process on the whole batch, mined negatives, foils and all; its figures."""

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
"""DeepSpeed asserts on float64."""
B, FOILS = 8, 2


def built(dtype: torch.dtype) -> tuple[FusionModel, retrieval.Retrieval]:
    """The same weights at each call, gates open; what the loss never reaches is frozen, as a run does it."""
    task = retrieval.build(retrieval.Config(foils="foils", draw=FOILS, contrastive=0.7, matching=1.3), None)
    model = models.build(
        tiny.build_model("clip"), registry.get_component("fusion", "cross").Config(layers=1, heads=2), None, forks=["text"]
    )
    torch.manual_seed(1)
    model.head = task.build_head(model)
    with torch.no_grad():
        for p in [*model.fusion.parameters(), *model.head.parameters()]:  # type: ignore[union-attr]
            p.add_(0.2 * torch.randn_like(p))
    model = model.to(dtype)
    freeze_unused(model, [task.loss(task.encode(model, whole().slice(0, 2)), whole().slice(0, 2).targets)[0]])
    return model.train(), task


def whole() -> Batch:
    """Two captions are equal, in two processes; the second process has fewer foils, and shorter texts."""
    pictures, foils = tiny.build_batch(0, B), tiny.build_batch(1, B * FOILS)
    text, mask = pictures.inputs["text"], pictures.masks["text"].clone()
    mask[B // 2 :, 8:] = False
    foiled = torch.ones(B, FOILS, dtype=torch.bool)
    foiled[5:, 1] = foiled[6, 0] = False
    ids = torch.arange(B)
    ids[6] = ids[1]
    inputs = {"image": pictures.inputs["image"], "text": text, "foils": foils.inputs["text"].unflatten(0, (B, FOILS))}
    masks = {"text": mask, "foils": foils.masks["text"].unflatten(0, (B, FOILS))}
    return Batch(inputs, masks, pictures.keys, {"caption_id": ids, "negative_mask": foiled})


def share() -> Batch:
    """This process's part, trimmed as its loader would."""
    b = B // distributed.world_size()
    mine = whole().slice(b * distributed.rank(), b * (distributed.rank() + 1))
    longest = int(mine.masks["text"].sum(dim=1).max())
    mine.inputs["text"], mine.masks["text"] = mine.inputs["text"][:, :longest], mine.masks["text"][:, :longest]
    return mine


def reference() -> tuple[float, dict[str, Tensor], int]:
    """One process, float64, pair by pair; the number of pairs too."""
    model, _ = built(torch.float64)
    batch, head = whole(), model.head
    texts, text = model.tokens_and_embedding("text", batch.inputs["text"], batch.masks["text"])
    images, image = model.tokens_and_embedding("image", batch.inputs["image"])
    foils, foil = model.tokens_and_embedding("text", batch.inputs["foils"], batch.masks["foils"])
    assert text is not None
    assert image is not None
    assert foil is not None

    # -- contrastive: equal captions are no negatives
    s = model.encoder.logit_scale.exp() * image @ text.T
    ids = batch.targets["caption_id"]
    kept = (ids[:, None] != ids[None]) | torch.eye(B, dtype=torch.bool)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(B):
        total = total - (s[i, i] - s[i][kept[i]].exp().sum().log()) / 2 - (s[i, i] - s[:, i][kept[i]].exp().sum().log()) / 2

    # -- matching: a wrong pair counts as far as embeddings take it for the right one
    def open_to(wrong: Tensor, right: Tensor) -> Tensor:
        return 2 / (1 + (right - wrong).detach().exp())

    near = model.encoder.logit_scale.exp() * foil @ image.T
    torch.manual_seed(derive_seed(0, 0, 0, 0))
    first, second = hard_negatives.draw_uniform(B, 2, torch.device("cpu"))
    forth, back = (
        hard_negatives.draw_negatives(s.detach(), ~kept, first),
        hard_negatives.draw_negatives(s.detach().T, ~kept, second),
    )

    def pick(tokens: Any, i: int) -> Any:
        return tokens._replace(states=tokens.states[i : i + 1], mask=tokens.mask[i : i + 1], pooled=tokens.pooled[i : i + 1])

    terms, weights = [], []
    for i in range(B):
        caption, picture = int(forth.row[i]), int(back.row[i])
        pairs = [(pick(texts, i), i, None), (pick(texts, caption), i, s[i, caption]), (pick(texts, i), picture, s[picture, i])]
        pairs += [
            (pick(foils, j), i, near[j, i])
            for j in range(i * FOILS, (i + 1) * FOILS)
            if batch.targets["negative_mask"].flatten()[j]
        ]
        for words, asked, wrong in pairs:
            p = head.match(model, words, pick(images, asked)).sigmoid()  # type: ignore[operator]
            terms.append(-p.log() if wrong is None else -(1 - p).log())
            weights.append(torch.zeros(()) if wrong is None else open_to(wrong, s[i, i]))
        weights[-len(pairs)] = sum(weights[-len(pairs) :])  # a right pair counts as much as its wrong ones together
    value = 0.7 * total / B + 1.3 * (torch.cat(terms) * torch.stack(weights)).sum() / sum(weights)
    value.backward()
    return value.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, len(terms)


def searched(small: Small) -> dict[str, float]:
    """The figures of search over seven pictures: two processes hold three and four."""
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


def cells(small: Small) -> tuple[dict[str, tuple[float, str, float]], dict[str, float]]:
    """strategy -> worst gradient, where, error of the loss; and the figures of search."""
    value, expected, _ = reference_alone()
    found: dict[str, tuple[float, str, float]] = {}
    for word, bound in EXACT.items():
        strategy = build_strategy(word, "fp32", OptimConfig(clip_norm=0.0), torch.device("cpu"))
        model, task = built(torch.float64 if bound < 1e-6 else torch.float32)
        strategy.setup(model)
        strategy.model.train()
        loss, got = tiny.run_one_step(strategy, task, share(), 1, (0, 0, distributed.rank()))
        where, worst = max(tiny.gradient_errors(got, expected).items(), key=lambda item: item[1])
        found[word] = (worst, where, abs(loss - value) / value)
    return found, searched(small)


def reference_alone() -> tuple[float, dict[str, Tensor], int]:
    """The reference as a world of one computes it, inside one of two."""
    kept = distributed.world_size, distributed.rank
    distributed.world_size, distributed.rank = lambda: 1, lambda: 0
    try:
        return reference()
    finally:
        distributed.world_size, distributed.rank = kept


def test_gradients_and_search_of_two_processes(small: Small) -> None:
    pytest.importorskip("deepspeed")
    pairs = reference()[2]
    assert pairs == 3 * B + 12  # every sample found negatives; 12 foils of 16 are there
    alone = searched(small)
    assert alone["captions"] > alone["samples"] == 7
    for found, figures in world.run(cells, 2, small):
        assert len(found) == len(EXACT)
        for word, (worst, where, error) in found.items():
            assert worst <= EXACT[word], (word, where, worst)
            assert error <= EXACT[word], (word, error)
        same = {name: value for name, value in figures.items() if name != "rerank_ms"}
        assert same == pytest.approx({name: value for name, value in alone.items() if name != "rerank_ms"})
