"""Every command runs on a vision transformer and on a convolutional tower with BatchNorm."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from launch import cli
from pretrain.embedding import dataset
from tests.support import Small

TOWERS = {
    "vit": ["scenes", "image.name=vit_tiny_patch16_224", "image.args={patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}"],
    "resnet": ["resnet-50", "image.args={channels: [8, 8, 16, 32], layers: [1, 1, 1, 1]}"],
}
"""A shipped configuration, and settings that shrink its image tower."""
FORMATS = {"vit": ("hf", "open_clip"), "resnet": ("hf", "onnx")}
"""A vision transformer is exported to onnx by the same command, and its graphs run, in api/test_api.py."""


@pytest.mark.parametrize("name", TOWERS)
def test_every_command_runs(name: str, small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """pretrain, evaluate, embed, evaluate of the embeddings, export, finetune, attend and report, one after the other."""
    config, *tower = TOWERS[name]
    settings = [item for item in small.settings("first") if not item.startswith("image.")]
    settings += ["image.size=64", *tower, f"data.val={small.val}", "train.precision=fp32"]
    assert cli.main(["pretrain", config, *settings, "train.steps=2"]) == 0
    figures = []
    assert cli.main(["evaluate", "runs/first", "--data", small.val, "--json"]) == 0
    figures.append(json.loads(capsys.readouterr().out))
    embed = ["embed", "runs/first", "--data", small.val, "--out", "embeddings", "--workers", "0", "--dtype", "float32"]
    assert cli.main(embed) == 0
    assert cli.main(embed) == 0, "a second command finds nothing to do"
    assert "complete, nothing to do" in capsys.readouterr().out
    loaded = dataset.load("embeddings")
    assert loaded.image.shape == (64, 16)
    assert cli.main(["evaluate", "runs/first", "--data", "embeddings", "--json"]) == 0
    figures.append(json.loads(capsys.readouterr().out))
    recalls = [{key: value for key, value in figure["metrics"].items() if "R@" in key} for figure in figures]
    assert recalls[0]
    assert recalls[1] == pytest.approx(recalls[0])
    for format_name in FORMATS[name]:
        assert cli.main(["export", "runs/first", f"as-{format_name}", "--format", format_name]) == 0
    tuning = small.settings("vqa", "init=runs/first", "train.steps=1", "fusion.layers=1", "fusion.heads=2")
    tuning = [item for item in tuning if not item.startswith(("image.", "text.", "model."))]
    assert cli.main(["finetune", "vqa", *tuning]) == 0
    with tarfile.open(sorted(small.root.glob("scenes/val-*.tar"))[0]) as tar:
        member = next(member for member in tar if member.name.endswith(".jpg"))
        Image.open(io.BytesIO(tar.extractfile(member).read())).save("picture.png")  # type: ignore[union-attr]
    assert cli.main(["attend", "runs/vqa", "picture.png", "what color is the car?", "--out", "maps.png"]) == 0
    assert cli.main(["report", "runs/first"]) == 0
    assert Path("runs/first/report.html").is_file()
    assert Path("maps.png").is_file()
