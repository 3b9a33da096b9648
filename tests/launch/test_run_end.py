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


SHORT = ["train.steps=2", "train.threads=1", "train.trackers=[]", "data.workers=0", "data.batch_size=16", "eval.workers=0"]
"""Settings that make a fine-tuning run that was printed a short one."""


def run_next_commands(error: str) -> list[list[str]]:
    """Run the commands that were printed, and return their words. Exports to ONNX take long: other tests run them."""
    commands = [
        shlex.split(line) for line in error[error.index("next:\n") :].splitlines()[1:] if line.startswith("  clipfuse ")
    ]
    for command in commands:
        more = SHORT if command[1] == "finetune" else []
        assert command[-1] == "onnx" or cli.main([*command[1:], *more]) == 0, command
    return commands


def test_a_run_ends_with_its_figures_and_commands_that_work(
    small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    val = f"data.val={small.val}"
    assert cli.main(["pretrain", "scenes", *small.settings("a run", val, "train.steps=3", "train.eval_every=1")]) == 0
    error = capsys.readouterr().err
    assert "done: 3 steps; the run lies in runs/a run" in error
    assert run_next_commands(error) == [
        ["clipfuse", "report", "runs/a run"],
        ["clipfuse", "evaluate", "runs/a run", "--data", small.val],
        ["clipfuse", "index", "runs/a run", "--data", small.val, "--db", "runs/a run/index"],
        ["clipfuse", "finetune", "retrieval", "init=runs/a run", "run=runs/a run-retrieval", f"data.train={small.train}", val],
        ["clipfuse", "export", "runs/a run", "runs/a run-hf", "--format", "hf"],
    ]
    assert Path("runs/a run/report.html").is_file()
    assert Path("runs/a run-hf/config.json").is_file()
    output = capsys.readouterr()
    assert len(rows(error)) > 5
    assert "\n".join(rows(error)) in "\n".join(rows(output.out))  # of `evaluate`, of the best checkpoint
    print_end(RunFolder("a run"), Outcome("stopped", "stopped by SIGTERM", 2, {}), "text_to_image_R@5", Table, [])
    line = capsys.readouterr().err
    assert line.startswith("the run lies in runs/a run; best so far: text_to_image_R@5 ")
    assert len(line.splitlines()) == 1

    error, run = output.err, "runs/a run-retrieval"
    assert f"done: 2 steps; the run lies in {run}" in error
    report, evaluate, attend, index, search, export = run_next_commands(error)
    assert report == ["clipfuse", "report", run]
    assert evaluate == ["clipfuse", "evaluate", run, "--data", small.val]
    assert attend[:4] == ["clipfuse", "attend", run, f"{run}/example.jpg"]
    assert attend[5:] == ["--out", f"{run}/attended.png"]
    assert index == ["clipfuse", "index", run, "--data", small.val, "--db", f"{run}/index"]
    assert search == ["clipfuse", "search", f"{run}/index", attend[4], "--rerank", run]
    assert export == ["clipfuse", "export", run, f"{run}-onnx", "--format", "onnx"]
    assert Path(f"{run}/attended.png").is_file()
    output = capsys.readouterr()
    assert rows(error)[-1].startswith("│ rerank ms")  # which differs
    assert "\n".join(rows(error)[:-1]) in "\n".join(rows(output.out))
    assert "rerank" in output.out.splitlines()[-1]


def test_without_evaluation_and_other_formats(small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bert = "text.args={model_type: bert, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}"
    settings = small.settings("x", "train.steps=1", bert, "text.pool=eot")
    assert cli.main(["pretrain", "scenes", *settings]) == 0
    error = capsys.readouterr().err
    assert not rows(error)
    report, index, finetune, export = run_next_commands(error)
    assert report[1:] == ["report", "runs/x"]
    assert index[1:] == ["index", "runs/x", "--data", small.train, "--db", "runs/x/index"]
    assert finetune[-1] == "train.eval_every=0"
    assert export[1:] == ["export", "runs/x", "runs/x-onnx", "--format", "onnx"]
    config = load_config(find_config("scenes", "pretrain"), settings)
    *_, embed = suggest_commands(config, RunFolder("x"), Outcome("done", "", 1, {}), "exports: no format can hold this model")
    assert embed[:3] == ["clipfuse", "embed", "runs/x"]
    assert cli.main(embed[1:]) == 0
    assert list(Path("runs/x/embeddings").glob("*.parquet"))
