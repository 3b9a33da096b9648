"""Compiled models: one set of graphs for all batches, blocks that are alike share them, evaluation compiles nothing."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from pretrain import train as trainer
from pretrain.config import find_config
from pretrain.data.loader import Batch
from pretrain.optim import OptimConfig
from pretrain.registry import get_component
from pretrain.strategies import Strategy, build_strategy
from pretrain.strategies.blocks import MODES, find_compiled
from pretrain.towers import TokenSequence, Tower
from pretrain.training.objective import Contrastive
from pretrain.training.step import train_step
from tests.support import Small, read_losses, run_clipfuse, tiny, world

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch itself hides it where warnings are no errors
CPU = torch.device("cpu")
SIGLIP = "text.args={model_type: siglip_text_model, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2}"
TOWERS = {"clip": ["loss.name=clip"], "siglip": ["loss.name=siglip", SIGLIP]}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # torch would run the block eagerly without a word
        yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def build_components(small: Small, run: Path, *more: str) -> tuple[trainer.Components, list[Batch]]:
    """Build a run's components, and its first six batches."""
    config = trainer.load_config(
        find_config("scenes", "pretrain"), small.settings(run, "train.steps=6", "text.length=64", "data.batch_size=4", *more)
    )
    components = trainer.build(config)
    batches = iter(components.loader)
    return components, [next(batches) for _ in range(6)]


def start(model: nn.Module, word: str = "true") -> Strategy:
    """Build a strategy with a compiled model. The backend is "aot_eager": generating code would take minutes."""
    strategy = build_strategy("single", "fp32", OptimConfig(), CPU)
    strategy.setup(model)
    strategy.compile(word, backend="aot_eager")
    strategy.model.train()
    return strategy


@pytest.mark.parametrize("loss", TOWERS)
def test_six_batches_of_texts_of_all_lengths_need_the_graphs_of_the_first(small: Small, tmp_path: Path, loss: str) -> None:
    _, uncompiled = build_components(small, tmp_path / "run", *TOWERS[loss])
    assert len({batch.inputs["text"].shape for batch in uncompiled}) > 1  # what compiling must not see
    components, batches = build_components(small, tmp_path / "run", *TOWERS[loss], "train.compile=true")
    strategy = start(components.model)
    objective = Contrastive(get_component("losses", loss).build(get_component("losses", loss).Config()))
    counts = []
    for number, batch in enumerate(batches):
        train_step(strategy, objective, batch, 1, 1e-3, (0, number, 0))
        counts.append(graphs())
    assert counts == [2] * 6  # the two blocks of a tower share one graph
    for number, batch in enumerate(batches):
        train_step(strategy, objective, batch, 2, 1e-3, (0, number, 0))
        counts.append(graphs())
    assert counts[6:] == [6] * 6  # smaller chunks, with and without gradient


def test_evaluation_compiles_nothing() -> None:
    model = tiny.build_model("clip")
    reference = tiny.build_model("clip")
    strategy = start(model)
    tiny.run_one_step(strategy, tiny.build_objective("clip"), tiny.build_batch(), 1, (0, 0, 0))
    before, batch = graphs(), tiny.build_batch(1).slice(0, 5)
    assert before > 0
    with strategy.full_model() as evaluated, torch.inference_mode():
        out = evaluated.eval()(batch.inputs, batch.masks)
        expected = reference.eval()(batch.inputs, batch.masks)
    assert graphs() == before
    torch.testing.assert_close(out["text"], expected["text"])


def test_blocks_that_differ_have_a_graph_each_and_none_is_given_up() -> None:
    """Each of twelve blocks has its own rate of drop path; torch's own limit is eight graphs."""
    strategy = start(tiny.build_model("clip", image={"args": {"depth": 12, "drop_path_rate": 0.2}}))
    tiny.run_one_step(strategy, tiny.build_objective("clip"), tiny.build_batch(), 1, (0, 0, 0))
    assert graphs() == 12 + 1


def count_sharded_graphs(precision: str) -> int:
    """Return the graphs that a step of fsdp2 compiles."""
    strategy = build_strategy("fsdp2", precision, OptimConfig(), CPU)
    strategy.setup(tiny.build_model("clip", image={"args": {"init_values": 0.1}}))
    strategy.compile("true", backend="aot_eager")
    strategy.model.train()
    tiny.run_one_step(strategy, tiny.build_objective("clip"), tiny.build_batch(), 1, (0, 0, 0))
    return graphs()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_sharded_block_is_one_graph_in_every_precision(precision: str) -> None:
    assert world.run(count_sharded_graphs, 1, precision) == [2]  # a graph for each tower, as without sharding


class Plain(Tower):
    """A tower without blocks."""

    modality = "image"

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> TokenSequence:
        pooled = self.second(self.first(inputs).relu())
        return TokenSequence(pooled[:, None], torch.ones(len(pooled), 1, dtype=torch.bool), None, pooled)


def test_what_is_compiled_are_blocks_or_else_whole_towers() -> None:
    model = tiny.build_model("clip")
    names = [type(module).__name__ for module in find_compiled(model)]
    assert names == ["Block", "Block", "CLIPEncoderLayer", "CLIPEncoderLayer"]
    tower = Plain()
    head = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))  # single operations gain nothing
    assert find_compiled(nn.ModuleDict({"tower": tower, "head": head})) == [tower]


def test_modes_are_torch_s_and_only_reduce_overhead_records_cuda_graphs() -> None:
    options = torch._inductor.list_mode_options()
    recording = {word for word, mode in MODES.items() if options[mode].get("triton.cudagraphs")}
    assert recording == {"reduce-overhead"}
    box = importlib.import_module("torch._inductor.cudagraph_trees").MarkStepBox
    for word, is_marked in (("true", False), ("reduce-overhead", True)):
        strategy, before = start(tiny.build_model("clip"), word), box.mark_step_counter
        tiny.run_one_step(strategy, tiny.build_objective("clip"), tiny.build_batch(), 1, (0, 0, 0))
        assert (box.mark_step_counter != before) == is_marked


@pytest.mark.parametrize("value", ["true", "false", "default", "max-autotune", "reduce-overhead"])
def test_each_word_is_read_from_files_and_saved(tmp_path: Path, small: Small, value: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"base: {find_config('scenes', 'pretrain')}\ntrain: {{compile: {value}}}\n")
    config = trainer.load_config(path, small.settings(tmp_path / "run", "train.steps=1"))
    assert config.train.compile == value
    trainer.configuration.save(config, tmp_path / "saved.yaml")
    assert trainer.load_config(tmp_path / "saved.yaml", []).train.compile == value


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("word", ["true", "reduce-overhead", "max-autotune"])
def test_on_a_gpu_compiled_losses_are_those_of_the_eager_model(small: Small, tmp_path: Path, word: str) -> None:
    losses = []
    more = ["train.steps=6", "train.eval_every=3", f"data.val={small.val}", "eval.workers=0", "performance.tf32=false"]
    for chunks in (1, 2):
        for compiled in ("false", word):
            run = tmp_path / f"{compiled}-{chunks}"
            settings = small.settings(run, *more, f"train.compile={compiled}", f"train.chunks={chunks}")
            run_clipfuse("pretrain", "scenes", *settings, cwd=tmp_path, timeout=400)
            losses.append(read_losses(run))
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-3)
