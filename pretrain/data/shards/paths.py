"""Finding shards and counting their samples.

Training needs only the count of each shard before it starts. It comes from a file beside the shards (`counts.py`), or else from
one pass over the headers: of a local shard while it is indexed, of a remote one by requests for byte ranges.
"""

from __future__ import annotations

import glob
import logging
import multiprocessing
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

from braceexpand import braceexpand

from pretrain.data.shards.cache import ShardCache
from pretrain.data.shards.counts import find_manifest_record, looks_complete, recorded_count
from pretrain.data.shards.index import ShardIndex, count_by_headers, indexed_count, load_index
from pretrain.data.shards.ranges import NoRangesError
from pretrain.data.shards.retries import retry_io
from pretrain.data.shards.stores import is_pattern, is_store, list_shards
from pretrain.data.shards.urls import is_http, is_remote
from pretrain.errors import ConfigError, UserError
from pretrain.printable import one_safe_line

__all__ = ["RawSample", "ShardIndex", "count_samples", "expand_shards", "load_index"]


log = logging.getLogger(__name__)

_THREADS = 32  # that ask for counts and headers
_MANY = 100  # remote shards without counts, about which a warning is logged


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
    items = [part for item in ([spec] if isinstance(spec, str) else spec) for part in split_patterns(item)]
    shards = sorted({shard for item in items for shard in _expand_one(item, where)})
    if not shards:
        raise ConfigError(f"{where} names no shards: give a glob, a brace pattern, a folder or a url")
    if len(items) == 1:
        return shards
    # Several patterns may name one file twice, as a/0.tar and ./a/0.tar.
    files = {shard if is_remote(shard) else os.path.abspath(shard): shard for shard in reversed(shards)}
    return sorted(files.values())


def split_patterns(item: str) -> list[str]:
    """Split patterns at "::", as webdataset and open_clip do; not within a name, a command or the address of a host, [::1]."""
    if "::" not in item or _matches_files(item):
        return [item]
    parts: list[str] = []
    for part in re.split(r"::(?=pipe:)", item):
        is_command = part.startswith("pipe:")
        boundary = r"::(?=[a-z][a-z0-9+.-]*://|\S+\.tar(?:::|$))" if is_command else r"::(?![^\[\]/]*\])"
        start = 0
        for match in re.finditer(boundary, part):
            if _is_separator(part[start : match.start()], part[match.end() :]):
                parts.append(part[start : match.start()])
                start = match.end()
        parts.append(part[start:])
    return [part for part in parts if part]


def _is_separator(before: str, after: str) -> bool:
    """Return whether "::" between two texts separates patterns, rather than being part of a name."""
    if not before or not after or before.endswith((".tar", "}", "*", "/", " -")):  # a command may end in " -"
        return True
    return bool(re.match(r"[a-z][a-z0-9+.-]*://|[/~]", after)) or os.path.exists(os.path.expanduser(before))


def _matches_files(item: str) -> bool:
    """Return whether a pattern as a whole, with the first value of each of its braces, matches a file or folder."""
    if os.path.exists(item):
        return True
    try:
        first = next(iter(braceexpand(item)))  # all values of several patterns together may be too many to look for
    except ValueError:
        return False
    return any(glob.iglob(os.path.expanduser(first.removeprefix("file://")), recursive=True))


def _expand_command(command: str) -> list[str]:
    """Expand the ranges {0000..0012} that number shards in a command; other braces are left to the shell."""
    depth, start = 0, 0
    for i, character in enumerate(command):
        if character == "{":
            start = i if depth == 0 else start
            depth += 1
        elif character == "}" and depth:
            depth -= 1
            group = command[start : i + 1]
            if depth == 0 and ".." in group and _numbers_shards(command[:start], group, command[i + 1 :]):
                values = list(braceexpand(group, escape=False))
                if values != [group]:
                    return [command[:start] + value + end for value in values for end in _expand_command(command[i + 1 :])]
    return [command]


def _numbers_shards(before: str, group: str, after: str) -> bool:
    """Return whether braces in a command are part of the name of a .tar, or have leading zeros, and are not a loop's range."""
    if before.endswith(("$", "\\")) or re.search(r"\bfor\s+\w+\s+in\s[^;\n]*$", before):
        return False
    rest_of_word = re.match(r"[^\s;|&()<>]*", after)
    is_name = rest_of_word is not None and re.search(r"\.tar(?!\w)", rest_of_word[0])
    return bool(is_name or re.search(r"\b0\d+\.\.|\.\.0\d", group))


def _expand_one(item: str, where: str) -> list[str]:
    """Return the shards that match one pattern."""
    if item.startswith("pipe:"):
        return _expand_command(item)
    try:
        patterns = list(braceexpand(item))
    except ValueError:
        raise ConfigError(f"{where}={item}: its braces are not balanced; write a range as {{0000..0012}}") from None
    shards: list[str] = []
    missing: list[str] = []
    for pattern in patterns:
        path = os.path.expanduser(pattern.removeprefix("file://"))
        if is_store(path) and is_pattern(path):
            matches = list_shards(path)
        elif is_remote(path):
            matches = [path]
            if is_http(path) and "*" in path.partition("?")[0]:
                raise ConfigError(f"{where}={item}: a web server does not list its files; write a range as {{0000..0012}}")
        elif os.path.isdir(path):
            matches = glob.glob(os.path.join(glob.escape(path), "*.tar"))
        elif os.path.exists(path):
            matches = [path]
        else:
            matches = [match for match in glob.glob(path, recursive=True) if not os.path.isdir(match)]
        shards += matches
        missing += [] if matches else [pattern]
    if missing and is_remote(missing[0]):
        raise ConfigError(f"{where}={item}: no object in the store matches {missing[0]}")
    if missing:
        folder = os.path.expanduser(missing[0].removeprefix("file://"))
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        if os.path.isdir(folder):
            raise ConfigError(f"{where}={item}: no *.tar in this folder{more}{_suggest_source(folder, where)}")
        raise ConfigError(f"{where}={item}: no file matches {missing[0]}{more}")
    return shards


def _suggest_source(folder: str, where: str) -> str:
    """Return what a folder without shards holds that could be meant, for an error message; "" where nothing could.

    where: the configuration key or option that names the folder.
    """
    names = sorted(os.listdir(folder))
    compressed = [name for name in names if re.search(r"\.(tar\.\w+|tgz|tbz2?|txz|tzst)$", name.lower())]
    if compressed:
        return f", but {compressed[0]}: shards must be plain tar files, decompress it first"
    if any(name.endswith(".TAR") for name in names):
        return f"; the pattern {folder}/*.TAR matches some"
    if glob.glob(os.path.join(glob.escape(folder), "*", "*.tar")):
        return f", but in folders below it: give {os.path.join(folder, '*', '*.tar')}"
    table = next((name for name in names if name.lower().endswith((".csv", ".tsv", ".jsonl", ".parquet"))), None)
    if table is not None:
        return f"; `clipfuse data pack {shlex.quote(os.path.join(folder, table))} shards` makes shards of the table"
    image = _find_image(folder)
    if image is None:
        return ""
    has_caption = any(os.path.exists(os.path.splitext(image)[0] + extension) for extension in (".txt", ".TXT"))
    captions = "" if has_caption else " --caption-from path"
    origin = "NAME.txt beside NAME.jpg" if has_caption else "the words of each path"
    index = "; `clipfuse index` takes the folder as it is" if where == "--data" else ""
    command = f"clipfuse data pack {shlex.quote(folder)} shards{captions}"
    return f"; `{command}` makes shards of its images, captions: {origin}{index}"


_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_LOOKED_AT = 1000
"""Folders that are searched for an image, for an error message."""


def _find_image(folder: str) -> str | None:
    """Return the path of an image at any depth below a folder; None where none is soon met."""
    for root, _, names in islice(os.walk(folder), _LOOKED_AT):
        for name in sorted(names):
            if name.lower().endswith(_IMAGES):
                return os.path.join(root, name)
    return None


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
    with ThreadPoolExecutor(_THREADS) as threads:
        # What manifests hold is looked up at once, after one request for each folder; other files may take one for each shard.
        folders = {path.partition("?")[0].rpartition("/")[0]: path for path in paths if is_remote(path)}
        list(threads.map(find_manifest_record, folders.values()))
        sizes = [find_manifest_record(path).samples if is_remote(path) else None for path in paths]
        unlisted = [i for i, count in enumerate(sizes) if count is None]
        for i, count in zip(
            unlisted, threads.map(partial(_known_count, cache=cache), [paths[i] for i in unlisted]), strict=True
        ):
            sizes[i] = count
    unknown = [i for i, count in enumerate(sizes) if count is None]
    by_headers = [i for i in unknown if is_http(paths[i]) or is_store(paths[i])]
    if len(by_headers) > _MANY:
        log.warning(one_safe_line(
            f"{len(by_headers):,} remote shards such as {paths[by_headers[0]]} have no counts beside them: reading their "
            "headers, which may take long; `clipfuse data check SHARDS --manifest` writes the counts once"
        ))  # fmt: skip
    done, errors = len(paths) - len(unknown), []

    def collect(indices: list[int], results: Iterator[int | str | None]) -> list[int]:
        """Collect the results for some shards, and return which have none."""
        nonlocal done
        without = []
        for i, result in zip(indices, results, strict=True):
            if result is None:
                without.append(i)
                continue
            if isinstance(result, str):
                errors.append(result)
            sizes[i] = result if isinstance(result, int) else 0
            done += 1
            if progress:
                progress(done, len(paths))
        return without

    whole = collect(by_headers, _count_all_by_headers([paths[i] for i in by_headers], cache))
    whole = sorted(set(unknown) - set(by_headers) | set(whole))
    collect(whole, map_in_processes(_count_by_indexing, [(paths[i], cache) for i in whole], workers))
    if errors:
        more = f" (and {len(errors) - 1} more shards; `clipfuse data check` lists them)" if len(errors) > 1 else ""
        raise UserError(errors[0] + more)
    return [int(count or 0) for count in sizes]


def _known_count(path: str, cache: ShardCache) -> int | None:
    """Return the count from a file beside the shard or its saved index; None where neither has it or the shard is cut short."""
    count, _ = recorded_count(path)
    if count is not None:
        return count if is_remote(path) or looks_complete(path) else None
    return None if is_remote(path) or not os.path.exists(path) else indexed_count(path, cache)


def _count_all_by_headers(paths: Sequence[str], cache: ShardCache) -> Iterator[int | str | None]:
    """Yield the number of samples of each remote shard from its headers, the error message, or None where only it as a whole
    can be had."""
    whole_only: set[str] = set()  # servers that send whole files only

    def count(path: str) -> int | str | None:
        server = "/".join(path.split("/", 3)[:3])
        if server in whole_only or cache.cached_path(path, "shards").exists():
            return None
        try:
            return retry_io(lambda: count_by_headers(path, cache.seconds), path)
        except NoRangesError:
            whole_only.add(server)
            return None
        except UserError as error:
            return str(error)

    if paths:
        yield count(paths[0])  # alone, as it may show that its server sends no ranges
    with ThreadPoolExecutor(_THREADS) as threads:
        yield from threads.map(count, paths[1:])


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
