"""Every shipped configuration builds without network access, and names the command that runs it."""

import shlex
from pathlib import Path

import pytest
import torch

from launch import cli
from pretrain.checkpoints.loading import load_model
from pretrain.data.text import load_tokenizer
from pretrain.train import load_config
from tests.pretrain.towers.test_weights import make_bert, make_resnet
from tests.support import ROOT, Small

SHIPPED = sorted((ROOT / "configs/pretrain").glob("*.yaml"))
SETTINGS = [
    "data.train=synthetic",
    "data.val=null",
    "data.batch_size=64",
    "data.workers=0",
    "train.epochs=0",
    "train.steps=1",
    "train.eval_every=0",
]


def first_line(path: Path) -> list[str]:
    """Return the words of the command in the first line of a configuration, without `clipfuse`."""
    line = path.read_text().splitlines()[0]
    return shlex.split(line[line.index("clipfuse ") :])[1:]


@pytest.fixture
def published(small: Small, in_tmp: Path) -> list[str]:
    """Write a ResNet and a sentence encoder into the working folder; return the settings that `two-towers` takes them by."""
    torch.save(make_resnet().state_dict(), "resnet.pth")
    make_bert(Path("bert"), pooling_mode_mean_tokens=True)
    load_tokenizer(small.tokenizer).save_pretrained("bert")
    image = ["image.name=resnet18", "image.args={channels: [8, 8, 16, 16], layers: [1, 1, 1, 1]}", "image.size=32"]
    image += ["image.trainable_blocks=-1"]  # this one has four, the file trains eight
    return [*image, "image.weights=resnet.pth", "text.name=bert", "text.length=24"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_command_in_the_first_line_runs(
    path: Path, small: Small, published: list[str], in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a dry run, with towers of full size. The data and the tokenizer are others, and published weights stay at the hub."""
    load_config(path, [])
    command = first_line(path)
    if path.stem == "two-towers":
        settings = [f"data.train={small.train}", f"data.val={small.val}", *published]
    elif path.stem in ("clipart", "clipart-conv"):
        settings = [f"data.train={small.train}", f"data.val={small.val}"]
    else:
        settings = [*SETTINGS, f"text.tokenizer={small.tokenizer}", "image.pretrained=false"]
    assert cli.main([*command, "--dry-run", *settings]) == 0
    assert "trainable" in capsys.readouterr().out
    assert path.stem in (command[1], "clip-base")


def test_two_towers_align_local_towers_and_read_the_pooling(
    small: Small, published: list[str], in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One step: the towers learn at their own rates, and the text tower pools as its folder says."""
    data = [f"data.train={small.train}", "data.batch_size=16", "data.workers=0", "train.steps=1", "train.epochs=0"]
    assert cli.main(["pretrain", "two-towers", *data, *published, "train.threads=1", "optim.warmup=0"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("image tower: weights from resnet.pth: ")]
    assert [line for line in lines if line.startswith("text tower: weights from bert: ")]
    assert not [line for line in lines if "LOAD REPORT" in line or "Loading weights" in line]  # of transformers
    loaded = load_model("runs/two-towers")
    assert loaded.config.text.pool == "avg"
    # AdamW's first step has the length of the learning rate, whatever the gradient.
    before, after = torch.load("resnet.pth"), loaded.model.tower("image").model.state_dict()
    step = (after["conv1.weight"] - before["conv1.weight"]).abs().median()
    assert step == pytest.approx(1e-3 * 0.3, rel=0.2)


# ---------------------------------------------------------------------------------------------------------------------
# Fine-tuning

FINETUNE = sorted((ROOT / "configs/finetune").glob("*.yaml"))


@pytest.fixture(scope="module")
def encoders(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of one step for `init`."""
    run = tmp_path_factory.mktemp("encoders") / "run"
    assert cli.main(["pretrain", "scenes", *small.settings(run, "train.steps=1")]) == 0
    return run


@pytest.mark.parametrize("path", FINETUNE, ids=lambda path: path.stem)
def test_the_command_in_the_first_line_of_fine_tuning_runs(
    path: Path, small: Small, encoders: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = first_line(path)
    assert command[:2] == ["finetune", path.stem]
    data = [f"data.train={small.train}", f"data.val={small.val}", "data.workers=0"]
    assert cli.main([*command, "--dry-run", f"init={encoders}", *data, "data.batch_size=16"]) == 0
    output = capsys.readouterr().out
    assert "trainable" in output
    assert f"run: {path.stem} (finetune)" in output
