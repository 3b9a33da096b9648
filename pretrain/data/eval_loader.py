"""The evaluation loader: each sample exactly once over all processes."""

from __future__ import annotations

import copy
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pretrain.data import BadSample
from pretrain.data.batch import Batch, Decoder
from pretrain.data.captions import TXT, TXT_LINES, TXT_WHOLE, count_lines
from pretrain.data.config import count_samples_once, list_shards_once
from pretrain.data.shards.cache import ShardCache
from pretrain.data.shards.reader import ShardReader
from pretrain.data.text import TextDecoder
from pretrain.data.worker import EvaluationDataset, SampleReader
from pretrain.data.worker_pool import run_workers
from pretrain.errors import UserError
from pretrain.printable import one_safe_line
from pretrain.runtime.agree import on_main
from pretrain.runtime.progress import report_progress

log = logging.getLogger(__name__)

_MAX_NAMED = 20  # bad samples that are named in the log; all are counted
_PROBED_SHARDS, _PROBED_SAMPLES = 4, 64  # of which KEY.txt is read to see whether its lines are captions

_reported_shards: set[str] = set()
"""First shards of data whose KEY.txt of several lines was reported: a run evaluates the same data many times."""


class EvalLoader:
    """The evaluation batches of one process, in the order of the shards.

    It can be iterated repeatedly. The last batch may be short. Samples whose content cannot be used are left out and
    counted in `bad`, by reason.

    Args:
        reader: reads samples by shard.
        counts: samples in each shard.
        decoders: by modality; called with train=False.
        batch_size: samples per batch of this process.
        workers: worker processes; 0 reads and decodes in this process.
        rank: the rank of this process, of `world`.
        world: number of processes.
        max_samples: only the first so many samples over all processes; 0 = all.
    """

    def __init__(
        self, reader: SampleReader, counts: Sequence[int], decoders: Mapping[str, Decoder], batch_size: int, workers: int,
        rank: int, world: int, max_samples: int,
    ) -> None:  # fmt: skip
        self.bad: Counter[str] = Counter()
        self.total = min(sum(counts), max_samples or sys.maxsize)
        """Samples over all processes."""
        self._evaluation, self._workers, self._size = EvaluationDataset(reader, decoders), workers, batch_size
        self._counts = np.asarray(counts, dtype=np.int64)
        self._sample_range = range(self.total * rank // world, self.total * (rank + 1) // world)

    def __iter__(self) -> Iterator[Batch]:
        self.bad.clear()
        num_batches = -(-len(self._sample_range) // self._size)
        with run_workers(self._evaluation, self._iterate_addresses(), min(self._workers, num_batches)) as results:
            for _ in report_progress("evaluating", num_batches):
                part = next(results)
                if part.problem:
                    raise UserError(part.problem)
                for bad in part.bad:
                    self.bad[bad.reason] += 1
                    if self.bad.total() <= _MAX_NAMED:
                        log.warning(one_safe_line(f"{bad.key} cannot be used and is left out: {bad.reason}: {bad.detail}"))
                if part.batch is not None:
                    yield part.batch

    def _iterate_addresses(self) -> Iterator[list[tuple[int, int]]]:
        """Yield [(shard, sample of the shard)] of each batch."""
        ends = np.cumsum(self._counts)
        for start in range(self._sample_range.start, self._sample_range.stop, self._size):
            indices = np.arange(start, min(start + self._size, self._sample_range.stop))
            shard = np.searchsorted(ends, indices, side="right")
            yield list(zip(shard.tolist(), (indices - (ends - self._counts)[shard]).tolist(), strict=True))


def build_eval_loader(
    shards: Any,
    decoders: Mapping[str, Decoder],
    batch_size: int,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    max_samples: int = 0,
    cache: ShardCache | None = None,
) -> EvalLoader:
    """Build the evaluation loader of this process.

    Over `world` processes, every sample of the shards is read exactly once; each process reads a consecutive part. Besides
    inputs, batches carry targets["json"], a dict for each sample. Where there is a text decoder they also carry
    targets["captions"], a list of all captions of each sample. Where a decoder reads captions from `txt` and most samples hold
    several lines, as in the shards of clip_benchmark, each line is a caption.

    Args:
        shards: anything that data.val may be: a string, or a list of strings or of {shards: ...}.
        decoders: by modality; called with train=False.
        batch_size: samples per batch of this process.
        workers: worker processes; 0 reads and decodes in this process.
        rank: the rank of this process, of `world`.
        world: number of processes.
        max_samples: only the first so many samples over all processes; 0 = all.
        cache: where fetched shards and indices are kept.

    Raises:
        ConfigError: an invalid specification, or one that matches no shard.
        UserError: the shards are damaged, cannot be read, or hold no samples.
    """
    paths = list_shards_once(shards, "data.val")
    counts = count_samples_once(paths, cache or ShardCache(), "data.val")
    reader = ShardReader(paths, cache, counts, max_open=8)
    decoders = _recognize_lines(reader, counts, decoders)
    return EvalLoader(reader, counts, decoders, batch_size, workers, rank, world, max_samples)


# ---- KEY.txt with one caption a line ---------------------------------------------------------------------------------


class LineCounts(NamedTuple):
    """What the first samples of a data set hold in their KEY.txt."""

    samples: int
    """Samples looked at that have a KEY.txt."""
    with_lines: int
    """Those of them that hold several lines."""
    lines: int
    """Lines that are not empty, in all of them."""

    @property
    def are_captions(self) -> bool:
        """Whether lines are taken for captions: at least half of the samples hold several."""
        return self.with_lines > 0 and 2 * self.with_lines >= self.samples


def count_caption_lines(reader: ShardReader, counts: Sequence[int]) -> LineCounts:
    """Count the lines of KEY.txt in some samples of the first shards. Raises UserError.

    Args:
        reader: reads samples by shard.
        counts: samples in each shard.
    """
    shards = [shard for shard, count in enumerate(counts) if count][:_PROBED_SHARDS]
    lines = []
    for shard in shards:
        for sample in np.unique(np.linspace(0, counts[shard] - 1, _PROBED_SAMPLES // len(shards)).astype(int)).tolist():
            try:
                data = reader.read(shard, sample, [TXT]).members.get(TXT)
            except BadSample:
                continue
            if data is not None:
                lines.append(count_lines(data))
    return LineCounts(len(lines), sum(n > 1 for n in lines), sum(lines))


def _recognize_lines(reader: ShardReader, counts: Sequence[int], decoders: Mapping[str, Decoder]) -> dict[str, Decoder]:
    """Return the decoders, of which those that read captions from `txt` read one a line where the data is so. Collective."""
    names = [
        name
        for name, decoder in decoders.items()
        if isinstance(decoder, TextDecoder) and type(decoder).__call__ is TextDecoder.__call__ and decoder.caption == TXT
    ]
    if not names:
        return dict(decoders)

    def probe() -> LineCounts:
        probed = count_caption_lines(reader, counts)
        if probed.with_lines and reader.paths[0] not in _reported_shards:
            _reported_shards.add(reader.paths[0])
            log.warning(one_safe_line(describe_lines(probed, reader.paths[0], probed.are_captions)))
        reader.close()  # before worker processes are forked
        return probed

    if not on_main(probe).are_captions:
        return dict(decoders)
    changed = {name: copy.copy(decoders[name]) for name in names}
    for decoder in changed.values():
        assert isinstance(decoder, TextDecoder)
        decoder.caption = TXT_LINES
    return {**decoders, **changed}


def describe_lines(probed: LineCounts, path: str, are_split: bool) -> str:
    """Return how KEY.txt of several lines is read, in one line.

    Args:
        probed: what samples of the data hold.
        path: the first shard of the data.
        are_split: whether each line is read as a caption.
    """
    share = _describe_share(probed, path)
    if are_split:
        each = f"each line is a caption ({probed.lines / probed.samples:.1f} a sample)"
        return f"{share}: {each}; the caption setting {TXT_WHOLE} reads them as one"
    return f"{share}, which are read as one caption; the caption setting {TXT_LINES} reads each line as one"


def describe_training_lines(probed: LineCounts, path: str, caption: str, draw: int) -> str:
    """Return how training reads KEY.txt of several lines, and the setting that changes it, in one line.

    Args:
        probed: what samples of the data hold.
        path: the first shard of the data.
        caption: the setting data.caption.
        draw: captions drawn per sample.
    """
    share = _describe_share(probed, path)
    if caption != TXT_LINES:
        return f"{share}, which training reads as one caption; data.caption={TXT_LINES} draws one of the lines each time"
    drawn = "one is drawn each time" if draw == 1 else f"{draw} are drawn each time"
    lines = f"each line is a caption ({probed.lines / probed.samples:.1f} a sample), of which {drawn}"
    return f"{share}: {lines}; data.caption={TXT} reads them as one"


def _describe_share(probed: LineCounts, path: str) -> str:
    return f"{path}: {probed.with_lines} of {probed.samples} samples looked at hold several lines in KEY.txt"
