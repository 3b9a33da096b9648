"""Writes what is left of one shard: members as they are, under the names they had."""

from __future__ import annotations

import tarfile
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np

from pretrain.data import BadSample, job_pool
from pretrain.data.pack.writer import ShardResult, add_members, finish_shard, get_stats_path
from pretrain.data.sample_filter import REPEATED, format_skip_line
from pretrain.data.shards.reader import ShardReader
from pretrain.errors import UserError
from pretrain.runtime import files

_MAX_EXAMPLES = 3  # keys recorded per shard for each reason


def write_shard(source: str, name: str, reasons: np.ndarray, names: list[str], path: Path) -> ShardResult:
    """Write the samples of a shard that stay into the tar `path`, and the result into NAME_stats.json.

    Both files appear only when they are complete, the stats last: a shard with stats is finished. The same arguments give the
    same bytes. A shard of which nothing stays has stats and no tar.

    Args:
        source: the shard that is read.
        name: of the shard in keys.
        reasons: (n,) why each sample goes, a position in `names`; 0 where it stays.
        names: of the reasons.
        path: the tar.

    Raises:
        UserError: the shard cannot be read, or the disk is full.
        JobStopped: the parent process stops.
    """
    result = ShardResult(len(reasons))
    partial = files.partial_path(path)
    reader = ShardReader([source])
    if reader.count(0) != len(reasons):
        raise UserError(f"{source} holds {reader.count(0):,} samples, and held {len(reasons):,} before: it has changed")
    try:
        with open(partial, "wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for sample, reason in enumerate(reasons.tolist()):
                job_pool.raise_if_stopped()
                key = reader.key(0, sample).partition("/")[2]
                if reason:
                    result.skip(f"{name}/{key}", BadSample(names[reason]))
                    continue
                try:
                    members = reader.read(0, sample).members
                except BadSample as bad:  # a member is too large, which only those who read it see
                    result.skip(f"{name}/{key}", bad)
                    continue
                add_members(tar, reader.stem(0, sample), members)
                result.written += 1
        finish_shard(partial, path, result)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; finished shards stay, and the same command goes on"
        ) from error
    finally:
        reader.close()
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return result


def read_result(path: Path, samples: int) -> ShardResult | None:
    """Return the result of a shard that an earlier run finished, or None if it is not finished."""
    try:
        result = ShardResult.from_json(get_stats_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return result if result.count == samples and (path.exists() or not result.written) else None


def list_shard(source: str, name: str, reasons: np.ndarray, names: list[str]) -> tuple[ShardResult, list[str]]:
    """Return the result of a shard that is not written, and the lines of a list for data.skip. Raises UserError."""
    result = ShardResult(len(reasons), written=int((reasons == 0).sum()))
    reader = ShardReader([source])
    lines: list[str] = []
    for sample in np.flatnonzero(reasons).tolist():
        key = f"{name}/{reader.key(0, sample).partition('/')[2]}"
        reason = names[reasons[sample]]
        result.skip(key, BadSample(reason))
        lines.append(format_skip_line(key, REPEATED if reader.is_repeated(0, sample) else reason))
    reader.close()
    return result, lines


def add_results(results: list[ShardResult]) -> tuple[Counter[str], dict[str, list[str]]]:
    """Return how many samples went, and the first keys, by reason."""
    counts: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    for result in results:
        counts += result.skipped
        for reason, keys in result.examples.items():
            known = examples.setdefault(reason, [])
            known += keys[: _MAX_EXAMPLES - len(known)]
    return counts, examples
