"""When a run is evaluated: the default gives a curve, and stays cheap next to training."""

from pathlib import Path

import pytest

from launch import cli
from pretrain.training.config import TrainConfig
from tests.support import Small, read_jsonl


@pytest.mark.parametrize(
    ("eval_every", "total_steps", "batch_size", "val_samples", "steps"),
    [
        (None, 1000, 32, 500, 100),
        (None, 1001, 32, 500, 101),
        (None, 900, 32, 2000, 225),  # 4 x 2,000 is no more than a third of 900 x 32; 5 x 2,000 would be
        (None, 10, 32, 100, 0),  # 320 / 3 samples suffice for the evaluation at the end
        (None, 3, 100, 1, 1),
        (None, 100, 8, 10_000, 0),
        (0, 1000, 32, 500, 0),
        (7, 10, 1, 10_000, 7),
    ],
)
def test_ten_evaluations_read_at_most_a_third_of_what_training_reads(
    eval_every: int | None, total_steps: int, batch_size: int, val_samples: int, steps: int
) -> None:
    config = TrainConfig(steps=total_steps, eval_every=eval_every)
    assert config.evaluation_interval(total_steps, total_steps * batch_size, val_samples) == steps
    if eval_every is None and steps:
        evaluations = -(-total_steps // steps)
        assert evaluations <= 10
        assert 3 * evaluations * val_samples <= total_steps * batch_size


def test_a_run_has_a_validation_curve_by_default(small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    settings = small.settings(run, f"data.val={small.val}", "eval.max_samples=8", "eval.workers=0", "train.steps=12")
    settings = [setting for setting in settings if not setting.startswith("train.eval_every")]
    assert cli.main(["pretrain", "vit-b-16", *settings]) == 0
    evaluated = [line["step"] for line in read_jsonl(run / "metrics.jsonl") if "val/image_to_text_R@1" in line]
    assert evaluated == [2, 4, 6, 8, 10, 12]
    shown = " ".join(capsys.readouterr().err.split())
    assert "evaluates on 8 samples every 2 steps" in shown
    assert [shown.count(f"step {step}/12 image_to_text_R@1 0.") for step in (2, 3, 4)] == [1, 0, 1]
    assert shown.count(" (chance 0.125), text_to_image_R@1 ") == 6

    assert cli.main(["pretrain", "vit-b-16", *small.settings(tmp_path / "no", "train.steps=2", "train.eval_every=1")]) == 2
    assert "train.eval_every=1 needs data.val" in " ".join(capsys.readouterr().err.split())
