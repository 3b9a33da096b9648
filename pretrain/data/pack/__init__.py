"""Packs a folder of images and sounds, a table or existing tars into shards, in parallel.

    folder.py          images and sounds in a folder, with captions next to them or in their paths
    table.py           tables that name images and sounds or contain them
    table_rows.py      the image, the sound, the captions and further columns of a row
    table_readers.py   opens tables and reads their rows: JSON lines, Parquet, and the two below
    delimited.py       reads CSV and TSV files of any length: separators, quotes
    annotations.py     reads COCO's annotations and Karpathy's splits
    grouping.py        finds the rows of a table that name the same image
    tars.py            existing shards, packed again
    sources.py         chooses between the three by the name of the source
    writer.py          stores the samples of one shard; this is what a worker process runs

A packed folder contains these files:

    OUT/PREFIX-0000.tar            KEY.jpg|png|webp and KEY.wav|flac|ogg|mp3, at least one of the two, KEY.txt, and KEY.json
                                   (further columns, and the path of the image or sound)
    OUT/PREFIX-0000_stats.json     number of samples, and what was skipped and why
    OUT/PREFIX-plan.json           source, options and a fingerprint of the source: a stopped run resumes only if they are equal

Sample n of the source is in shard n // shard_size, unless it was skipped. The rows of a table that name the same image are one
sample. So the samples of a shard do not depend on other
shards. Any number of processes write shards in any order, and a run that is started again keeps the finished ones.

May import the rest of `pretrain.data`, `pretrain.runtime` and `pretrain.errors`. Do not import torch: workers start anew.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pretrain.data.caption_statistics import SEVERAL_LINES
from pretrain.data.job_pool import run_jobs
from pretrain.data.pack.sources import PackSource, SourceOptions, open_source
from pretrain.data.pack.table import TableSource
from pretrain.data.pack.writer import ShardJob, ShardResult, StorageOptions, get_stats_path, write_shard
from pretrain.errors import ConfigError, UserError
from pretrain.printable import format_count
from pretrain.runtime import files

_ADVICE = {SEVERAL_LINES: ": --caption-from lines reads one caption per line"}


@dataclass
class PackSummary:
    """How many samples of a source were packed, and how many were skipped and why."""

    out: Path
    shards: int = 0
    written: int = 0
    """Samples in the shards."""
    reused: int = 0
    """Shards that an earlier, stopped run had finished."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Number of samples by reason."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """By reason, the names of the first few skipped samples."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Captions left out of samples that have others, by reason."""
    odd: Counter[str] = field(default_factory=Counter)
    """Odd captions by kind."""
    label_conflicts: int = 0
    """Samples whose rows have different labels."""
    notes: list[str] = field(default_factory=list)
    """Lines for the user about what the source holds."""

    def add(self, result: ShardResult) -> None:
        """Add the result of one shard."""
        self.shards += result.written > 0
        self.written += result.written
        self.skipped += result.skipped
        self.dropped += result.dropped
        self.odd += result.odd
        self.label_conflicts += result.label_conflicts
        for reason, names in result.examples.items():
            known = self.examples.setdefault(reason, [])
            known += names[: 3 - len(known)]

    def __str__(self) -> str:
        return "\n".join(self.format_lines())

    def format_lines(self) -> list[str]:
        """Return the summary as lines of text for the console."""
        reused = f" ({self.reused:,} finished before)" if self.reused else ""
        out = [f"{self.out}: {format_count(self.written, 'sample')} in {format_count(self.shards, 'shard')}{reused}"]
        if self.skipped:
            out.append(f"skipped {self.skipped.total():,}:")
        for reason, count in self.skipped.most_common():
            out.append(f"  {count:>8,}  {reason}: {'; '.join(self.examples.get(reason, []))}")
        if self.dropped:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.most_common())
            out.append(f"captions left out of samples that have others: {reasons}")
        for oddity, count in self.odd.most_common():
            out.append(f"{count:,} {'caption' if count == 1 else 'captions'} {oddity}{_ADVICE.get(oddity, '')}")
        if self.label_conflicts:
            have = "has" if self.label_conflicts == 1 else "have"
            out.append(
                f"{format_count(self.label_conflicts, 'image')} {have} rows with different labels: the first label is used"
            )
        return out + self.notes


def pack(
    source: str | Path,
    out: str | Path,
    *,
    image_column: str = "image",
    audio_column: str | None = None,
    caption_column: str = "caption",
    caption_from: str = "txt",
    size: int | None = None,
    side: str = "shortest",
    shard_size: int = 1000,
    prefix: str = "shard",
    outside: bool = False,
    separator: str | None = None,
    image_root: str | Path | None = None,
    splits: Sequence[str] = (),
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PackSummary:
    """Pack a source into shards in the folder `out`.

    A run that was stopped continues when it is started again, and gives the same tars as an uninterrupted run.

    Args:
        source: a folder of images, sounds or both; a .csv, .tsv, .txt, .jsonl or .parquet (or a glob of several); COCO's or
            Karpathy's .json; or tars as `data.train` takes them. Rows that name the same image are one sample with several
            captions.
        out: the folder for the shards, created if it does not exist.
        image_column: for tables: the path of the image, relative to the table, or the image itself.
        audio_column: for tables: the same of the sound; None = `audio`, unless its values name no sounds. A table needs one of
            the two columns.
        caption_column: for tables: a text, or a list of texts. The first text of a list becomes KEY.txt; the whole list
            becomes the field of this name in KEY.json. Where images have several rows, every sample has that field.
        caption_from: for folders: "txt" reads NAME.txt (or .TXT) next to NAME.jpg as one caption, "lines" each line of it as
            one; "path" uses the words of the image's path.
        size: pixels; larger images are scaled down to it. None stores the bytes of each file unchanged.
        side: which side `size` limits: "shortest" or "longest".
        shard_size: samples of the source per shard.
        prefix: first part of the shards' names.
        outside: allow paths of a table that lead out of its folder, and links that lead out of a folder.
        separator: for tables of separated values; None = detect comma, tab, semicolon or bar.
        image_root: for tables: the folder that paths of images are relative to; None = the folder of the table. For COCO's
            annotations: None = the folder of the split beside them.
        splits: for Karpathy's splits: the names of those to pack; () = all.
        workers: number of processes; None means one per core.
        progress: called with (samples done, all samples).

    Raises:
        UserError: the source cannot be packed. Single samples that cannot be used are only counted.
    """
    out = Path(out).expanduser()
    storage = StorageOptions(size, side, caption_column)
    _check_options(storage, caption_from, shard_size, prefix, separator)
    _make_writable(out)
    if Path(source).expanduser().resolve() == out.resolve():
        raise ConfigError(f"{out} is both source and target: give another folder for the shards")
    root = None if image_root is None else Path(image_root).expanduser()
    if root is not None and not root.is_dir():
        raise ConfigError(f"--image-root {image_root}: there is no such folder")
    reading = SourceOptions(
        image_column, caption_column, caption_from, outside, separator, root, tuple(splits), audio_column or ""
    )
    opened = open_source(str(source), reading, out.resolve())
    options = {"caption_from": caption_from, "shard_size": shard_size, "outside": outside, **asdict(storage)}
    if isinstance(opened, TableSource):
        options |= {"image_column": image_column, "rows_of_an_image": "one sample", "separator": separator}
        options |= {"image_root": None if root is None else str(root.absolute()), "splits": list(splits)}
        if opened.has_sounds:
            options["audio_column"] = opened.audio_column
    with _lock_folder(out, prefix):
        plan = _load_or_write_plan(out, prefix, opened, str(source), options)
        summary = _write_shards(opened, plan, out, prefix, storage, workers or os.cpu_count() or 1, progress)
        summary.notes = list(plan.get("notes", []))
    if not summary.written:
        reason, count = summary.skipped.most_common(1)[0]
        example = f": {summary.examples[reason][0]}" if summary.examples.get(reason) else ""
        raise UserError(
            f"{source}: no sample can be used; {count:,} of {plan['samples']:,} have the problem: {reason}{example}"
        )
    return summary


def _check_options(storage: StorageOptions, caption_from: str, shard_size: int, prefix: str, separator: str | None) -> None:
    if storage.size is not None and storage.size < 1:
        raise ConfigError(f"--size {storage.size} must be at least 1 pixel")
    if storage.side not in ("shortest", "longest"):
        raise ConfigError(f"--side {storage.side!r} must be one of shortest, longest")
    if caption_from not in ("txt", "lines", "path"):
        raise ConfigError(f"--caption-from {caption_from!r} must be one of txt, lines, path")
    if shard_size < 1:
        raise ConfigError(f"--shard-size {shard_size} must be at least 1")
    if separator is not None and (not separator or set(separator) & set('"\r\n')):
        raise ConfigError(f"--separator {separator!r} must be text without quotes and line ends, for example ;")
    if not re.fullmatch(r"[\w-]+", prefix):
        raise ConfigError(f"--prefix {prefix!r} must be letters, digits, - and _: shards are called PREFIX-0000.tar")


def _make_writable(out: Path) -> None:
    """Create the folder and check that files can be written there. Raises UserError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write shards to {out}: {error.strerror or error}") from error


@contextmanager
def _lock_folder(out: Path, prefix: str) -> Iterator[None]:
    """Lock the shards of a prefix, and remove partial files of a killed run. Raises UserError if locked."""
    with open(out / f".{prefix}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is packing into {out}/{prefix}-*.tar right now") from None
        for partial in out.glob(f".{prefix}-*.partial"):
            partial.unlink(missing_ok=True)
        yield


# ---------------------------------------------------------------------------------------------------------------------
# PREFIX-plan.json


def _load_or_write_plan(
    out: Path, prefix: str, source: PackSource, source_name: str, options: dict[str, Any]
) -> dict[str, Any]:
    """Return the plan of an earlier run, or write a new one.

    Raises:
        UserError: the folder holds shards of another source or other options, or shards without a plan.
    """
    path = out / f"{prefix}-plan.json"
    plan = _read_plan(path)
    fingerprint = source.compute_fingerprint()
    if plan is None:
        shards = sorted(p.name for p in out.glob(f"{prefix}-[0-9]*.tar"))
        if shards:
            raise UserError(f"{out} has {shards[0]} already, and no plan to resume from: give another folder or prefix")
        samples = source.count()
        plan = {"source": source_name, "fingerprint": fingerprint, "samples": samples, "rejected": {}, "options": options}
        if isinstance(source, TableSource):
            plan["rejected"] = {
                reason: {"count": source.rejected_counts[reason], "rows": rows} for reason, rows in source.rejected.items()
            }
        plan["notes"] = source.get_notes()
        files.write_text(path, json.dumps(plan, indent=2))
        return plan
    changed = [
        f"{name}={plan['options'].get(name)}, now {value}"
        for name, value in options.items()
        if plan["options"].get(name) != value
    ]
    if changed or plan["fingerprint"] != fingerprint:
        difference = "; ".join(changed) if changed else f"{plan['source']}, which has changed since or is not the source now"
        raise UserError(
            f"{out} holds {prefix} shards made with other settings ({difference}): "
            "give another folder or prefix, or remove them"
        )
    return plan


def _read_plan(path: Path) -> dict[str, Any] | None:
    """Return the plan in a file, None without a file. Raises UserError if the file is not a plan."""
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove it and the shards next to it to start over") from error
    if not isinstance(plan, dict) or not {"source", "fingerprint", "samples", "options"} <= set(plan):
        raise UserError(f"{path} is not the plan of a packed folder: give another folder or prefix")
    return plan


# ---------------------------------------------------------------------------------------------------------------------
# Writing shards in parallel


def _write_shards(
    source: PackSource,
    plan: dict[str, Any],
    out: Path,
    prefix: str,
    storage: StorageOptions,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> PackSummary:
    """Write the shards that an earlier run did not finish, and return the summary of all."""
    shard_size, total = plan["options"]["shard_size"], plan["samples"]
    shards = -(-total // shard_size)
    digits = max(4, len(str(shards - 1)))
    results: dict[int, ShardResult] = {}
    done = 0

    def record(shard: int, result: ShardResult) -> None:
        nonlocal done
        results[shard] = result
        done += result.count
        if progress:
            progress(done, total)

    def unfinished() -> Iterator[tuple[int, tuple[ShardJob, int, Path, StorageOptions]]]:
        for shard, job in enumerate(source.iterate_jobs(shard_size)):
            path = out / f"{prefix}-{shard:0{digits}d}.tar"
            result = _read_result(path, len(job))
            if result is None:
                yield shard, (job, shard, path, storage)
            else:
                record(shard, result)

    new = 0
    for shard, result in run_jobs(write_shard, unfinished(), min(workers, shards)):
        record(shard, result)
        new += result.written > 0
    summary = PackSummary(out)
    for reason, rejected in plan.get("rejected", {}).items():
        summary.skipped[reason] = rejected["count"]
        summary.examples[reason] = list(rejected["rows"])
    for shard in sorted(results):
        summary.add(results[shard])
    summary.reused = summary.shards - new
    if not summary.written:  # so that the user can correct the source and try again
        for shard in results:
            get_stats_path(out / f"{prefix}-{shard:0{digits}d}.tar").unlink(missing_ok=True)
        (out / f"{prefix}-plan.json").unlink(missing_ok=True)
    return summary


def _read_result(path: Path, samples: int) -> ShardResult | None:
    """Return the result of a shard that an earlier run finished, or None if it is not finished."""
    try:
        result = ShardResult.from_json(get_stats_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return result if result.count == samples and (path.exists() or not result.written) else None
