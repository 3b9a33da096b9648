"""VQA on two processes has the gradients of one process, for any strategy and number of chunks.

Also: survey() reads every training sample in exactly one process.
"""

import pytest
import torch

from finetune import model as models
from finetune.adapt.freeze import freeze_unused
from finetune.model import FusionModel
from finetune.tasks import survey, vqa
from pretrain import registry
from pretrain.data.batch import Batch
from pretrain.optim import OptimConfig
from pretrain.runtime import distributed
from pretrain.strategies import build_strategy
from tests.support import Small, tiny, world

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
EXACT = {"ddp": 1e-10, "fsdp2": 1e-10, "zero2": 1e-5}
"""Largest relative error by strategy; DeepSpeed refuses float64."""
ANSWERS, M, B = ["red", "blue", "two", "yes"], 3, 8


def build_model_and_task(dtype: torch.dtype) -> tuple[FusionModel, vqa.VQA]:
    """Build the same weights at each call.

    Zero-initialized layers are randomized, and weights that the loss does not use are frozen as in a run.
    """
    task = vqa.build(vqa.Config(answers=ANSWERS), None)
    model = models.build(tiny.build_model("clip"), registry.get_component("fusion", "cross").Config(layers=1, heads=2), None)
    torch.manual_seed(1)
    model.head = task.build_head(model)
    with torch.no_grad():
        for p in [*model.fusion.parameters(), *model.head.parameters()]:  # type: ignore[union-attr]
            p.add_(0.2 * torch.randn_like(p))
    model = model.to(dtype)
    small = build_batch().slice(0, 2)
    freeze_unused(model, [task.loss(task.encode(model, small), small.targets)[0]])
    return model.train(), task


def build_batch() -> Batch:
    """Build a batch of which two processes hold 4 and 12 questions: one per image, then three."""
    images, texts = tiny.build_batch(0, B), tiny.build_batch(1, B * M)
    g = torch.Generator().manual_seed(5)
    question_mask = torch.ones(B, M)
    question_mask[: B // 2, 1:] = 0
    answers = torch.zeros(B, M, 10, dtype=torch.int64)
    answers[..., 0] = torch.randint(0, len(ANSWERS), (B, M), generator=g)
    scores = torch.zeros(B, M, 10)
    scores[..., 0] = torch.rand(B, M, generator=g) * question_mask
    return Batch(
        {"image": images.inputs["image"], "text": texts.inputs["text"].unflatten(0, (B, M))},
        {"text": texts.masks["text"].unflatten(0, (B, M))},
        images.keys,
        {"answers": answers, "scores": scores, "question_mask": question_mask},
    )


def compute_reference() -> tuple[float, dict[str, torch.Tensor]]:
    """Compute loss and gradients in one process in float64, question by question."""
    model, _ = build_model_and_task(torch.float64)
    b = build_batch()
    logits = model(b.inputs, b.masks, {})["logits"]
    terms = []
    for i in range(B):
        for j in range(M):
            if b.targets["question_mask"][i, j]:
                p = logits[i, j].exp() / logits[i, j].exp().sum()
                terms.append(-b.targets["scores"][i, j, 0].double() * p[b.targets["answers"][i, j, 0]].log())
    value = torch.stack(terms).mean()
    value.backward()
    return value.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def survey_and_measure(shards: list[str]) -> tuple[list[tuple[str, int]], dict[str, tuple[float, str, float]]]:
    return [(values["split"], values["index"]) for values in survey(shards)], measure_errors()


def measure_errors() -> dict[str, tuple[float, str, float]]:
    """Return by strategy and chunks: worst gradient error, its parameter, error of the loss."""
    value, expected = compute_reference()
    share = B // distributed.world_size()
    local = build_batch().slice(share * distributed.rank(), share * (distributed.rank() + 1))
    results: dict[str, tuple[float, str, float]] = {}
    for name, bound in EXACT.items():
        strategy = build_strategy(name, "fp32", OptimConfig(clip_norm=0.0), torch.device("cpu"))
        model, task = build_model_and_task(torch.float64 if bound < 1e-6 else torch.float32)
        strategy.setup(model)
        strategy.model.train()
        for chunks in (1, 2):
            loss, gradients = tiny.run_one_step(strategy, task, local, chunks, (0, 0, distributed.rank()))
            where, worst = max(tiny.gradient_errors(gradients, expected).items(), key=lambda item: item[1])
            results[f"{name} {chunks}"] = (worst, where, abs(loss - value) / value)
    return results


def test_gradients_of_two_processes_with_unequal_numbers_of_questions(small: Small) -> None:
    pytest.importorskip("deepspeed")
    ranks = world.run(survey_and_measure, 2, [small.train, small.val])
    assert len(ranks[0][0]) == len(ranks[1][0])
    assert sorted(ranks[0][0] + ranks[1][0]) == [("train", i) for i in range(300)] + [("val", i) for i in range(64)]
    for _, results in ranks:
        assert len(results) == 2 * len(EXACT)
        for cell, (worst, where, error) in results.items():
            bound = EXACT[cell.split()[0]]
            assert worst <= bound, (cell, where, worst)
            assert error <= bound, (cell, error)
