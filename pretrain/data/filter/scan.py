"""Reads the keys, the json and the captions of one shard, and applies the rules that look at one sample alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pretrain.data import BadSample
from pretrain.data.caption_statistics import find_oddities
from pretrain.data.captions import caption_id, caption_members, read_captions
from pretrain.data.filter.options import FilterOptions
from pretrain.data.filter_expression import Filter, get_value
from pretrain.data.key_digests import digest
from pretrain.data.sample_filter import SkipList, parse_keep, read_skip_list
from pretrain.data.sample_json import read_fields
from pretrain.data.shards.reader import TEXT_EXTENSIONS, ShardReader
from pretrain.runtime.files import replace_atomically

IN_SKIP, NOT_IN_KEEP_LIST = "in --skip", "not in --keep-list"
MAX_REASON = 200
"""Characters of a reason."""


class Scan(NamedTuple):
    """What is known of the n samples of a shard after one pass."""

    keys: np.ndarray
    """(n,) uint64: digests of "shard/KEY", as embeddings are found by."""
    reasons: np.ndarray
    """(n,) int32: why a sample goes, a position in `names`; 0 where it stays."""
    names: list[str]
    captions: np.ndarray
    """Ids of the captions that pass, of all samples in order: int64."""
    counts: np.ndarray
    """(n,) int32: how many of them are of each sample."""


class _Rules:
    """The rules that look at one sample alone."""

    def __init__(self, options: FilterOptions) -> None:
        self.options = options
        self.condition: Filter | None = parse_keep(options.keep, "--keep") if options.keep is not None else None
        self.skip: SkipList | None = read_skip_list(options.skip, "--skip ") if options.skip is not None else None
        self.only = read_skip_list(options.keep_list, "--keep-list ") if options.keep_list is not None else None
        self.fields = tuple(dict.fromkeys(self.condition.names())) if self.condition is not None else ()

    def find_reason(self, reader: ShardReader, sample: int, key: str) -> tuple[str, list[int]]:
        """Return why a sample goes, or "", and the ids of the captions that pass. Raises BadSample, UserError."""
        is_repeated = reader.is_repeated(0, sample)
        if self.skip is not None and self.skip.names(key, is_repeated):
            return IN_SKIP, []
        if self.only is not None and not self.only.names(key, is_repeated):
            return NOT_IN_KEEP_LIST, []
        needs_text = self.condition is not None or self.options.reads_captions
        text_members = dict.fromkeys([*TEXT_EXTENSIONS, *caption_members(self.options.caption)])
        members = reader.read(0, sample, list(text_members) if needs_text else ()).members
        if self.condition is not None and not self._fulfills(members):
            return f"not {self.options.keep}"[:MAX_REASON], []
        if not self.options.reads_captions:
            return "", []
        captions = read_captions(members, self.options.caption)
        problems = [self.find_problem(caption) for caption in captions]
        passing = [caption_id(caption) for caption, problem in zip(captions, problems, strict=True) if not problem]
        return ("" if passing else problems[0]), passing

    def _fulfills(self, members: Mapping[str, bytes]) -> bool:
        fields = read_fields(members)
        values = {name: get_value(fields, name.removeprefix("json.")) for name in self.fields}
        return self.condition is None or self.condition.matches(values)

    def find_problem(self, caption: str) -> str:
        """Return why a caption does not pass, or ""."""
        options, words = self.options, len(caption.split())
        if options.min_words is not None and words < options.min_words:
            return f"caption of fewer than {options.min_words} words"
        if options.max_words is not None and words > options.max_words:
            return f"caption of more than {options.max_words:,} words"
        if options.letters and not any(map(str.isalpha, caption)):
            return "caption without a letter"
        if options.no_odd and (oddities := find_oddities(caption)):
            return f"captions {oddities[0]}"
        return ""


def scan_shard(path: str, name: str, embedded_name: str, options: FilterOptions | None, out: Path) -> None:
    """Scan a shard and save the result as `out`, which is complete or not there.

    Args:
        path: of the shard.
        name: of the shard in keys.
        embedded_name: of the shard in the keys of embeddings.
        options: the rules; None = no rules and keys only, for samples that are compared with but never go.
        out: an .npz file.

    Raises:
        UserError: the shard cannot be read.
        OSError: `out` cannot be written.
    """
    reader = ShardReader([path])
    rules = _Rules(options) if options is not None else None
    names = {"": 0}
    keys, reasons, captions, counts = [], [], [], []
    for sample in range(reader.count(0)):
        passing: list[int] = []
        reason, key = "", reader.key(0, sample).partition("/")[2]
        if rules is not None:
            try:
                reason, passing = rules.find_reason(reader, sample, f"{name}/{key}")
            except BadSample as error:
                reason = error.reason
        keys.append(digest(f"{embedded_name}/{key}"))
        reasons.append(names.setdefault(reason, len(names)))
        captions += passing
        counts.append(len(passing))
    reader.close()
    with replace_atomically(out) as partial, open(partial, "wb") as file:
        np.savez(
            file,
            keys=np.array(keys, dtype=np.uint64),
            reasons=np.array(reasons, dtype=np.int32),
            names=np.array(list(names)),
            captions=np.array(captions, dtype=np.int64),
            counts=np.array(counts, dtype=np.int32),
        )


def load_scan(path: Path) -> Scan:
    """Load what `scan_shard` saved. Raises OSError, ValueError."""
    with np.load(path) as arrays:
        return Scan(arrays["keys"], arrays["reasons"], arrays["names"].tolist(), arrays["captions"], arrays["counts"])
