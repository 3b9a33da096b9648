"""`init` at another size of images and length of texts: positions are resampled, everything else stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from launch import cli
from pretrain.checkpoints import loading, warm_start
from pretrain.towers.positions import stretch
from pretrain.train import load_config
from pretrain.training.session import build_encoders
from tests.support import Small

TEXTS = ["a red car on a bridge", "two dogs"]


def long_clip(table: Tensor) -> Tensor:
    """Long-CLIP's table of 248 rows from CLIP's 77, written out: 20 stay, 57 become four each (section 3.2)."""
    rows = list(table[:20])
    for i in range(20, 77):
        step = table[i + 1] - table[i] if i < 76 else table[76] - table[75]
        rows += [table[i] + quarter / 4 * step for quarter in range(4)]
    return torch.stack(rows)


def test_a_longer_table_is_that_of_long_clip() -> None:
    table = torch.randn(77, 8, dtype=torch.float64)
    torch.testing.assert_close(stretch(table, 248), long_clip(table), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [3, 10, 24, 77])
@pytest.mark.parametrize("more", [1, 2, 100])
def test_a_line_stays_a_line_and_the_first_positions_stay(rows: int, more: int) -> None:
    """Behind the kept positions, positions on a straight line are spread over a straight line that begins where it began."""
    first = 2
    table = torch.arange(first + rows, dtype=torch.float64)[:, None] * torch.tensor([1.0, -3.0], dtype=torch.float64)
    longer = stretch(table, first + rows + more, first)
    kept = first + min(20, rows - 2)
    assert torch.equal(longer[: kept + 1], table[: kept + 1])
    slopes = longer[kept + 1 :] - longer[kept:-1]
    expected = (rows - (kept - first)) / (rows + more - (kept - first))
    torch.testing.assert_close(slopes[:, 0], torch.full((len(slopes),), expected, dtype=torch.float64))
    torch.testing.assert_close(slopes[:, 1], -3 * slopes[:, 0])


def test_a_shorter_table_is_the_beginning() -> None:
    table = torch.randn(77, 8)
    assert torch.equal(stretch(table, 32), table[:32])


def test_a_run_starts_from_another_size(small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The positions of images are those of timm, and short texts have the same embeddings."""
    assert cli.main(["pretrain", "scenes", *small.settings("first", "train.steps=1")]) == 0
    (in_tmp / "larger.yaml").write_text("image: {size: 48}\ntext: {length: 90}\n")
    data = [f"data.train={small.train}", "data.val=null", "run=second", "train.steps=1", "init=runs/first"]
    config = load_config(in_tmp / "larger.yaml", data)
    assert config.text is not None
    assert config.text.args["max_position_embeddings"] == 90
    tokenizer, model = build_encoders(config)
    capsys.readouterr()
    warm_start.load_weights(model, config.init, False, tokenizer)
    assert "init: image model.pos_embed is resampled from [1, 5, 32] to [1, 10, 32]" in capsys.readouterr().err

    source = loading.load_model("runs/first")
    before: dict[str, Any] = source.model.state_dict()
    after = model.state_dict()
    positions = before["towers.image.model.pos_embed"]
    expected = resample_abs_pos_embed(positions, [3, 3], num_prefix_tokens=1)
    torch.testing.assert_close(after["towers.image.model.pos_embed"], expected)
    resampled = {name for name in after if before[name].shape != after[name].shape}
    assert resampled == {"towers.image.model.pos_embed", "towers.text.model.embeddings.position_embedding.weight"}
    assert all(torch.equal(before[name], after[name]) for name in after if name not in resampled)

    def encode(encoders: Any) -> Tensor:
        tokens = tokenizer(TEXTS, return_tensors="pt", padding=True)
        embeddings: Tensor = encoders.eval().encode("text", tokens["input_ids"], tokens["attention_mask"].bool())
        return embeddings

    torch.testing.assert_close(encode(model), encode(source.model), rtol=1e-6, atol=1e-6)

    towers = [f"text.args={config.text.args}", f"text.tokenizer={small.tokenizer}", "init={image: runs/first}"]
    one_tower = load_config(in_tmp / "larger.yaml", [*data[:4], *towers, "image.size=64"])
    tokenizer, images = build_encoders(one_tower)
    warm_start.load_weights(images, one_tower.init, False, tokenizer)
    expected = resample_abs_pos_embed(positions, [4, 4], num_prefix_tokens=1)
    torch.testing.assert_close(images.state_dict()["towers.image.model.pos_embed"], expected)
