"""train.stages: where stages begin and end, what they cost, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune.config import FinetuneConfig
from launch import cli
from launch.plan import build_plan
from launch.plan.measure import PlaceholderTokenizer
from pretrain import model as models
from pretrain.config import find_config
from pretrain.data.batch_sizes import BatchRange, BatchSizes
from pretrain.data.config import DataConfig
from pretrain.data.order import Order, ShardSource
from pretrain.errors import ConfigError
from pretrain.runtime import distributed
from pretrain.train import PretrainConfig, load_config
from pretrain.training import stages
from pretrain.training.config import TrainConfig
from pretrain.training.flops import FlopCounter, build_sample
from pretrain.training.spikes import SpikeWatch
from tests.support import TINY_TOWERS, Small

N = 1000
"""Samples of an epoch."""


def load(*settings: str) -> PretrainConfig:
    """Load the configuration of tiny towers with these settings."""
    fixed = ["data.train=synthetic", "data.val=null", "data.batch_size=16", "train.steps=0", "train.eval_every=0", *TINY_TOWERS]
    return load_config(find_config("scenes", "pretrain"), [*fixed, *settings])


def resolve(text: str, *settings: str) -> stages.RunStages:
    return stages.resolve(load(f"train.stages={text}", *settings), N)


# ---------------------------------------------------------------------------------------------------------------------
# Where stages begin


def test_only_sizes_of_batches_bind_a_run_that_resumes() -> None:
    """So a run whose stages change images alone may be lengthened."""
    images = "[{until: 0.5, image.size: 16}, {until: 0.75, optim.lr: 1e-4}]"
    assert resolve(images, "train.steps=8").identity() is resolve(images, "train.steps=80").identity() is None
    both = "[{until: 0.25, image.size: 16, data.batch_size: 32}, {until: 0.5, data.batch_size: 32}]"
    assert resolve(both, "train.steps=8").identity() == "32 samples a step from step 0, 16 samples a step from step 4"


@pytest.mark.parametrize(
    ("text", "length", "expected"),
    [
        # 0.9 of 3,000 samples are 84.4 batches of 32, rounded up to 85, 2,720 samples; 280 remain, 17.5 batches of 16
        ("[{until: 0.9, data.batch_size: 32}]", "train.epochs=3", [(0, 85, 0, 32), (85, 103, 2720, 16)]),
        ("[{until: 2700, data.batch_size: 32}]", "train.samples=3000", [(0, 85, 0, 32), (85, 103, 2720, 16)]),
        ("[{until: 0.25, optim.lr: 1e-4}]", "train.steps=10", [(0, 3, 0, 16), (3, 10, 48, 16)]),
        (
            "[{until: 0.5, data: {batch_size: 64}}, {until: 0.75, data.batch_size: 32, image.size: 16}]",
            "train.samples=1024",
            [(0, 8, 0, 64), (8, 16, 512, 32), (16, 32, 768, 16)],
        ),
        ("[]", "train.epochs=3", [(0, 188, 0, 16)]),
    ],
)
def test_steps_and_samples(text: str, length: str, expected: list[tuple[int, int, int, int]]) -> None:
    run = resolve(text, length)
    assert [(s.begin, s.end, s.position, s.batch_size) for s in run] == expected
    assert run.total_samples >= 1024 or length == "train.steps=10"
    counted = 0
    for step in range(run.total_steps):  # one by one
        stage = run.at(step)
        assert stage.begin <= step < stage.end
        assert run.batches.position(step) == counted
        assert run.batches.batch_at(counted) == run.batches.batch_at(counted + stage.batch_size - 1) == step
        counted += stage.batch_size
    assert counted == run.total_samples


def test_a_run_has_its_length_in_samples_rounded_up_to_batches() -> None:
    rng, config = np.random.default_rng(0), load("train.samples=1000")
    for _ in range(50):
        samples, size = int(rng.integers(2000, 9000)), int(rng.integers(1, 9)) * 16
        until = round(float(rng.uniform(0.1, 0.8)), 3)
        train = TrainConfig(samples=samples, stages=[{"until": until, "data.batch_size": size}])
        run = stages.resolve(replace(config, train=train), N)
        first = math.ceil(round(until * samples, 6) / size)
        assert run[0].end == first
        assert run.total_steps == first + math.ceil((samples - first * size) / 16)
        assert 0 <= run.total_samples - samples < 16


@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize(("world", "nodes"), [(1, 1), (2, 1), (4, 2)])
def test_every_sample_is_read_once_an_epoch(streams: int, world: int, nodes: int) -> None:
    """Over all processes, in the order of a run without stages."""
    order = Order([ShardSource([70, 30, 60, 32])], seed=1, window=2, streams=streams)
    batches = BatchSizes([BatchRange(0, 0, 32), BatchRange(2, 64, 8), BatchRange(9, 120, 24)])
    read: list[tuple[int, ...]] = []
    for batch in range(12):
        start, size = batches.position(batch), batches.size(batch)
        parts = [order.positions_from(start, size, rank, world, nodes) for rank in range(world)]
        assert {len(part) for part in parts} == {size // world}
        assert sorted(np.concatenate(parts)) == list(range(start, start + size))
        read += zip(*(values.tolist() for values in order.locate(np.sort(np.concatenate(parts)))), strict=True)
    assert len(read) == order.epoch_size == 192
    assert len(set(read)) == 192
    assert read == list(zip(*(values.tolist() for values in order.locate(np.arange(192))), strict=True))


def test_streams_divide_the_batches_of_all_stages() -> None:
    """48 divides 144, but not 128."""
    streams = []
    for sizes in ([], [144, 128]):
        data = DataConfig(train="x.tar", batch_size=144, stage=True)
        data.set_streams(["x.tar"] * 100, 100, 1, sizes)
        streams.append(data.streams)
    assert streams == [48, 16]


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{image.size: 16}]", r"train\.stages\[0\]=.* needs until"),
        ("[{until: 1, image.size: 16}]", r"until=1 must be a fraction of the run, above 0 and below 1, or a whole number"),
        ("[{until: 0.5}]", r"train\.stages\[0\]=.*changes nothing: set one of image\.size"),
        (
            "[{until: 0.5, image.sizes: 16}]",
            r"no key 'image\.sizes'; did you mean 'image\.size'\?; valid keys are until, image",
        ),
        ("[{until: 0.5, image.size: small}]", r"train\.stages\[0\]\.image\.size='small' must be a whole number"),
        ("[{until: 0.5, image.size: 16}, {until: 0.4, image.size: 24}]", r"stages\[1\]\.until=0\.4 is not after .* \(0\.5\)"),
        ("[{until: 0.5, text.length: 32}]", r"stages\[0\]\.text\.length=32 is above text\.length=24, for which the model"),
        ("[{until: 0.5, data.batch_size: 17}]", r"stages\[0\]\.data\.batch_size=17 must be divisible by .* = 2 x 1"),
        ("[{until: 0.5, image.patch_dropout: 1}]", r"train\.stages\[0\]: .*image\.patch_dropout=1\.0 from 0 to below 1"),
        ("[{until: 0.5, optim.lr: 0}]", r"train\.stages\[0\]: optim\.lr=0\.0 must be above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(text: str, message: str) -> None:
    with distributed.assume_world(2, 1, gpu=False), pytest.raises(ConfigError, match=message) as error:
        load(f"train.stages={text}", "train.samples=3000", "train.strategy=ddp")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{until: 0.999, data.batch_size: 256}]", r"stages\[0\]\.until=0\.999 leaves the last stage, the configuration"),
        ("[{until: 4000, image.size: 16}]", r"stages\[0\]\.until=4000 leaves the last stage"),
        ("[{until: 0.5, image.size: 16}, {until: 1000, image.size: 32}]", r"stages\[1\]\.until=1000 leaves the stage no step"),
    ],
)
def test_stages_without_steps_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(text, "train.samples=3000")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.stages=[{until: 0.5, image.size: 24}]"], "train.stages[0].image.size=24: it is not a multiple of vit_tiny"),
        (
            ["train.stages=[{until: 0.5, image.patch_dropout: 0.5}]", "image.name=test_convnext", "image.args={}"],
            "image.patch_dropout: test_convnext has no patch dropout",
        ),
    ],
)
def test_towers_that_cannot_are_refused_before_training(
    small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str], settings: list[str], message: str
) -> None:
    assert cli.main(["pretrain", "scenes", *small.settings("r", "train.steps=4", *settings)]) == 2
    assert message in capsys.readouterr().err
    assert not (in_tmp / "runs/r").exists()


def test_fine_tuning_refuses_stages() -> None:
    train = TrainConfig(steps=4, stages=[{"until": 0.5, "data.batch_size": 8}])
    with pytest.raises(ConfigError, match=r"train\.stages is for pretraining"):
        FinetuneConfig(train=train).check()


# ---------------------------------------------------------------------------------------------------------------------
# What stages cost


STAGES = "train.stages=[{until: 0.5, image.size: 16, image.patch_dropout: 0.5, text.length: 12, data.batch_size: 64}]"


def built(config: PretrainConfig) -> Any:
    tokenizer = PlaceholderTokenizer(400)
    return models.build(models.tower_configs(config), config.model, tokenizer)


def test_a_stage_costs_what_a_model_of_its_size_costs() -> None:
    """The reference is a model that is built for the stage's images, texts and patch dropout."""
    config = load(STAGES, "train.samples=3000", "image.args.patch_size=4")
    model = built(stages.build_config(config))
    stages.prepare_model(model, config)
    expected = []
    for size, length, dropout in ((16, 12, 0.5), (32, 24, 0.0)):
        image = replace(config.image, size=size, patch_dropout=dropout)
        counter = FlopCounter(built(replace(config, image=image, text=replace(config.text, length=length))))
        counter.add(build_sample(size, length))
        expected.append(counter.take())
    costs = stages.measure_costs(model, config)
    resampling = 3 * 2 * (4 * 8 * 8 * 32 + 4 * 4 * 8 * 32) // 2  # of the positions, 8 x 8 to 4 x 4, once for two samples
    assert costs == [pytest.approx(expected[0], abs=resampling), expected[1]]
    assert costs[0] < costs[1] / 3


def test_dry_run_and_plan_name_the_stages(small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The memory is that of the largest stage, here the first one of 64 samples."""
    text = STAGES.replace("image.size: 16, ", "").replace("0.5, text", "0.1, text")
    settings = small.settings("r", text, "train.samples=600")
    assert cli.main(["pretrain", "scenes", *settings, "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "23 steps in 2 stages, 2.03 epochs" in output
    first = "stage 1 of 2: steps 1 to 5 (5 x 64 samples), image.patch_dropout=0.1, text.length=12, data.batch_size=64; "
    assert first in output
    assert "stage 2 of 2: steps 6 to 23 (18 x 16 samples), the configuration itself; " in output
    plan = build_plan("scenes", settings, 1, "h100", samples=300)
    lines = "\n".join(plan.lines())
    assert plan.chosen.share == 64
    assert plan.chosen.total == max(estimated.total for estimated in plan.stages)
    assert "the run: 23 steps" in lines
    assert "note: memory, network and computation are those of stage 1 of 2, the largest" in lines
    assert lines.count("GiB, ") == 2
    assert [estimated.share for estimated in plan.stages] == [64, 16]


# ---------------------------------------------------------------------------------------------------------------------
# Spikes


@pytest.mark.parametrize("mode", ["log", "skip"])
def test_a_larger_batch_is_no_spike(mode: Any) -> None:
    """ln 512 is 1.4 above ln 128; within a stage such a step is a spike."""
    watch = SpikeWatch(TrainConfig(steps=1, on_spike=mode, spike_window=5), torch.device("cpu"))
    small, large = math.log(128), math.log(512)
    for step in range(1, 31):
        if step == 11:
            watch.restart(step)
        loss = torch.tensor(small if step < 11 else large + (2 if step == 25 else 0))
        out = {"loss": watch.guard(loss), "skipped": torch.zeros(())}
        watch.record(out)
        if step % 5 == 0:
            watch.judge(watch.pending(), step)
    assert watch.count == 1
