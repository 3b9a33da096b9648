"""The training loader, whose batches do not depend on the number of worker processes.

    build_loader(data, decoders, ...) -> Loader              training: endless, resumes from state_dict()
    build_eval_loader(shards, decoders, ...) -> EvalLoader   evaluation: each sample exactly once over all processes

Workers receive positions and return collated partial batches, in order. For a GPU a thread merges them into page-locked
memory, and copies one batch ahead of the trainer. The loader counts the batches that the trainer took, not those that were read
or copied ahead, so its state is one position and a few counters.

Legend: B = global batch size, b = B / world = samples per batch of one process.
"""

from __future__ import annotations

import hashlib
import logging
import resource
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch

from pretrain.data import synthetic
from pretrain.data.batch import Batch, Decoder, merge
from pretrain.data.batch_sizes import BatchSizes
from pretrain.data.captions import caption_members
from pretrain.data.config import DataConfig, count_samples_once, resolve_sources_once
from pretrain.data.eval_loader import EvalLoader, build_eval_loader, count_caption_lines, describe_training_lines
from pretrain.data.order import Order, ShardSource
from pretrain.data.prefetch import is_prefetch_needed, run_prefetcher
from pretrain.data.sample_filter import SampleFilter, SkipList
from pretrain.data.shards.cache import is_remote
from pretrain.data.shards.reader import ShardReader
from pretrain.data.shuffle import Ints
from pretrain.data.text import TextDecoder
from pretrain.data.training_captions import TrainingCaptions
from pretrain.data.worker import PartialBatch, SampleReader, SkippedSample, TrainingDataset
from pretrain.data.worker_pool import run_workers
from pretrain.errors import UserError
from pretrain.printable import format_count, one_safe_line
from pretrain.runtime.console import log_info
from pretrain.runtime.device_copy import feed

__all__ = ["Batch", "DataConfig", "Decoder", "EvalLoader", "Loader", "build_eval_loader", "build_loader"]

log = logging.getLogger(__name__)

PARTIAL_SIZE = 256
"""Samples that a worker decodes at a time; a process with more samples per batch spreads them over its workers."""
MIN_JUDGED = 1000
"""Smallest denominator of the rate of bad samples, so that a few early ones do not stop a run."""
MAX_NAMED = 20
"""Bad samples that are named in the log; all are counted."""
MAX_COMPARED = 1000
"""Shards whose keys are compared with the lines of data.skip when a run begins; it takes a millisecond or two for each."""
CPU = torch.device("cpu")


class Loader:
    """Endless batches of the samples that this process serves, from the start or a loaded state.

    Args:
        order: which sample is read at which position.
        reader: reads samples by shard; the shards of all sources are numbered consecutively.
        decoders: by modality.
        batch_size: B, samples per batch over all processes.
        rank: the rank of this process, of `world`.
        world: number of processes.
        nodes: number of nodes that they run on.
        workers: worker processes; 0 reads and decodes in this process.
        max_bad_rate: fraction of unusable samples above which the run stops.
        max_bad_run: consecutive unusable samples above which the run stops.
        device: where batches are needed.
        is_ahead: merge batches and copy them to the device in a thread; None = if the device is a GPU and workers read.
        partial_size: samples that a worker decodes at a time.
        shard_names: the names of all shards, for `digest`.
        prefetch_reader: a reader whose shards are fetched and indexed ahead; None where they are local and indexed.
        sample_filter: data.keep and data.skip; None = neither is set.

    Raises:
        ConfigError: the batch size cannot be divided among the processes.
    """

    def __init__(
        self,
        order: Order,
        reader: SampleReader,
        decoders: Mapping[str, Decoder],
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        nodes: int = 1,
        workers: int = 0,
        max_bad_rate: float = 0.01,
        max_bad_run: int = 100,
        device: torch.device = CPU,
        is_ahead: bool | None = None,
        partial_size: int = PARTIAL_SIZE,
        shard_names: Sequence[str] = (),
        prefetch_reader: ShardReader | None = None,
        sample_filter: SampleFilter | None = None,
    ) -> None:
        order.check(batch_size, world, nodes)
        self.order, self.decoders, self.batch_size = order, decoders, batch_size
        self.batches = BatchSizes.constant(batch_size)
        self.stage_decoders: tuple[Mapping[str, Decoder], ...] = (decoders,)
        """The decoders of each range of `batches`."""
        self.rank, self.world, self.nodes, self.workers, self.device = rank, world, nodes, workers, device
        # Without workers the samples are decoded here: two threads would share tokenizers and readers, and one lock.
        self.is_ahead = device.type == "cuda" and workers > 0 if is_ahead is None else is_ahead
        self.max_bad_rate, self.max_bad_run = max_bad_rate, max_bad_run
        self.partial_size = partial_size
        self.shard_names, self.prefetch_reader = shard_names, prefetch_reader
        self.bad: Counter[str] = Counter()
        """Unusable samples of this process so far, by reason."""
        self.filtered: Counter[str] = Counter(dict.fromkeys(sample_filter.reasons, 0) if sample_filter is not None else {})
        """Samples of this process that data.keep and data.skip passed over so far, by reason."""
        self._replaced: Counter[tuple[str, str]] = Counter()
        """Samples of both kinds since `take_replaced`, by shard and reason."""
        self._dataset = TrainingDataset(order, reader, decoders, max_bad_run, sample_filter)
        self._batch = 0  # number of the next batch that the trainer takes
        self._slots_read = 0
        self._bad_run = 0  # unusable samples since the last usable one
        self._num_logged = 0
        self._last_bad: SkippedSample | None = None

    def set_stages(self, batches: BatchSizes, decoders: Sequence[Mapping[str, Decoder]]) -> None:
        """Let the size of batches, and how samples are decoded, change in the course of the run. Before the first batch.

        decoders: of each range of `batches`, by modality. Raises ConfigError for a size that cannot be divided.
        """
        for size in {part.size for part in batches.ranges}:
            self.order.check(size, self.world, self.nodes)
        if isinstance(self._dataset.reader, synthetic.SyntheticReader):
            decoders = [synthetic.replace_images(mapping) for mapping in decoders]
        self.batches, self.stage_decoders = batches, tuple(decoders)
        self.decoders = self.stage_decoders[-1]
        self._dataset.find_decoders = partial(_find_decoders, batches, self.stage_decoders)

    @property
    def shard_count(self) -> int:
        """Number of shards of all sources."""
        return sum(len(source.counts) for source in self.order.sources)

    def digest(self) -> str:
        """Return a digest of data and order, which must be equal to resume a run.

        Folders do not enter, so that data may move.
        """
        filters = [f"{name}={value}" for name, value in self.filter_identity().items() if value is not None]
        parts = [self.order.digest(), *self.shard_names, *filters]
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()

    def filter_identity(self) -> dict[str, str | None]:
        """Return what data.keep and data.skip stand for, which must be equal to resume a run; None where one is not set."""
        sample_filter = self._dataset.sample_filter
        return sample_filter.identity() if sample_filter is not None else {"data.keep": None, "data.skip": None}

    def take_replaced(self) -> Counter[tuple[str, str]]:
        """Return how many samples of batches that the trainer took were replaced since the last call, by shard and reason."""
        replaced, self._replaced = self._replaced, Counter()
        return replaced

    def state_dict(self) -> dict[str, Any]:
        """Return the state to save: plain numbers and strings, less than 10 KB."""
        return {
            "position": self.batches.position(self._batch),
            "batch_size": self.batch_size,
            "data": self.digest(),
            "seen": self._slots_read,
            "run": self._bad_run,
            "bad": {reason[:100]: n for reason, n in self.bad.most_common(50)},
            "filtered": dict(self.filtered),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            UserError: data, seed, order or batch size differ from those of the state.
        """
        if state["data"] != self.digest():
            raise UserError(
                "the checkpoint was made with other data (shards, their counts, weights), another seed, or another "
                "data.window, data.streams, data.block, data.replacement, data.keep or data.skip: to resume a run they must be "
                "the same"
            )
        if state["batch_size"] != self.batch_size:
            raise UserError(
                f"data.batch_size={self.batch_size}, but the checkpoint was made with {state['batch_size']}: to resume a run "
                "it must be the same"
            )
        self._batch = self.batches.batch_at(state["position"])
        self._slots_read, self._bad_run = state["seen"], state["run"]
        self.bad = Counter(state["bad"])
        self.filtered = Counter({**dict.fromkeys(self.filtered, 0), **state.get("filtered", {})})  # older checkpoints have none

    def first_samples(
        self, count: int, modalities: Sequence[str] | None = None, decoders: Mapping[str, Decoder] | None = None
    ) -> Batch:
        """Read the first `count` samples of the run in this process, without advancing the loader.

        They are the same on every process. modalities: those that are decoded; None = all. decoders: with which these are
        decoded; None = those of the last stage.

        Raises:
            UserError: they cannot be read or used.
        """
        dataset = self._dataset
        if modalities is not None:
            decoders = {name: (decoders or self.decoders)[name] for name in modalities}
            dataset = TrainingDataset(self.order, dataset.reader, decoders, dataset.max_attempts, dataset.sample_filter)
        partial = dataset[np.arange(count)]
        if partial.problem:
            raise UserError(partial.problem)
        if partial.batch is None:
            bad = partial.bad[-1]
            raise UserError(f"no sample can be used: the last one tried is {bad.key} ({bad.reason}: {bad.detail})")
        return partial.batch

    def __iter__(self) -> Generator[Batch, None, None]:
        with (
            run_workers(self._dataset, self._iterate_positions(self._batch), self.workers) as partials,
            run_prefetcher(self.prefetch_reader, self._list_shards, self._batch, self._window_batches()) as report_batch,
            feed(self._merge(partials), self.device, self.is_ahead, partials.kill) as batches,
        ):
            for parts, batch in batches:
                for part in parts:
                    self._count_bad(part)
                self._check_bad_rate()
                assert batch is not None
                self._batch += 1
                report_batch(self._batch)
                yield batch

    def _merge(self, partials: Iterator[PartialBatch]) -> Iterator[tuple[list[PartialBatch], Batch | None]]:
        """Yield each batch, and the parts that it was merged from, without their tensors.

        It may run ahead of the trainer, so it changes nothing here. There is no batch where a part cannot be used.
        """
        for number in count(self._batch):
            decoders, num_partials = self.stage_decoders[self.batches.index(number)], self._count_partials(number)
            parts: list[PartialBatch] = []
            while len(parts) < num_partials and (not parts or parts[-1].batch is not None):
                parts.append(next(partials))
            batches = [part.batch for part in parts if part.batch is not None]
            is_complete = len(batches) == num_partials
            batch = merge(batches, decoders, pin=self.device.type == "cuda") if is_complete else None
            yield [replace(part, batch=None) for part in parts], batch

    def _list_shards(self, batch: int) -> list[int]:
        """Return the numbers of the shards that this node reads for a batch."""
        node = self.rank * self.nodes // self.world
        start, size = self.batches.position(batch), self.batches.size(batch)
        positions = self.order.positions_from(start, size, node, self.nodes, self.nodes)
        source, shard, _ = self.order.locate(positions)
        shards: list[int] = np.unique(self._dataset.first_shards[source] + shard).tolist()
        return shards

    def _window_batches(self) -> int:
        """Return the number of batches after which every window now in use is finished."""
        return 1 + self.order.window_samples * self.order.streams // min(part.size for part in self.batches.ranges)

    def _count_partials(self, batch: int) -> int:
        """Return the number of partial batches of a batch."""
        return -(-self.batches.size(batch) // self.world // self.partial_size)

    def _iterate_positions(self, start: int) -> Iterator[Ints]:
        """Yield the positions of each partial batch, from batch `start` on."""
        for batch in count(start):
            start, size = self.batches.position(batch), self.batches.size(batch)
            positions = self.order.positions_from(start, size, self.rank, self.world, self.nodes)
            yield from np.array_split(positions, self._count_partials(batch))

    def _count_bad(self, partial: PartialBatch) -> None:
        """Count the bad samples of a partial batch, in order.

        Raises:
            UserError: the worker failed, or more than `max_bad_run` consecutive samples are bad.
        """
        if partial.problem:
            raise UserError(partial.problem)
        self._replaced.update(partial.filtered)
        for (_, reason), n in partial.filtered.items():
            self.filtered[reason] += n
        last_slot = -1
        for bad in partial.bad:
            if bad.slot > last_slot + 1:
                self._bad_run = 0
            last_slot = bad.slot
            self._bad_run += 1
            self._record(bad)
            if self._bad_run > self.max_bad_run:
                raise UserError(
                    f"{self._bad_run} samples in a row cannot be used, more than data.max_bad_run={self.max_bad_run}; "
                    f"the last is {bad.key} ({bad.reason}: {bad.detail}); {self._count_reasons()}"
                )
        self._bad_run = self._bad_run if last_slot == partial.slots - 1 else 0
        self._slots_read += partial.slots

    def _check_bad_rate(self) -> None:
        """Raise UserError where the rate of bad samples is too high.

        It is checked once per batch, so that the size of partial batches makes no difference.
        """
        total = self.bad.total()
        if total > self.max_bad_rate * max(self._slots_read, MIN_JUDGED):
            bad = self._last_bad
            last = f"the last is {bad.key} ({bad.reason}: {bad.detail}); " if bad else ""
            raise UserError(
                f"{total:,} of {self._slots_read:,} samples cannot be used, more than data.max_bad_rate={self.max_bad_rate}; "
                f"{last}{self._count_reasons()}"
            )

    def _record(self, bad: SkippedSample) -> None:
        """Count a bad sample, and log it if it is one of the first."""
        self.bad[bad.reason] += 1
        self._replaced[bad.key.partition("/")[0], bad.reason] += 1
        self._num_logged += 1
        self._last_bad = bad
        if self._num_logged <= MAX_NAMED:
            more = " (further ones are only counted)" if self._num_logged == MAX_NAMED else ""
            log.warning(one_safe_line(f"{bad.key} cannot be used and is replaced: {bad.reason}: {bad.detail}{more}"))

    def _count_reasons(self) -> str:
        """Return the counts of the most frequent reasons, for error messages."""
        return "by reason: " + ", ".join(f"{reason} {n:,}" for reason, n in self.bad.most_common(5))


def _find_decoders(batches: BatchSizes, decoders: Sequence[Mapping[str, Decoder]], position: int) -> Mapping[str, Decoder]:
    """Return the decoders of the range that holds a position."""
    return decoders[batches.index_at(position)]


def build_loader(
    data: DataConfig,
    decoders: Mapping[str, Decoder],
    seed: int,
    rank: int = 0,
    world: int = 1,
    nodes: int = 1,
    device: torch.device = CPU,
    batch_sizes: Sequence[int] = (),
) -> Loader:
    """Build the training loader of this process. Collective where there is a process group.

    Args:
        data: the `data` section of the configuration.
        decoders: by modality.
        seed: the seed of the run.
        rank: the rank of this process, of `world`.
        world: number of processes.
        nodes: number of nodes that they run on.
        device: where batches are needed.
        batch_sizes: further sizes that batches will have (`Loader.set_stages`), which streams are chosen to divide.

    Raises:
        ConfigError: no shard matches, a number is out of range, or the batch is larger than the data or cannot be divided.
        UserError: shards are damaged or cannot be read, or there are no samples.
    """
    reader: SampleReader
    prefetch_reader: ShardReader | None = None
    sample_filter: SampleFilter | None = None
    if data.train == "synthetic":
        sources, paths = [ShardSource([synthetic.SAMPLES] * synthetic.SHARDS)], []
    else:
        specs = resolve_sources_once(data.train, "data.train")
        paths = [path for spec in specs for path in spec.shards]
        counts = count_samples_once(paths, data.build_cache(), "data.train")
        sources, start = [], 0
        for spec in specs:
            source_counts = counts[start : start + len(spec.shards)]
            weight = spec.weight if spec.weight is not None else float(max(sum(source_counts), 1))
            sources.append(ShardSource(source_counts, weight))
            start += len(source_counts)
    data.set_streams(paths, min(len(source.counts) for source in sources), nodes, batch_sizes)
    order = Order(sources, seed, data.window, data.streams, data.block, data.replacement)
    if data.train == "synthetic":
        reader, shard_names = synthetic.SyntheticReader(data.caption), ["synthetic"]
        decoders = synthetic.replace_images(decoders)
    else:
        window_shards = 2 * data.window * len(sources) * order.node_streams(nodes)  # windows in use, and the next ones
        reader = ShardReader(paths, data.build_cache(), counts, max_open=min(window_shards, _max_open_files()))
        prefetch_reader = reader if rank % (world // nodes) == 0 and is_prefetch_needed(paths, reader.cache) else None
        shard_names = [path.rsplit("/", 1)[-1] for path in paths]
        if data.keep is not None or data.skip is not None:
            sample_filter = SampleFilter(reader, data.keep, data.skip)
            if rank == 0 and sample_filter.skip_list is not None:
                _report_unmatched_lines(sample_filter.skip_list, reader, data)
        if rank == 0 and caption_members(data.caption) == ("txt",) and any(map(_reads_captions, decoders.values())):
            _report_caption_lines(reader, counts, order, data)
    return Loader(
        order,
        reader,
        decoders,
        data.batch_size,
        rank,
        world,
        nodes,
        data.workers,
        data.max_bad_rate,
        data.max_bad_run,
        device=device,
        shard_names=shard_names,
        prefetch_reader=prefetch_reader,
        sample_filter=sample_filter,
    )


def _reads_captions(decoder: Decoder) -> bool:
    """Return whether a decoder reads captions: those of questions and labels are no text decoders, or decode otherwise."""
    return isinstance(decoder, TrainingCaptions) or (
        isinstance(decoder, TextDecoder) and type(decoder).__call__ is TextDecoder.__call__
    )


def _report_caption_lines(reader: ShardReader, counts: Sequence[int], order: Order, data: DataConfig) -> None:
    """Log how KEY.txt of several lines is read, where some of the samples looked at are so.

    Of remote shards only the first one that training reads is looked at, which is fetched for that.
    """
    if any(map(is_remote, reader.paths)):
        source, shard, _ = (int(index[0]) for index in order.locate([0]))
        first = sum(len(other.counts) for other in order.sources[:source]) + shard
        counts = [count if i == first else 0 for i, count in enumerate(counts)]
    probed = count_caption_lines(reader, counts)
    reader.close()  # before worker processes are forked
    if probed.with_lines:
        log_info(describe_training_lines(probed, reader.paths[0], data.caption, data.draw))


def _report_unmatched_lines(skip_list: SkipList, reader: ShardReader, data: DataConfig) -> None:
    """Warn of lines of data.skip that name no sample of data.train.

    Of local shards keys are compared, in the first MAX_COMPARED that the list names; of the others only their names.
    """
    shards = [shard for shard in range(len(reader.paths)) if reader.name(shard) in skip_list.shards]
    unmatched = len(skip_list) - sum(skip_list.shards[reader.name(shard)] for shard in shards)
    local = [shard for shard in shards if not (data.stage or is_remote(reader.paths[shard]))]
    for shard in local[:MAX_COMPARED]:
        unmatched += skip_list.shards[reader.name(shard)] - skip_list.count_lines(
            (reader.key(shard, sample), reader.is_repeated(shard, sample)) for sample in range(reader.count(shard))
        )
    reader.close()  # before worker processes are forked
    if unmatched:
        total = format_count(len(skip_list), "line")
        log.warning(one_safe_line(f"data.skip={data.skip}: {unmatched:,} of {total} name no sample of data.train"))


def _max_open_files() -> int:
    """Return how many shards a worker may hold open: a quarter of the process limit, 16 to 512."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 512 if soft == resource.RLIM_INFINITY else max(16, min(512, soft // 4))
