"""Samples that training passes over: those that data.keep does not keep, and those that the file of data.skip names.

    data.keep='json.similarity > 0.28 and json.width >= 200'      filter_expression.py's language, on fields of the json
    data.skip=skip.txt                                            one SHARD/KEY a line, as in logs and audits

A line may go on after a tab with a reason. Where several samples of a shard have the KEY, it means all of them; with the reason
REPEATED it means those after the first. Imports neither torch nor what reads shards, so that a typo is found at once.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pretrain.data.filter_expression import Filter, get_value
from pretrain.data.filter_parser import parse_filter
from pretrain.data.sample_json import read_fields
from pretrain.errors import ConfigError
from pretrain.printable import escape_controls
from pretrain.runtime.files import read_bytes

if TYPE_CHECKING:
    from pretrain.data.shards.paths import RawSample

NOT_KEPT, SKIPPED = "not kept", "in data.skip"
"""Reasons by which samples are counted."""

REPEATED = "duplicate key"
"""In the second column of a list: only samples whose KEY an earlier sample of their shard has."""

_PREFIX = "json."
_LINE = re.compile(r"[^/\t]+/[^\t]")
_MAX_BYTES = 1 << 32  # of a list


def parse_keep(text: str, where: str = "data.keep") -> Filter:
    """Parse data.keep, or an option that takes the same. Raises ConfigError where it is no condition on fields of the json."""
    parsed = parse_filter(text, where)
    for name in parsed.names():
        if not name.startswith(_PREFIX) or name == _PREFIX:
            raise ConfigError(f"{where} {text!r:.200}: fields of a sample's json are written json.NAME, not {name!r:.60}")
    return parsed


class SkipList:
    """The samples that a list names. It holds digests of 8 bytes, so that ten million lines take 80 MB.

    Args:
        lines: of the list, without empty ones.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        entries = {_parse_line(line) for line in lines}
        self.shards = Counter(entry.partition("/")[0] for entry in entries)
        """Lines by the name of their shard; a line that is there twice counts once."""
        self._digests = np.unique(np.frombuffer(b"".join(map(_digest, entries)), dtype="<u8"))

    def __len__(self) -> int:
        return self.shards.total()

    def names(self, key: str, is_repeated: bool = False) -> bool:
        """Return whether the list names a sample.

        Args:
            key: "shard/KEY".
            is_repeated: whether an earlier sample of the shard has the key.
        """
        return self._holds(key) or (is_repeated and self._holds(f"{key}\t{REPEATED}"))

    def count_lines(self, samples: Iterable[tuple[str, bool]]) -> int:
        """Return how many lines name at least one of these samples, given as (key, whether it is repeated)."""
        entries = {entry for key, is_repeated in samples for entry in (key, *([f"{key}\t{REPEATED}"] if is_repeated else []))}
        return sum(map(self._holds, entries))

    def _holds(self, entry: str) -> bool:
        digest = np.frombuffer(_digest(escape_controls(entry)), dtype="<u8")[0]
        at = int(np.searchsorted(self._digests, digest))
        return at < len(self._digests) and bool(self._digests[at] == digest)

    def describe(self) -> str:
        """Return the number of lines and a digest of them, by which lists are compared when a run resumes."""
        return f"{len(self)} lines, {hashlib.blake2b(self._digests.tobytes(), digest_size=8).hexdigest()}"


def read_skip_list(path: str, where: str = "data.skip=") -> SkipList:
    """Read the file of data.skip, or of an option that takes the same format.

    Raises ConfigError, whose message has `where` before the path, where it cannot be read, or a line is no SHARD/KEY.
    A file that has not changed since the last call is not read again: a million lines take seconds.
    """
    try:
        status = os.stat(path)
        return _read_skip_list(path, (status.st_ino, status.st_size, status.st_mtime_ns), where)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ConfigError(f"{where}{path!s:.200} cannot be read: {getattr(error, 'strerror', None) or error}") from error


@lru_cache(maxsize=2)
def _read_skip_list(path: str, version: tuple[int, int, int], where: str) -> SkipList:
    """Read a list. Raises OSError, ConfigError."""
    try:
        text = read_bytes(Path(path), _MAX_BYTES).decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}{path} is no list of samples: byte {error.start:,} is not UTF-8") from error
    lines = [line.rstrip("\r") for line in text.removeprefix("\ufeff").split("\n")]
    for number, line in enumerate(lines, start=1):
        if line and not _LINE.match(line):
            raise ConfigError(
                f"{where}{path}: line {number:,} is {line!r:.80}, not SHARD/KEY as `clipfuse data check SHARDS --fix FILE` "
                "writes it"
            )
    return SkipList(filter(None, lines))


def format_skip_line(key: str, reason: str) -> str:
    """Return the line of a list that names a sample, without its line break."""
    return f"{escape_controls(key)}\t{reason}"


def _parse_line(line: str) -> str:
    """Return the entry of a line, which holds no control characters but the tab before REPEATED."""
    key, _, reason = line.partition("\t")
    return escape_controls(f"{key}\t{REPEATED}" if reason == REPEATED else key)


def _digest(entry: str) -> bytes:
    return hashlib.blake2b(entry.encode(), digest_size=8).digest()


class FieldReader(Protocol):
    """What a SampleFilter needs of shards.reader.ShardReader."""

    def read(self, shard: int, sample: int, extensions: tuple[str, ...] | None = None) -> RawSample: ...

    def key(self, shard: int, sample: int) -> str: ...

    def is_repeated(self, shard: int, sample: int) -> bool: ...


class SampleFilter:
    """The settings data.keep and data.skip, applied to samples.

    Args:
        reader: reads samples by shard.
        keep: data.keep; None = every sample.
        skip: the file of data.skip; None = none.

    Raises ConfigError.
    """

    def __init__(self, reader: FieldReader, keep: str | None, skip: str | None) -> None:
        self.reader, self.keep = reader, keep
        self.condition = parse_keep(keep) if keep is not None else None
        self.skip_list = read_skip_list(skip) if skip is not None else None
        self.settings = " and ".join(
            f"{name}={value!r:.200}" for name, value in (("data.keep", keep), ("data.skip", skip)) if value is not None
        )
        """The settings, for messages."""
        self._names = tuple(dict.fromkeys(self.condition.names())) if self.condition is not None else ()

    def identity(self) -> dict[str, str | None]:
        """Return what must not change when a run resumes, by setting."""
        return {"data.keep": self.keep, "data.skip": self.skip_list.describe() if self.skip_list is not None else None}

    @property
    def reasons(self) -> list[str]:
        """The reasons by which this filter passes over samples."""
        settings = ((NOT_KEPT, self.condition), (SKIPPED, self.skip_list))
        return [reason for reason, setting in settings if setting is not None]

    def find_reason(self, shard: int, sample: int) -> str:
        """Return why training passes over a sample, or "" where it does not. Nothing is decoded.

        Raises:
            BadSample: its json cannot be read.
            UserError: the shard cannot be read.
        """
        if self.skip_list is not None and self.skip_list.names(
            self.reader.key(shard, sample), self.reader.is_repeated(shard, sample)
        ):
            return SKIPPED
        if self.condition is None:
            return ""
        fields = read_fields(self.reader.read(shard, sample, ("json", "cls")).members)
        values = {name: get_value(fields, name.removeprefix(_PREFIX)) for name in self._names}
        return "" if self.condition.matches(values) else NOT_KEPT
