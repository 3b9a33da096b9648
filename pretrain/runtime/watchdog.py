"""Who is alive: processes beat in the group's store, so that a run that lost one ends soon, with a line that names it.

A collective only knows that an answer is missing, not whose: NCCL waits for its timeout and aborts, gloo says "connection
closed by peer" or "timed out". So a thread of every process writes a beat (a counter, and where the main thread is) into
the TCPStore of the group each second, and three things are found out:

    dead     its process is no more, on this machine                     every thread of the machine sees it in a second or two
             its beat stopped for `timeout` seconds, on another one      rank 0's thread sees it, the others watch rank 0
    hung     its main thread stayed behind the others for as long        rank 0's thread sees it
    after a collective failed: `explain` calls the roll. Who failed by itself, who is silent, who is still elsewhere?

A verdict of the threads ends the process at once: its main thread may sit in a collective that never returns.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

import torch.distributed as td

from pretrain.errors import UserError
from pretrain.runtime import distributed

_COLLECTIVE = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|timed out waiting|process ?group|broken pipe|socket|TCPStore", re.IGNORECASE
)

_ENDS = "; the run ends, the last checkpoint is intact"


class Watchdog:
    """`with Watchdog(timeout, record) as watchdog`, `watchdog.mark(step, "what")` at the same places on every process.

    timeout: seconds after which a silent or hung process ends the run. record(why) is called by the first process that
    knows who was lost, whichever that is. Without a group of two or more it does nothing.
    """

    def __init__(self, timeout: float, record: Callable[[str], None]) -> None:
        # The verdict comes before the collectives' own timeout, which names nobody.
        self.limit = 0.8 * timeout
        self.every = min(1.0, timeout / 20)
        self._record = record
        self._done = threading.Event()
        self._explaining = threading.Event()
        self._count = 0
        self._places = 0
        self._place = "starting"
        self._seen: dict[int, _Seen] = {}
        self._store: td.Store | None = None
        self._silent_store: float | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if distributed.world_size() > 1:
            self._store = distributed.open_shared_store("heartbeat")
            self._store.set_timeout(datetime.timedelta(seconds=max(5.0, self.limit)))
            self._beat()
            distributed.barrier()  # from here on every process has a beat to read
            self._look(everyone=True)
            self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join(timeout=2 * self.every)
        if self._store is not None and error is None:
            with suppress(RuntimeError):  # the store may be gone already: whoever held it is done as well
                self._store.set(f"end/{distributed.rank()}", json.dumps([False, "done"]))

    def mark(self, step: int, what: str) -> None:
        """Where the main thread is now; costs nothing. Every process must pass the same places in the same order."""
        self._place = f"step {step}, {what}"
        self._places += 1

    # -----------------------------------------------------------------------------------------------------------------
    # The thread

    def _beat(self) -> None:
        assert self._store is not None
        self._count += 1
        beat = [self._count, self._places, self._place, *_ME]
        self._store.set(f"beat/{distributed.rank()}", json.dumps(beat))

    def _watch(self) -> None:
        while not self._done.wait(self.every):
            try:
                self._beat()
                self._look()
                verdict = None if self._explaining.is_set() else self._judge()
                self._silent_store = None
            except (RuntimeError, ValueError) as error:  # torch's store errors are RuntimeErrors
                self._silent_store = self._silent_store or time.monotonic()
                lost = time.monotonic() - self._silent_store
                verdict = f"the rendezvous store does not answer: {_first_line(error)}" if lost > self.limit else None
            if verdict is not None and not self._done.is_set() and not self._explaining.is_set():
                self._end(verdict)

    def _look(self, everyone: bool = False) -> None:
        """Reads beats (rank 0: of all, the others: of rank 0) and remembers, by its own clock, when each last changed."""
        assert self._store is not None
        ranks = list(range(distributed.world_size())) if distributed.rank() == 0 or everyone else [0]
        now = time.monotonic()
        for rank, text in zip(ranks, self._store.multi_get([f"beat/{rank}" for rank in ranks]), strict=True):
            count, places, place, host, pid, space = json.loads(text)
            seen = self._seen.setdefault(rank, _Seen(count, places, now, now))
            if count != seen.count:
                seen.count, seen.beat = count, now
            if places != seen.places:
                seen.places, seen.moved = places, now
            seen.place, seen.who = place, f"process {rank} ({host}, pid {pid})"
            seen.pid = pid if (host, space) == (_ME[0], _ME[2]) else None

    def _judge(self) -> str | None:
        """The line that ends the run, or nothing. Rank 0 judges all; the others judge it, and who is on their machine."""
        assert self._store is not None
        if self._store.check(["verdict"]):
            return self._store.get("verdict").decode()
        now = time.monotonic()
        watched = {rank: seen for rank, seen in self._seen.items() if distributed.rank() == 0 or rank == 0}
        front = max(seen.places for seen in watched.values())
        for rank, seen in self._seen.items():
            if seen.pid is not None and not _alive(seen.pid):
                verdict = f"{seen.who} died, last at {seen.place}"
            elif rank not in watched:
                continue
            elif now - seen.beat > self.limit:
                verdict = f"{seen.who} is gone: no sign of it for {now - seen.beat:.0f} s, last at {seen.place}"
            elif seen.places < front and now - seen.moved > self.limit:
                verdict = f"{seen.who} hangs: for {now - seen.moved:.0f} s at {seen.place} while others wait"
            else:
                continue
            if not self._store.check([f"end/{rank}"]):  # neither done nor has it said its own error
                return self._publish(verdict)
        return None

    def _publish(self, verdict: str) -> str:
        """The first verdict counts, whoever finds it."""
        assert self._store is not None
        return self._store.compare_set("verdict", "", verdict).decode()

    def _end(self, verdict: str) -> None:
        why = f"{verdict}{_ENDS}"
        if distributed.is_first_to_report(why):
            print(f"clipfuse: {why}", file=sys.stderr, flush=True)
            self._record(why)
        sys.stdout.flush()
        os._exit(1)

    # -----------------------------------------------------------------------------------------------------------------
    # The roll call

    def diagnose(self, error: BaseException) -> UserError | None:
        """Called on every process whose main thread met an exception: the line that names who began it.

        None where this process failed by itself (its own error says it all) or where nothing is known.
        """
        if self._store is None:
            return None
        collective = isinstance(error, RuntimeError) and bool(_COLLECTIVE.search(str(error)))
        own = error if isinstance(error, UserError | MemoryError) or not collective else None
        said = "" if own is None else (str(own) if isinstance(own, UserError) else f"{type(own).__name__}: {_first_line(own)}")
        try:
            self._store.set(f"end/{distributed.rank()}", json.dumps([own is not None, said]))
            if own is not None:
                return None
            self._explaining.set()
            told = self._call_roll()
        except (RuntimeError, ValueError):  # torch's store errors
            told = UserError(f"process 0, or the launcher that holds the rendezvous, is gone{_ENDS}")
        if told is not None and distributed.is_first_to_report(f"recorded: {told}"):
            self._record(str(told))
        return told

    def _call_roll(self) -> UserError | None:
        assert self._store is not None
        missing = [rank for rank in range(distributed.world_size()) if rank != distributed.rank()]
        begin = time.monotonic()
        # Beats in which a live process must move, and time for the others to fail as this one did.
        while missing and time.monotonic() - begin < max(2.0, 4 * self.every):
            self._look(everyone=True)
            for rank in [r for r in missing if self._store.check([f"end/{r}"])]:
                missing.remove(rank)
                own, said = json.loads(self._store.get(f"end/{rank}"))
                if own:
                    return UserError(f"{self._seen[rank].who} failed: {said}{_ENDS}")
            dead = [seen for seen in (self._seen[r] for r in missing) if seen.pid is not None and not _alive(seen.pid)]
            if dead or self._store.check(["verdict"]):
                return UserError(self._publish(f"{dead[0].who} died, last at {dead[0].place}" if dead else "") + _ENDS)
            time.sleep(min(0.2, self.every))
        if not missing:
            return None
        silent = [r for r in missing if self._seen[r].beat <= begin + self.every]
        named = self._seen[(silent or missing)[0]]
        return UserError(self._publish(f"{named.who} {'is gone' if silent else 'hangs'}, last at {named.place}") + _ENDS)


class _Seen:
    """What is known of a process: its last beat, and when beat and place last changed (monotonic seconds)."""

    def __init__(self, count: int, places: int, beat: float, moved: float) -> None:
        self.count, self.places, self.beat, self.moved = count, places, beat, moved
        self.place, self.who = "", ""
        self.pid: int | None = None
        """Its number here, where it runs on this machine."""


def _alive(pid: int) -> bool:
    """Whether the process runs; one that ended and waits for its launcher to notice does not."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        return not os.path.exists("/proc/self")  # gone between the two, or a system without /proc
    except PermissionError:
        return True


def _namespace() -> int:
    """Which process numbers are meant: containers on one machine count for themselves."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def _first_line(error: Any) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


_ME = (os.uname().nodename, os.getpid(), _namespace())
