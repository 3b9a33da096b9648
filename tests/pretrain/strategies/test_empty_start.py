"""fsdp2 starts from the weights of rank 0: the other processes build image towers on the meta device and hold shards only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pretrain.config import find_config
from pretrain.optim import OptimConfig
from pretrain.runtime import distributed
from pretrain.strategies import build_strategy, has_initial_weights
from pretrain.towers.meta_copy import is_on_meta, move_to_meta_
from pretrain.train import load_config
from pretrain.training.session import build_encoders
from tests.support import Small, read_jsonl, run_clipfuse, world

CPU = torch.device("cpu")
WIDTH, LAYERS = 2048, 16
MEGABYTES = 4 * WIDTH * WIDTH * LAYERS / 2**20


class Tall(nn.Module):
    """Many layers of 16 MB each, two small ones that share their weight, and a buffer that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))
        self.inside, self.outside = nn.Linear(5, 7), nn.Linear(5, 7)
        self.outside.weight = self.inside.weight
        self.register_buffer("positions", torch.arange(7), persistent=False)

    def clamp_(self) -> None:
        """Strategies call it after each step."""


def peak_megabytes() -> float:
    """Return the most memory that this process has held since it was last reset."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def start() -> dict[str, Any]:
    """Start fsdp2 as a run does and return what this rank sees."""
    strategy = build_strategy("fsdp2", "fp32", OptimConfig(), CPU)
    distributed.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak_megabytes()
    torch.manual_seed(3)
    with torch.device("cpu" if has_initial_weights("fsdp2") else "meta"):
        model = Tall()
    was_on_meta = is_on_meta(model)
    strategy.setup(model)
    observed = {"on meta": was_on_meta, "megabytes": peak_megabytes() - before}
    distributed.barrier()
    observed["tied"] = strategy.module.outside.weight is strategy.module.inside.weight  # type: ignore[union-attr]
    observed["positions"] = strategy.module.positions.tolist()  # type: ignore[union-attr, operator]
    observed["names"] = [name for name, _ in strategy.module.named_parameters()]
    observed["weights"] = strategy.full_weights()
    with strategy.full_model() as full:
        observed["full"] = [name for name, p in full.named_parameters() if p.is_meta]
        observed["full positions"] = full.positions.tolist()  # type: ignore[union-attr, operator]
    return observed


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is reset by Linux only")
def test_weights_are_those_of_rank_0_and_no_other_process_holds_the_model() -> None:
    torch.manual_seed(3)
    expected = Tall().state_dict()
    first, second = world.run(start, 2)
    assert (first["on meta"], second["on meta"]) == (False, True)
    assert first["megabytes"] - second["megabytes"] > 0.8 * MEGABYTES
    assert first["weights"].keys() == expected.keys()
    assert all(torch.equal(first["weights"][name], value) for name, value in expected.items())
    for observed in (first, second):
        assert observed["tied"]
        assert observed["positions"] == observed["full positions"] == list(range(7))
        assert observed["full"] == []
        assert observed["names"][LAYERS:] == ["inside.weight", "inside.bias", "outside.bias"]


def test_moving_a_model_to_the_meta_device_returns_what_it_held() -> None:
    model = Tall()
    model.layers[1].requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in [*model.state_dict().items(), *model.named_buffers()]}
    held = move_to_meta_(model)
    assert held.keys() == before.keys()
    assert all(torch.equal(held[name], tensor) for name, tensor in before.items())
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert model.outside.weight is model.inside.weight
    assert [p.requires_grad for p in model.layers.parameters()][:3] == [True, False, True]
    assert move_to_meta_(model) == {}


@pytest.mark.parametrize("config", ["scenes", "scenes-conv", "clipart-conv"])
def test_image_towers_of_shipped_configurations_build_on_the_meta_device(small: Small, config: str, in_tmp: Path) -> None:
    settings = [f"text.tokenizer={small.tokenizer}"]
    loaded = load_config(find_config(config, "pretrain"), settings)
    (_, empty), (_, full) = build_encoders(loaded, has_weights=False), build_encoders(loaded)
    image, text = empty.tower("image"), empty.tower("text")
    assert all(tensor.is_meta for tensor in [*image.parameters(), *image.buffers()])
    assert not is_on_meta(text)
    for name in ("pools_mean", "pools_max", "width", "pooled_width", "depth", "trims", "unused_parameters"):
        assert getattr(image, name) == getattr(full.tower("image"), name), name
    for built, expected in ((empty.named_parameters(), full.named_parameters()), (empty.named_buffers(), full.named_buffers())):
        assert {name: (t.shape, t.dtype, t.requires_grad) for name, t in built} == {
            name: (t.shape, t.dtype, t.requires_grad) for name, t in expected
        }


def test_runs_of_fsdp2_and_ddp_begin_alike_also_from_init_and_after_a_stop(small: Small, tmp_path: Path) -> None:
    """Losses of both: the first steps, those from `init=`, and those after a resume."""
    losses = {}
    for strategy in ("ddp", "fsdp2"):
        run = tmp_path / strategy
        shared = [f"train.strategy={strategy}", "--nproc", "2"]
        run_clipfuse("pretrain", "scenes", *small.settings(run, "train.steps=2"), *shared, cwd=tmp_path)
        run_clipfuse("pretrain", "scenes", *small.settings(run, "train.steps=4"), *shared, cwd=tmp_path)
        warm = tmp_path / f"{strategy}-warm"
        run_clipfuse(
            "pretrain", "scenes", *small.settings(warm, "train.steps=2", f"init={tmp_path / 'ddp'}"), *shared, cwd=tmp_path
        )
        losses[strategy] = [row["loss"] for folder in (run, warm) for row in read_jsonl(folder / "metrics.jsonl")]
    assert len(losses["ddp"]) == 6
    assert losses["fsdp2"] == pytest.approx(losses["ddp"], rel=1e-4)
