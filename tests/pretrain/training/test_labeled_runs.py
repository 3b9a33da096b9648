"""Runs with data.weight, data.negatives and data.teachers: on several processes, resumed, and refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune import config as finetune_config
from pretrain import registry
from pretrain.checkpoints.loading import load_model
from pretrain.config import find_config
from pretrain.embedding.job import embed
from pretrain.errors import ConfigError
from pretrain.train import check_targets, load_config
from tests.pretrain.embedding.test_job import CPU, make_options, save_model
from tests.support import Small, read_jsonl, read_losses, read_sample_keys, run_clipfuse

STEPS = 6


def settings(small: Small, run: Path, *more: str) -> list[str]:
    return small.settings(
        run,
        f"train.steps={STEPS}",
        "train.save_every=3",
        "train.audit=true",
        "data.caption=captions",
        "data.draw=2",
        "data.weight=index",  # of the scene, from 0
        "data.negatives=foils",
        "data.draw_negatives=2",
        "loss.name=distill",
        *more,
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_with_all_of_them_resumes_and_is_the_same_on_two_processes(small: Small, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    embed(load_model(save_model(small, tmp_path, 1)), make_options(small, teacher, data=[small.train], caption="captions"), CPU)
    setting = f"data.teachers={teacher}"
    whole, resumed, shared = (tmp_path / name for name in ("whole", "resumed", "shared"))
    done = run_clipfuse("pretrain", "scenes", *settings(small, whole, setting), cwd=tmp_path)
    assert "300 of 300 image embeddings, 600 of 600 text embeddings of the first 300 samples are there" in done.stderr
    losses = read_losses(whole)
    lines = [line for line in read_jsonl(whole / "metrics.jsonl") if "loss" in line]
    for line in lines:
        assert line["teacher_coverage"] == 1
        assert line["loss"] == pytest.approx((line["clip_loss"] + line["distill_loss"]) / 2, rel=1e-4)
        assert line["distill_loss"] > 0
    checkpoint = f"resume={whole / 'checkpoints/step-0000003'}"
    run_clipfuse("pretrain", "scenes", *settings(small, resumed, setting, checkpoint, "data.workers=2"), cwd=tmp_path)
    assert read_losses(resumed) == {step: loss for step, loss in losses.items() if step > 3}
    last = f"checkpoints/step-{STEPS:07d}/model.safetensors"
    assert (resumed / last).read_bytes() == (whole / last).read_bytes()
    more = [setting, "train.strategy=ddp", "train.chunks=2"]
    run_clipfuse("pretrain", "scenes", "--nproc", "2", *settings(small, shared, *more), cwd=tmp_path)
    by_rank = read_sample_keys(shared, 0), read_sample_keys(shared, 1)
    assert {step: keys + by_rank[1][step] for step, keys in by_rank[0].items()} == read_sample_keys(whole)
    assert list(read_losses(shared).values()) == pytest.approx(list(losses.values()), rel=2e-5)


def test_settings_that_a_loss_does_not_account_for_are_refused(small: Small, tmp_path: Path) -> None:
    for changes, message in (
        (
            ["loss.name=clip", "data.teachers=x"],
            r"data\.teachers='x': loss\.name=clip does not account for it; loss\.name=distill",
        ),
        (["loss.name=distill"], r"loss\.name=distill needs data\.teachers"),
        (["loss.name=distill", "data.teachers=x", "data.incomplete=keep"], r"data\.incomplete=keep: loss\.name=distill"),
        (["data.incomplete=keep", "data.weight=w"], r"data\.incomplete=keep goes neither with data\.weight"),
        (["loss.name=tests.support.settings_loss", "data.weight=w"], r"data\.weight='w': loss\.name=tests"),
    ):
        config = load_config(find_config("scenes", "pretrain"), small.settings(tmp_path, *changes))
        with pytest.raises(ConfigError, match=message):
            check_targets(config, registry.get_component("losses", config.loss.name))


def test_fine_tuning_refuses_them(small: Small, tmp_path: Path) -> None:
    checkpoint = save_model(small, tmp_path, 2)
    for setting in ("data.weight=w", "data.negatives=n", "data.teachers=t", "data.incomplete=keep", "data.sentences=true"):
        with pytest.raises(ConfigError, match=r"is for pretraining"):
            finetune_config.load_config(find_config("vqa", "finetune"), [f"init={checkpoint}", setting])
