"""Runs with text.group_shapes=static or packed: the losses of a run without groups, bit for bit the same after a stop."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.config import find_config
from pretrain.errors import ConfigError
from pretrain.train import load_config, train
from tests.support import Small, read_losses, world

STEPS, SAVED = 6, 3
STATIC, PACKED = ("text.group_shapes=static", "text.static_groups=3"), ("text.group_shapes=packed", "text.pool=eot")


def run_training(settings: list[str]) -> None:
    train(load_config(find_config("scenes", "pretrain"), settings))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("shapes", [STATIC, PACKED], ids=["static", "packed"])
def test_a_run_has_the_losses_of_one_without_groups_and_resumes_bit_for_bit(
    small: Small, tmp_path: Path, shapes: tuple[str, str]
) -> None:
    def settings(name: str, *more: str) -> list[str]:
        steps = [f"train.steps={STEPS}", f"train.save_every={SAVED}", "optim.lr=1e-2", "data.batch_size=64"]
        evaluation = ["train.eval_every=3", f"data.val={small.val}", "eval.workers=0"]
        return small.settings(tmp_path / name, *steps, *evaluation, *more)

    world.run(run_training, 1, settings("whole", "text.groups=1", shapes[1]))
    world.run(run_training, 1, settings("static", *shapes))
    resumed = f"resume={tmp_path}/static/checkpoints/step-{SAVED:07d}"
    world.run(run_training, 1, settings("resumed", *shapes, resumed))
    world.run(run_training, 2, settings("two", *shapes, "train.strategy=ddp", "train.chunks=2", "data.workers=0"))
    whole, static = (read_losses(tmp_path / name) for name in ("whole", "static"))
    assert list(static) == list(range(1, STEPS + 1))
    assert static == pytest.approx(whole, rel=1e-5)
    assert read_losses(tmp_path / "two") == pytest.approx(whole, rel=1e-4)
    assert read_losses(tmp_path / "resumed") == {step: loss for step, loss in static.items() if step > SAVED}
    last = f"checkpoints/step-{STEPS:07d}/model.safetensors"
    assert (tmp_path / "resumed" / last).read_bytes() == (tmp_path / "static" / last).read_bytes()


def test_a_tower_that_attends_to_padding_has_no_groups(small: Small, tmp_path: Path) -> None:
    siglip = "text.args={model_type: siglip_text_model, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2}"
    settings = small.settings(tmp_path / "run", "train.steps=1", siglip, "text.pool=tower", *STATIC)
    with pytest.raises(ConfigError, match=r"text\.group_shapes=static: .* depend on the padding"):
        run_training(settings)
    with pytest.raises(ConfigError, match=r"text\.group_shapes=packed is for causal"):
        run_training([*settings, "text.group_shapes=packed"])
    with pytest.raises(ConfigError, match=r"text\.static_groups=0 1 or more"):
        load_config(find_config("scenes", "pretrain"), small.settings(tmp_path / "run", "text.static_groups=0"))
