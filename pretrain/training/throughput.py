"""Samples per second, data wait, memory and MFU between two log steps."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pretrain.data.batch import Batch
from pretrain.data.batch_sizes import BatchSizes
from pretrain.runtime.gpus import find_gpu, peak_flops
from pretrain.runtime.memory import peak_bytes
from pretrain.training.flops import FlopCounter


class ThroughputMeter:
    """Measures training from one log line to the next; evaluation and saving are excluded.

    Args:
        batches: the number of samples of each step, over all processes.
        total_steps: steps of the run.
        step: the step at which measuring begins.
        flops: counts the forward and backward operations of this process's part of a batch, for MFU; None = unknown.
        precision: train.precision, which decides the peak that MFU compares with.
    """

    def __init__(
        self,
        batches: BatchSizes,
        total_steps: int,
        step: int,
        device: torch.device,
        flops: FlopCounter | None,
        precision: str = "fp32",
    ) -> None:
        self._batches, self._total, self._step, self._device = batches, total_steps, step, device
        self._peak = _find_peak(device, precision)
        self._flops = flops if self._peak else None
        self._wait = self._excluded = 0.0
        self._rate = math.nan
        self._begin = time.perf_counter()

    @contextmanager
    def time_data_wait(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        begin = time.perf_counter()
        yield
        self._wait += time.perf_counter() - begin

    @contextmanager
    def exclude(self) -> Iterator[None]:
        """Leave the time inside out of the training time."""
        begin = time.perf_counter()
        yield
        self._excluded += time.perf_counter() - begin

    @property
    def wait_seconds(self) -> float:
        """The time that this process has waited for data since the last line."""
        return self._wait

    def count_steps(self, step: int) -> int:
        """Return the number of steps since the last line, up to `step`."""
        return step - self._step

    def count_step(self, batch: Batch) -> None:
        """Count the operations of a step on this batch."""
        if self._flops is not None:
            self._flops.add(batch)

    def set_patch_dropout(self, fraction: float | None) -> None:
        """Count the operations of the steps that follow with so many image patches left out; None = as the tower is built."""
        if self._flops is not None:
            self._flops.patch_dropout = fraction

    def build_line(
        self, step: int, lr: float, numbers: dict[str, float], skipped: int, bad: dict[str, int], filtered: dict[str, int]
    ) -> dict[str, Any]:
        """Build a line of metrics.jsonl, and begin to measure anew.

        numbers: what train_step() returned, averaged over processes. bad, filtered: the loader's counts by reason.
        """
        now = time.perf_counter()
        seconds = max(1e-9, now - self._begin - self._excluded)
        step_seconds = seconds / self.count_steps(step)
        self._rate = (self._batches.position(step) - self._batches.position(self._step)) / seconds
        mfu = self._flops.take() / seconds / self._peak if self._flops is not None else None
        wait = self._wait
        self._begin, self._step = now, step
        self._wait = self._excluded = 0.0
        return {
            "step": step,
            "samples_seen": self._batches.position(step),
            "time": time.time(),
            "lr": lr,
            **numbers,
            "samples_per_second": self._rate,
            "step_seconds": step_seconds,
            "data_wait_seconds": wait,
            "data_wait_share": wait / seconds,
            "memory_gib": peak_bytes(self._device) / 2**30,
            "mfu": mfu,
            "skipped": skipped,
            "bad_samples": sum(bad.values()),
            **{f"bad/{reason}": count for reason, count in bad.items()},
            **({"filtered_samples": sum(filtered.values())} if filtered else {}),
            **{f"filtered/{reason}": count for reason, count in filtered.items()},
        }

    def seconds_left(self, step: int) -> float:
        """Return the seconds to the end of the run at the rate of the last log line, whatever stages follow."""
        return (self._batches.position(self._total) - self._batches.position(step)) / self._rate


def _find_peak(device: torch.device, precision: str) -> float:
    """Return the peak of a device in FLOP/s; 0 for the CPU and for GPUs that the table lacks."""
    gpu = find_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return peak_flops(gpu, precision, torch.backends.cuda.matmul.fp32_precision == "tf32") if gpu else 0.0
