"""Anything -> shards: a folder of pictures, a CSV, TSV, JSON-lines or Parquet table, or tars, in parallel.

    OUT/PREFIX-0000.tar            KEY.jpg|png|webp, KEY.txt, KEY.json (further columns, and where the picture was)
    OUT/PREFIX-0000_stats.json     how many samples it has, and what was skipped and why
    OUT/PREFIX-plan.json           source, options and their fingerprint: what makes going on after a kill safe

Sample n of the source is in shard n // shard_size, or was skipped: which samples a shard holds does not depend on the others,
so shards are written in any order by any number of processes, and finished ones are kept when a stopped run is started again.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pretrain.data.pack.sources import PackSource, open_source
from pretrain.data.pack.table import Table
from pretrain.data.pack.writer import Job, Result, Style, stats_path, write_shard
from pretrain.errors import ConfigError, UserError
from pretrain.runtime import files
from pretrain.runtime.orphans import exit_with_parent

_UNEVEN = "row with too few or too many values"


@dataclass
class Summary:
    """What became of a source."""

    out: Path
    shards: int = 0
    written: int = 0
    kept: int = 0
    """Shards found finished from an earlier, stopped run."""
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    """By reason, the first few names."""

    def add(self, result: Result) -> None:
        """Adds a shard."""
        self.shards += result.written > 0
        self.written += result.written
        self.skipped += result.skipped
        for reason, names in result.examples.items():
            known = self.examples.setdefault(reason, [])
            known += names[: 3 - len(known)]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """For a person."""
        kept = f" ({self.kept:,} were there already)" if self.kept else ""
        out = [f"{self.out}: {self.written:,} samples in {self.shards:,} shards{kept}"]
        if self.skipped:
            out.append(f"skipped {self.skipped.total():,}:")
        for reason, count in self.skipped.most_common():
            out.append(f"  {count:>8,}  {reason}: {'; '.join(self.examples.get(reason, []))}")
        return out


def pack(
    source: str | Path,
    out: str | Path,
    *,
    image_column: str = "image",
    caption_column: str = "caption",
    caption_from: str = "txt",
    size: int | None = None,
    side: str = "shortest",
    shard_size: int = 1000,
    prefix: str = "shard",
    outside: bool = False,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Packs a source into `out`; started again after a stop, it goes on, and gives the tars it would have given at once.

    Args:
        source: a folder of pictures; a .csv, .tsv, .jsonl or .parquet (or a glob of several); tars as `data.train` takes them.
        out: the folder for the shards, made if it is not there.
        image_column: tables: the picture's path, relative to the table, or the picture itself.
        caption_column: tables: text, or a list of texts. Of a list the first is KEY.txt, and all are KEY.json's field of
            this name.
        caption_from: folders: "txt" = NAME.txt beside NAME.jpg; "path" = the words of its path.
        size: pixels; makes larger pictures smaller. None stores every file's bytes as they are.
        side: which side `size` limits: "shortest" or "longest".
        shard_size: samples of the source a shard.
        prefix: what shards are called.
        outside: tables: let paths lead out of the table's folder.
        workers: processes; None = one a core.
        progress: called with (samples done, samples in all).

    Raises:
        UserError: one line, for anything that keeps it from working; samples that cannot be used are only counted.
    """
    out = Path(out).expanduser()
    style = Style(size, side, caption_column)
    _check(style, caption_from, shard_size, prefix)
    _make(out)
    if Path(source).expanduser().resolve() == out.resolve():
        raise ConfigError(f"{out} is both source and target: give another folder for the shards")
    opened = open_source(str(source), image_column, caption_column, caption_from, outside, out.resolve())
    options = {"caption_from": caption_from, "shard_size": shard_size, "outside": outside, **asdict(style)}
    options |= {"image_column": image_column} if isinstance(opened, Table) else {}
    with _alone(out, prefix):
        plan = _plan(out, prefix, opened, str(source), options)
        summary = _run(opened, plan, out, prefix, style, workers or os.cpu_count() or 1, progress)
    if not summary.written:
        reason, count = summary.skipped.most_common(1)[0]
        example = f": {summary.examples[reason][0]}" if summary.examples.get(reason) else ""
        raise UserError(
            f"{source}: no sample can be used; {count:,} of {plan['samples']:,} have the problem: {reason}{example}"
        )
    return summary


def _check(style: Style, caption_from: str, shard_size: int, prefix: str) -> None:
    if style.size is not None and style.size < 1:
        raise ConfigError(f"size={style.size} must be at least 1 pixel")
    if style.side not in ("shortest", "longest"):
        raise ConfigError(f"side={style.side!r} must be one of shortest, longest")
    if caption_from not in ("txt", "path"):
        raise ConfigError(f"caption_from={caption_from!r} must be one of txt, path")
    if shard_size < 1:
        raise ConfigError(f"shard_size={shard_size} must be at least 1")
    if not prefix or "/" in prefix or "." in prefix:
        raise ConfigError(f"prefix={prefix!r} must be a word without slash or dot: shards are called PREFIX-0000.tar")


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write shards to {out}: {error.strerror or error}") from error


@contextmanager
def _alone(out: Path, prefix: str) -> Iterator[None]:
    """Two runs must not write the same shards; what a killed one left half done is removed."""
    with open(out / f".{prefix}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is packing into {out}/{prefix}-*.tar right now") from None
        for partial in out.glob(f".{prefix}-*.partial"):
            partial.unlink(missing_ok=True)
        yield


# ---------------------------------------------------------------------------------------------------------------------
# The plan


def _plan(out: Path, prefix: str, source: PackSource, named: str, options: dict[str, Any]) -> dict[str, Any]:
    """What this run makes; of an earlier run with the same source and options if there was one. Raises UserError."""
    path = out / f"{prefix}-plan.json"
    before = _read_plan(path)
    fingerprint = source.fingerprint()
    if before is None:
        there = sorted(p.name for p in out.glob(f"{prefix}-[0-9]*.tar"))
        if there:
            raise UserError(f"{out} has {there[0]} already, and no plan to go on with: give another folder or prefix")
        samples = source.count()
        uneven, rows = (source.uneven, source.uneven_rows) if isinstance(source, Table) else (0, [])
        notes = {"source": named, "fingerprint": fingerprint, "samples": samples}
        before = {**notes, "uneven": uneven, "uneven_rows": rows, "options": options}
        files.write_text(path, json.dumps(before, indent=2))
        return before
    changed = [
        f"{name}={before['options'].get(name)}, now {value}"
        for name, value in options.items()
        if before["options"].get(name) != value
    ]
    if changed or before["fingerprint"] != fingerprint:
        what = "; ".join(changed) if changed else f"{before['source']} then, and it has changed or is another one now"
        raise UserError(
            f"{out} holds {prefix} shards made with other settings ({what}): give another folder or prefix, or remove them"
        )
    return before


def _read_plan(path: Path) -> dict[str, Any] | None:
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove it and the shards beside it to start anew") from error
    if not isinstance(plan, dict) or not {"source", "fingerprint", "samples", "uneven", "uneven_rows", "options"} <= set(plan):
        raise UserError(f"{path} is not the plan of a packed folder: give another folder or prefix")
    return plan


# ---------------------------------------------------------------------------------------------------------------------
# The work


def _run(
    source: PackSource,
    plan: dict[str, Any],
    out: Path,
    prefix: str,
    style: Style,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> Summary:
    shard_size, total = plan["options"]["shard_size"], plan["samples"]
    shards = -(-total // shard_size)
    digits = max(4, len(str(shards - 1)))
    results: dict[int, Result] = {}
    done = 0

    def finished(shard: int, result: Result) -> None:
        nonlocal done
        results[shard] = result
        done += result.count
        if progress:
            progress(done, total)

    def unfinished() -> Iterator[tuple[int, Path, Job]]:
        for shard, job in enumerate(source.jobs(shard_size)):
            path = out / f"{prefix}-{shard:0{digits}d}.tar"
            result = _read_result(path, len(job))
            if result is None:
                yield shard, path, job
            else:
                finished(shard, result)

    made = 0
    for shard, result in _parallel(unfinished(), style, min(workers, shards)):
        finished(shard, result)
        made += result.written > 0
    summary = Summary(out)
    if plan["uneven"]:
        summary.skipped[_UNEVEN] = plan["uneven"]
        summary.examples[_UNEVEN] = list(plan["uneven_rows"])
    for shard in sorted(results):
        summary.add(results[shard])
    summary.kept = summary.shards - made
    if not summary.written:  # so that it can be tried again once the source was put right
        for shard in results:
            stats_path(out / f"{prefix}-{shard:0{digits}d}.tar").unlink(missing_ok=True)
        (out / f"{prefix}-plan.json").unlink(missing_ok=True)
    return summary


def _read_result(path: Path, samples: int) -> Result | None:
    """Of a shard that an earlier run finished."""
    try:
        result = Result.from_json(stats_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return result if result.count == samples and (path.exists() or not result.written) else None


def _parallel(tasks: Iterator[tuple[int, Path, Job]], style: Style, workers: int) -> Iterator[tuple[int, Result]]:
    """Writes shards, in processes where more than one is wanted; few tasks are held at a time, they may carry pictures."""
    if workers == 1:
        for shard, path, job in tasks:
            yield shard, write_shard(job, shard, path, style)
        return
    pending: dict[Future[Result], int] = {}
    # spawn, not fork: pyarrow has threads
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, (os.getpid(),))
    try:
        for shard, path, job in tasks:
            pending[pool.submit(write_shard, job, shard, path, style)] = shard
            if len(pending) > workers:
                yield from _done(pending)
        while pending:
            yield from _done(pending)
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process died, perhaps for want of memory: run the same again to go on, with fewer workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _done(pending: dict[Future[Result], int]) -> Iterator[tuple[int, Result]]:
    for future in wait(pending, return_when=FIRST_COMPLETED).done:
        yield pending.pop(future), future.result()


def _start(parent: int) -> None:
    """Settings of a worker: Ctrl-C is the parent's business; when that is killed, the worker ends too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exit_with_parent(parent)
