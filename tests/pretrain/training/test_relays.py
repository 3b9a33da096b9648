"""A run that is stopped and resumed on other numbers of processes and workers equals one that was never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from launch import cli
from tests.support import Small, read_losses, read_sample_keys
from tests.support.launches import eventful_settings
from tests.support.relay import Moment, read_batch_keys, run_processes

STEPS = 28
TRAIN_EDGE, VAL_EDGE = 25, 16
"""Steps in which an epoch of each source ends: 300 samples, 12 in a batch; 64 samples, 4 in a batch."""


class Leg(NamedTuple):
    """A start of the run, and where it stops."""

    processes: int
    workers: int = 0
    at: int = STEPS
    """The step, counted in this leg, in which the last process receives SIGTERM."""
    moment: Moment = "computing"


def settings(small: Small, run: Path, leg: Leg) -> list[str]:
    """Return the arguments of a leg: two weighted sources, evaluations, checkpoints and averaged weights."""
    return [
        "scenes",
        *eventful_settings(
            small,
            run,
            leg.processes,
            leg.workers,
            f"train.steps={STEPS}",
            "train.save_every=6",
            "train.eval_every=9",
            "loss.name=tests.support.failing_loss",
            "loss.how=terminate",
            f"loss.at={leg.at if leg.moment == 'computing' else STEPS + 1}",
        ),
    ]


def run_leg(small: Small, run: Path, leg: Leg, code: int) -> dict[int, list[str]]:
    """Run a leg, check its exit code, and return {step: sample keys} of the run since the number of processes changed."""
    assert run_processes(leg.processes, settings(small, run, leg), run.parent, leg.moment) == code
    return read_batch_keys(run, leg.processes)


@pytest.fixture(scope="module")
def undisturbed(small: Small, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By number of processes: a run that was never stopped."""
    runs = {processes: tmp_path_factory.mktemp("undisturbed") / "run" for processes in (1, 2)}
    keys = [run_leg(small, run, Leg(processes, at=STEPS + 1), 0) for processes, run in runs.items()]
    assert keys[0] == keys[1]
    assert read_losses(runs[2]) == pytest.approx(read_losses(runs[1]), rel=2e-5)
    return runs


RELAYS = {
    "1-1-1": [Leg(1, 1, 4), Leg(1, 0, VAL_EDGE - 4), Leg(1, 2, 3), Leg(1, 0, moment="saving"), Leg(1)],
    "1-1-edge": [Leg(1, 0, moment="evaluating"), Leg(1, 0, TRAIN_EDGE - 9), Leg(1, 1)],
    "2-2-2": [Leg(2, 0, 3), Leg(2, 1, moment="saving"), Leg(2, 0, moment="evaluating"), Leg(2)],
    "1-2-1": [Leg(1, 0, moment="saving"), Leg(2, 1, 3), Leg(2, 0, moment="evaluating"), Leg(1)],
    "2-4-2": [Leg(2, 0, 5), Leg(4, 0, 4), Leg(2, 1, moment="saving"), Leg(2)],
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", RELAYS)
def test_a_relay_equals_the_undisturbed_run(small: Small, undisturbed: dict[int, Path], tmp_path: Path, name: str) -> None:
    """The samples are the same; so are the losses, bit for bit where the number of processes never changes."""
    run = tmp_path / "run"
    keys: dict[int, list[str]] = {}
    legs = RELAYS[name]
    for leg in legs:
        known = max(keys, default=0)
        keys |= {step: k for step, k in run_leg(small, run, leg, 0 if leg is legs[-1] else 75).items() if step > known}
    numbers = {leg.processes for leg in legs}
    reference = undisturbed[min(numbers)]
    assert keys == read_batch_keys(reference, min(numbers))
    losses, expected = read_losses(run), read_losses(reference)
    assert list(losses) == list(range(1, STEPS + 1))
    if len(numbers) > 1:
        assert losses == pytest.approx(expected, rel=2e-5)
        return
    assert losses == expected
    for file in ("model.safetensors", "state/weights/model.safetensors"):
        path = f"checkpoints/step-{STEPS:07d}/{file}"
        assert (run / path).read_bytes() == (reference / path).read_bytes()


def test_a_run_resumes_with_the_streams_that_it_began_with(small: Small, in_tmp: Path) -> None:
    """As runs do that began where the default was another one."""

    def run(name: str, steps: int, *more: str) -> dict[int, list[str]]:
        words = small.settings(name, f"train.steps={steps}", "train.audit=true", "optim.schedule=constant", *more)
        assert cli.main(["pretrain", "scenes", *words]) == 0
        return read_sample_keys(in_tmp / "runs" / name)

    streams = ["data.streams=2", "data.block=50"]
    straight = run("straight", 5, *streams)
    run("stopped", 2, *streams)
    assert run("stopped", 5, "data.block=50") == straight
    assert run("plain", 5) != straight
