"""Every strategy gives the gradient of the whole batch, on any number of processes and chunks.

Each (strategy, processes) starts its processes once and runs all its cases: losses x chunks x tiles x precisions, and
several texts for each image; the whole grid on two processes. The reference is one process on the whole batch, with the loss in
closed form, in float64.
"""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from pretrain.data.loader import Batch
from pretrain.optim import OptimConfig
from pretrain.runtime import distributed
from pretrain.strategies import Strategy, build_strategy
from pretrain.training.step import derive_seed
from tests.support import tiny, world

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # seconds each on an idle machine, minutes on a busy one
EXACT = {"single": 1e-10, "ddp": 1e-10, "fsdp2": 1e-10, "zero1": 1e-5, "zero2": 1e-5, "zero3": 1e-5}
"""Relative error allowed under precision=fp32. ZeRO's is float32's, because DeepSpeed refuses float64."""
ROUGH = dict.fromkeys(EXACT, 5e-2)
"""Relative error allowed under precision=bf16, which has 8 bits: 4e-3 for each operation."""
FLOOR = {"fp32": 1e-3, "bf16": 2e-2}
"""Smallest norm that an error is compared with, as a fraction of the norm of the whole gradient.

Gradients whose terms cancel (a key bias's cancel to zero) keep the rounding noise of the whole gradient."""
LOSSES, CHUNKS, TILE, TEXTS = ("clip", "siglip"), (1, 2, 4), 3, 3
CPU = torch.device("cpu")
WORLDS = [("single", 1), *((name, n) for name in list(EXACT)[1:] for n in (1, 2, 4))]
"""(strategy, processes)."""


@dataclass
class CaseResult:
    """The errors of one case: of the worst gradient, of which parameter that is, and of the loss."""

    precision: str
    loss: str
    chunks: int
    tile: int
    gradient_error: float
    parameter: str
    loss_error: float


def gradients_of_one_step(
    strategy: Strategy, loss: str, chunks: int, step: int, texts: int = 1, whole: Batch | None = None, **settings: Any
) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss over all processes and the full gradients of one step with learning rate 0.

    This process encodes its own part of the batch.
    """
    b = tiny.SAMPLES // distributed.world_size()
    batch = (whole or tiny.build_batch(texts=texts)).slice(b * distributed.rank(), b * (distributed.rank() + 1))
    return tiny.run_one_step(strategy, tiny.build_objective(loss, **settings), batch, chunks, (0, step, distributed.rank()))


def start(name: str, loss: str, precision: str, **settings: Any) -> Strategy:
    """Build a strategy with the tiny model, whose matrices zero3 shards."""
    strategy = build_strategy(name, precision, OptimConfig(clip_norm=0.0), CPU)  # type: ignore[arg-type]
    strategy.persistence_threshold = 100  # type: ignore[attr-defined]
    is_double = precision == "fp32" and EXACT[name] < 1e-6
    strategy.setup(tiny.build_model(loss, torch.float64 if is_double else torch.float32, **settings))
    strategy.model.train()
    return strategy


GRID = {
    "fp32": [(chunks, *texts_and_tile) for chunks in CHUNKS for texts_and_tile in ((1, 0), (1, TILE), (TEXTS, 0))],
    "bf16": [(chunks, 1, 0) for chunks in CHUNKS],  # without tiles, because the loss itself is computed in float32
}
"""Precision -> (chunks, texts for each image, tile)."""
PART = {"fp32": [(1, 1, 0), (4, 1, TILE), (2, TEXTS, 0)], "bf16": [(2, 1, 0)]}
"""The combinations on one and on four processes: each value of the whole grid, which two processes run, occurs."""

LABELED: list[tuple[int, int, dict[str, Any]]] = [
    (1, 1, {}),
    (TEXTS, 2, {"tile": TILE}),
    (1, 2, {"tile": TILE, "exchange": "ring"}),
]
"""(texts for each image, chunks, settings) with weights and two negatives for each image (data.weight, data.negatives)."""
DISTILLED: list[tuple[int, dict[str, Any]]] = [(1, tiny.TEACHING), (2, {**tiny.TEACHING, "tile": TILE})]
"""(chunks, settings) of the distill loss, with two teachers (data.teachers)."""


def list_special_cases(loss: str) -> list[tuple[str, int, dict[str, Any], Batch]]:
    """Return (loss, chunks, settings, batch) of the cases with labels, and with teachers."""
    cases: list[tuple[str, int, dict[str, Any], Batch]] = [
        (loss, chunks, settings, tiny.label(tiny.build_batch(texts=texts + 2), 2)) for texts, chunks, settings in LABELED
    ]
    if loss == "clip":
        cases += [("distill", chunks, settings, tiny.teach(tiny.build_batch())) for chunks, settings in DISTILLED]
    return cases


def choose_special_cases(name: str, loss: str) -> list[int]:
    """Return the numbers of special cases that run here: all on two processes; on one and on four a part, of what is exact."""
    everything = list(range(len(list_special_cases(loss))))
    if distributed.world_size() == 2:
        return everything
    return [] if name.startswith("zero") else [number for number in everything if number not in (0, len(LABELED))]


@functools.cache
def compute_references() -> bytes:
    """Return {(loss, texts or "special N"): (loss, gradients)} of one process, serialized: all processes compare with them."""
    references: dict[tuple[str, int | str], tuple[float, dict[str, torch.Tensor]]] = {}
    for loss in LOSSES:
        for texts in (1, TEXTS):
            references[loss, texts] = tiny.reference_gradients(loss, tiny.build_batch(texts=texts))
        for number, (*_, batch) in enumerate(list_special_cases(loss)):
            references[loss, f"special {number}"] = tiny.reference_gradients(loss, batch)
    out = io.BytesIO()
    torch.save(references, out)
    return out.getvalue()


def run_cases(name: str, serialized: bytes) -> list[CaseResult]:
    references = torch.load(io.BytesIO(serialized))
    results = []
    for loss in LOSSES:
        for precision, combinations in (GRID if distributed.world_size() == 2 else PART).items():
            if precision == "bf16" and loss == "siglip" and distributed.world_size() != 2:
                continue  # the towers round, not the loss
            strategy = start(name, loss, precision)
            for chunks, texts, tile in combinations:
                expected_loss, expected = references[loss, texts]
                loss_value, gradients = gradients_of_one_step(strategy, loss, chunks, 0, texts, tile=tile)
                errors = tiny.gradient_errors(gradients, expected, FLOOR[precision])
                parameter, worst = max(errors.items(), key=lambda item: item[1])
                loss_error = abs(loss_value - expected_loss) / abs(expected_loss)
                results.append(CaseResult(precision, loss, chunks, tile, worst, parameter, loss_error))
            cases = list_special_cases(loss) if precision == "fp32" else []
            for number in choose_special_cases(name, loss) if cases else []:
                name_of_loss, chunks, settings, batch = cases[number]
                expected_loss, expected = references[loss, f"special {number}"]
                loss_value, gradients = gradients_of_one_step(strategy, name_of_loss, chunks, 0, whole=batch, **settings)
                parameter, worst = max(tiny.gradient_errors(gradients, expected).items(), key=lambda item: item[1])
                loss_error = abs(loss_value - expected_loss) / abs(expected_loss)
                results.append(
                    CaseResult(precision, name_of_loss, chunks, settings.get("tile", 0), worst, parameter, loss_error)
                )
    return results


@pytest.mark.parametrize(("name", "processes"), WORLDS, ids=[f"{name}-{n}" for name, n in WORLDS])
def test_gradients_are_those_of_one_process(name: str, processes: int, record_property: Any) -> None:
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    ranks = world.run(run_cases, processes, name, compute_references())
    plain, special = (len(LOSSES) * len(CHUNKS) * 4, 8) if processes == 2 else (2 * 3 + 1, 0 if name.startswith("zero") else 5)
    assert len(ranks[0]) == plain + special
    for results in ranks:
        for precision, bound in (("fp32", EXACT[name]), ("bf16", ROUGH[name])):
            cases = [case for case in results if case.precision == precision]
            worst = max(cases, key=lambda case: case.gradient_error)
            record_property(f"worst {precision}", worst.gradient_error)
            print(f"{name} on {processes}: worst gradient {precision} {worst}")
            assert worst.gradient_error <= bound, worst
            assert max(case.loss_error for case in cases) <= bound


def replicated_gradients() -> tuple[list[float], list[int]]:
    """Return the largest gradient errors under fsdp2 with two replicas, for 1 and 2 chunks, and the shape of the mesh."""
    _, expected = tiny.reference_gradients("clip", tiny.build_batch())
    strategy = build_strategy("fsdp2", "fp32", OptimConfig(clip_norm=0.0), CPU, replicas=2)
    strategy.setup(tiny.build_model("clip", torch.float64))
    strategy.model.train()
    errors = []
    for chunks in (1, 2):
        _, gradients = gradients_of_one_step(strategy, "clip", chunks, 0)
        errors.append(max(tiny.gradient_errors(gradients, expected).values()))
        strategy.optimizer.zero_grad()
    return errors, list(next(strategy.model.parameters()).device_mesh.shape)  # type: ignore[attr-defined]


def test_replicas_of_shards_have_the_same_gradients() -> None:
    for errors, mesh in world.run(replicated_gradients, 4):
        assert mesh == [2, 2]
        assert max(errors) <= EXACT["fsdp2"]


def compressed_errors() -> tuple[float, float]:
    """Return the largest gradient error of ddp with gradients sent in bf16, and without."""
    _, expected = tiny.reference_gradients("clip", tiny.build_batch())
    errors = []
    for compression in ("bf16", "none"):
        strategy = build_strategy("ddp", "fp32", OptimConfig(clip_norm=0.0), CPU, gradient_compression=compression)
        strategy.setup(tiny.build_model("clip"))
        _, gradients = gradients_of_one_step(strategy, "clip", 2, 0)
        errors.append(max(tiny.gradient_errors(gradients, expected).values()))
    return errors[0], errors[1]


def test_compressed_gradients_are_rounded_and_no_worse() -> None:
    for compressed, plain in world.run(compressed_errors, 2):
        assert 1e-4 < compressed < 2e-2  # bf16 rounds to 8 bits, 4e-3, once before and once after the sum
        assert plain < 1e-5


def rounded_gradients(name: str) -> dict[str, torch.Tensor]:
    """Return the gradients under bf16 of a model whose gains and layer scales would differ if they were rounded."""
    strategy = start(name, "clip", "bf16", image={"args": {"init_values": 0.1}})
    return gradients_of_one_step(strategy, "clip", 2, 0)[1]


def test_fsdp2_rounds_what_ddp_rounds() -> None:
    expected, gradients = (world.run(rounded_gradients, 2, name)[0] for name in ("ddp", "fsdp2"))
    assert "towers.image.model.blocks.0.ls1.gamma" in gradients
    errors = tiny.gradient_errors(gradients, expected, 1e-3)
    assert max(errors.values()) <= 1e-6, max(errors.items(), key=lambda item: item[1])


# ---------------------------------------------------------------------------------------------------------------------
# Gradients with dropout


STOCHASTIC = {
    "image": {"patch_dropout": 0.5, "args": {"proj_drop_rate": 0.2, "attn_drop_rate": 0.2, "drop_path_rate": 0.2}},
    "text": {"groups": 1, "args": {"attention_dropout": 0.2}},  # one group, so that all strategies draw the same numbers
}


def stochastic_reference(processes: int, chunks: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the gradients of one graph over all chunks of all processes, each encoded with its own seed.

    The loss is in closed form.
    """
    net = tiny.build_model("clip", dtype, **STOCHASTIC)
    batch, outputs = tiny.build_batch(), []
    b = tiny.SAMPLES // processes
    for rank in range(processes):
        for k, chunk in enumerate(batch.slice(b * rank, b * (rank + 1)).chunk(chunks)):
            torch.manual_seed(derive_seed(0, 5, rank, k))
            outputs.append(net(chunk.inputs, chunk.masks))
    features = {name: torch.cat([output[name] for output in outputs]) for name in ("image", "text")}
    tiny.closed_form_loss("clip", {**features, "logit_scale": outputs[0]["logit_scale"]}).backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def stochastic_errors(name: str) -> list[float]:
    """Return the largest gradient error for each number of chunks."""
    strategy = start(name, "clip", "fp32", **STOCHASTIC)
    dtype = torch.float64 if EXACT[name] < 1e-6 else torch.float32
    errors = []
    for chunks in CHUNKS:
        expected = stochastic_reference(distributed.world_size(), chunks, dtype)
        _, gradients = gradients_of_one_step(strategy, "clip", chunks, 5)
        errors.append(max(tiny.gradient_errors(gradients, expected).values()))
    return errors


@pytest.mark.parametrize(("name", "processes"), [("single", 1), ("ddp", 2), ("fsdp2", 2), ("zero2", 2), ("zero3", 2)])
def test_cached_equals_plain_for_the_same_seeds_with_dropout_on(name: str, processes: int) -> None:
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    for errors in world.run(stochastic_errors, processes, name):
        assert max(errors) <= 2 * EXACT[name], errors  # twice, because the reference of ZeRO is float32 too


def test_dropout_changes_the_gradients_of_that_reference() -> None:
    one_chunk, two_chunks = (stochastic_reference(1, chunks, torch.float64) for chunks in (1, 2))
    assert max(tiny.gradient_errors(one_chunk, two_chunks).values()) > 0.1


# ---------------------------------------------------------------------------------------------------------------------
# Gradients of compiled models


def compiled_errors(name: str) -> tuple[list[float], int]:
    """Return the largest gradient error for 1 and 2 chunks of a compiled model, and the number of graphs.

    The backend is "eager": generating code would take minutes.
    """
    from torch._dynamo.utils import counters

    _, expected = tiny.reference_gradients("clip", tiny.build_batch())
    strategy = start(name, "clip", "fp32")
    strategy.compile("true", backend="eager")
    errors = []
    for chunks in (1, 2):
        _, gradients = gradients_of_one_step(strategy, "clip", chunks, 0)
        errors.append(max(tiny.gradient_errors(gradients, expected).values()))
    return errors, counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2"])
def test_compiled_models_have_the_same_gradients(name: str) -> None:
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    for errors, graphs in world.run(compiled_errors, 2, name):
        assert max(errors) <= EXACT[name], errors
        assert graphs > 0
