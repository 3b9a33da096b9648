"""Verifies shards before a training run has to: whole archives, readable pictures, captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pretrain.data import BadSample
from pretrain.data.captions import read_captions
from pretrain.data.decode import decode_image as decode_image
from pretrain.data.images import EXTENSIONS
from pretrain.data.shards.cache import ShardCache, retry_io
from pretrain.data.shards.index import load_index
from pretrain.data.shards.paths import map_in_processes
from pretrain.data.shards.reader import ShardReader
from pretrain.errors import UserError

_MAX_NAMED = 10  # samples named for each reason; all are counted


@dataclass
class CheckReport:
    """What was found."""

    shards: int = 0
    samples: int = 0
    """In the shards that are whole."""
    bad_samples: int = 0
    """Samples that training would replace."""
    bad: Counter[str] = field(default_factory=Counter)
    """Bad samples by reason; one may have several."""
    names: dict[str, list[str]] = field(default_factory=dict)
    """The first few of each reason: "shard/KEY: detail"."""
    damaged: list[str] = field(default_factory=list)
    """A line for each shard that cannot be used at all: training refuses to start."""
    empty: list[str] = field(default_factory=list)
    """Shards without samples."""

    @property
    def ok(self) -> bool:
        """Whether training would start and replace nothing."""
        return self.samples > 0 and not self.damaged and not self.bad_samples

    def add(self, other: CheckReport) -> None:
        """Takes in what was found elsewhere."""
        self.shards += other.shards
        self.samples += other.samples
        self.bad_samples += other.bad_samples
        self.bad += other.bad
        for reason, names in other.names.items():
            self.names[reason] = [*self.names.get(reason, []), *names][:_MAX_NAMED]
        self.damaged += other.damaged
        self.empty += other.empty


class _CheckJob(NamedTuple):
    path: str
    cache: ShardCache
    caption: str
    decode: bool


def check_shards(
    paths: Sequence[str],
    decode: bool = True,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    caption: str = "txt",
    cache: ShardCache | None = None,
) -> CheckReport:
    """Indexes every shard and tries every sample.

    Args:
        paths: shards, as `shards.expand` gives them.
        decode: decode every picture and read every caption; otherwise only whether there is one.
        workers: processes; None = one a core.
        progress: called with (shards done, shards in all).
        caption: "txt", or the json field that holds captions.
        cache: where fetched shards and indices go.
    """
    jobs = [_CheckJob(path, cache or ShardCache(), caption, decode) for path in paths]
    report = CheckReport()
    for done, found in enumerate(map_in_processes(_check_shard, jobs, workers), start=1):
        report.add(found)
        if progress:
            progress(done, len(jobs))
    return report


def _check_shard(job: _CheckJob) -> CheckReport:
    report = CheckReport(shards=1)
    try:
        where = retry_io(lambda: load_index(job.path, job.cache), job.path)
        report.samples = where.count
        if where.count == 0:
            report.empty.append(job.path)
        reader = ShardReader([job.path], job.cache)
        for sample in range(where.count):
            reasons = _find_problems(reader, sample, job)
            report.bad_samples += bool(reasons)
            for error in reasons:
                report.bad[error.reason] += 1
                names = report.names.setdefault(error.reason, [])
                if len(names) < _MAX_NAMED:
                    names.append(f"{reader.key(0, sample)}: {error.detail[:200]}")
        reader.close()
    except UserError as error:
        return CheckReport(shards=1, damaged=[str(error)])
    return report


def _find_problems(reader: ShardReader, sample: int, job: _CheckJob) -> list[BadSample]:
    """What is wrong with a sample."""
    found: list[BadSample] = []
    try:
        members = reader.read(0, sample, None if job.decode else ()).members
        if not job.decode:
            members = dict.fromkeys(reader.extensions(0, sample), b"")
    except BadSample as error:
        return [error]
    picture = next((members[extension] for extension in EXTENSIONS if extension in members), None)
    if picture is None:
        found.append(BadSample("no image", f"members: {', '.join(sorted(members)) or 'none'}"))
    if job.decode:
        try:
            if picture is not None:
                decode_image(picture)
        except BadSample as error:
            found.append(error)
        try:
            read_captions(members, job.caption)
        except BadSample as error:
            found.append(error)
    elif ("txt" if job.caption == "txt" else "json") not in members:
        found.append(BadSample("no caption", f"members: {', '.join(sorted(members)) or 'none'}"))
    return found
