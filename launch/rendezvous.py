"""Hold the rendezvous of runs of several nodes in a process of its own: python -m launch.rendezvous HOST:PORT.

Without it, the node whose name is HOST in `--rdzv HOST:PORT` holds the rendezvous and must stay up. With this process on HOST,
which need not be a node of any run, every node may be lost and come back. It holds torch's TCPStore in memory, some kilobytes
for each run, and reads and writes no file.

A run that has ended has closed its rendezvous. Its state is removed after a while, so that the same command can start again.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as td
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend

STATE = "torch.rendezvous."
"""torch's prefix of the key that holds the state of a run's rendezvous."""
CLOSED = "clipfuse/closed/"
"""Prefix of the key that a run's launchers write after they have closed its rendezvous."""
CLOSED_SECONDS = 15.0
"""How long the state of a closed rendezvous stays, so that all nodes see that it is closed."""


def hold(endpoint: str, ended: threading.Event) -> None:
    """Serve the store at HOST:PORT until `ended` is set. Raises ValueError for another form, RuntimeError where it cannot."""
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"{endpoint!r} must be HOST:PORT")
    store = td.TCPStore(host, int(port), is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    print(f"the rendezvous is open at {endpoint}", flush=True)
    closed_since: dict[str, float] = {}
    while not ended.wait(1.0):
        now = time.monotonic()
        runs = {key.removeprefix(CLOSED) for key in store.list_keys() if key.startswith(CLOSED)}
        closed_since = {run: closed_since.get(run, now) for run in runs}
        for run in [run for run, since in closed_since.items() if now - since > CLOSED_SECONDS]:
            _forget(store, run)


def _forget(store: td.TCPStore, run: str) -> None:
    """Remove what a run has left, so that another start finds nothing of it."""
    for key in store.list_keys():
        if f"{STATE}{run}." in key:  # what its rounds have stored
            store.delete_key(key)
    store.set(STATE + run, C10dRendezvousBackend._NULL_SENTINEL)  # as torch marks a state that nobody has written
    store.delete_key(CLOSED + run)


def main(arguments: list[str]) -> int:
    """Run the program; return 0 after a signal, 1 where the port cannot be used, 2 for wrong usage."""
    if len(arguments) != 1 or arguments[0] in ("-h", "--help"):
        print("usage: python -m launch.rendezvous HOST:PORT", file=sys.stderr)
        return 2
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    try:
        hold(arguments[0], ended)
    except (ValueError, RuntimeError) as error:
        print(f"clipfuse: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
