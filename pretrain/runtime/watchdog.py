"""Heartbeats of all processes: a run that lost a process ends soon, with a line that names it.

A collective only reports that an answer is missing, not whose: NCCL waits for its timeout and aborts, gloo says "connection
closed by peer" or "timed out". So a thread of every process writes heartbeats into the group's TCPStore, up to once a
second: a counter, and the position of the main thread. Three conditions are detected:

    dead      the process ended, and ran on this machine: every thread on the machine detects it within two seconds
              no heartbeat for `timeout` seconds, on another machine: rank 0 detects it; the other ranks watch rank 0
    stalled   the main thread stayed behind the others for as long: rank 0 detects it
    failed    a collective raised an error: diagnose() finds the process that failed first, is silent, or is elsewhere

A thread that detects a dead or stalled process ends its own process at once: the main thread may be in a collective that never
returns. Before that, every process writes what torch's flight recorder has recorded of its collectives into the run folder,
and the line names the process whose collective is missing, and the collective.
"""

from __future__ import annotations

import datetime
import faulthandler
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as td

from pretrain.errors import UserError
from pretrain.runtime import distributed, flight_recorder

_COLLECTIVE_ERROR = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|timed out waiting|process ?group|broken pipe|socket|TCPStore", re.IGNORECASE
)

_RUN_ENDS = "; the run ends, the last checkpoint is intact"


class Watchdog:
    """A thread that writes this process's heartbeat and watches those of the others.

    It does nothing without a group of two or more.

    `with Watchdog(timeout, record) as watchdog:`, with `watchdog.mark(step, phase)` at the same points on every process.
    timeout: seconds after which a silent or stalled process ends the run. record(reason): called once in the run, by the
    first process that knows which one was lost. folder: where collectives are recorded when the run is lost; None = nowhere.
    finish(): called before a process ends, for work that must not be lost; it takes at most some seconds.
    """

    def __init__(
        self,
        timeout: float,
        record: Callable[[str], None],
        folder: Path | None = None,
        finish: Callable[[], None] = lambda: None,
    ) -> None:
        # Shorter than the timeout of collectives, whose error names no process.
        self.limit = 0.8 * timeout
        self.every = min(1.0, timeout / 20)
        self._record = record
        self._folder, self._finish = folder, finish
        self._done = threading.Event()
        self._diagnosing = threading.Event()
        self._count = 0
        self._marks = 0
        self._position = "starting"
        self._processes: dict[int, _ProcessState] = {}
        self._store: td.Store | None = None
        self._store_lost_since: float | None = None
        self._thread: threading.Thread | None = None
        self._this_process = (os.uname().nodename, os.getpid(), _pid_namespace())  # which may be forked after the import

    def __enter__(self) -> Watchdog:
        if distributed.world_size() > 1:
            self._store = distributed.open_shared_store("heartbeat")
            self._store.set_timeout(datetime.timedelta(seconds=max(5.0, self.limit)))
            self._write_heartbeat()
            # From here on every process has written one. All learn all names by a collective: as requests to the one process
            # that holds the store these would be as many as the square of the number of processes.
            self._note_heartbeats(dict(enumerate(distributed.gather_objects(self._heartbeat()))))
            self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join(timeout=2 * self.every)
        if self._store is not None and error is None:
            with suppress(RuntimeError):  # the process that holds the store may have ended, and the store with it
                self._report_end(None)

    def mark(self, step: int, phase: str) -> None:
        """Record the position of the main thread; costs nothing.

        All processes must pass the same marks in the same order.
        """
        self._position = f"step {step}, {phase}"
        self._marks += 1

    def describe(self, rank: int) -> str:
        """Return a process's name with host and pid, as far as its heartbeat is known here."""
        process = self._processes.get(rank)
        return process.name if process is not None and process.name else f"process {rank}"

    # -----------------------------------------------------------------------------------------------------------------
    # The thread: write and read heartbeats, find dead and stalled processes

    def _heartbeat(self) -> str:
        return json.dumps([self._count, self._marks, self._position, *self._this_process])

    def _write_heartbeat(self) -> None:
        assert self._store is not None
        self._count += 1
        self._store.set(f"heartbeat/{distributed.rank()}", self._heartbeat())

    def _watch(self) -> None:
        while not self._done.wait(self.every):
            try:
                self._write_heartbeat()
                self._read_heartbeats()
                diagnosis = None if self._diagnosing.is_set() else self._find_lost_process()
                self._store_lost_since = None
            except (RuntimeError, ValueError) as error:  # torch's store errors are RuntimeErrors
                self._store_lost_since = self._store_lost_since or time.monotonic()
                seconds = time.monotonic() - self._store_lost_since
                diagnosis = f"the rendezvous store does not answer: {_first_line(error)}" if seconds > self.limit else None
            if diagnosis is not None and not self._done.is_set() and not self._diagnosing.is_set():
                self._end_process(diagnosis)

    def _read_heartbeats(self, all_ranks: bool = False) -> None:
        """Read and note the other ranks' heartbeats.

        Rank 0 reads those of all ranks; the others read that of rank 0, or all with `all_ranks`.
        """
        assert self._store is not None
        ranks = list(range(distributed.world_size())) if distributed.rank() == 0 or all_ranks else [0]
        texts = self._store.multi_get([f"heartbeat/{rank}" for rank in ranks])
        self._note_heartbeats(dict(zip(ranks, texts, strict=True)))

    def _note_heartbeats(self, texts: dict[int, Any]) -> None:
        """Note heartbeats by rank, and the local time at which each last changed."""
        now = time.monotonic()
        for rank, text in texts.items():
            count, marks, position, host, pid, namespace = json.loads(text)
            process = self._processes.setdefault(rank, _ProcessState(rank, count, marks, now, now))
            if count != process.count:
                process.count, process.heartbeat_time = count, now
            if marks != process.marks:
                process.marks, process.mark_time, process.behind_since = marks, now, None
            process.position, process.name = position, f"process {rank} ({host}, pid {pid})"
            process.pid = pid if (host, namespace) == (self._this_process[0], self._this_process[2]) else None

    def _find_lost_process(self) -> str | None:
        """Return the line that ends the run, or None.

        Rank 0 checks all ranks; the others check rank 0 and the processes on their own machine.
        """
        assert self._store is not None
        if self._store.check(["diagnosis"]):
            return self._store.get("diagnosis").decode()
        now = time.monotonic()
        watched = {rank: process for rank, process in self._processes.items() if distributed.rank() == 0 or rank == 0}
        most_marks = max(process.marks for process in watched.values())
        for rank, process in self._processes.items():
            silent, still = now - process.heartbeat_time, now - process.mark_time
            if process.marks == most_marks:
                process.behind_since = None
            elif process.behind_since is None:  # from now on others wait for it, however long all worked before
                process.behind_since = now
            if process.pid is not None and not _is_running(process.pid):
                diagnosis = f"{process.name} died, last at {process.position}"
            elif rank not in watched:
                continue
            elif silent > self.limit:
                diagnosis = f"{process.name} is dead: no heartbeat for {silent:.0f} s, last at {process.position}"
            elif process.behind_since is not None and now - process.behind_since > self.limit:
                diagnosis = f"{process.name} stalled: for {still:.0f} s at {process.position} while others wait"
            else:
                continue
            if not self._store.check([f"end/{rank}"]):  # it neither finished nor reported an error of its own
                return self._publish(diagnosis)
        return None

    def _publish(self, diagnosis: str) -> str:
        """Store the diagnosis if no process has stored one; return the stored one, equal on all processes."""
        assert self._store is not None
        return self._store.compare_set("diagnosis", "", diagnosis).decode()

    def _explain(self, diagnosis: str) -> str:
        """Save this process's collectives; return the line that ends the run, equal on all processes, with the missing one.

        Rank 0 collects the records of all ranks, for a few seconds, and the others wait for its line.
        """
        assert self._store is not None
        reason = f"{diagnosis}{_RUN_ENDS}"
        if " died, " in diagnosis:  # no collective explains it
            return reason
        with suppress(RuntimeError, ValueError, OSError, KeyError):  # whatever fails here must not hide the diagnosis
            dumps = flight_recorder.read_dumps()
            if self._folder is not None:
                flight_recorder.save_dumps(dumps, self._folder, distributed.rank())
            self._store.set(f"flight/{distributed.rank()}", json.dumps(flight_recorder.summarize(dumps)))
            patience = max(2.0, 4 * self.every) * (1 if distributed.rank() == 0 else 1.5)
            awaited = [f"flight/{rank}" for rank in range(distributed.world_size())] if distributed.rank() == 0 else ["reason"]
            begin = time.monotonic()
            while not self._store.check(awaited) and time.monotonic() - begin < patience:
                time.sleep(0.1)
            if distributed.rank() == 0:
                ranks = [rank for rank in range(distributed.world_size()) if self._store.check([f"flight/{rank}"])]
                summaries = {rank: json.loads(self._store.get(f"flight/{rank}")) for rank in ranks}
                missing = flight_recorder.find_missing(summaries)
                reason = f"{diagnosis}; {missing}{_RUN_ENDS}" if missing else reason
                self._store.set("reason", reason)
                time.sleep(0.3)  # the others read it before this process, and with it perhaps the store, ends
            elif self._store.check(["reason"]):
                reason = self._store.get("reason").decode()
        return reason

    def _end_process(self, diagnosis: str) -> None:
        faulthandler.dump_traceback_later(60, exit=True)  # in case that reading the records hangs as well
        reason = self._explain(diagnosis)
        if distributed.is_first_to_report(reason):
            print(f"clipfuse: {reason}", file=sys.stderr, flush=True)
            self._record(reason)
        self._finish()
        sys.stdout.flush()
        os._exit(1)

    # -----------------------------------------------------------------------------------------------------------------
    # After an exception: find the process that failed first

    def diagnose(self, error: BaseException) -> UserError | None:
        """Return the error that names the process that failed first.

        Called on every process whose main thread raised an error.

        None if this process failed by itself, since `error` explains that, or if the cause is unknown.
        """
        if self._store is None:
            return None
        is_collective = isinstance(error, RuntimeError) and bool(_COLLECTIVE_ERROR.search(str(error)))
        cause = error if isinstance(error, UserError | MemoryError) or not is_collective else None
        message = ""
        if cause is not None:
            message = str(cause) if isinstance(cause, UserError) else f"{type(cause).__name__}: {_first_line(cause)}"
        try:
            self._report_end(message if cause is not None else None)
            if cause is not None:
                return None
            self._diagnosing.set()
            diagnosis = self._find_failed_process()
        except (RuntimeError, ValueError):  # torch's store errors
            diagnosis = UserError(f"process 0, or the launcher that holds the rendezvous, is gone{_RUN_ENDS}")
        if diagnosis is not None and distributed.is_first_to_report(f"recorded: {diagnosis}"):
            self._record(str(diagnosis))
        return diagnosis

    def _report_end(self, cause: str | None) -> None:
        """Store that this process has ended; cause: the message of an error of its own."""
        assert self._store is not None
        rank = distributed.rank()
        if cause is not None:
            self._store.compare_set("cause", "", json.dumps([rank, cause]))
        self._store.set(f"end/{rank}", "")
        self._store.add("ends", 1)

    def _find_failed_process(self) -> UserError | None:
        """Wait for the other processes' reports; return an error that names the one that failed or is absent.

        All processes wait at once, so that each may ask for a few keys only, however many processes there are.
        """
        assert self._store is not None
        begin = time.monotonic()
        self._read_heartbeats(all_ranks=True)
        # Long enough for a heartbeat of every live process, and for the others to fail as this one did.
        while time.monotonic() - begin < max(2.0, 4 * self.every):
            if self._store.check(["cause"]):
                rank, message = json.loads(self._store.get("cause"))
                return UserError(f"{self._processes[rank].name} failed: {message}{_RUN_ENDS}")
            if self._store.add("ends", 0) == distributed.world_size():
                return None
            ended = [p for p in self._processes.values() if p.pid is not None and not _is_running(p.pid)]
            dead = [process for process in ended if not self._has_ended(process)]
            if dead or self._store.check(["diagnosis"]):
                return UserError(
                    self._explain(self._publish(f"{dead[0].name} died, last at {dead[0].position}" if dead else ""))
                )
            time.sleep(min(0.2, self.every))
        self._read_heartbeats(all_ranks=True)
        silent = [process for process in self._processes.values() if process.heartbeat_time <= begin + self.every]
        for process in dict.fromkeys([*silent, *self._processes.values()]):
            if process.rank != distributed.rank() and not self._has_ended(process):
                state = "is dead" if process in silent else "stalled"
                return UserError(self._explain(self._publish(f"{process.name} {state}, last at {process.position}")))
        return None

    def _has_ended(self, process: _ProcessState) -> bool:
        """Return whether a process has reported its end."""
        assert self._store is not None
        return self._store.check([f"end/{process.rank}"])


class _ProcessState:
    """The last heartbeat of a process, and when its count and marks last changed (monotonic seconds)."""

    def __init__(self, rank: int, count: int, marks: int, heartbeat_time: float, mark_time: float) -> None:
        self.rank = rank
        self.count, self.marks, self.heartbeat_time, self.mark_time = count, marks, heartbeat_time, mark_time
        self.position, self.name = "", ""
        self.behind_since: float | None = None
        """When this rank first saw that others had passed marks that the process has not passed; None = it is not behind."""
        self.pid: int | None = None
        """None for a process on another machine or in another container."""


def _is_running(pid: int) -> bool:
    """Return whether a process runs; a zombie, which its launcher has not reaped yet, does not."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        return not os.path.exists("/proc/self")  # it ended between the two calls, or this system has no /proc
    except PermissionError:
        return True


def _pid_namespace() -> int:
    """Return the id of the pid namespace, since containers have their own pids; 0 if it is unknown."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def _first_line(error: Any) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
