"""Every shipped configuration builds, with the network off, and its first line is the command that runs it."""

from pathlib import Path

import pytest

from launch import cli
from pretrain.config import load
from pretrain.recipe import PretrainConfig
from tests.support import ROOT, Small

SHIPPED = sorted((ROOT / "configs/pretrain").glob("*.yaml"))
FOR_ALL = [
    "data.train=synthetic",
    "data.val=null",
    "data.batch_size=64",
    "data.workers=0",
    "train.epochs=0",
    "train.steps=1",
    "train.eval_every=0",
]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_loads_and_says_how_to_run_it(path: Path) -> None:
    load(PretrainConfig, path, [])
    first = path.read_text().splitlines()[0]
    assert first.startswith("# clipfuse pretrain ") or "clipfuse pretrain" in first


@pytest.mark.parametrize("path", [path for path in SHIPPED if path.stem != "clip-base"], ids=lambda path: path.stem)
def test_dry_builds(path: Path, small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The towers at full size; published weights are named but not fetched."""
    settings = [*FOR_ALL, f"text.tokenizer={small.tokenizer}", "image.pretrained=false"]
    assert cli.main(["pretrain", path.stem, "--dry-run", *settings]) == 0
    assert "trainable" in capsys.readouterr().out
