"""Runs with stages: their losses are those of runs glued by hand, they resume in each stage, and processes change nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from launch import cli
from pretrain import train as trainer
from pretrain.config import find_config
from pretrain.data.loader import Batch
from pretrain.strategies import build_strategy
from pretrain.train import load_config
from tests.support import Small, read_jsonl, read_losses, read_sample_keys
from tests.support.relay import read_batch_keys, run_processes

STAGE = "{until: 160, image.size: 16, text.length: 12, data.batch_size: 32, optim.lr: 3e-3}"
"""Five steps of 32 samples, of twelve steps; the last seven have 16."""
STEPS, FIRST = 12, 5
ARGS = "image.args={patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2, global_pool: avg, fc_norm: false}"


def settings(small: Small, run: Path | str, *more: str) -> list[str]:
    return small.settings(
        run, ARGS, "train.samples=272", f"train.stages=[{STAGE}]", "train.audit=true", "train.save_every=100", *more
    )


def train(small: Small, run: Path, *more: str) -> Path:
    """Train in this process; return the run folder."""
    assert cli.main(["pretrain", "scenes", *settings(small, run, *more)]) == 0
    return run


def last_weights(run: Path, folder: str = "") -> Path:
    return run / f"checkpoints/step-{STEPS:07d}" / folder / "model.safetensors"


# ---------------------------------------------------------------------------------------------------------------------
# Against plain torch code


def read_batches(small: Small, start: int, *more: str) -> Iterator[Batch]:
    """Yield the batches of a run without stages from position `start` on."""
    config = load_config(find_config("scenes", "pretrain"), settings(small, "none", "train.stages=[]", *more))
    loader = trainer.build(config).loader
    loader.load_state_dict({**loader.state_dict(), "position": start})
    return iter(loader)


class Glued(torch.nn.Module):
    """Both towers in plain timm and transformers code: timm resamples positions on the fly, short texts use the first ones."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        args = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "global_pool": "avg", "fc_norm": False}
        self.image = timm.create_model(
            "vit_base_patch16_224", img_size=32, num_classes=0, dynamic_img_size=True, qkv_bias=True, **args
        )
        self.image.load_state_dict(model.towers["image"].model.state_dict())
        self.text = model.towers["text"].model
        self.projections, self.logit_scale = model.projections, model.logit_scale
        self.mean, self.std = model.towers["image"].mean, model.towers["image"].std

    def forward(self, batch: Batch) -> Tensor:
        """Return CLIP's loss (Radford et al. 2021, figure 3)."""
        images = (batch.inputs["image"].float() / 255 - self.mean) / self.std
        ids, mask = batch.inputs["text"], batch.masks["text"]
        states = self.text(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        pooled = {"image": self.image(images), "text": (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)}
        image, text = (torch.nn.functional.normalize(self.projections[n](pooled[n]), dim=-1) for n in ("image", "text"))
        logits, labels = self.logit_scale.exp() * image @ text.T, torch.arange(len(ids))
        cross_entropy = torch.nn.functional.cross_entropy
        return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


def train_glued(small: Small) -> list[float]:
    """Return the losses of five steps on batches of 32 small samples and seven on batches of 16 full ones."""
    config = load_config(find_config("scenes", "pretrain"), settings(small, "none", "train.stages=[]"))
    model = Glued(trainer.build(config).model)
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6)
    small_ones = read_batches(small, 0, "image.size=16", "text.length=12", "data.batch_size=32")
    losses = []
    for step, batch in enumerate([*islice(small_ones, FIRST), *islice(read_batches(small, 160), STEPS - FIRST)]):
        assert batch.inputs["image"].shape == ((32, 3, 16, 16) if step < FIRST else (16, 3, 32, 32))
        peak = 3e-3 if step < FIRST else 1e-3
        for group in optimizer.param_groups:
            cosine = 0.5 * (1 + math.cos(math.pi * (step - 2) / (STEPS - 2)))
            group["lr"] = peak * ((step + 1) / 2 if step < 2 else cosine)
        loss = model(batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_run_in_two_stages_has_the_losses_of_two_runs_glued_by_hand(small: Small, tmp_path: Path) -> None:
    run = train(small, tmp_path / "run")
    assert list(read_losses(run).values()) == pytest.approx(train_glued(small), rel=2e-4)
    lines = read_jsonl(run / "metrics.jsonl")
    assert [line["stage"] for line in lines] == [1] * FIRST + [2] * (STEPS - FIRST)
    assert [line["samples_seen"] for line in lines] == [32, 64, 96, 128, 160, *range(176, 273, 16)]
    keys = [key for batch in read_sample_keys(run).values() for key in batch]
    assert len(keys) == len(set(keys)) == 272  # of an epoch of 300


# ---------------------------------------------------------------------------------------------------------------------
# Resuming


@pytest.fixture(scope="module")
def uninterrupted(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything random, whose checkpoints of all steps are kept."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    return train(small, run, *EVENTFUL, "train.save_every=1", "train.keep=0")


EVENTFUL = [
    f"train.stages=[{STAGE.replace('image.size: 16', 'image.size: 24, image.patch_dropout: 0.5')}]",
    "data.augment.flip=true",
    "optim.average=0.9",
    "train.chunks=2",
]


@pytest.mark.parametrize(("stop", "workers"), [(2, 2), (FIRST, 0), (9, 2)])
def test_a_run_resumes_bit_for_bit_in_each_stage_and_between_them(
    small: Small, tmp_path: Path, uninterrupted: Path, stop: int, workers: int
) -> None:
    """With workers, which read ahead into the next stage."""
    checkpoint = uninterrupted / f"checkpoints/step-{stop:07d}"
    run = train(small, tmp_path / "run", *EVENTFUL, f"resume={checkpoint}", f"data.workers={workers}")
    expected = {step: loss for step, loss in read_losses(uninterrupted).items() if step > stop}
    assert read_losses(run) == expected
    assert read_sample_keys(run) == {step: read_sample_keys(uninterrupted)[step] for step in expected}
    for folder in ("", "state/weights"):
        assert last_weights(run, folder).read_bytes() == last_weights(uninterrupted, folder).read_bytes()


def test_other_stages_are_refused_when_a_run_resumes(
    small: Small, tmp_path: Path, uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The size of a batch decides the position of each sample; the learning rate may change."""
    words = settings(small, tmp_path / "r", *EVENTFUL, f"resume={uninterrupted}/checkpoints/step-0000004")
    others = [word.replace("until: 160", "until: 128") for word in words]
    assert cli.main(["pretrain", "scenes", *others]) == 2
    message = "train.stages is '32 samples a step from step 0, 16 samples a step from step 4' now and was '32 samples a step"
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Processes and strategies


@pytest.fixture(scope="module")
def single(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, with a checkpoint within its first stage."""
    return train(small, tmp_path_factory.mktemp("single") / "run", "train.save_every=3", "train.keep=0")


@pytest.mark.parametrize(("strategy", "chunks", "begin"), [("ddp", 2, 3), ("fsdp2", 1, 0), ("zero3", 2, 0)])
def test_two_processes_train_as_one_under_every_strategy(
    small: Small, tmp_path: Path, single: Path, strategy: str, chunks: int, begin: int
) -> None:
    """begin: the step after which two processes go on from the checkpoint of one; 0 = they begin.

    One strategy of each kind: zero1 and zero2 differ from zero3 in what they shard, which stages do not touch.
    """
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed")
    run = tmp_path / "run"
    words = ["scenes", *settings(small, run, f"train.strategy={strategy}", f"train.chunks={chunks}")]
    words += [f"resume={single}/checkpoints/step-{begin:07d}"] if begin else []
    assert run_processes(2, words, tmp_path) == 0
    assert read_batch_keys(run, 2) == {step: keys for step, keys in read_sample_keys(single).items() if step > begin}
    expected = {step: loss for step, loss in read_losses(single).items() if step > begin}
    assert read_losses(run) == pytest.approx(expected, rel=2e-5)
    weights, expected_weights = load_file(last_weights(run)), load_file(last_weights(single))
    for key, value in expected_weights.items():
        assert torch.allclose(weights[key], value, rtol=1e-3, atol=2e-5), key


# ---------------------------------------------------------------------------------------------------------------------
# Compiled models


def test_a_compiled_model_sees_one_shape_a_stage(small: Small, tmp_path: Path) -> None:
    """The backend is "eager", of which torch counts the graphs."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    config = load_config(find_config("scenes", "pretrain"), settings(small, tmp_path / "run", "train.compile=true"))
    parts = trainer.build(config)
    batches = list(islice(iter(parts.loader), STEPS))
    shapes = [(batch.inputs["image"].shape, batch.inputs["text"].shape) for batch in batches]
    assert shapes == [((32, 3, 16, 16), (32, 12))] * FIRST + [((16, 3, 32, 32), (16, 24))] * (STEPS - FIRST)
    strategy = build_strategy("single", "fp32", config.optim, torch.device("cpu"))
    strategy.setup(parts.model)
    strategy.compile("true", backend="eager")
    graphs = []
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True), torch.no_grad():
        for batch in batches:
            strategy.model(batch.inputs, batch.masks)
            graphs.append(int(counters["stats"]["unique_graphs"]))
    torch._dynamo.reset()
    assert graphs == [2] * FIRST + [4] * (STEPS - FIRST)  # the blocks of a tower share one graph
