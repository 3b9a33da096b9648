"""train.profile=START:STOP: a trace of these steps in the run folder, and where their time goes.

Process 0 records with torch.profiler, and the loop marks its phases in the trace. The other processes run as ever. A profile
changes no number. Outside of the profiled steps a phase costs one call that returns an empty context.

    profile-10-20.json.gz    opens in https://ui.perfetto.dev and chrome://tracing
    profile-10-20.txt        the lines that were printed (profile_summary.py)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch

from pretrain.errors import ConfigError
from pretrain.runtime import distributed
from pretrain.runtime.console import log_info
from pretrain.runtime.files import write_text
from pretrain.strategies import Strategy
from pretrain.training import profile_summary as summary

DATA, FORWARD, OPTIMIZER, SAVING = summary.DATA, summary.FORWARD, summary.OPTIMIZER, summary.SAVING
"""The phases that the loop marks."""
NOTHING: AbstractContextManager[None] = nullcontext()


def parse_steps(words: str | None) -> range:
    """Return the steps, counted from 0, that train.profile=START:STOP names; none for None. Raises ConfigError."""
    if words is None:
        return range(0)
    begin, _, end = words.partition(":")
    if not (begin.isascii() and begin.isdigit() and end.isascii() and end.isdigit() and int(begin) < int(end)):
        raise ConfigError(
            f"train.profile={words!r} must be START:STOP, two numbers of steps with START below STOP; 10:15 profiles the five "
            "steps after step 10"
        )
    return range(int(begin), int(end))


class StepProfiler:
    """Records the steps that train.profile names, on rank 0.

    Args:
        words: train.profile.
        folder: where the trace is written.
        strategy: its backward() and apply() are marked while steps are recorded.
    """

    def __init__(self, words: str | None, folder: Path, strategy: Strategy) -> None:
        self._steps = parse_steps(words) if distributed.is_main() else range(0)
        self._folder, self._strategy = folder, strategy
        self._profiler: Any = None
        self._mark: Callable[[str], AbstractContextManager[Any]] = _mark_nothing
        self._open_step = ExitStack()
        self._begin = self._done = 0

    def begin_step(self, step: int) -> None:
        """Begin the step `step`, counted from 0; the one before has ended."""
        if self._profiler is not None:
            if step not in self._steps:
                self.close()
                return
            self._end_step()
        elif step not in self._steps:
            return
        else:
            self._start(step)
        self._open_step.enter_context(self._mark(summary.STEP))

    def phase(self, name: str) -> AbstractContextManager[Any]:
        """Return the context that marks what runs inside as a phase of the step."""
        return self._mark(name)

    def _start(self, step: int) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its log lines are for its developers
        from torch import profiler

        self._begin = self._done = step
        self._profiler = profiler.profile(activities=list(profiler.supported_activities()))
        self._wait_for_device()
        self._profiler.start()
        self._mark = lambda name: profiler.record_function(summary.MARK + name)
        for method, phase in (("backward", summary.BACKWARD), ("apply", summary.OPTIMIZER)):
            setattr(self._strategy, method, self._marked(getattr(self._strategy, method), phase))

    def _marked(self, method: Callable[..., Any], phase: str) -> Callable[..., Any]:
        """Return a method that marks its calls as a phase."""

        def call(*args: Any) -> Any:
            with self._mark(phase):
                return method(*args)

        return call

    def _end_step(self) -> None:
        self._open_step.close()
        self._done += 1

    def _wait_for_device(self) -> None:
        if self._strategy.device.type == "cuda":
            torch.cuda.synchronize(self._strategy.device)

    def close(self) -> None:
        """End the profile, if it has begun: write the trace, and print where the time of the steps went."""
        if self._profiler is None:
            return
        self._wait_for_device()  # inside the step, so that what it launched is a part of it
        self._end_step()
        profiler, self._profiler, self._mark = self._profiler, None, _mark_nothing
        for method in ("backward", "apply"):
            delattr(self._strategy, method)
        profiler.stop()
        name = f"profile-{self._begin}-{self._done}"
        trace = self._folder / f"{name}.json.gz"
        unfinished = self._folder / f".{name}.partial.json.gz"
        profiler.export_chrome_trace(str(unfinished))
        os.replace(unfinished, trace)
        lines = summary.describe(summary.summarize(summary.read_trace(trace)))
        write_text(trace.with_name(f"{name}.txt"), "".join(line + "\n" for line in lines))
        for line in [*lines, f"wrote {trace}, which https://ui.perfetto.dev opens"]:
            log_info(line)


def _mark_nothing(name: str) -> AbstractContextManager[None]:
    return NOTHING
