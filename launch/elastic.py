"""clipfuse pretrain CONFIG --nproc N [--nodes M --rdzv HOST:PORT]: torch's elastic launcher, with our exit codes.

What torchrun does not do, and this does:

    exit codes      torchrun turns every failing code into 1; here 0 done, 1 failed, 2 wrong usage, 75 stopped and resumable
    signals         SIGTERM, SIGINT, SIGUSR1 and SIGHUP go on to the processes, which agree, save and end; nobody is killed
                    30 seconds later
    a failure       the others may say who failed before they are stopped; then one line says what ended which process
    restarts        after a lost process or node, never after wrong usage or a stop that was asked for

On several nodes the same command runs on each, with the same --rdzv; a node that is lost and comes back (or another one in
its place) joins again, and the run goes on from the last checkpoint.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous import registry as rendezvous

from pretrain.errors import ConfigError, UserError
from pretrain.runtime.entrypoint import DONE, FAILED, STOPPED, USAGE

ROOT = Path(__file__).resolve().parent.parent
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
PATIENCE = 15.0
"""Seconds that the others get to say who failed, before they are stopped."""


@dataclass(frozen=True)
class World:
    """Which processes to start."""

    nproc: int
    """On this node."""
    nodes: int = 1
    rdzv: str | None = None
    """HOST:PORT where the nodes meet; the node that has HOST holds it."""
    restarts: int | None = None
    """How often to start again after a lost process or node; None: 0 on one node, 3 on several."""
    grace: float = 600.0
    """Seconds to save in after a signal."""
    wait: float = 900.0
    """Seconds to wait for the other nodes."""


def processes(word: str | None) -> int:
    """--nproc N | gpus -> number of processes on this node. Raises ConfigError."""
    if word is None:
        return 1
    if word in ("gpu", "gpus"):
        found = torch.cuda.device_count()
        if not found:
            raise ConfigError(f"--nproc {word}: no GPU here; give a number of processes")
        return found
    if not word.isdigit() or int(word) < 1:
        raise ConfigError(f"--nproc {word!r} must be a number of processes, or gpus")
    return int(word)


def launch(module: str, words: list[str], world: World) -> int:
    """Runs `python -m MODULE WORDS` as world.nproc processes that know each other; returns the exit code."""
    restarts = world.restarts if world.restarts is not None else (3 if world.nodes > 1 else 0)
    if world.nodes > 1 and not world.rdzv:
        raise ConfigError(
            f"--nodes {world.nodes} needs --rdzv HOST:PORT, the same on every node: one node and a free port of it"
        )
    # -- the environment of the processes
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // world.nproc)))
    options = [f"--nproc={world.nproc}", *([f"--nodes={world.nodes}", f"--rdzv={world.rdzv}"] if world.nodes > 1 else [])]
    os.environ.setdefault("CLIPFUSE_COMMAND", shlex.join(["clipfuse", module, *words[:1], *options, *words[1:]]))
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # the others are forwarded, see _Agent.signals
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # one clear line instead
    logging.getLogger("torch.distributed.run").setLevel(logging.CRITICAL)

    with tempfile.TemporaryDirectory(prefix="clipfuse-") as logs:
        handler = rendezvous.get_rendezvous_handler(_meeting(world))
        spec = WorkerSpec(
            role="clipfuse",
            local_world_size=world.nproc,
            entrypoint=sys.executable,
            args=("-m", module, *(word.replace("$", "$$") for word in words)),  # the agent substitutes ${...}
            rdzv_handler=handler,
            max_restarts=restarts,
            monitor_interval=0.1,
            local_addr="localhost" if world.nodes == 1 else None,
        )
        agent = _Agent(spec, DefaultLogsSpecs(log_dir=logs), world)
        try:
            with agent.signals():
                return agent.work()
        finally:
            handler.shutdown()


def _meeting(world: World) -> RendezvousParameters:
    job = "-".join(os.environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"))
    return RendezvousParameters(
        backend="c10d",
        endpoint=world.rdzv or "localhost:0",
        run_id=f"clipfuse{job}" if world.nodes > 1 else uuid.uuid4().hex,
        min_nodes=world.nodes,
        max_nodes=world.nodes,
        local_addr="localhost" if world.nodes == 1 else None,
        join_timeout=int(world.wait),
    )


class _EarlyStopError(Exception):
    """A signal came while no process was running."""


class _Agent(LocalElasticAgent):
    """Starts the processes of this node, watches them, and starts them again where that makes sense."""

    def __init__(self, spec: WorkerSpec, logs: DefaultLogsSpecs, world: World) -> None:
        super().__init__(spec, logs, exit_barrier_timeout=60)
        self.world = world
        self.ended: dict[int, int] = {}
        """Rank -> exit code of the processes that ended badly first."""
        self._since = 0.0
        self._stopping: signal.Signals | None = None
        self._asked = 0.0

    # -----------------------------------------------------------------------------------------------------------------
    # From start to exit code

    def work(self) -> int:
        """Runs to the end; returns the exit code and says what went wrong where no process could."""
        try:
            result = self.run()
        except _EarlyStopError:
            self._say(f"stopped by {self._stopping_name()} before the processes were running")
            return STOPPED
        except SignalException as error:
            self._say(f"ended by {error.sigval.name}")
            return FAILED
        except Exception as error:
            if type(error).__module__.startswith("torch.distributed.elastic.rendezvous"):
                return self._without_rendezvous(error)
            raise
        if result is None:  # another node closed the rendezvous: the run is over there
            return FAILED
        return self._code() if result.is_failed() else DONE

    def _code(self) -> int:
        codes = set(self.ended.values())
        if self._stopping is not None and codes <= {STOPPED, -self._stopping}:
            if STOPPED not in codes:
                self._say(f"stopped by {self._stopping.name} before training began")
            return STOPPED
        for usual in (USAGE, STOPPED):
            if codes == {usual}:
                return usual
        self._say(self._blame())
        return FAILED

    def _without_rendezvous(self, error: Exception) -> int:
        """The node that holds the rendezvous went first: what this node's own processes say counts."""
        if self._processes():
            end = time.monotonic() + PATIENCE
            while any(p.poll() is None for p in self._processes().values()) and time.monotonic() < end:
                time.sleep(0.1)
            self.ended = {rank: p.poll() or 0 for rank, p in self._processes().items() if p.poll() != 0}
            if self.ended.keys() and None not in [p.poll() for p in self._processes().values()]:
                return self._code()
            if not self.ended:
                return DONE
        raise UserError(
            f"the rendezvous at {self.world.rdzv} failed ({' '.join(str(error).split()) or type(error).__name__}): "
            f"{self.world.nodes} nodes must run this command with the same --rdzv, and the one that holds it must stay"
        ) from error

    def _blame(self) -> str:
        """What ended which process; empty where that process said it itself."""
        said = []
        for rank, code in sorted(self.ended.items(), key=lambda item: item[1]):
            if code < 0:
                name = signal.Signals(-code).name
                why = " (the kernel does so when memory runs out)" if code == -signal.SIGKILL else ""
                said.append(f"process {rank} was killed by {name}{why}")
            elif code not in (FAILED, USAGE, STOPPED):
                said.append(f"process {rank} ended with exit code {code}")
        return "; ".join(said[:3])

    @staticmethod
    def _say(line: str) -> None:
        if line:
            print(f"clipfuse: {line}", file=sys.stderr, flush=True)

    # -----------------------------------------------------------------------------------------------------------------
    # Watching

    def _processes(self) -> dict[int, subprocess.Popen[Any]]:
        """Rank -> process of this node."""
        if self._pcontext is None:
            return {}
        handlers: dict[int, Any] = getattr(self._pcontext, "subprocess_handlers", {})
        return {worker.global_rank: handlers[worker.local_rank].proc for worker in self._worker_group.workers if handlers}

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """The extension point of torch's agent: called ten times a second."""
        running = self._processes()
        bad = {rank: process.returncode for rank, process in running.items() if process.poll()}
        now = time.monotonic()
        if bad and not self.ended:
            self.ended, self._since = bad, now
        assert self._pcontext is not None
        if self._stopping is not None and now - self._asked > self.world.grace:
            self._say(f"not saved {self.world.grace:.0f} s after {self._stopping.name}: killed; the last checkpoint is intact")
            self._pcontext.close(signal.SIGKILL, timeout=10)
        elif bad:
            stopped = set(bad.values()) == {STOPPED}
            if stopped:
                self.ended = bad
            patience = self.world.grace if stopped else PATIENCE
            if any(p.poll() is None for p in running.values()):
                if now - self._since < patience:
                    return RunResult(state=WorkerState.HEALTHY)  # the others are about to end by themselves
                self._pcontext.close(signal.SIGKILL, timeout=10)  # what is left hangs
            if set(self.ended.values()) & {STOPPED, USAGE} or self._stopping is not None:
                self._remaining_restarts = 0
            if stopped and self.world.nodes > 1:
                self._exit_barrier()  # whoever holds the rendezvous goes last
            if self._remaining_restarts:
                left = self._remaining_restarts - 1
                self._say(f"{self._blame() or 'a process failed'}; again from the last checkpoint ({left} restarts left)")
        result: RunResult = super()._monitor_workers(worker_group)
        return result

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        # A node that comes back may become the first one; without this the others keep the address of the one that was.
        if hasattr(self._rdzv_handler, "_bootstrap_store_info"):
            self._rdzv_handler._bootstrap_store_info = None
        self._pcontext = None
        self.ended = {}
        super()._rendezvous(worker_group)

    # -----------------------------------------------------------------------------------------------------------------
    # Signals

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Inside, signals go on to the processes."""
        before = {number: signal.signal(number, self._forward) for number in FORWARDED}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        if self._stopping is None:
            self._stopping, self._asked = signal.Signals(number), time.monotonic()
        # A closed terminal asks for the same as SIGTERM.
        sent = signal.SIGTERM if number == signal.SIGHUP else signal.Signals(number)
        if number == signal.SIGHUP:
            self._stopping = signal.SIGTERM
        alive = [process for process in self._processes().values() if process.poll() is None]
        for process in alive:
            process.send_signal(sent)
        if not self._processes():
            raise _EarlyStopError

    def _stopping_name(self) -> str:
        return self._stopping.name if self._stopping else ""
