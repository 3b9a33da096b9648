"""Every shipped configuration builds without network access, and names the command that runs it."""

from pathlib import Path

import pytest

from launch import cli
from pretrain.train import load_config
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


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_pretraining_loads_and_its_first_line_is_the_command(path: Path) -> None:
    load_config(path, [])
    first = path.read_text().splitlines()[0]
    assert first.startswith("# clipfuse pretrain ") or "clipfuse pretrain" in first


@pytest.mark.parametrize("path", [path for path in SHIPPED if path.stem != "clip-base"], ids=lambda path: path.stem)
def test_pretraining_builds_in_a_dry_run(path: Path, small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The towers have their full size. Published weights are not downloaded."""
    settings = [*SETTINGS, f"text.tokenizer={small.tokenizer}", "image.pretrained=false"]
    assert cli.main(["pretrain", path.stem, "--dry-run", *settings]) == 0
    assert "trainable" in capsys.readouterr().out


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
def test_fine_tuning_builds_in_a_dry_run(
    path: Path, small: Small, encoders: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert path.read_text().startswith(f"# clipfuse finetune {path.stem} ")
    data = [f"data.train={small.train}", f"data.val={small.val}", "data.workers=0"]
    assert cli.main(["finetune", path.stem, "--dry-run", f"init={encoders}", *data, "data.batch_size=16"]) == 0
    output = capsys.readouterr().out
    assert "trainable" in output
    assert f"name: {path.stem}" in output
