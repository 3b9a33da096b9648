"""clipfuse pretrain CONFIG --nproc N [--nodes M --rdzv HOST:PORT]: torch's elastic launcher, with our exit codes.

What torchrun does not do, and this does:

    exit codes      torchrun turns every failing code into 1; here 0 done, 1 failed, 2 wrong usage, 75 stopped and resumable
    signals         SIGTERM, SIGINT, SIGUSR1 and SIGHUP are forwarded to the processes, which agree, save and end; none is
                    killed 30 seconds later
    failures        the other processes get time to report who failed; then one line says what ended which process
    restarts        after a lost process or node, never after wrong usage or a requested stop

On several nodes the same command runs on each, with the same --rdzv. A node that is lost and comes back (or its replacement)
joins again, and the run resumes from the last checkpoint. With --nodes MIN:MAX the others go on without it, and the run saves
and grows when a node joins. Where the processes of all present nodes cannot share the batch, some nodes wait.
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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.distributed.elastic.agent.server.api import RunResult, Worker, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous import registry as rendezvous

from launch.nodes import NodeCount, find_usable
from launch.rendezvous import CLOSED
from pretrain.config import find_config
from pretrain.errors import ConfigError, UserError
from pretrain.printable import format_count
from pretrain.runtime.entrypoint import DONE, FAILED, STOPPED, USAGE

ROOT = Path(__file__).resolve().parent.parent
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
REPORT_SECONDS = 15.0
"""Time that the other processes get to report who failed, before they are stopped."""

HEALTHY_SECONDS = 3600.0
"""Time without a lost process after which earlier restarts no longer count."""


@dataclass(frozen=True)
class World:
    """The processes to start on this node, and how they meet those of other nodes."""

    nproc: int
    """Processes on this node."""
    nodes: int = 1
    """Nodes of the run; the largest number of them if it is elastic."""
    rdzv: str | None = None
    """HOST:PORT where the nodes meet; the node whose name is HOST serves it."""
    restarts: int | None = None
    """Restarts after a lost process or node; None = 0 on one node, 3 on several."""
    grace: float = 600.0
    """Seconds to save a checkpoint after a signal, then SIGKILL."""
    wait: float = 900.0
    """Seconds to wait for the other nodes, of an elastic run for the smallest number of them."""
    least_nodes: int | None = None
    """The smallest number of nodes with which an elastic run goes on; None = it needs all."""
    join: float = 30.0
    """Seconds that an elastic run waits for more nodes before it starts with fewer than its largest number."""

    @property
    def node_count(self) -> NodeCount:
        """The number of nodes, or the smallest and the largest one."""
        return NodeCount(self.nodes, self.least_nodes)


def parse_nproc(word: str | None) -> int:
    """Return the processes on this node for --nproc N or --nproc gpus; 1 for None. Raises ConfigError."""
    if word is None:
        return 1
    if word in ("gpu", "gpus"):
        gpus = torch.cuda.device_count()
        if not gpus:
            raise ConfigError(f"--nproc {word}: no GPU here; give a number of processes")
        return gpus
    if not word.isdigit() or int(word) < 1:
        raise ConfigError(f"--nproc {word!r} must be a number of processes, or gpus")
    return int(word)


def launch(module: str, words: list[str], world: World) -> int:
    """Run `python -m MODULE WORDS` as world.nproc processes of one process group; return the exit code."""
    restarts = world.restarts if world.restarts is not None else (3 if world.nodes > 1 else 0)
    if world.nodes > 1 and not world.rdzv:
        raise ConfigError(
            f"--nodes {world.node_count} needs --rdzv HOST:PORT, the same on every node: one node and a free port of it"
        )
    usable = [world.nodes]
    if world.node_count.is_elastic:
        config = find_config(words[0], module)
        usable = find_usable(module, config, words[1:], world.node_count, world.nproc, torch.cuda.is_available())
    # Empty entries stand for the current folder, where a user's own pretrain.py would be started instead of ours.
    folders = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // world.nproc)))
    options = [f"--nproc={world.nproc}", *([f"--nodes={world.node_count}", f"--rdzv={world.rdzv}"] if world.nodes > 1 else [])]
    os.environ.setdefault("CLIPFUSE_COMMAND", shlex.join(["clipfuse", module, *words[:1], *options, *words[1:]]))
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # the others are forwarded, see _Agent.forward_signals
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # _Agent prints one line instead
    logging.getLogger("torch.distributed.run").setLevel(logging.CRITICAL)

    with tempfile.TemporaryDirectory(prefix="clipfuse-") as logs:
        handler = rendezvous.get_rendezvous_handler(_rendezvous_parameters(world))
        spec = WorkerSpec(
            role="clipfuse",
            local_world_size=world.nproc,
            entrypoint=sys.executable,
            args=("-P", "-m", module, *(word.replace("$", "$$") for word in words)),  # the agent substitutes ${...}
            rdzv_handler=handler,
            max_restarts=restarts,
            monitor_interval=0.1,
            local_addr="localhost" if world.nodes == 1 else None,
        )
        agent = _Agent(spec, DefaultLogsSpecs(log_dir=logs), world, usable)
        try:
            with agent.forward_signals():
                return agent.run_to_exit_code()
        finally:
            if not agent.is_spare:  # the others go on without a node that waits
                _close(handler)


def _close(handler: Any) -> None:
    """Close the rendezvous: the run is over on all nodes."""
    if handler.shutdown():
        with suppress(RuntimeError):  # the store is gone
            handler._store.set(CLOSED + handler.get_run_id(), "")


def _rendezvous_parameters(world: World) -> RendezvousParameters:
    job = "-".join(os.environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"))
    return RendezvousParameters(
        backend="c10d",
        endpoint=world.rdzv or "localhost:0",
        run_id=f"clipfuse{job}" if world.nodes > 1 else uuid.uuid4().hex,
        min_nodes=world.node_count.least,
        max_nodes=world.nodes,
        local_addr="localhost" if world.nodes == 1 else None,
        join_timeout=int(world.wait),
        last_call_timeout=int(world.join),
    )


_END = "clipfuse/end"
"""Key of a round's store that holds the exit code, for nodes that wait."""


class _EarlyStopError(Exception):
    """A signal arrived while no process was running."""


class _Agent(LocalElasticAgent):
    """Starts the processes of this node, monitors them, and restarts them after a lost process or node."""

    def __init__(self, spec: WorkerSpec, logs: DefaultLogsSpecs, world: World, usable: list[int]) -> None:
        super().__init__(spec, logs, exit_barrier_timeout=60)
        self.world = world
        self.usable = usable
        """Numbers of nodes with which the run can go on."""
        self.is_spare = False
        """Whether this node waits, because the others cannot share the batch with it."""
        self._nodes_before = 0
        self._restarts = spec.max_restarts
        self._started_at = 0.0
        self.failed: dict[int, int] = {}
        """Rank -> exit code of the processes that failed first."""
        self._failed_at = 0.0
        self._stopping: signal.Signals | None = None
        self._stop_requested_at = 0.0

    # -----------------------------------------------------------------------------------------------------------------
    # Exit codes

    def run_to_exit_code(self) -> int:
        """Run to the end and return the exit code; print what went wrong where no process could."""
        try:
            result = self.run()
        except _EarlyStopError:
            self._print(f"stopped by {self._stopping_name()} before the processes were running")
            return STOPPED
        except SignalException as error:
            self._print(f"ended by {error.sigval.name}")
            return FAILED
        except Exception as error:
            if type(error).__module__.startswith("torch.distributed.elastic.rendezvous"):
                return self._exit_without_rendezvous(error)
            raise
        if result is None:  # another node closed the rendezvous: the run is over there
            return FAILED
        return self._exit_code() if result.is_failed() else DONE

    def _exit_code(self) -> int:
        codes = set(self.failed.values())
        if self._stopping is not None and codes <= {STOPPED, -self._stopping}:
            if STOPPED not in codes:
                self._print(f"stopped by {self._stopping.name} before training began")
            return STOPPED
        for expected in (USAGE, STOPPED):
            if codes == {expected}:
                return expected
        self._print(self._describe_failures())
        return FAILED

    def _exit_without_rendezvous(self, error: Exception) -> int:
        """The node that serves the rendezvous ended first: decide by the exit codes of this node's processes."""
        if self._processes():
            end = time.monotonic() + REPORT_SECONDS
            while any(p.poll() is None for p in self._processes().values()) and time.monotonic() < end:
                time.sleep(0.1)
            self.failed = {rank: p.poll() or 0 for rank, p in self._processes().items() if p.poll() != 0}
            if self.failed.keys() and None not in [p.poll() for p in self._processes().values()]:
                return self._exit_code()
            if not self.failed:
                return DONE
        raise UserError(
            f"the rendezvous at {self.world.rdzv} failed ({' '.join(str(error).split()) or type(error).__name__}): "
            f"{self.world.node_count} nodes must run this command with the same --rdzv, and the one that serves it must stay up"
        ) from error

    def _describe_failures(self) -> str:
        """Describe what ended which process; empty where that process printed it itself."""
        failures = []
        for rank, code in sorted(self.failed.items(), key=lambda item: item[1]):
            if code < 0:
                name = signal.Signals(-code).name
                hint = " (the kernel does so when memory runs out)" if code == -signal.SIGKILL else ""
                failures.append(f"process {rank} was killed by {name}{hint}")
            elif code not in (FAILED, USAGE, STOPPED):
                failures.append(f"process {rank} ended with exit code {code}")
        return "; ".join(failures[:3])

    @staticmethod
    def _print(line: str) -> None:
        if line:
            print(f"clipfuse: {line}", file=sys.stderr, flush=True)

    # -----------------------------------------------------------------------------------------------------------------
    # Monitoring

    def _processes(self) -> dict[int, subprocess.Popen[Any]]:
        """Rank -> process of this node."""
        if self._pcontext is None:
            return {}
        handlers: dict[int, Any] = getattr(self._pcontext, "subprocess_handlers", {})
        return {worker.global_rank: handlers[worker.local_rank].proc for worker in self._worker_group.workers if handlers}

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """Override torch's agent, which calls this ten times a second."""
        if self.is_spare:
            return self._monitor_others()
        running = self._processes()
        failed = {rank: process.returncode for rank, process in running.items() if process.poll()}
        now = time.monotonic()
        if now - self._started_at > HEALTHY_SECONDS:
            self._remaining_restarts = self._restarts
        if failed and not self.failed:
            self.failed, self._failed_at = failed, now
        assert self._pcontext is not None
        if self._stopping is not None and now - self._stop_requested_at > self.world.grace:
            self._print(
                f"not saved {self.world.grace:.0f} s after {self._stopping.name}: killed; the last checkpoint is intact"
            )
            self._pcontext.close(signal.SIGKILL, timeout=10)
        elif failed:
            stopped = set(failed.values()) == {STOPPED}
            if stopped:
                self.failed = failed
            patience = self.world.grace if stopped else REPORT_SECONDS
            if any(p.poll() is None for p in running.values()):
                if now - self._failed_at < patience:
                    return RunResult(state=WorkerState.HEALTHY)  # the others are about to end on their own
                self._pcontext.close(signal.SIGKILL, timeout=10)  # the rest hang
            if set(self.failed.values()) & {STOPPED, USAGE} or self._stopping is not None:
                self._remaining_restarts = 0
            if stopped and self._stopping is None and self._is_joined_by_others():
                return RunResult(state=WorkerState.HEALTHY)  # torch's agent then joins the next round
            if stopped and self.world.nodes > 1:
                self._exit_barrier()  # the node that serves the rendezvous must end last
            if self._remaining_restarts:
                remaining = self._remaining_restarts - 1
                cause = self._describe_failures() or "a process failed"
                self._print(f"{cause}; restarting from the last checkpoint ({format_count(remaining, 'restart')} left)")
        result: RunResult = super()._monitor_workers(worker_group)
        return result

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        # A node that comes back may become the first one; without this the others keep the address of the old first node.
        if hasattr(self._rdzv_handler, "_bootstrap_store_info"):
            self._rdzv_handler._bootstrap_store_info = None
        self._pcontext = None
        self.failed = {}
        super()._rendezvous(worker_group)
        if self.world.node_count.is_elastic:
            self._print_size(worker_group)

    # -----------------------------------------------------------------------------------------------------------------
    # Elastic runs

    def _assign_worker_ranks(self, store: Any, group_rank: int, group_world_size: int, spec: WorkerSpec) -> list[Worker]:
        """Override torch's agent: nodes beyond a usable number get no processes."""
        active = max(count for count in self.usable if count <= group_world_size)
        self.is_spare = group_rank >= active
        workers: list[Worker] = [] if self.is_spare else super()._assign_worker_ranks(store, group_rank, active, spec)
        return workers

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._started_at = time.monotonic()
        if self.is_spare:
            return {}
        # Every start but the run's first is a restart for the processes, also on a node that has just joined.
        handler: Any = self._rdzv_handler
        starts: int = handler._state_holder.state.round
        worker_group.spec.max_restarts = max(worker_group.spec.max_restarts, self._remaining_restarts + starts)
        ids: dict[int, Any] = super()._start_workers(worker_group)
        return ids

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        """Override torch's agent, which kills processes that need more than 30 seconds to save."""
        self._shutdown(timeout=int(self.world.grace))

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        if not self.failed and not self.is_spare and worker_group.group_rank == 0:
            self._print("a node joins: the run saves, and goes on with it")
        super()._restart_workers(worker_group)

    def _is_joined_by_others(self) -> bool:
        """Return whether nodes wait for the next round, for which another node has stopped all processes."""
        return self.world.node_count.is_elastic and self._rdzv_handler.num_nodes_waiting() > 0

    def _monitor_others(self) -> RunResult:
        """Return the state of the run on a node that waits: healthy until the others have ended."""
        store: Any = self._store
        handler: Any = self._rdzv_handler
        is_closed = handler.is_closed()  # reads the state of the rendezvous anew
        if store.check([_END]):
            code = int(store.get(_END))
        elif is_closed:
            code = FAILED
        else:
            present = handler._state_holder.state.participants.values()
            if not set(range(self._nodes_before)) <= set(present):  # perhaps all of those that computed are lost
                self._restart_workers(self._worker_group)
            return RunResult(state=WorkerState.HEALTHY)
        if code == DONE:
            return RunResult(state=WorkerState.SUCCEEDED)
        if code == STOPPED:
            self._exit_barrier()  # the others wait there
        self.failed = {-1: code}
        self._remaining_restarts = 0
        return RunResult(state=WorkerState.FAILED)

    def _exit_barrier(self) -> None:
        if self.world.node_count.is_elastic and not self.is_spare:
            store: Any = self._store
            with suppress(RuntimeError):  # the store is gone
                store.set(_END, str(STOPPED if self.failed else DONE))
        super()._exit_barrier()

    def _print_size(self, worker_group: WorkerGroup) -> None:
        """Print the number of nodes, where it has changed."""
        assert worker_group.group_world_size is not None
        present = worker_group.group_world_size
        active = max(count for count in self.usable if count <= present)
        if self.is_spare:
            self._print(f"this node waits: {format_count(active, 'node')} of {present} share the batch evenly")
        elif worker_group.group_rank == 0 and active != self._nodes_before:
            processes = format_count(active * self.world.nproc, "process")
            self._print(f"the run goes on with {format_count(active, 'node')} of {self.world.node_count}: {processes}")
        self._nodes_before = active

    # -----------------------------------------------------------------------------------------------------------------
    # Signals

    @contextmanager
    def forward_signals(self) -> Iterator[None]:
        """Forward signals to the processes inside the block."""
        before = {number: signal.signal(number, self._forward) for number in FORWARDED}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        if self._stopping is None:
            self._stopping, self._stop_requested_at = signal.Signals(number), time.monotonic()
        # A closed terminal (SIGHUP) requests the same as SIGTERM.
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
