"""Where the time of a step goes, read from the trace of a profile: `split_time` and the lines that a user reads.

A trace is a list of events as chrome://tracing knows them; `ts` and `dur` are microseconds. The loop marks its phases with
events named "clipfuse: ..." (see profile.py). Every instant between the first and the last marked step is counted once:

    on a CPU     communication, while a collective runs and this process computes no operator; else the phase of the loop
    on a GPU     the phase that launched the kernel that runs; else communication, else copies, while these run. While the GPU
                 is idle: data wait, or logging, if the loop is there; else `GPU idle`, because the host is late
"""

from __future__ import annotations

import bisect
import gzip
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARK = "clipfuse: "
"""Prefix of the events with which the loop marks steps and phases."""
STEP, DATA, FORWARD, BACKWARD, OPTIMIZER, SAVING = "step", "data wait", "forward", "backward", "optimizer", "evaluation, saving"
COMMUNICATION, COPIES, IDLE, OTHER = "communication", "copies", "GPU idle", "logging, other"
PHASES = (BACKWARD, OPTIMIZER, DATA, SAVING, FORWARD)
"""The marked phases, the inner ones first: `forward` is what remains of a training step."""
PARTS = (FORWARD, BACKWARD, OPTIMIZER, DATA, COMMUNICATION, COPIES, IDLE, SAVING, OTHER)
"""All parts of the time, as they are printed."""
COLLECTIVES = ("c10d::", "_c10d_functional::", "gloo:", "nccl:", "mpi:", "ucc:")
ENCLOSING = ("autograd", "c10d", "_c10d_functional", "DistributedDataParallel", "FSDP", "Optimizer")
"""Namespaces of events that enclose operators: the time in them may be spent waiting."""
ROWS = 8
"""Operators that are printed."""

Interval = tuple[float, float]
Event = dict[str, Any]


@dataclass
class Summary:
    """Mean seconds of one step, by part of the time and by operator."""

    steps: int
    seconds: float
    """Length of one step. The parts add up to it."""
    parts: dict[str, float]
    on_gpu: bool
    operators: list[tuple[str, float, float]]
    """(name, seconds, calls) of one step, the longest first: kernels on a GPU, else operators without those they call."""


def read_trace(path: Path) -> list[Event]:
    """Return the events with a duration in a trace; gzipped if its name ends in .gz."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [event for event in json.loads(data)["traceEvents"] if event.get("ph") == "X"]


def summarize(events: list[Event]) -> Summary:
    """Divide the time of the marked steps among PARTS. Raises ValueError where no step is marked."""
    steps = [event for event in events if event["name"] == MARK + STEP]
    if not steps:
        raise ValueError("no step is marked in this trace")
    thread = steps[0]["tid"]
    window = (min(event["ts"] for event in steps), max(event["ts"] + event["dur"] for event in steps))
    phases = {
        phase: _union(_interval(event) for event in events if event["name"] == MARK + phase and event["tid"] == thread)
        for phase in PHASES
    }
    device = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    parts = _split_gpu(events, device, phases, window) if device else _split_cpu(events, thread, phases, window)
    count = len(steps)
    seconds = {name: parts.get(name, 0.0) / 1e6 / count for name in PARTS}
    total = (window[1] - window[0]) / 1e6 / count
    operators = _sum_kernels(device) if device else _sum_operators(events, thread, window)
    rows = [(name, us / 1e6 / count, calls / count) for name, us, calls in operators[:ROWS]]
    return Summary(count, total, seconds, bool(device), rows)


# ---------------------------------------------------------------------------------------------------------------------
# Parts of the time


class _Timeline:
    """A window of time, from which parts are taken one after the other: no instant is counted twice."""

    def __init__(self, window: Interval) -> None:
        self.rest = [window]
        self.parts: Counter[str] = Counter()

    def take(self, part: str, intervals: list[Interval]) -> None:
        """Count what is left of the window inside disjoint sorted `intervals` as `part`."""
        rest = _subtract(self.rest, intervals)
        self.parts[part] += _length(self.rest) - _length(rest)  # type: ignore[assignment]
        self.rest = rest


def _split_cpu(events: list[Event], thread: Any, phases: dict[str, list[Interval]], window: Interval) -> dict[str, float]:
    """Return {part: microseconds} of a process that computes on the CPU."""
    computing = _union(
        _interval(event)
        for event in events
        if event.get("cat") == "cpu_op" and event["tid"] == thread and event["name"].partition(":")[0] not in ENCLOSING
        if "::" in event["name"]
    )
    collectives = _union(_interval(event) for event in events if event["name"].startswith(COLLECTIVES))
    timeline = _Timeline(window)
    timeline.take(COMMUNICATION, _subtract(collectives, computing))
    for phase in PHASES:
        timeline.take(phase, phases[phase])
    timeline.take(OTHER, [window])
    return dict(timeline.parts)


def _split_gpu(
    events: list[Event], device: list[Event], phases: dict[str, list[Interval]], window: Interval
) -> dict[str, float]:
    """Return {part: microseconds} of a process that computes on a GPU. device: what the GPU executed."""
    launches = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    by_part: dict[str, list[Interval]] = defaultdict(list)
    for event in device:
        if "nccl" in event["name"].lower():
            part = COMMUNICATION
        elif event["cat"] == "gpu_memcpy":
            part = COPIES
        else:
            launch: Any = launches.get(event.get("args", {}).get("correlation"), event["ts"])
            part = next((phase for phase in PHASES if _contains(phases[phase], launch)), OTHER)
        by_part[part].append(_interval(event))
    timeline = _Timeline(window)
    for part in (*PHASES, OTHER, COMMUNICATION, COPIES):
        timeline.take(part, _union(by_part[part]))
    for part, phase in ((IDLE, BACKWARD), (IDLE, OPTIMIZER), (DATA, DATA), (SAVING, SAVING), (IDLE, FORWARD)):
        timeline.take(part, phases[phase])
    timeline.take(OTHER, [window])
    return dict(timeline.parts)


def _interval(event: Event) -> Interval:
    return event["ts"], event["ts"] + event["dur"]


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the union of intervals as sorted disjoint ones."""
    out: list[Interval] = []
    for begin, end in sorted(intervals):
        if out and begin <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        elif end > begin:
            out.append((begin, end))
    return out


def _subtract(intervals: list[Interval], removed: list[Interval]) -> list[Interval]:
    """Return what is left of sorted disjoint intervals outside other such ones."""
    out: list[Interval] = []
    ends = [end for _, end in removed]
    for begin, end in intervals:
        for other_begin, other_end in removed[bisect.bisect_right(ends, begin) :]:
            if other_begin >= end:
                break
            if other_begin > begin:
                out.append((begin, other_begin))
            begin = max(begin, other_end)
        if begin < end:
            out.append((begin, end))
    return out


def _length(intervals: list[Interval]) -> float:
    return sum(end - begin for begin, end in intervals)


def _contains(intervals: list[Interval], instant: float) -> bool:
    """Return whether an instant lies inside one of sorted disjoint intervals."""
    i = bisect.bisect_right(intervals, (instant, float("inf"))) - 1
    return i >= 0 and instant < intervals[i][1]


# ---------------------------------------------------------------------------------------------------------------------
# Operators


def _sum_kernels(device: list[Event]) -> list[tuple[str, float, int]]:
    """Return (name, microseconds, calls) of what a GPU executed, the longest first."""
    seconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in device:
        seconds[event["name"]] += event["dur"]
        calls[event["name"]] += 1
    return [(name, float(us), calls[name]) for name, us in seconds.most_common()]


def _sum_operators(events: list[Event], thread: Any, window: Interval) -> list[tuple[str, float, int]]:
    """Return (name, microseconds, calls) of the operators on a thread, without those they call, the longest first."""
    inside = [
        event
        for event in events
        if event.get("cat") == "cpu_op" and event["tid"] == thread and window[0] <= event["ts"] < window[1]
    ]
    inside.sort(key=lambda event: (event["ts"], -event["dur"]))
    own = [float(event["dur"]) for event in inside]
    calls: Counter[str] = Counter()
    stack: list[int] = []
    for i, event in enumerate(inside):
        while stack and inside[stack[-1]]["ts"] + inside[stack[-1]]["dur"] <= event["ts"]:
            stack.pop()
        if stack:
            own[stack[-1]] -= event["dur"]
        stack.append(i)
        calls[event["name"]] += 1
    sums: Counter[str] = Counter()
    for event, us in zip(inside, own, strict=True):
        sums[event["name"]] += us  # type: ignore[assignment]
    return [(name, float(us), calls[name]) for name, us in sums.most_common()]


# ---------------------------------------------------------------------------------------------------------------------
# What the user reads


def describe(summary: Summary) -> list[str]:
    """Return the lines of one screen: the parts of a step, the longest operators, and what to do."""
    steps = "step" if summary.steps == 1 else "steps"
    lines = [f"one step took {_milliseconds(summary.seconds)} (mean of {summary.steps} profiled {steps}; profiling adds to it)"]
    for name in PARTS:
        seconds = summary.parts[name]
        if seconds or name in (FORWARD, BACKWARD, OPTIMIZER, DATA, COMMUNICATION, OTHER):
            share = seconds / summary.seconds
            lines.append(f"  {name:20} {_milliseconds(seconds):>12} {100 * share:5.1f} %  {'#' * round(40 * share)}".rstrip())
    lines.append("longest kernels:" if summary.on_gpu else "longest operators on the main thread, without those they call:")
    for name, seconds, calls in summary.operators:
        lines.append(f"  {name[:64]:64} {_milliseconds(seconds):>12} {calls:7.1f} calls")
    return [*lines, f"hint: {choose_hint(summary)}"]


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f} ms"


def choose_hint(summary: Summary) -> str:
    """Return one line on what to change, by the part that costs the most beyond what is usual."""
    share = {name: seconds / summary.seconds for name, seconds in summary.parts.items()}
    hints = {
        DATA: (
            0.1,
            "more data.workers, smaller images in the shards, or shards on a local disk (data.stage=true)",
        ),
        COMMUNICATION: (0.2, "processes wait for each other or the network: a larger data.batch_size, another train.strategy"),
        IDLE: (0.2, "the GPU waits for the host: a larger data.batch_size, or train.compile=true"),
        COPIES: (0.1, "copies between host and device are not hidden by computing: a larger model or batch hides them"),
        OPTIMIZER: (0.2, "the optimizer's work does not grow with the batch: a larger data.batch_size, or zero1 to shard it"),
        OTHER: (0.1, "logging and the loop itself: a larger train.log_every, or steps with more work in each"),
        SAVING: (0.1, "evaluation and saving lie in the profiled steps: larger train.eval_every and train.save_every"),
    }
    excess = {name: share[name] / limit for name, (limit, _) in hints.items() if share[name] > limit}
    if excess:
        name = max(excess, key=lambda part: share[part])
        return f"{name} {100 * share[name]:.0f} %: {hints[name][1]}"
    compute = share[FORWARD] + share[BACKWARD]
    return f"computing takes {100 * compute:.0f} %: train.precision=bf16 and train.compile=true make it faster"
