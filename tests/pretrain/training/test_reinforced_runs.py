"""A run with data.teachers=samples: resumed, on two processes, and refused where samples have no embeddings."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import Small, read_jsonl, read_losses, read_sample_keys, reinforced, run_clipfuse

STEPS = 4


def settings(small: Small, root: Path, run: str, *more: str) -> list[str]:
    return small.settings(
        root / run,
        f"train.steps={STEPS}",
        "train.save_every=2",
        "train.audit=true",
        f"data.train={root / 'shards'}",
        "data.window=2",
        "data.caption=txt+syn.json:syn_text",
        "data.draw=2",
        "data.teachers=samples",
        "loss.name=distill",
        *more,
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_resumes_and_is_the_same_on_two_processes(small: Small, tmp_path: Path) -> None:
    def change(i: int, content: dict[str, bytes]) -> None:
        if i == 7:
            del content["npz"]

    reinforced.write_shards(tmp_path / "shards", 40, change=change)
    limit = "data.max_bad_rate=0.2"
    done = run_clipfuse("pretrain", "scenes", *settings(small, tmp_path, "whole", limit), cwd=tmp_path)
    assert "80 of 80 text embeddings of the first 40 samples are there" in done.stderr
    whole, resumed, shared = (tmp_path / name for name in ("whole", "resumed", "shared"))
    losses = read_losses(whole)
    for line in (line for line in read_jsonl(whole / "metrics.jsonl") if "loss" in line):
        assert line["teacher_coverage"] == 1
        assert line["distill_loss"] > 0
    assert "no teacher embeddings" in (whole / "replaced.tsv").read_text()
    more = [limit, f"resume={whole / 'checkpoints/step-0000002'}", "data.workers=2", "data.teacher_widths=[6]"]
    run_clipfuse("pretrain", "scenes", *settings(small, tmp_path, "resumed", *more), cwd=tmp_path)
    assert read_losses(resumed) == {step: loss for step, loss in losses.items() if step > 2}
    last = f"checkpoints/step-{STEPS:07d}/model.safetensors"
    assert (resumed / last).read_bytes() == (whole / last).read_bytes()
    more = [limit, "train.strategy=ddp", "train.chunks=2"]
    run_clipfuse("pretrain", "scenes", "--nproc", "2", *settings(small, tmp_path, "shared", *more), cwd=tmp_path)
    by_rank = read_sample_keys(shared, 0), read_sample_keys(shared, 1)
    assert {step: keys + by_rank[1][step] for step, keys in by_rank[0].items()} == read_sample_keys(whole)
    assert list(read_losses(shared).values()) == pytest.approx(list(losses.values()), rel=2e-5)


def test_widths_that_are_not_those_of_the_samples_end_the_run_in_one_line(small: Small, tmp_path: Path) -> None:
    reinforced.write_shards(tmp_path / "shards", 20)
    done = run_clipfuse(
        "pretrain", "scenes", *settings(small, tmp_path, "r", "data.teacher_widths=[4,4]"), cwd=tmp_path, check=None
    )
    assert done.returncode != 0
    assert "teacher embeddings of another width: image_emb has 6 numbers, text_emb 6, not 8" in done.stderr
    assert "Traceback" not in done.stderr
