"""The calls from the command to loss.backward() are exactly those that the docstring of loop.py names."""

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import cli
from pretrain.training import loop
from tests.support import ROOT, Small

FOLDERS = ("launch", "pretrain", "finetune")


def test_the_docstring_names_every_call_from_the_command_to_the_gradient(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    backward = torch.Tensor.backward

    def record_and_call(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        for frame in traceback.extract_stack():
            path = Path(frame.filename)
            if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in FOLDERS:
                calls.append(frame.name)
        calls.append("backward")
        backward(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", record_and_call)
    assert cli.main(["pretrain", "scenes", *small.settings(tmp_path / "run", "train.steps=1")]) == 0
    documented = next(line for line in (loop.__doc__ or "").splitlines() if "->" in line)
    assert calls == [name.strip().removesuffix("()").rpartition(".")[2] for name in documented.split("->")]
    assert len(calls) - 1 == 8
    assert "Eight calls" in (loop.__doc__ or "")
