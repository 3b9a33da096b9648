"""Goes ahead of the workers: fetches and indexes the shards of the windows to come, so that no batch waits for them.

A process of its own beside the first trainer of each node, started only where shards are remote or not yet indexed. It decides
nothing and reports nothing: what goes wrong here, the workers meet again and report.
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

from pretrain.data.shards.cache import ShardCache, is_remote
from pretrain.data.shards.index import indexed_count, load_index
from pretrain.data.shards.reader import ShardReader
from pretrain.runtime.orphans import is_orphan

_MAX_PROBES = 64  # shards looked at to see whether they are indexed
_MAX_REMEMBERED = 4096  # shards not looked at again


def is_prefetch_needed(paths: Sequence[str], cache: ShardCache) -> bool:
    """Whether there is anything to do: remote shards, or some (of a few tried) without an index."""
    tried = paths[:: max(1, len(paths) // _MAX_PROBES)]
    with suppress(OSError):
        return any(map(is_remote, paths)) or any(indexed_count(path, cache) is None for path in tried)
    return False


@contextmanager
def run_prefetcher(
    reader: ShardReader | None, shards: Callable[[int], Sequence[int]], start: int, reach: int
) -> Iterator[Callable[[int], None]]:
    """Runs the process; the loader tells the function it gets which batch it is at.

    Args:
        reader: knows the shards; None = nothing to do.
        shards: batch -> numbers of the shards it reads.
        start: first batch.
        reach: batches to be ahead.
    """
    if reader is None:
        yield lambda batch: None
        return
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    at = context.Value("q", start)
    process = context.Process(
        target=_prefetch, args=(reader.paths, reader.cache, shards, start, reach, at, os.getpid()), daemon=True
    )
    process.start()

    def tell(batch: int) -> None:
        at.value = batch

    try:
        yield tell
    finally:
        process.kill()
        process.join()
        process.close()


def _prefetch(
    paths: Sequence[str],
    cache: ShardCache,
    shards: Callable[[int], Sequence[int]],
    start: int,
    reach: int,
    at: Any,
    parent: int,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the trainer ends it
    done: OrderedDict[int, None] = OrderedDict()
    for batch in count(start):
        while batch > at.value + reach:
            time.sleep(0.1)
            if is_orphan(parent):
                return
        for shard in shards(batch):
            if shard in done:
                done.move_to_end(shard)
                continue
            with suppress(Exception):
                load_index(paths[shard], cache)
            if is_orphan(parent):
                return
            done[shard] = None
            if len(done) > _MAX_REMEMBERED:
                done.popitem(last=False)
