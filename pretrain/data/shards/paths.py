"""Tar shards: find them, count them. `index.py` knows where their samples lie, `reader.py` reads them, `check.py` verifies.

Training needs only the count of each shard before it starts: from img2dataset's NAME_stats.json or a sizes.json beside the
shards, else from the index, which costs one pass over the headers of a shard, once.
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
    """One sample as stored: its key "shard/KEY", and the bytes of its members by extension."""

    key: str
    members: dict[str, bytes] = field(default_factory=dict)


# ---- find ------------------------------------------------------------------------------------------------------------


def expand_shards(spec: str | Sequence[str], where: str = "data.train") -> list[str]:
    """Shards from globs, brace patterns ({0000..0012}), folders (all *.tar in them) and urls; sorted, each once.

    Args:
        spec: one or several of them.
        where: what they were given for, to name in errors.

    Raises:
        ConfigError: something that matches no shard.
    """
    found: set[str] = set()
    for item in [spec] if isinstance(spec, str) else spec:
        found |= set(_expand_one(item, where))
    if not found:
        raise ConfigError(f"{where} names no shards: give a glob, a brace pattern, a folder or a url")
    return sorted(found)


def _expand_one(item: str, where: str) -> list[str]:
    if item.startswith("pipe:"):
        return [item]
    try:
        patterns = list(braceexpand(item))
    except ValueError:  # unbalanced
        raise ConfigError(f"{where}={item}: its braces are not balanced; a range is written {{0000..0012}}") from None
    found: list[str] = []
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
        found += matches
        missing += [] if matches else [pattern]
    if missing:
        folder = os.path.isdir(os.path.expanduser(missing[0]))
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ConfigError(
            f"{where}={item}: " + (f"no *.tar in this folder{more}" if folder else f"no file matches {missing[0]}{more}")
        )
    return found


# ---- count -----------------------------------------------------------------------------------------------------------


def count_samples(
    paths: Sequence[str],
    cache: ShardCache | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[int]:
    """Samples in each shard: what is written beside it or in its saved index, else from one pass, in parallel.

    Args:
        paths: shards, as `expand` gives them.
        cache: where fetched shards and indices go.
        workers: processes for the passes; None = one a core.
        progress: called with (shards done, shards in all).

    Raises:
        UserError: shards that are damaged or cannot be read, naming the first.
    """
    cache = cache or ShardCache()
    for path in paths:
        cache.check_allowed(path)
    with ThreadPoolExecutor(32) as threads:
        found = list(threads.map(partial(_known_count, cache=cache), paths))
    unknown = [i for i, count in enumerate(found) if count is None]
    done, errors = len(paths) - len(unknown), []
    for i, result in zip(
        unknown, map_in_processes(_count_by_indexing, [(paths[i], cache) for i in unknown], workers), strict=True
    ):
        if isinstance(result, str):
            errors.append(result)
        found[i] = result if isinstance(result, int) else 0
        done += 1
        if progress:
            progress(done, len(paths))
    if errors:
        more = f" (and {len(errors) - 1} more shards; `clipfuse data check` lists them)" if len(errors) > 1 else ""
        raise UserError(errors[0] + more)
    return [int(count or 0) for count in found]


def _known_count(path: str, cache: ShardCache) -> int | None:
    said, _ = recorded_count(path)
    if said is not None:
        return said
    return None if is_remote(path) or not os.path.exists(path) else indexed_count(path, cache)


def _count_by_indexing(job: tuple[str, ShardCache]) -> int | str:
    """The count, or the line that says why there is none."""
    path, cache = job
    try:
        return retry_io(lambda: load_index(path, cache).count, path)
    except UserError as error:
        return str(error)


def map_in_processes(function: Callable[[Any], Any], jobs: list[Any], workers: int | None) -> Iterator[Any]:
    """function over jobs, in order, in processes where there are enough of them to be worth it."""
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    if workers < 2 or len(jobs) < 4:
        yield from map(function, jobs)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from pool.map(function, jobs, chunksize=max(1, min(16, len(jobs) // (4 * workers))))
