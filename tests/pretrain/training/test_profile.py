"""train.profile: where the time of a step goes, against clocks, counted microseconds and delays that are known."""

from __future__ import annotations

import gzip
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as td
from safetensors.torch import load_file

from launch import cli
from pretrain.data import loader as loaders
from pretrain.errors import ConfigError
from pretrain.optim import OptimConfig
from pretrain.strategies import build_strategy
from pretrain.training import profile_summary as summary
from pretrain.training.config import TrainConfig
from pretrain.training.profile import StepProfiler
from pretrain.training.step import train_step
from tests.support import Small, read_jsonl, read_losses, tiny, world

DELAY = 0.05
"""Seconds that each batch of the slow source takes, and each step of a slow rank."""


def event(name: str, cat: str, ts: float, dur: float, tid: int = 1, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": cat, "ts": ts, "dur": dur, "tid": tid, "args": args}


def mark(name: str, ts: float, dur: float) -> dict[str, Any]:
    return event(summary.MARK + name, "user_annotation", ts, dur)


def microseconds(result: summary.Summary) -> dict[str, int]:
    """Return the parts of all steps together that are not zero."""
    return {name: round(1e6 * result.steps * seconds) for name, seconds in result.parts.items() if seconds}


# ---------------------------------------------------------------------------------------------------------------------
# The parts of a trace that is written by hand


def test_each_instant_of_a_gpu_trace_is_counted_once_by_what_the_gpu_does() -> None:
    events = [
        mark("step", 0, 100),
        mark("data wait", 0, 20),
        mark("forward", 20, 60),
        mark("backward", 40, 20),
        mark("optimizer", 60, 10),
        event("cudaLaunchKernel", "cuda_runtime", 22, 1, correlation=1),
        event("cudaLaunchKernel", "cuda_runtime", 45, 1, tid=2, correlation=2),  # autograd's thread
        event("cudaLaunchKernel", "cuda_runtime", 61, 1, correlation=3),
        event("cudaMemcpyAsync", "cuda_runtime", 21, 1, correlation=4),
        event("gemm", "kernel", 25, 20, 7, correlation=1),
        event("gemm_backward", "kernel", 50, 10, 7, correlation=2),
        event("ncclDevKernel_AllReduce", "kernel", 55, 15, 8, correlation=9),
        event("adamw", "kernel", 72, 6, 7, correlation=3),
        event("Memcpy HtoD", "gpu_memcpy", 21, 6, 7, correlation=4),
    ]
    result = summary.summarize(events)
    assert microseconds(result) == {
        "forward": 20,  # the kernel that was launched there, although it runs on into the backward pass
        "backward": 10,
        "optimizer": 6,
        "data wait": 20,
        "communication": 10,  # what no kernel hides
        "copies": 4,
        "GPU idle": 10,  # 20-21, 45-50, 70-72 and 78-80: the host is in the training step
        "logging, other": 20,
    }
    assert result.operators[0] == ("gemm", pytest.approx(20e-6), 1)


SPANS = {"data wait": 3, "forward": 4, "backward": 5, "optimizer": 2, "gloo:all_reduce": 4, "aten::mm": 9}
"""Names of random events, and how many of each."""


def test_random_cpu_traces_are_divided_as_painting_each_microsecond_divides_them() -> None:
    generator = random.Random(0)
    for _ in range(30):
        spans = {name: sorted(generator.sample(range(1, 200), 2 * count)) for name, count in SPANS.items()}
        pairs = {name: list(zip(points[::2], points[1::2], strict=True)) for name, points in spans.items()}
        events = [mark("step", 0, 100), mark("step", 100, 100)]
        for name, intervals in pairs.items():
            for begin, end in intervals:
                if name in ("gloo:all_reduce", "aten::mm"):
                    tid, cat = (9, "user_annotation") if name.startswith("gloo") else (1, "cpu_op")
                    events.append(event(name, cat, begin, end - begin, tid))
                else:
                    events.append(mark(name, begin, end - begin))
        painted: dict[str, int] = {}
        for instant in range(200):
            active = [name for name, intervals in pairs.items() if any(begin <= instant < end for begin, end in intervals)]
            phases = [name for name in ("backward", "optimizer", "data wait", "forward") if name in active]
            part = phases[0] if phases else "logging, other"
            if "gloo:all_reduce" in active and "aten::mm" not in active:
                part = "communication"
            painted[part] = painted.get(part, 0) + 1
        result = summary.summarize(events)
        assert microseconds(result) == painted
        assert sum(result.parts.values()) == pytest.approx(result.seconds)


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("data wait", "data.workers"),
        ("communication", "train.strategy"),
        ("GPU idle", "train.compile=true"),
        ("logging, other", "train.log_every"),
        ("forward", "train.precision=bf16"),
    ],
)
def test_the_hint_is_about_the_part_that_costs_most(part: str, expected: str) -> None:
    parts = dict.fromkeys(summary.PARTS, 0.0) | {"backward": 0.05}
    parts[part] += 0.05
    assert expected in summary.choose_hint(summary.Summary(1, 0.1, parts, False, []))


@pytest.mark.parametrize("words", ["5", "5:5", "7:3", "-1:4", "a:b", "1:2:3", "1.5:3", ":4", "٣:٤", ""])
def test_a_profile_that_is_no_range_of_steps_is_one_line(words: str) -> None:
    with pytest.raises(ConfigError, match=r"^train\.profile=.*must be START:STOP"):
        TrainConfig(steps=10, profile=words).check()


def test_a_profile_after_the_end_of_the_run_is_refused() -> None:
    TrainConfig(steps=10, profile="9:20", trackers=[]).check()
    with pytest.raises(ConfigError, match=r"train\.profile=10:20 begins at the end of the run: train\.steps=10"):
        TrainConfig(steps=10, profile="10:20").check()


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def read_parts(text: str) -> dict[str, float]:
    """Return {part: milliseconds} from the lines that were printed."""
    lines = [line.split() for line in text.splitlines() if line.startswith("  ") and " ms " in line and "calls" not in line]
    return {" ".join(words[: words.index("ms") - 1]): float(words[words.index("ms") - 1].replace(",", "")) for words in lines}


def test_a_profiled_run_says_how_long_it_waited_and_computes_the_same_bits(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["train.steps=6", "optim.average=0.9", "train.save_every=5"]
    assert cli.main(["pretrain", "scenes", *small.settings(tmp_path / "plain", *common)]) == 0
    read = loaders.TrainingDataset.__getitem__

    def read_slowly(self: Any, positions: Any) -> Any:
        time.sleep(DELAY)
        return read(self, positions)

    monkeypatch.setattr(loaders.TrainingDataset, "__getitem__", read_slowly)
    capsys.readouterr()
    run = tmp_path / "profiled"
    assert cli.main(["pretrain", "scenes", *small.settings(run, *common, "train.profile=2:5")]) == 0
    printed = capsys.readouterr().err

    assert read_losses(run) == read_losses(tmp_path / "plain")
    file = "checkpoints/step-0000006/model.safetensors"
    weights, expected = load_file(run / file), load_file(tmp_path / "plain" / file)
    assert all(torch.equal(weights[name], value) for name, value in expected.items())

    assert f"wrote {run}/profile-2-5.json.gz" in printed
    assert printed.count("\n", printed.index("one step took")) < 30  # one screen
    assert "data wait" in printed.rpartition("hint: ")[2]
    text = (run / "profile-2-5.txt").read_text()
    assert all(line in printed for line in text.splitlines())
    trace = json.loads(gzip.decompress((run / "profile-2-5.json.gz").read_bytes()))["traceEvents"]
    assert sum(event["name"] == "clipfuse: step" for event in trace) == 3

    parts = read_parts(text)
    assert parts["forward"] > 0 < parts["backward"]
    assert parts["optimizer"] > 0 == parts["communication"]
    result = summary.summarize(summary.read_trace(run / "profile-2-5.json.gz"))
    assert sum(result.parts.values()) == pytest.approx(result.seconds)
    rows = {row["step"]: row for row in read_jsonl(run / "metrics.jsonl") if "loss" in row}
    waited = sum(rows[step]["data_wait_seconds"] for step in (3, 4, 5))  # by the clock of the throughput meter
    assert 3 * DELAY <= 3 * result.parts["data wait"] <= waited + 1e-6
    assert 3 * result.parts["data wait"] == pytest.approx(waited, rel=0.1)
    assert 3 * result.seconds <= rows[6]["time"] - rows[2]["time"]

    # a resumed run profiles what is left of the steps
    assert cli.main(["pretrain", "scenes", *small.settings(run, *common, "train.steps=9", "train.profile=4:8")]) == 0
    assert (run / "profile-6-8.json.gz").exists()
    assert list(read_losses(run)) == list(range(1, 10))


def profile_ranks(strategy_name: str, folder: str) -> dict[str, float] | None:
    """Train four tiny steps, with rank 1 late by DELAY at each; return {part: seconds} of the last three, of rank 0."""
    strategy = build_strategy(strategy_name, "fp32", OptimConfig(), torch.device("cpu"))  # type: ignore[arg-type]
    strategy.setup(tiny.build_model("clip"))
    objective, rank = tiny.build_objective("clip"), td.get_rank()
    batch = tiny.build_batch().slice(8 * rank, 8 * rank + 8)
    profiler = StepProfiler("1:4", Path(folder), strategy)
    for step in range(4):
        profiler.begin_step(step)
        time.sleep(DELAY * rank)
        with profiler.phase("forward"):
            train_step(strategy, objective, batch, 2, 1e-3, (0, step, rank))
    profiler.close()
    profiler.close()
    assert "apply" not in vars(strategy)
    if rank:
        return None
    result = summary.summarize(summary.read_trace(Path(folder) / "profile-1-4.json.gz"))
    assert sum(result.parts.values()) == pytest.approx(result.seconds)
    return {name: result.steps * seconds for name, seconds in result.parts.items()}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero3"])
def test_waiting_for_a_late_process_is_communication(strategy: str, tmp_path: Path) -> None:
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed")
    parts, other = world.run(profile_ranks, 2, strategy, str(tmp_path))
    assert other is None
    assert parts["communication"] >= 0.9 * 2 * DELAY  # rank 1 may be late by less in the first of the three steps
    assert parts["forward"] > 0
    assert parts["backward"] > 0
    assert parts["optimizer"] > 0
    assert [path.name for path in tmp_path.glob("profile*.json.gz")] == ["profile-1-4.json.gz"]
