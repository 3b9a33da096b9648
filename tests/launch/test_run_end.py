"""What a run prints at its end: the table of `clipfuse evaluate`, where the run lies, and commands that work as printed."""

import shlex
from pathlib import Path

import pytest
from rich.table import Table

from launch import cli
from pretrain.config import find_config
from pretrain.train import load_config, suggest_commands
from pretrain.training.loop import Outcome
from pretrain.training.run_dir import RunFolder
from pretrain.training.run_end import print_end
from tests.support import Small


def rows(text: str) -> list[str]:
    """Return the rows of a table of figures."""
    return [" ".join(line.split()) for line in text.splitlines() if line.startswith("│")]


def run_next_commands(error: str) -> list[list[str]]:
    """Run the commands that were printed, and return their words. Exports to ONNX take long: other tests run them."""
    commands = [
        shlex.split(line) for line in error[error.index("next:\n") :].splitlines()[1:] if line.startswith("  clipfuse ")
    ]
    for command in commands:
        assert command[-1] == "onnx" or cli.main(command[1:]) == 0, command
    return commands


def test_a_run_ends_with_its_figures_and_commands_that_work(
    small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    val = f"data.val={small.val}"
    assert cli.main(["pretrain", "scenes", *small.settings("a run", val, "train.steps=3", "train.eval_every=1")]) == 0
    error = capsys.readouterr().err
    assert "done: 3 steps; the run lies in runs/a run" in error
    commands = run_next_commands(error)
    assert commands == [
        ["clipfuse", "report", "runs/a run"],
        ["clipfuse", "export", "runs/a run", "runs/a run-hf", "--format", "hf"],
    ]
    assert Path("runs/a run/report.html").is_file()
    assert Path("runs/a run-hf/config.json").is_file()
    capsys.readouterr()
    assert cli.main(["evaluate", "runs/a run", "--data", small.val]) == 0  # of the best checkpoint
    assert len(rows(error)) > 5
    assert rows(error) == rows(capsys.readouterr().out)
    print_end(RunFolder("a run"), Outcome("stopped", "stopped by SIGTERM", 2, {}), "text_to_image_R@5", Table, [])
    line = capsys.readouterr().err
    assert line.startswith("the run lies in runs/a run; best so far: text_to_image_R@5 ")
    assert len(line.splitlines()) == 1

    data = [f"data.train={small.train}", val, "data.workers=0", "data.batch_size=16", "train.steps=2", "train.trackers=[]"]
    task = ["classification", "init=runs/a run", "run=kinds", "train.threads=1", "eval.workers=0"]
    assert cli.main(["finetune", *task, *data]) == 0
    error = capsys.readouterr().err
    assert "done: 2 steps; the run lies in runs/kinds" in error
    assert run_next_commands(error) == [
        ["clipfuse", "report", "runs/kinds"],
        ["clipfuse", "export", "runs/kinds", "runs/kinds-onnx", "--format", "onnx"],
    ]
    capsys.readouterr()
    assert cli.main(["evaluate", "runs/kinds", "--data", small.val]) == 0
    assert len(rows(error)) > 1
    assert rows(error) == rows(capsys.readouterr().out)


def test_without_evaluation_and_other_formats(small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bert = "text.args={model_type: bert, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}"
    settings = small.settings("x", "train.steps=1", bert, "text.pool=eot")
    assert cli.main(["pretrain", "scenes", *settings]) == 0
    error = capsys.readouterr().err
    assert not rows(error)
    assert [command[1:] for command in run_next_commands(error)] == [
        ["report", "runs/x"],
        ["export", "runs/x", "runs/x-onnx", "--format", "onnx"],
    ]
    config = load_config(find_config("scenes", "pretrain"), settings)
    _, embed = suggest_commands(config, RunFolder("x"), Outcome("done", "", 1, {}), "exports: no format can hold this model")
    assert embed[:3] == ["clipfuse", "embed", "runs/x"]
    assert cli.main(embed[1:]) == 0
    assert list(Path("runs/x/embeddings").glob("*.parquet"))
