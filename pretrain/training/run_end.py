"""What a run prints at its end: the figures of its evaluation, where it lies, and the next commands to type.

The figures are those of the checkpoint that `clipfuse evaluate RUN` takes. They are known, so nothing is evaluated again.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from pretrain.checkpoints import store
from pretrain.checkpoints.export import FORMATS
from pretrain.data.config import format_patterns
from pretrain.errors import UserError
from pretrain.formats import onnx
from pretrain.printable import format_count
from pretrain.runtime import distributed
from pretrain.runtime.console import console, log_info
from pretrain.training.loop import Outcome
from pretrain.training.run_dir import RunFolder
from pretrain.training.trainer_state import load_trainer_state


@dataclass(frozen=True)
class Evaluated:
    """A checkpoint of a run and the metrics of its evaluation on data.val."""

    checkpoint: Path
    step: int
    metrics: dict[str, float]


def find_evaluated(folder: RunFolder) -> Evaluated | None:
    """Return the best checkpoint of a run with its metrics; None where none was evaluated, or it cannot be read."""
    best = store.read_pointer(folder.checkpoints, "best")
    if best is None:
        return None
    try:
        metrics = load_trainer_state(best / "state" / "trainer.pt")["results"]
    except UserError:
        return None
    return Evaluated(best, store.parse_step(best), metrics) if metrics else None


def print_end(
    folder: RunFolder,
    outcome: Outcome,
    primary_metric: str,
    build_table: Callable[[Evaluated], Table],
    commands: list[list[str]],
) -> None:
    """Print, on rank 0, how a run ended.

    Args:
        folder: of the run.
        outcome: a run that was stopped gets one line.
        primary_metric: the one that this line names.
        build_table: the table that `clipfuse evaluate` prints.
        commands: the words of the next commands.
    """
    if not distributed.is_main():
        return
    evaluated = find_evaluated(folder)
    if outcome.state == "stopped":
        if evaluated is not None and primary_metric in evaluated.metrics:
            score = f"{primary_metric} {evaluated.metrics[primary_metric]:.4g} at step {evaluated.step:,}"
            log_info(f"the run lies in {folder.path}; best so far: {score}")
        return
    log_info(f"done: {format_count(outcome.step, 'step')}; the run lies in {folder.path}")
    if evaluated is not None:
        console.print(build_table(evaluated), soft_wrap=False)
    log_info("next:")
    for words in commands:
        log_info(f"  {shlex.join(words)}")


def named_formats(exports: str) -> list[str]:
    """Return the formats that can hold a model whole, by the line of `describe_formats`, and whose libraries are here."""
    match = re.match(r"exports: (.*?) can hold this model", exports)
    names = match[1].split(", ") if match else []
    return [name for name in names if name in FORMATS and (name != "onnx" or _has_onnx())]


def _has_onnx() -> bool:
    try:
        onnx.check_libraries()
    except UserError:
        return False
    return True


def report_command(folder: RunFolder) -> list[str]:
    """Return the command that writes the run's report."""
    return ["clipfuse", "report", str(folder.path)]


def export_command(folder: RunFolder, format_name: str, step: int) -> list[str]:
    """Return the command that exports a run, to a folder that does not exist yet."""
    name = f"{folder.path}-{format_name}"
    return ["clipfuse", "export", str(folder.path), f"{name}-{step}" if Path(name).exists() else name, "--format", format_name]


def evaluate_command(config: Any, folder: RunFolder) -> list[list[str]]:
    """Return the command that evaluates a run on its data.val, as a list of one; [] without data.val."""
    if not config.data.val:
        return []
    return [["clipfuse", "evaluate", str(folder.path), "--data", format_patterns(config.data.val, "data.val")]]


def index_command(config: Any, folder: RunFolder, modality: str = "") -> list[list[str]]:
    """Return the command that makes the images or sounds of a run searchable, as a list of one; [] for data without any.

    modality: which of them, where the run has both; "" = images.
    """
    data, has_sounds = data_option(config), config.others.get("audio") is not None
    if not data or config.text is None or (config.image is None and not has_sounds):
        return []
    only = ["--only", modality] if modality == "audio" and config.image is not None else []
    return [["clipfuse", "index", str(folder.path), *data, "--db", str(folder.path / "index"), *only]]


def finetune_command(config: Any, folder: RunFolder) -> list[list[str]]:
    """Return the command that fine-tunes a run to re-rank on the same data, as a list of one; [] for synthetic data."""
    data = config.data
    if data.train == "synthetic" or config.image is None or config.text is None:
        return []
    settings = {"init": str(folder.path), "run": f"{folder.path}-retrieval", "data.train": data.train, "data.val": data.val}
    for name in ("caption", "val_caption"):
        if getattr(data, name) not in ("txt", None):
            settings[f"data.{name}"] = getattr(data, name)
    words = [f"{key}={_format_setting(value)}" for key, value in settings.items()]
    return [["clipfuse", "finetune", "retrieval", *words, *([] if data.val else ["train.eval_every=0"])]]


def _format_setting(value: Any) -> str:
    """Return the text of a setting: a text as it is, lists and mappings as YAML reads them."""
    return value if isinstance(value, str) else json.dumps(value)


def data_option(config: Any) -> list[str]:
    """Return the option that gives a command the run's data.val, or without one its data.train; [] for synthetic data."""
    key = "val" if config.data.val else "train"
    spec = getattr(config.data, key)
    return [] if spec == "synthetic" else ["--data", format_patterns(spec, f"data.{key}")]
