"""Which process is slow, and whether it computes or waits for data.

The steps of all processes take equally long, because each waits for the slowest in collectives. So what is compared is what a
process does alone: it waits for its data, and it encodes its part of the batch, between events on the device. Under fsdp2 and
zero3 encoding contains gathers of weights, in which the fast wait for the slow; there only the waits for data tell them apart.

Nothing is sent for it: at log steps each process's two numbers ride with the metrics, in the one collective that averages them.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.data.batch import Batch
from pretrain.runtime import distributed
from pretrain.runtime.console import log_info
from pretrain.training.objective import Features, Objective

SLOW_FACTOR = 1.3
"""A process is slow if what it does alone takes this many times as long as on the median process..."""
SLOW_SHARE = 0.1
"""...and the difference is this share of a step."""
STARVED_SHARE = 0.25
"""A run is short of data if a process waits for it for this share of the time."""
PERSISTENT = 3
"""Consecutive log steps after which either is reported: a slow process once until it changes, short data once a start."""
MAX_TIMED = 32
"""Calls of encode() between two log steps that are timed: the last ones."""


class TimedObjective:
    """An objective whose encode() is timed: on a GPU by events, which the host does not wait for."""

    def __init__(self, objective: Objective, device: torch.device) -> None:
        self.objective, self.can_split = objective, objective.can_split
        self._on_gpu = device.type == "cuda"
        self._seconds: deque[float] = deque(maxlen=MAX_TIMED)
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=MAX_TIMED)
        self.calls = 0

    def encode(self, model: nn.Module, batch: Batch) -> Features:
        """Encode as the objective does."""
        self.calls += 1
        if not self._on_gpu:
            begin = time.perf_counter()
            features = self.objective.encode(model, batch)
            self._seconds.append(time.perf_counter() - begin)
            return features
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        events[0].record()
        features = self.objective.encode(model, batch)
        events[1].record()
        self._events.append(events)
        return features

    def loss(self, features: Features, targets: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the objective's loss and report."""
        return self.objective.loss(features, targets)

    def take_seconds(self) -> float:
        """Return the time of all calls since the last take, from the mean of those timed.

        On a GPU a call that may still run counts at the next take: nothing waits for it.
        """
        while self._events and self._events[0][1].query():
            begin, end = self._events.popleft()
            self._seconds.append(begin.elapsed_time(end) / 1000)
        total = self.calls * sum(self._seconds) / len(self._seconds) if self._seconds else 0.0
        self._seconds.clear()
        self.calls = 0
        return total


class RankTimes:
    """Compares the processes of a run at log steps.

    Args:
        timed: the objective of this process.
        describe: returns the name of a rank for a line in the log.
        workers: data.workers of each process, for the hint.
    """

    def __init__(self, timed: TimedObjective, describe: Callable[[int], str], workers: int) -> None:
        self._timed, self._describe, self._workers = timed, describe, workers
        self._slow_rank, self._slow_times, self._starved_times = -1, 0, 0
        self._is_starvation_reported = False

    def row(self, wait: float, steps: int) -> Tensor:
        """Return this process's seconds a step: a tensor (2, world) whose mean over processes compare() takes.

        Args:
            wait: the time that it waited for data since the last log step.
            steps: steps since then.
        """
        row = torch.zeros(2, distributed.world_size())
        seconds = torch.tensor([wait, self._timed.take_seconds()]) / steps
        row[:, distributed.rank()] = seconds * distributed.world_size()
        return row

    def compare(self, means: Tensor, step: int, step_seconds: float) -> dict[str, Any]:
        """Return numbers for a line of metrics.jsonl, and log what has been so for PERSISTENT log steps.

        Args:
            means: (2, world), what row() returned, averaged over processes.
            step: the present step.
            step_seconds: the duration of a step, waits for others included.
        """
        waits, encodings = means.double()
        most_wait = float(waits.max()) / step_seconds
        self._starved_times = self._starved_times + 1 if most_wait > STARVED_SHARE else 0
        if self._starved_times >= PERSISTENT and not self._is_starvation_reported:
            self._is_starvation_reported = True
            self._report_starvation(step, most_wait, int(waits.argmax()))
        if len(waits) == 1:
            return {}
        alone = waits + encodings
        slowest, median = int(alone.argmax()), float(alone.median())
        excess = float(alone[slowest]) - median
        is_slow = float(alone[slowest]) > SLOW_FACTOR * median and excess > SLOW_SHARE * step_seconds
        self._slow_times = (self._slow_times + 1 if slowest == self._slow_rank else 1) if is_slow else 0
        self._slow_rank = slowest
        if self._slow_times == PERSISTENT:
            self._report_slow(step, slowest, waits, encodings)
        return {
            "slowest_rank": slowest,
            "slowest_rank_seconds": float(alone[slowest]),
            "median_rank_seconds": median,
            "data_wait_share_max": most_wait,
        }

    def _report_slow(self, step: int, rank: int, waits: Tensor, encodings: Tensor) -> None:
        excess = [float(times[rank] - times.median()) for times in (waits, encodings)]
        alone = waits + encodings
        if excess[0] > excess[1]:
            cause = "it waits for data: compare its disk, its network and what else runs on its cores"
        else:
            cause = "it computes more slowly: compare the clocks and temperature of its GPU, and what else runs there"
        log_info(
            f"step {step}: {self._describe(rank)} is slow, and the others wait for it: alone it takes "
            f"{float(alone[rank]):.3f} s a step, {float(alone[rank] / alone.median().clamp(min=1e-9)):.1f} times the "
            f"median of all processes; {cause}"
        )

    def _report_starvation(self, step: int, share: float, rank: int) -> None:
        cores = len(os.sched_getaffinity(0)) // distributed.local_world_size()
        if self._workers == 0:
            advice = "data.workers=0 reads in the training process itself: set data.workers above 0"
        elif self._workers < cores:
            advice = f"raise data.workers={self._workers} (this process has {cores} cores)"
        else:
            advice = (
                f"data.workers={self._workers} already uses all {cores} cores of this process: store smaller images in the "
                "shards, or read them from a faster disk (data.cache, data.stage=true)"
            )
        name = self._describe(rank) if distributed.world_size() > 1 else "the run"
        log_info(f"step {step}: {name} waits for data for {100 * share:.0f} % of the time, not for computing; {advice}")
