"""Verification of shards before training: complete archives, readable images and sounds, and captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from pretrain.data import BadSample, MissingContent
from pretrain.data.audio_files import AUDIO_EXTENSIONS, check_audio, require_packages
from pretrain.data.caption_statistics import CaptionStatistics
from pretrain.data.captions import TXT, TXT_WHOLE, caption_members, check_caption_source, read_captions
from pretrain.data.decode import decode_image as decode_image
from pretrain.data.images import EXTENSIONS
from pretrain.data.members import explain_missing_caption, explain_missing_image, explain_missing_sound, explain_no_pair
from pretrain.data.sample_filter import REPEATED, format_skip_line
from pretrain.data.shards.cache import ShardCache, digest_file
from pretrain.data.shards.counts import Record
from pretrain.data.shards.index import load_index
from pretrain.data.shards.names import find_new_names, name_shard
from pretrain.data.shards.paths import map_in_processes
from pretrain.data.shards.reader import ShardReader
from pretrain.data.shards.retries import retry_io
from pretrain.errors import ConfigError, UserError

_MAX_NAMED = 10  # samples named per reason; all are counted


@dataclass
class CheckData:
    """The settings of the `data` section that decide which samples a run can use."""

    caption: str | None = None
    """As data.caption; null = txt."""
    incomplete: Literal["bad", "keep"] = "bad"
    """As data.incomplete. bad: a sample needs an image or a sound, and a caption. keep: any two of the three."""


@dataclass
class CheckConfig:
    """The part of a configuration that `clipfuse data check` reads."""

    data: CheckData = field(default_factory=CheckData)


@dataclass
class CheckReport:
    """Result of checking shards: how many samples they hold, and which are bad."""

    shards: int = 0
    samples: int = 0
    """Samples in the undamaged shards."""
    images: int = 0
    """Samples that have an image."""
    sounds: int = 0
    """Samples that have a sound."""
    combinations: Counter[str] = field(default_factory=Counter)
    """With data.incomplete=keep, usable samples by what they have: image+text+audio, image+text, ..."""
    bad_samples: int = 0
    """Samples that training would replace."""
    bad: Counter[str] = field(default_factory=Counter)
    """Bad samples by reason; a sample may have several reasons."""
    names: dict[str, list[str]] = field(default_factory=dict)
    """The first few bad samples of each reason, as "shard/KEY: detail"."""
    damaged: list[str] = field(default_factory=list)
    """One line for each shard that cannot be used at all: training refuses to start with it."""
    empty: list[str] = field(default_factory=list)
    """Shards without samples."""
    records: dict[str, Record] = field(default_factory=dict)
    """Samples, size and digest of each undamaged shard by its path, where they were asked for."""
    lines: list[str] = field(default_factory=list)
    """The bad samples of undamaged shards, as lines of a list that data.skip reads."""
    captions: CaptionStatistics = field(default_factory=CaptionStatistics)
    """Lengths and oddities of the captions of usable samples, if samples were decoded. Odd captions are not bad."""
    unchecked: str = ""
    """Why sounds were counted, but not decoded; "" where they were, or where there are none."""

    @property
    def is_ok(self) -> bool:
        """Whether training would start and replace no sample."""
        return self.samples > 0 and not self.damaged and not self.bad_samples

    def add(self, other: CheckReport) -> None:
        """Add the results of another report to this one."""
        self.shards += other.shards
        self.samples += other.samples
        self.images += other.images
        self.sounds += other.sounds
        self.combinations += other.combinations
        self.bad_samples += other.bad_samples
        self.bad += other.bad
        for reason, names in other.names.items():
            self.names[reason] = [*self.names.get(reason, []), *names][:_MAX_NAMED]
        self.damaged += other.damaged
        self.empty += other.empty
        self.records |= other.records
        self.lines += other.lines
        self.captions.add(other.captions)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as values of JSON."""
        counts = {"bad": dict(self.bad), "combinations": dict(self.combinations)}
        values = {**vars(self), **counts, "captions": self.captions.as_dict()}
        del values["records"], values["lines"]
        return values


class _CheckJob(NamedTuple):
    """One shard to check, with the options of `check_shards`."""

    path: str
    cache: ShardCache
    caption: str
    decode: bool
    record: bool
    name: str
    """Of the shard in keys."""
    decode_sounds: bool = True
    """Whether sounds are decoded where `decode` is set."""
    incomplete: str = "bad"


def check_shards(
    paths: Sequence[str],
    decode: bool = True,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    caption: str = "txt",
    cache: ShardCache | None = None,
    record: bool = False,
    incomplete: str = "bad",
) -> CheckReport:
    """Index every shard and try to read every sample.

    Args:
        paths: shards, as `expand_shards` returns them.
        decode: decode every image and sound, and read every caption; False only checks that each sample has an image or a
            sound, and a caption. Without the packages that read sounds, those are only counted.
        workers: number of processes; None = one per core.
        progress: called with (shards done, shards in total).
        caption: "txt", or the name of the json field that holds captions.
        cache: where fetched shards and indices are kept.
        record: find the size and the digest of each shard, for its manifest.
        incomplete: see CheckData.
    """
    check_caption_source(caption, "--caption")
    cache = replace(cache or ShardCache(), check_records=not record)  # records that are about to be written again
    new_names = find_new_names(paths)
    unchecked = _explain_missing_packages() if decode else ""
    jobs = [
        _CheckJob(path, cache, caption, decode, record, new_names.get(i) or name_shard(path), not unchecked, incomplete)
        for i, path in enumerate(paths)
    ]
    report = CheckReport()
    for done, shard_report in enumerate(map_in_processes(_check_shard, jobs, workers), start=1):
        report.add(shard_report)
        if progress:
            progress(done, len(jobs))
    report.unchecked = unchecked if report.sounds else ""
    return report


def _explain_missing_packages() -> str:
    """Return why sounds cannot be read, or ""."""
    try:
        require_packages()
    except ConfigError as error:
        return str(error)
    return ""


def _check_shard(job: _CheckJob) -> CheckReport:
    """Check one shard; the report of a damaged one says only that."""
    report = CheckReport(shards=1)
    try:
        if job.record:
            job.cache.mark_damaged(job.path)  # a manifest states what is there now, not what the cache holds
        shard_index = retry_io(lambda: load_index(job.path, job.cache, check_count=not job.record), job.path)
        if job.record:
            report.records[job.path] = retry_io(lambda: _describe_shard(job, shard_index.count), job.path)
        report.samples = shard_index.count
        if shard_index.count == 0:
            report.empty.append(job.path)
        reader = ShardReader([job.path], job.cache)
        for sample in range(shard_index.count):
            extensions = reader.extensions(0, sample)
            report.images += any(extension in EXTENSIONS for extension in extensions)
            report.sounds += any(extension in AUDIO_EXTENSIONS for extension in extensions)
            problems, modalities = _inspect(reader, sample, job)
            report.bad_samples += bool(problems)
            key = f"{job.name}/{shard_index.key(sample)}"
            if problems:
                reason = REPEATED if reader.is_repeated(0, sample) else problems[0].reason
                report.lines.append(format_skip_line(key, reason))
            for error in problems:
                report.bad[error.reason] += 1
                names = report.names.setdefault(error.reason, [])
                if len(names) < _MAX_NAMED:
                    names.append(f"{key}: {error.detail[:200]}")
            if problems:
                continue
            if job.incomplete == "keep":
                report.combinations["+".join(modalities)] += 1
            if job.decode and "text" in modalities:
                _add_captions(report.captions, reader, sample, job)
        reader.close()
    except UserError as error:
        return CheckReport(shards=1, damaged=[str(error)])
    return report


def _describe_shard(job: _CheckJob, count: int) -> Record:
    """Return samples, size and digest of a shard."""
    with job.cache.hold(job.path) as path, open(path, "rb") as file:
        digest = digest_file(file, "blake2b")
        return Record(count, "", file.tell(), digest)


def _add_captions(statistics: CaptionStatistics, reader: ShardReader, sample: int, job: _CheckJob) -> None:
    """Add the captions of a usable sample to the statistics."""
    members = reader.read(0, sample, caption_members(job.caption)).members
    text = members["txt"] if job.caption in (TXT, TXT_WHOLE) else None
    statistics.add_sample(reader.key(0, sample), read_captions(members, job.caption), text)


def _inspect(reader: ShardReader, sample: int, job: _CheckJob) -> tuple[list[BadSample], list[str]]:
    """Return one BadSample for each reason why the sample cannot be used, and the modalities that it has."""
    try:
        members = reader.read(0, sample, None if job.decode else ()).members
        if not job.decode:
            members = dict.fromkeys(reader.extensions(0, sample), b"")
    except BadSample as error:
        return [error], []
    errors = _find_errors(members, job)
    missing = [name for name in ("image", "text", "audio") if isinstance(errors.get(name), MissingContent)]
    modalities = [name for name in ("image", "text", "audio") if name not in missing]
    if job.incomplete == "keep":
        problems = [error for name, error in errors.items() if name not in missing]
        if not problems and len(modalities) < 2:
            problems = [BadSample("no pair", explain_no_pair(modalities, missing))]
    else:
        optional = {"image", "audio"} if {"image", "audio"} & set(modalities) else {"audio"}
        problems = [error for name, error in errors.items() if name not in optional.intersection(missing)]
    apart = reader.explain_apart(0, sample)
    if apart and any(problem.reason in ("no image", "no caption", "no pair") for problem in problems):
        return [BadSample("members apart", apart)], []
    return problems, modalities


def _find_errors(members: dict[str, bytes], job: _CheckJob) -> dict[str, BadSample]:
    """Return for each modality that a sample with these members lacks (MissingContent), or that cannot be used, why."""
    errors: dict[str, BadSample] = {}
    image = next((members[extension] for extension in EXTENSIONS if extension in members), None)
    sound = next((members[extension] for extension in AUDIO_EXTENSIONS if extension in members), None)
    try:
        if image is None:
            raise MissingContent("no image", explain_missing_image(members, EXTENSIONS))
        if job.decode:
            decode_image(image)
    except BadSample as error:
        errors["image"] = error
    try:
        if sound is None:
            raise MissingContent("audio missing", explain_missing_sound(members))
        if job.decode and job.decode_sounds:
            check_audio(sound)
    except BadSample as error:
        errors["audio"] = error
    try:
        if job.decode:
            read_captions(members, job.caption)
        elif not members.keys() & caption_members(job.caption):
            raise MissingContent("no caption", explain_missing_caption(members, caption_members(job.caption)[0]))
    except BadSample as error:
        errors["text"] = error
    return errors
