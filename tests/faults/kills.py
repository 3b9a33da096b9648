"""Real training that is killed, stopped and frozen at seeded moments, against a run that was never disturbed.

A campaign is one run: legs of 1, 2 or 4 processes with 0 to 2 data workers each. A fault ends each leg but the last, and the
same command goes on with another leg. In the end every sample that the undisturbed run consumed must have been consumed once,
in the same order, and losses, evaluations and weights must be equal: bit for bit where the number of processes never changes,
else to the rounding of another order of summation (invariants 2 and 3).
"""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil
import torch
from safetensors.torch import load_file

from tests.faults import positions
from tests.support import Small, read_jsonl
from tests.support.launches import Launcher, clipfuse_command, eventful_settings, start_launcher

STEPS = 40
TRAIN_EDGE, VAL_EDGE = 25, 16
"""Steps in which an epoch of each source ends: 300 samples, 12 in a batch; 64 samples, 4 in a batch."""
SAVE_EVERY, EVAL_EVERY = 5, 7
TOLERANCE = 2e-5
"""Largest relative difference of losses between numbers of processes: sums in another order, over all steps."""

Action = Literal[
    "SIGKILL to all", "SIGKILL to a rank", "SIGKILL to the launcher", "SIGKILL to a worker", "SIGTERM",
    "freeze all", "freeze a rank", "freeze a worker",
]  # fmt: skip
ACTIONS: tuple[Action, ...] = (
    "SIGKILL to all",
    "SIGKILL to a rank",
    "SIGKILL to the launcher",
    "SIGKILL to a worker",
    "SIGTERM",
)
"""Those that end a leg."""
FREEZES: tuple[Action, ...] = ("freeze all", "freeze a rank", "freeze a worker")
PHASES = ("waiting for data", "computing", "evaluating", "saving", "writing")
"""What a rank does when the fault comes. "writing": files of a checkpoint are being written, by whatever thread.

A kill of all processes may also come while they start ("starting")."""


@dataclass(frozen=True)
class Fault:
    """What happens to a run, and when: `delay` seconds after a rank is first seen in `phase`, in `step` or a later one."""

    action: Action
    step: int
    phase: str
    delay: float = 0.0
    seconds: float = 0.0
    """How long a freeze lasts."""

    @property
    def ends(self) -> bool:
        """Whether the run must be started again."""
        return self.action not in FREEZES


@dataclass(frozen=True)
class Leg:
    """A start of the run, and what happens to it."""

    processes: int
    workers: int
    faults: tuple[Fault, ...] = ()


@dataclass
class Strike:
    """A fault that has happened; after the run has ended, what it cost."""

    leg: Leg
    fault: Fault
    step: int
    moment: str
    has_survived: bool = False
    """Whether the run went on after it, to the next fault or its end."""
    samples_lost: int = 0


@dataclass
class Verdict:
    """A run compared with the undisturbed one."""

    lost: int
    """Samples that the undisturbed run consumed and this one did not."""
    repeated: int
    moved: int
    """Steps whose samples are others, or in another order."""
    losses: float
    """The largest relative difference of a loss or a metric; 0 = bit for bit."""
    weights: float
    """The largest absolute difference of a weight; 0 = the same bytes."""
    lost_by_step: Counter[int] = field(default_factory=Counter)


# ---------------------------------------------------------------------------------------------------------------------
# Drawing campaigns


def draw_legs(rng: random.Random, sizes: Sequence[int], steps: Sequence[int] = (), freezes: bool = False) -> list[Leg]:
    """Draw the legs of a campaign.

    Args:
        sizes: the number of processes of each leg; a fault ends each but the last one.
        steps: of some faults; the others are drawn.
        freezes: let a freeze precede each fault that leaves time for it.
    """
    count = len(sizes) - 1
    free = sorted(set(range(2, STEPS - SAVE_EVERY - 4)) - set(steps))
    moments = sorted([*steps, *rng.sample(free, count - len(steps))])
    legs, before = [], 0
    for processes, step in zip(sizes[:-1], moments, strict=True):
        workers = rng.choice([0, 1, 2])
        ending = _draw_action(rng, ACTIONS, processes, workers)
        phase = rng.choice((*PHASES, "starting") if ending == "SIGKILL to all" else PHASES)
        if step in steps:  # there, and not a few steps later
            phase = rng.choice(PHASES[:2])
        faults = [Fault(ending, step, phase, rng.uniform(0.2, 3.0) if phase == "starting" else 0.05 * rng.random() ** 2)]
        if freezes and step - before > 3 and phase != "starting":
            action = _draw_action(rng, FREEZES, processes, workers)
            faults.insert(
                0, Fault(action, rng.randrange(before + 1, step - 1), rng.choice(PHASES[:2]), 0.0, rng.uniform(0.3, 2.0))
            )
        legs.append(Leg(processes, workers, tuple(faults)))
        before = step
    return [*legs, Leg(sizes[-1], rng.choice([0, 1, 2]))]


def _draw_action(rng: random.Random, actions: Sequence[Action], processes: int, workers: int) -> Action:
    fitting = [
        action for action in actions
        if (workers or "worker" not in action) and (processes > 1 or ("a rank" not in action and "launcher" not in action))
    ]  # fmt: skip
    return rng.choice(fitting)


# ---------------------------------------------------------------------------------------------------------------------
# Running a campaign


def settings(small: Small, run: Path, leg: Leg, more: Sequence[str] = ()) -> list[str]:
    """Return the arguments of a leg: two weighted sources, frequent evaluations and checkpoints, averaged weights."""
    return [
        "scenes",
        *(["--nproc", str(leg.processes)] if leg.processes > 1 else []),
        *eventful_settings(
            small,
            run,
            leg.processes,
            leg.workers,
            f"train.steps={STEPS}",
            f"train.save_every={SAVE_EVERY}",
            f"train.eval_every={EVAL_EVERY}",
            "train.timeout=120",
            *more,
        ),
    ]


def run_campaign(
    small: Small, run: Path, legs: Sequence[Leg], more: Sequence[str] = (), strikes: list[Strike] | None = None
) -> list[Strike]:
    """Run all legs; return the faults that happened. Raises AssertionError where a leg does not end as it must.

    strikes: where they are noted as they happen.
    """
    strikes = [] if strikes is None else strikes
    for leg in legs:
        folder = run.parent / f"positions-{time.monotonic_ns()}"
        folder.mkdir()
        command = clipfuse_command("pretrain", *settings(small, run, leg, more))
        command[2] = "tests.faults.traced"
        with start_launcher(*command, cwd=run.parent, **{positions.FOLDER: str(folder)}) as launcher:
            for fault in leg.faults:
                rank = fault.step % leg.processes
                wait_for_moment(launcher, run, folder, rank, fault)
                _note_survivors(strikes)
                _strike(launcher, leg, rank, fault)
                step, phase = positions.read(folder, rank)
                if list((run / "checkpoints").glob(".step-*.partial")) and phase != "saving":
                    phase = f"{phase}, files being written"
                strikes.append(Strike(leg, fault, step or (strikes[-1].step if strikes else 1), phase))
                if fault.ends:
                    _wait_for_end(launcher, fault)
            if not leg.faults or not leg.faults[-1].ends:
                launcher.wait_for_exit(0)
    _note_survivors(strikes)
    return strikes


def _note_survivors(strikes: Sequence[Strike]) -> None:
    for strike in strikes:
        strike.has_survived = True


def wait_for_moment(launcher: Launcher, run: Path, folder: Path, rank: int, fault: Fault) -> None:
    """Wait until the moment of a fault, or for some steps longer where its phase does not come."""
    deadline, latest = time.monotonic() + 240, fault.step + SAVE_EVERY + 2
    if fault.phase == "starting":
        time.sleep(fault.delay)
        return
    while True:
        step, phase = positions.read(folder, rank)
        is_phase = any((run / "checkpoints").glob(".step-*.partial")) if fault.phase == "writing" else phase == fault.phase
        if (step >= fault.step and is_phase) or step > latest:
            break
        code = launcher.process.poll()
        assert code is None, f"ended with {code} before {fault}, at step {step}\n{launcher.output[-4000:]}"
        assert time.monotonic() < deadline, f"{fault} did not come\n{launcher.output[-4000:]}"
        time.sleep(0.0005)
    time.sleep(fault.delay)


def _strike(launcher: Launcher, leg: Leg, rank: int, fault: Fault) -> None:
    """Do to the processes of a leg what a fault does."""
    main = psutil.Process(launcher.process.pid)
    ranks = launcher.ranks()  # which the launcher's descendants are noted by, too
    if leg.processes == 1:
        ranks = {0: main}
    if fault.action in ("SIGTERM", "SIGKILL to the launcher"):
        launcher.process.send_signal(signal.SIGTERM if fault.action == "SIGTERM" else signal.SIGKILL)
        return
    victims = [main, *main.children(recursive=True)] if fault.action.endswith("all") else [ranks[rank]]
    if fault.action.endswith("worker"):
        victims = _find_workers(ranks[rank])[-1:]
    if fault.ends:
        _send(victims, signal.SIGKILL)
        return
    _send(victims, signal.SIGSTOP)
    time.sleep(fault.seconds)
    _send(victims, signal.SIGCONT)


def _find_workers(rank: psutil.Process) -> list[psutil.Process]:
    """Return the data workers of a rank, which start with its first step."""
    deadline = time.monotonic() + 60
    while True:
        with suppress(psutil.NoSuchProcess):
            if workers := [child for child in rank.children() if "resource_tracker" not in " ".join(child.cmdline())]:
                return workers
        assert time.monotonic() < deadline, "no data worker has started"
        time.sleep(0.01)


def _send(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _wait_for_end(launcher: Launcher, fault: Fault) -> None:
    """Wait until all processes of a leg have ended by themselves, with the exit code that belongs to the fault."""
    is_alone = fault.action == "SIGKILL to all"
    codes = {"SIGTERM": 75, "SIGKILL to all": -9, "SIGKILL to the launcher": -9}
    output = launcher.wait_for_exit(codes.get(fault.action, 1), 120)
    if fault.action == "SIGKILL to a worker":
        assert "a data worker (process" in output, output[-3000:]
    if fault.action == "SIGKILL to a rank":
        assert "was killed by SIGKILL" in output, output[-3000:]
    deadline = time.monotonic() + (5 if is_alone else 60)
    while alive := [process for process in launcher._descendants.values() if _is_alive(process)]:
        assert time.monotonic() < deadline, f"{alive} outlive {fault}"
        time.sleep(0.02)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Comparing two runs


def read_keys(run: Path) -> dict[int, list[str]]:
    """Read {step: sample keys of the whole batch in order} from the audit files of all ranks that ever were."""
    batches: dict[int, list[str]] = {}
    for path in sorted(run.glob("audit-*.jsonl"), key=lambda path: int(path.stem.removeprefix("audit-"))):
        for line in read_jsonl(path):
            batches.setdefault(line["step"], []).extend(line["keys"])
    return batches


def compare_keys(keys: dict[int, list[str]], expected: dict[int, list[str]]) -> Verdict:
    """Compare the samples that two runs consumed, {step: keys}; losses and weights count as equal."""
    steps = expected.keys() | keys.keys()
    pairs = {step: (Counter(keys.get(step, [])), Counter(expected.get(step, []))) for step in steps}
    lost_by_step = Counter({step: (wanted - consumed).total() for step, (consumed, wanted) in pairs.items()})
    repeated = sum((consumed - wanted).total() for consumed, wanted in pairs.values())
    moved = sum(keys.get(step) != expected.get(step) for step in steps)
    return Verdict(lost_by_step.total(), repeated, moved, 0.0, 0.0, lost_by_step)


def compare(run: Path, reference: Path) -> Verdict:
    """Compare a run that has ended with the undisturbed one."""
    verdict = compare_keys(read_keys(run), read_keys(reference))
    verdict.losses, verdict.weights = _compare_numbers(run, reference), _compare_weights(run, reference)
    return verdict


def _compare_numbers(run: Path, reference: Path) -> float:
    """Return the largest relative difference of losses; evaluations must be equal, or of the same steps if weights differ."""
    lines, expected = (read_jsonl(path / "metrics.jsonl") for path in (run, reference))
    names = ("step", "samples_seen", "skipped")
    assert [[line.get(name) for name in names] for line in lines] == [[line.get(name) for name in names] for line in expected]
    differences = [0.0]
    for line, other in zip(lines, expected, strict=True):
        if "loss" in other:
            differences.append(abs(line["loss"] - other["loss"]) / abs(other["loss"]))
    if not max(differences):
        metrics = [[{k: v for k, v in line.items() if k.startswith("val/")} for line in part] for part in (lines, expected)]
        assert metrics[0] == metrics[1]
    return max(differences)


def _compare_weights(run: Path, reference: Path) -> float:
    differences = [0.0]
    for name in ("model.safetensors", "state/weights/model.safetensors"):
        path = f"checkpoints/step-{STEPS:07d}/{name}"
        weights, expected = load_file(run / path), load_file(reference / path)
        assert weights.keys() == expected.keys()
        differences += [float((weights[key] - value).abs().max()) for key, value in expected.items()]
        assert all(torch.isfinite(value).all() for value in weights.values())
    return max(differences)


def check(verdict: Verdict, is_exact: bool) -> None:
    """Raise AssertionError where a run differs from the undisturbed one by more than invariants 2 and 3 allow."""
    assert (verdict.lost, verdict.repeated, verdict.moved) == (0, 0, 0), verdict
    assert verdict.losses <= (0.0 if is_exact else TOLERANCE), verdict
    assert verdict.weights <= (0.0 if is_exact else 1e-3), verdict


def credit(strikes: Sequence[Strike], verdict: Verdict) -> None:
    """Write into each strike the samples lost between it and the next one."""
    for strike, following in zip(strikes, [*strikes[1:], None], strict=True):
        end = following.step if following is not None else STEPS + 1
        strike.samples_lost = sum(count for step, count in verdict.lost_by_step.items() if strike.step <= step < end)
