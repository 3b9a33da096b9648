"""A signal to stop during an evaluation ends it, and the run that resumes makes up for it. Long evaluations are not silent."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch import nn

from pretrain import registry, train
from pretrain.checkpoints import store
from pretrain.config import find_config
from pretrain.runtime import progress
from pretrain.runtime.signals import catch_stop_signals
from pretrain.training.loop import Outcome, fit
from pretrain.training.objective import Contrastive
from pretrain.training.session import open_session
from tests.support import Small, read_jsonl, read_losses
from tests.support.launches import read_status

Evaluate = Callable[[nn.Module], dict[str, float]]


def run(small: Small, name: str, evaluate: Evaluate) -> Outcome:
    """Run three steps with evaluations by `evaluate` after the second and the third."""
    settings = small.settings(name, "train.steps=3", "train.eval_every=2", f"data.val={small.val}")
    config = train.load_config(find_config("scenes", "pretrain"), settings)
    with open_session(config) as session:
        parts = train.build(config)
        plan = session.build_plan(parts.loader, config, parts.tokenizer, "score", model=parts.model)
        objective = Contrastive(registry.get_component("losses", "clip").build(config.loss))
        strategy = session.build_strategy()
        return fit(plan, session.folder, strategy, parts.model, objective, parts.loader, evaluate, session.checkpoint)


def test_a_signal_ends_the_evaluation_and_the_run_makes_up_for_it(
    small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a signal in each of the two evaluations, the run has the losses, metrics and best checkpoint of one without."""
    batches: list[int] = []
    signals: Iterator[bool] = iter(())

    def evaluate(model: nn.Module) -> dict[str, float]:
        is_stopped = next(signals, False)
        for batch in progress.report_progress("evaluating", 4):
            batches.append(batch)
            if is_stopped and batch == 1:
                os.kill(os.getpid(), signal.SIGINT)
        return {"score": float(next(model.parameters()).detach().sum())}

    assert run(small, "whole", evaluate).state == "done"
    assert batches == [0, 1, 2, 3] * 2

    signals, outcomes = iter((True, False, True, True, False)), []
    batches.clear()
    capsys.readouterr()
    while not outcomes or outcomes[-1] != ("done", 3):
        outcome = run(small, "parts", evaluate)
        outcomes.append((outcome.state, outcome.step))
        assert read_status(in_tmp / "runs/parts")["state"] == outcome.state
    assert outcomes == [("stopped", 2), ("stopped", 3), ("stopped", 3), ("done", 3)]
    assert batches == [0, 1, 0, 1, 2, 3, 0, 1, 0, 1, 0, 1, 2, 3]
    error = capsys.readouterr().err
    assert error.count("SIGINT: saving after this step, then stopping") == 3
    assert "the evaluation at step 3 is not finished: it begins anew when the run resumes" in error
    assert "nothing left to train" not in error
    assert read_losses(in_tmp / "runs/parts") == read_losses(in_tmp / "runs/whole")
    scores, best = [], []
    for name in ("whole", "parts"):
        lines = read_jsonl(in_tmp / "runs" / name / "metrics.jsonl")
        scores.append([(line["step"], line["val/score"]) for line in lines if "val/score" in line])
        best.append(store.read_pointer(in_tmp / "runs" / name / "checkpoints", "best"))
    assert scores[0] == scores[1]
    assert best[0] is not None
    assert best[1] is not None
    assert best[0].name == best[1].name


def test_a_long_loop_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.0)
    assert list(progress.report_progress("evaluating", 3)) == [0, 1, 2]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "evaluating: batch 1 of 3, eta 0:00"
    monkeypatch.setattr(progress, "FIRST_SECONDS", 5.0)
    assert list(progress.report_progress("evaluating", 3)) == [0, 1, 2]
    with catch_stop_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        assert list(progress.report_progress("evaluating", 2)) == [0, 1]  # of other work, it ends nothing
    assert capsys.readouterr().err == "SIGTERM: saving after this step, then stopping\n"
