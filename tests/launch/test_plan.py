"""clipfuse plan against measured runs, closed forms, and torch's own counts."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import cli, plan
from launch.plan.footprint import Footprint
from pretrain.checkpoints.loading import load_model
from pretrain.errors import ConfigError
from pretrain.strategies import STRATEGIES
from tests.bench import plan as bench
from tests.support import Small, world
from tests.support.launches import clipfuse_command, start_launcher

MODEL = plan.ModelSize(
    total=1_000_000, trainable=900_000, buffers=100, block=50_000, root=200_000, modalities=2,
    footprint=Footprint(activations=(1000.0, 500.0), with_gradients=(1000.0, 600.0)),
    flops=3e9,
)  # fmt: skip


def config(*settings: str) -> Any:
    return bench.load_configuration(["data.batch_size=64", *settings])


# ---------------------------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", bench.QUICK)
def test_memory_is_what_a_run_takes(name: str) -> None:
    """Peak of two training steps by torch's profiler, whose events are the allocator's own."""
    processes, settings = bench.CASES[name]
    found = world.run(bench.measure, processes, settings)[0]["measured_mib"]
    assert bench.estimate(settings, processes) == pytest.approx(found, rel=0.1)


def test_the_pass_without_contents_counts_a_known_network() -> None:
    """One linear layer and a ReLU: weights' gradients, the layer's output (kept by the ReLU), and its gradient at the peak."""
    from launch.plan.footprint import measure_footprint
    from pretrain.data.batch import Batch

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(100, 1000, bias=False)

        def forward(self, inputs: dict[str, Any], masks: dict[str, Any]) -> dict[str, Any]:
            return {"x": torch.relu(self.layer(inputs["x"]))}

    foot = measure_footprint(Net(), Batch({"x": torch.zeros(1, 100)}, {}, ["a"]), None)
    row = 4 * 1000  # one sample's output
    # relu(y) lives on, y does not; in the backward pass the gradient of relu(y), given, and that of y live beside it
    assert foot.activations[1] == 3 * row
    assert foot.at(10, gradients=True) - foot.at(10) == pytest.approx(0, abs=4 * 100 * 1000)


def test_strategies_spread_what_they_say() -> None:
    """At 10 processes, in bytes: what DeepSpeed's paper (Rajbhandari et al., arXiv:1910.02054, figure 1) spreads."""
    built = {word: plan.estimate(config(f"train.strategy={word}"), MODEL, 10).memory for word in STRATEGIES if word != "single"}
    P, T = 4 * MODEL.total, 4 * MODEL.trainable
    assert {word: parts["optimizer"] for word, parts in built.items()} == {
        "ddp": 2 * T, "fsdp2": 2 * T // 10, "zero1": 2 * T // 10, "zero2": 2 * T // 10, "zero3": 2 * T // 10,
    }  # fmt: skip
    assert built["ddp"]["gradients"] == built["zero1"]["gradients"] == T
    assert built["ddp"]["weights"] == P + MODEL.buffers
    assert built["fsdp2"]["weights"] < P < built["zero1"]["weights"]
    for parts in built.values():
        assert parts["activations"] == 1000 + 500 * 6  # 64 // 10 samples at once


def test_chunks_lower_activations_only() -> None:
    whole, parts = (plan.estimate(config("train.strategy=ddp", f"train.chunks={k}"), MODEL, 4) for k in (1, 4))
    assert (whole.share, parts.share) == (16, 16)
    assert whole.memory["activations"] == 1000 + 16 * 500
    assert parts.memory["activations"] == 1000 + 4 * 500
    assert {k: v for k, v in whole.memory.items() if k != "activations"} == {
        k: v for k, v in parts.memory.items() if k != "activations"
    }
    assert parts.flops == pytest.approx(whole.flops * 4 / 3)  # the second forward pass


def test_two_whole_batches_lie_on_the_device_whatever_the_number_of_chunks() -> None:
    for chunks in (1, 4):
        model = replace(MODEL, sample=150_528)  # an image of 224 px
        memory = plan.estimate(config("train.strategy=ddp", f"train.chunks={chunks}"), model, 4).memory
        assert memory["batches"] == 2 * (64 // 4) * 3 * 224 * 224


# ---------------------------------------------------------------------------------------------------------------------
# Network


def test_network_is_what_rings_send() -> None:
    ddp = plan.estimate(config("train.strategy=ddp"), MODEL, 4).network
    assert ddp["gradients"] == round(2 * 3 / 4 * 4 * MODEL.trainable)  # all-reduce
    assert ddp["weights"] == 0
    assert ddp["features"] == round(2 * 3 / 4 * 64 * 192 * 2 * 4)  # two modalities there, gradients back
    fsdp = plan.estimate(config("train.strategy=fsdp2"), MODEL, 4).network
    assert fsdp["gradients"] == round(3 / 4 * 4 * MODEL.trainable)  # reduce-scatter
    assert fsdp["weights"] == round(2 * 3 / 4 * 4 * MODEL.total)  # gathered forward and backward
    low = plan.estimate(config("train.strategy=fsdp2", "train.precision=bf16"), MODEL, 4).network
    assert low["weights"] == round(2 * 3 / 4 * (2 * (MODEL.total - MODEL.root) + 4 * MODEL.root))
    assert plan.estimate(config("train.strategy=single"), MODEL, 1).network == {"gradients": 0, "weights": 0, "features": 0}
    chunked = plan.estimate(config("train.strategy=fsdp2", "train.chunks=4"), MODEL, 4).network
    assert chunked["weights"] == 6 * fsdp["weights"]  # each chunk forward, forward again, backward


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def built() -> plan.Plan:
    settings = ["train.strategy=ddp", "train.precision=bf16", "train.epochs=2", "train.steps=0"]
    return plan.build_plan("vit-b-32", settings, 64, "h100", samples=1_000_000)


def test_counts_are_the_models_own(built: plan.Plan) -> None:
    """ViT-B/32 and CLIP's text model: 151.3 million parameters (OpenAI)."""
    assert built.parameters == pytest.approx(151.3e6, rel=0.002)
    # 4.4 GMACs for the image (timm's table), about 2.9 for 77 tokens; a MAC is two operations, backward twice the forward
    assert built.chosen.flops / built.chosen.share == pytest.approx(3 * 2 * (4.4e9 + 2.95e9), rel=0.05)


def test_steps_and_table(built: plan.Plan) -> None:
    plain = built.to_dict()
    assert plain["steps_per_epoch"] == math.ceil(1_000_000 / 4096)
    text = "\n".join(built.lines())
    assert f"1,000,000 samples = {plain['steps_per_epoch']:,} steps; the run: {math.ceil(2_000_000 / 4096):,} steps" in text
    assert "of 74.5: fits" in text
    for word in ("ddp", "fsdp2", "zero1", "zero2", "zero3"):
        assert f"train.strategy={word}" in text
    assert "train.strategy=single" not in text
    assert plain["chosen"]["memory_total_bytes"] == sum(plain["chosen"]["memory_bytes"].values())


def test_attention_counts_and_the_peak_is_that_of_the_precision(built: plan.Plan) -> None:
    """QK^T and its product with V: 4 N^2 C operations a layer forward, three times that with the backward pass."""
    layers = 2 * 12 * 512 * 512  # of CLIP's text model, and of the ViT below, per token
    weights = 77 * 12 * layers + 2 * 512 * 512 + 50 * 12 * 2 * 12 * 768 * 768 + 2 * 768 * 512
    attention = 12 * 4 * (77**2 * 512 + 50**2 * 768)
    patches = 2 * 49 * 3 * 32 * 32 * 768
    assert built.chosen.flops / built.chosen.share == 3 * (weights + attention) + 2 * patches
    fp32 = replace(built, config=replace(built.config, train=replace(built.config.train, precision="fp32")))
    assert fp32.seconds() / built.seconds() == pytest.approx(989 / (494 if fp32.uses_tf32() else 67))  # H100's data sheet


def test_what_does_not_fit_is_marked(built: plan.Plan) -> None:
    text = "\n".join(replace(built, gpu="t4", chosen=replace(built.chosen, memory={"weights": 20 * 10**9})).lines())
    assert "does NOT fit" in text


def test_what_could_not_run_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--gpu h1000: the choices are b200, .*h100, "):
        plan.build_plan("vit-b-32", [], 8, "h1000")
    with pytest.raises(ConfigError, match=r"data\.batch_size=4096 must be divisible"):
        plan.build_plan("vit-b-32", ["train.strategy=ddp"], 7, "h100")
    with pytest.raises(ConfigError, match=r"train\.strategy=single runs in one process, not 8"):
        plan.build_plan("vit-b-32", ["train.strategy=single"], 8, "h100")


def test_the_command_prints_json_without_data_tokenizer_or_gpu(tmp_path: Any) -> None:
    words = clipfuse_command(
        "plan", "scenes-conv", "--gpus", "2", "--gpu", "a100", "--json", "train.strategy=fsdp2", "train.chunks=2"
    )
    with start_launcher(*words, cwd=tmp_path) as run:
        output = run.wait_for_exit(0)
    found = json.loads(output.splitlines()[-1])
    assert (found["gpus"], found["gpu"], found["samples_per_epoch"]) == (2, "a100", None)
    assert (found["chosen"]["strategy"], found["chosen"]["chunks"]) == ("fsdp2", 2)


def test_a_file_that_names_no_towers_has_those_of_the_run_it_starts_from(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert cli.main(["pretrain", "scenes", *small.settings(run, "train.steps=1")]) == 0
    file = tmp_path / "more.yaml"
    file.write_text("data: {train: synthetic, batch_size: 16}\ntrain: {steps: 10, strategy: ddp}\n")
    capsys.readouterr()
    assert cli.main(["plan", str(file), f"init={run}", "--gpus", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == sum(p.numel() for p in load_model(run).model.parameters())
    assert not [note for note in found["notes"] if note.startswith("tokenizer")]  # init's own
