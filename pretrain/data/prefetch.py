"""Prefetching: shards of coming windows are fetched and indexed before the workers need them.

It is a separate process beside the first trainer of each node, started only where shards are remote or not yet indexed. It
does not affect the order of samples and reports no errors: the workers meet the same errors and report them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any

from pretrain.data.shards.cache import ShardCache
from pretrain.data.shards.index import indexed_count, load_index
from pretrain.data.shards.reader import ShardReader
from pretrain.data.shards.urls import is_remote
from pretrain.runtime.orphans import exit_with_parent, kill, kill_at_exit

_MAX_PROBES = 64  # shards that are checked for a saved index
_MAX_REMEMBERED = 4096  # indexed shards that are remembered and not indexed again


def is_prefetch_needed(paths: Sequence[str], cache: ShardCache) -> bool:
    """Return whether any shard is to be fetched, or any of a few shards has no saved index."""
    if cache.stage:
        return True
    probed = paths[:: max(1, len(paths) // _MAX_PROBES)]
    with suppress(OSError):
        return any(map(is_remote, paths)) or any(indexed_count(path, cache) is None for path in probed)
    return False


@contextmanager
def run_prefetcher(
    reader: ShardReader | None, shards: Callable[[int], Sequence[int]], start: int, max_ahead: int
) -> Iterator[Callable[[int], None]]:
    """Run the prefetching process while the context is open.

    Args:
        reader: its paths and cache are used; None = start no process.
        shards: returns the numbers of the shards that a batch reads.
        start: number of the first batch.
        max_ahead: how many batches to be ahead of the loader at most.

    Yields:
        A function by which the loader reports the number of its current batch.
    """
    if reader is None:
        yield lambda batch: None
        return
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    current_batch = context.Value("q", start)
    arguments = (reader.paths, reader.cache, shards, start, max_ahead, current_batch, os.getpid())
    process = context.Process(target=_prefetch, args=arguments, daemon=True)
    process.start()
    cancel = kill_at_exit([process])

    def report_batch(batch: int) -> None:
        current_batch.value = batch

    try:
        yield report_batch
    finally:
        kill([process])
        process.close()
        cancel()


def _prefetch(
    paths: Sequence[str],
    cache: ShardCache,
    shards: Callable[[int], Sequence[int]],
    start: int,
    max_ahead: int,
    current_batch: Any,
    parent: int,
) -> None:
    """Index the shards of batch after batch, at most `max_ahead` batches ahead, until killed or orphaned."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the trainer kills this process
    exit_with_parent(parent)  # also from within a fetch that does not end
    indexed: OrderedDict[int, None] = OrderedDict()
    for batch in count(start):
        while batch > current_batch.value + max_ahead:
            time.sleep(0.1)
        for shard in shards(batch):
            if shard in indexed:
                indexed.move_to_end(shard)
                continue
            with suppress(Exception):
                load_index(paths[shard], cache, check_count=False)  # the workers compare it
            indexed[shard] = None
            if len(indexed) > _MAX_REMEMBERED:
                indexed.popitem(last=False)
