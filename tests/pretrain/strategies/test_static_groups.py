"""Gradients are those of one process on the whole batch where each process encodes its texts in groups, or packed.

The texts of one process fit its groups, those of another do not: it encodes the same groups at greater lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from pretrain.data.batch import Batch
from pretrain.data.length_groups import LengthGroups, RowGroups
from pretrain.data.text_packing import PackedTexts, TextPacking
from pretrain.optim import OptimConfig
from pretrain.runtime import distributed
from pretrain.strategies import build_strategy
from tests.support import tiny, world

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
EXACT = {"single": 1e-10, "ddp": 1e-10, "fsdp2": 1e-10, "zero2": 1e-5, "zero3": 1e-5}
"""Relative error allowed. ZeRO's is float32's, because DeepSpeed refuses float64."""
HISTOGRAM = (0, 0, 0, 40, 60, 50, 30, 10, 5, 3, 2, 1, 1)
SHAPES = {"static": LengthGroups(HISTOGRAM, 4, group_cost=0), "packed": TextPacking(HISTOGRAM)}


@dataclass
class CaseResult:
    """The number of chunks and of texts a sample, which lengths the groups had, and the largest error of a gradient."""

    shapes: str
    chunks: int
    texts: int
    fits: list[str]
    passes: int
    error: float


def build_batch(texts: int) -> Batch:
    """Build a batch whose second half has longer texts than the groups are for."""
    batch = tiny.build_batch(texts=texts)
    lengths = torch.randint(3, 6, (tiny.SAMPLES, texts), generator=torch.Generator().manual_seed(0))
    lengths[tiny.SAMPLES // 2 :] = tiny.LENGTH
    mask = (torch.arange(tiny.LENGTH) < lengths[..., None]).reshape(batch.inputs["text"].shape)
    batch.masks["text"] = mask
    return batch


def describe_fit(groups: RowGroups | PackedTexts) -> str:
    """Return "fits" or "longest"."""
    if isinstance(groups, RowGroups):
        return groups.fit
    usual, _, most = groups.source.row_counts(len(groups.row_lengths))
    return {usual: "fits", most: "longest"}[groups.tokens.shape[1]]


def run_cases(name: str) -> list[CaseResult]:
    strategy = build_strategy(name, "fp32", OptimConfig(clip_norm=0.0), torch.device("cpu"))  # type: ignore[arg-type]
    strategy.persistence_threshold = 100  # type: ignore[attr-defined]
    strategy.setup(tiny.build_model("clip", torch.float64 if EXACT[name] < 1e-6 else torch.float32))
    strategy.model.train()
    results, passes = [], 0

    def count_pass(*_: Any) -> None:
        nonlocal passes
        passes += 1

    strategy.module.get_submodule("towers.text.model").register_forward_hook(count_pass)
    references = {texts: tiny.reference_gradients("clip", build_batch(texts))[1] for texts in (1, 3)}
    for shapes, texts in (("static", 1), ("static", 3), ("packed", 1), ("packed", 3)):
        whole, expected = build_batch(texts), references[texts]
        b = tiny.SAMPLES // distributed.world_size()
        batch = whole.slice(b * distributed.rank(), b * (distributed.rank() + 1))
        batch.groups["text"] = SHAPES[shapes].assign(batch.masks["text"].sum(dim=-1).flatten().numpy())
        for chunks in (1, 2):
            passes = 0
            objective = tiny.build_objective("clip")
            _, gradients = tiny.run_one_step(strategy, objective, batch, chunks, (0, 0, distributed.rank()))
            error = max(tiny.gradient_errors(gradients, expected).values())
            fits = [describe_fit(chunk.groups["text"]) for chunk in batch.chunk(chunks)]
            results.append(CaseResult(shapes, chunks, texts, fits, passes, error))
    return results


@pytest.mark.parametrize(("name", "processes"), [("single", 1), ("ddp", 2), ("fsdp2", 2), ("zero2", 2), ("zero3", 2)])
def test_gradients_of_groups_are_those_of_one_process(name: str, processes: int) -> None:
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    ranks = world.run(run_cases, processes, name)
    for results in ranks:
        for result in results:
            assert result.error <= EXACT[name], result
            forwards = 1 if result.chunks == 1 else 2 * result.chunks
            assert result.passes == forwards if result.shapes == "packed" else result.passes > forwards, result
    for cases in zip(*ranks, strict=True):
        assert len({case.passes for case in cases}) == 1  # the same on every process, so that none waits for another
    if processes == 2:
        assert all(set(result.fits) == {"fits"} for result in ranks[0])
        assert all(set(result.fits) == {"longest"} for result in ranks[1])


def graphs_of_compiled_blocks(shapes: str) -> list[int]:
    """Return the number of graphs after each of six steps on batches of different lengths, and after one of longest texts."""
    from torch._dynamo.utils import counters

    strategy = build_strategy("single", "fp32", OptimConfig(), torch.device("cpu"))
    strategy.setup(tiny.build_model("clip"))
    strategy.compile(backend="aot_eager")
    counts = []
    for step in range(8):
        batch = tiny.build_batch(step)
        lengths = torch.randint(3, 6, (tiny.SAMPLES,), generator=torch.Generator().manual_seed(step))
        lengths[step] = tiny.LENGTH
        if step > 5:
            lengths[:] = tiny.LENGTH
        batch.masks["text"] = torch.arange(tiny.LENGTH) < lengths[:, None]
        batch.groups["text"] = SHAPES[shapes].assign(lengths.numpy())
        assert describe_fit(batch.groups["text"]) == ("fits" if step < 6 else "longest")
        tiny.run_one_step(strategy, tiny.build_objective("clip"), batch, 1, (0, step, 0))
        counts.append(counters["stats"]["unique_graphs"])
    return counts


@pytest.mark.parametrize("shapes", list(SHAPES))
def test_compiled_blocks_have_no_more_graphs_after_the_first_step(shapes: str) -> None:
    (counts,) = world.run(graphs_of_compiled_blocks, 1, shapes)
    text_graphs = len(SHAPES[shapes].shapes(tiny.SAMPLES)) if shapes == "static" else 1  # type: ignore[attr-defined]
    assert counts[:6] == [1 + text_graphs] * 6  # and one of the image tower
    assert counts[6] == counts[7] > counts[5]
