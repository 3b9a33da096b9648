"""Finding shards and counting their samples.

Training needs only the count of each shard before it starts. It comes from img2dataset's NAME_stats.json or a sizes.json
beside the shards, or else from the index, which takes one pass over the headers of a shard, once.
"""

from __future__ import annotations

import glob
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from braceexpand import braceexpand

from pretrain.data.shards.cache import ShardCache, is_remote, retry_io
from pretrain.data.shards.index import ShardIndex, indexed_count, load_index, recorded_count
from pretrain.errors import ConfigError, UserError

__all__ = ["RawSample", "ShardIndex", "count_samples", "expand_shards", "load_index"]


@dataclass(slots=True)
class RawSample:
    """A sample as stored: its key "shard/KEY", and the bytes of its members by extension."""

    key: str
    members: dict[str, bytes] = field(default_factory=dict)


# ---- finding shards --------------------------------------------------------------------------------------------------


def expand_shards(spec: str | Sequence[str], where: str = "data.train") -> list[str]:
    """Return the shards that match globs, brace patterns, folders and urls; sorted and unique.

    A brace pattern is {0000..0012}; a folder stands for all *.tar in it.

    Args:
        spec: one or several patterns.
        where: the configuration key or argument that holds them, for error messages.

    Raises:
        ConfigError: a pattern that matches no shard.
    """
    shards: set[str] = set()
    for item in [spec] if isinstance(spec, str) else spec:
        shards |= set(_expand_one(item, where))
    if not shards:
        raise ConfigError(f"{where} names no shards: give a glob, a brace pattern, a folder or a url")
    return sorted(shards)


def _expand_one(item: str, where: str) -> list[str]:
    """Return the shards that match one pattern."""
    if item.startswith("pipe:"):
        return [item]
    try:
        patterns = list(braceexpand(item))
    except ValueError:
        raise ConfigError(f"{where}={item}: its braces are not balanced; write a range as {{0000..0012}}") from None
    shards: list[str] = []
    missing: list[str] = []
    for pattern in patterns:
        path = os.path.expanduser(pattern.removeprefix("file://"))
        if is_remote(path):
            matches = [path]
        elif os.path.isdir(path):
            matches = glob.glob(os.path.join(glob.escape(path), "*.tar"))
        elif os.path.exists(path):
            matches = [path]
        else:
            matches = [match for match in glob.glob(path, recursive=True) if not os.path.isdir(match)]
        shards += matches
        missing += [] if matches else [pattern]
    if missing:
        is_folder = os.path.isdir(os.path.expanduser(missing[0]))
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ConfigError(
            f"{where}={item}: " + (f"no *.tar in this folder{more}" if is_folder else f"no file matches {missing[0]}{more}")
        )
    return shards


# ---- counting samples ------------------------------------------------------------------------------------------------


def count_samples(
    paths: Sequence[str],
    cache: ShardCache | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[int]:
    """Return the number of samples of each shard, indexing shards of unknown count in parallel.

    A count comes from a file beside the shard or the saved index, or else from one pass over the shard.

    Args:
        paths: shards, as `expand_shards` returns them.
        cache: where fetched shards and indices are kept.
        workers: processes that index; None = one per core.
        progress: called with (shards done, shards in total).

    Raises:
        UserError: shards that are damaged or cannot be read; the message names the first.
    """
    cache = cache or ShardCache()
    for path in paths:
        cache.check_allowed(path)
    with ThreadPoolExecutor(32) as threads:
        sizes = list(threads.map(partial(_known_count, cache=cache), paths))
    unknown = [i for i, count in enumerate(sizes) if count is None]
    done, errors = len(paths) - len(unknown), []
    for i, result in zip(
        unknown, map_in_processes(_count_by_indexing, [(paths[i], cache) for i in unknown], workers), strict=True
    ):
        if isinstance(result, str):
            errors.append(result)
        sizes[i] = result if isinstance(result, int) else 0
        done += 1
        if progress:
            progress(done, len(paths))
    if errors:
        more = f" (and {len(errors) - 1} more shards; `clipfuse data check` lists them)" if len(errors) > 1 else ""
        raise UserError(errors[0] + more)
    return [int(count or 0) for count in sizes]


def _known_count(path: str, cache: ShardCache) -> int | None:
    """Return the count from a file beside the shard or its saved index; None where neither has it."""
    count, _ = recorded_count(path)
    if count is not None:
        return count
    return None if is_remote(path) or not os.path.exists(path) else indexed_count(path, cache)


def _count_by_indexing(job: tuple[str, ShardCache]) -> int | str:
    """Return the number of samples from the index, or the error message where the shard cannot be indexed."""
    path, cache = job
    try:
        return retry_io(lambda: load_index(path, cache).count, path)
    except UserError as error:
        return str(error)


def map_in_processes(function: Callable[[Any], Any], jobs: list[Any], workers: int | None) -> Iterator[Any]:
    """Yield function(job) for each job, in order; in several processes where there are at least 4 jobs.

    Args:
        function: pickled, as are its argument and result.
        jobs: the arguments.
        workers: number of processes; None = one per core.
    """
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    if workers < 2 or len(jobs) < 4:
        yield from map(function, jobs)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from pool.map(function, jobs, chunksize=max(1, min(16, len(jobs) // (4 * workers))))
