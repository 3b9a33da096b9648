"""Replaced samples by reason and shard: replaced-RANK.jsonl of each process, and replaced.tsv, the table over all of them.

A line of replaced-RANK.jsonl holds the counts since the line before: {"step": 20, "shards": {"train-0003": {"no image": 2}}}.
Lines are written with those of metrics.jsonl and before each checkpoint, so that a run that resumes cuts them back to its step.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path

from pretrain.data.loader import Loader
from pretrain.data.sample_filter import NOT_KEPT, SKIPPED
from pretrain.printable import escape_controls, format_count, one_safe_line
from pretrain.runtime import distributed
from pretrain.runtime.console import log_info
from pretrain.runtime.files import write_text
from pretrain.training.metrics import JsonLinesFile

log = logging.getLogger(__name__)

TABLE = "replaced.tsv"
"""Columns shard, reason and samples, most samples first."""


class ReplacedSamples:
    """The record of the samples that training replaced, which exists where there are some.

    Args:
        folder: of the run.
        loader: counts the samples of this process.
        step: from which the run goes on; lines of later steps are removed.
    """

    def __init__(self, folder: Path, loader: Loader, step: int) -> None:
        self._folder, self._loader, self._step = folder, loader, step
        self._unrecorded: Counter[tuple[str, str]] = Counter()
        self._path = folder / f"replaced-{distributed.rank()}.jsonl"
        self._lines = JsonLinesFile(self._path, step) if self._path.exists() else None
        if distributed.is_main():
            for path in folder.glob("replaced-*.jsonl"):  # those of ranks that are not there now
                rank = path.stem.removeprefix("replaced-")
                if rank.isdigit() and int(rank) >= distributed.world_size():
                    JsonLinesFile(path, step).close()

    def write(self, step: int) -> None:
        """Write the counts since the last line, if there are any, as those of this step."""
        self._step = step
        counts = self._unrecorded
        counts.update(self._loader.take_replaced())
        if not counts:
            return
        if self._lines is None:
            try:
                self._lines = JsonLinesFile(self._path, step)
            except OSError as error:  # the disk is full, for example
                log.warning(one_safe_line(f"{self._path} cannot be written now: {error.strerror or error}"))
                return
        self._unrecorded = Counter()
        shards: dict[str, dict[str, int]] = {}
        for (shard, reason), count in sorted(counts.items()):
            shards.setdefault(shard, {})[reason] = count
        self._lines.write({"step": step, "shards": shards})

    def close(self) -> None:
        """Write what is left, and the table, on rank 0.

        What is left belongs to a step that failed: it is not part of a checkpoint of the step before.
        """
        try:
            self.write(self._step + 1)
            if self._lines is not None:
                self._lines.close()
            if distributed.is_main():
                self._write_table()
        except OSError as error:  # the disk is full, or the folder is gone: the run ends for the reason that it has
            log.warning(one_safe_line(f"{self._folder / TABLE} cannot be written: {error.strerror or error}"))

    def _write_table(self) -> None:
        counts = read_counts(self._folder)
        if counts or (self._folder / TABLE).exists():
            rows = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
            lines = [f"{escape_controls(shard)}\t{escape_controls(reason)}\t{count}\n" for (shard, reason), count in rows]
            write_text(self._folder / TABLE, "".join(["shard\treason\tsamples\n", *lines]))
        if counts:
            log_info(one_safe_line(f"{describe_counts(counts)}; by shard in {self._folder / TABLE}"))


def read_counts(folder: Path) -> Counter[tuple[str, str]]:
    """Return how many samples a run has replaced, by shard and reason, over all processes."""
    counts: Counter[tuple[str, str]] = Counter()
    for path in sorted(folder.glob("replaced-*.jsonl")):
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.endswith("}\n"):  # a kill may have truncated the last line
                    for shard, reasons in json.loads(line)["shards"].items():
                        counts.update({(shard, reason): count for reason, count in reasons.items()})
    return counts


def describe_counts(counts: Counter[tuple[str, str]]) -> str:
    """Return what was replaced in one line: bad samples by reason, then those that data.keep and data.skip passed over."""
    reasons: Counter[str] = Counter()
    for (_, reason), count in counts.items():
        reasons[reason] += count
    by_reason = [(reason, count) for reason, count in reasons.most_common() if reason not in (NOT_KEPT, SKIPPED)]
    bad = sum(count for _, count in by_reason)
    parts = []
    if bad:
        named = ", ".join(f"{reason} {count:,}" for reason, count in by_reason[:5])
        parts.append(f"replaced {format_count(bad, 'bad sample')} ({named})")
    parts += [f"passed over {format_count(n, 'sample')} {reason}" for reason in (NOT_KEPT, SKIPPED) if (n := reasons[reason])]
    return ", ".join(parts)
