"""Processes agree on the step in which they stop, and no step sends a message for it."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as td

from pretrain.runtime import signals
from pretrain.runtime.watchdog import Watchdog
from tests.support import world
from tests.support.launches import free_port

STEPS = 40


class CountingStore(td.Store):
    """A store that counts the calls which its clones, too, pass on to another store."""

    def __init__(self, store: Any, calls: list[str]) -> None:
        super().__init__()
        self.store, self.calls = store, calls

    def clone(self) -> CountingStore:
        return CountingStore(self.store.clone(), self.calls)

    def __getattribute__(self, name: str) -> Any:
        if name in ("store", "calls", "clone") or name.startswith("__"):
            return super().__getattribute__(name)
        self.calls.append(name)
        return getattr(self.store, name)


def run_steps(port: int, at: int, seed: int) -> tuple[int, str, int, int, int]:
    """Run steps that end with a collective; the last rank receives SIGTERM after its step `at`.

    Returns the step in which this rank stopped, the signal, the number of collectives and of calls to the store in the steps
    before `at`, and the number of keys that agreeing stored.
    """
    rank, processes = td.get_rank(), td.get_world_size()
    tcp: Any = td.TCPStore("localhost", port, processes, is_master=rank == 0)
    calls: list[str] = []
    opened = CountingStore(tcp.clone(), calls)
    sleeps = random.Random(seed + rank)
    signals.distributed.open_shared_store = lambda name: opened  # type: ignore[assignment]
    with signals.catch_stop_signals() as stop:
        time.sleep(0.2)  # the thread waits now
        opening, keys = len(calls), tcp.num_keys()
        group: Any = td.group.WORLD
        collectives = group._get_sequence_number_for_group()
        sent = 0
        for step in range(1, STEPS + 1):
            td.all_reduce(torch.ones(1))
            time.sleep(0.01 * sleeps.random())
            if step == at and rank == processes - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            name = stop.agreed_signal()
            if step < at - 1:  # other ranks may be a step ahead
                sent = len(calls) - opening
                extra = group._get_sequence_number_for_group() - collectives - step
            if name:
                break
        td.barrier()
        keys = tcp.num_keys() - keys
        td.barrier()
    return step, name, extra, sent, keys


@pytest.mark.parametrize(("processes", "at"), [(2, 5), (4, 10), (2, STEPS + 1)])
def test_all_stop_in_the_same_step_and_no_step_sends_a_message(processes: int, at: int) -> None:
    results = world.run(run_steps, processes, free_port(), at, at)
    steps, names, collectives, calls, keys = (set(values) for values in zip(*results, strict=True))
    assert collectives == calls == {0}
    if at > STEPS:
        assert steps == {STEPS}
        assert names == {""}
        assert keys == {0}
    else:
        (step,) = steps
        assert at <= step <= at + 2
        assert names == {"SIGTERM"}
        assert keys == {processes + 2}  # the request, an answer of each process, the decision


def watch(port: int) -> tuple[list[str], dict[str, int], str, int]:
    """Run a watchdog for twenty of its periods, until rank 0 fails.

    Returns its calls to the store while it starts, those of the periods by name, what it finds out on this rank ("" = nothing),
    and the number of calls for that.
    """
    rank, processes = td.get_rank(), td.get_world_size()
    tcp: Any = td.TCPStore("localhost", port, processes, is_master=rank == 0)
    calls: list[str] = []
    opened = CountingStore(tcp.clone(), calls)
    signals.distributed.open_shared_store = lambda name: opened  # type: ignore[assignment]
    with Watchdog(2.0, lambda reason: None) as watchdog:
        opening = list(calls)
        calls.clear()
        for step in range(1000):
            watchdog.mark(step, "computing")
            time.sleep(0.002)
        td.barrier()
        counted = Counter(calls)
        td.barrier()
        calls.clear()
        error = ValueError("boom") if rank == 0 else RuntimeError("gloo: connection closed by peer")
        diagnosis = str(watchdog.diagnose(error) or "")
        spent = len(calls)
        td.barrier()
    return opening, dict(counted), diagnosis, spent


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_a_heartbeat_is_three_requests_however_many_processes_and_steps(processes: int) -> None:
    """One to write, one to read that of rank 0 (rank 0: those of all), one to ask whether a process was lost.

    A step is none. So the store gets 3 N requests a period of a second from N processes, for 4 N - 1 keys. To start, each sends
    its heartbeat and nothing else; when the run fails, each asks for a few keys, not for those of every other process.
    """
    for rank, (opening, counted, diagnosis, spent) in enumerate(world.run(watch, processes, free_port())):
        assert [call for call in opening if call != "set_timeout"] == ["set"]
        assert ("process 0 (" in diagnosis and " failed: ValueError: boom" in diagnosis) == (rank > 0)
        assert spent <= 24  # of those, three for each of a few periods
        assert counted.keys() == {"set", "multi_get", "check"}
        beats = counted["set"]
        assert 0 < beats <= 40  # a thousand steps
        assert abs(counted["multi_get"] - beats) <= 1
        assert abs(counted["check"] - beats) <= 1
