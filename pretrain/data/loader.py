"""The loader: worker processes read and decode; what they hand over does not depend on how many they are.

    build_loader(data, decoders, ...) -> Loader       training: endless, resumes from state()
    sequential(shards, decoders, ...) -> Sequential   evaluation: each sample exactly once, over any number of processes

Workers get positions and return collated pieces of batches, in order. The loader counts what the trainer took, not what was
read ahead, so a position is all there is to its state.

Legend: B global batch size, b = B / world this process's share.
"""

from __future__ import annotations

import hashlib
import logging
import resource
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np
import torch

from pretrain.data import synthetic
from pretrain.data.batch import Batch, Decoder, merge
from pretrain.data.config import DataConfig, count_samples_once, resolve_sources
from pretrain.data.eval_loader import EvalLoader, build_eval_loader
from pretrain.data.order import Order, ShardSource
from pretrain.data.prefetch import is_prefetch_needed, run_prefetcher
from pretrain.data.shards.reader import ShardReader
from pretrain.data.shuffle import Ints
from pretrain.data.worker import PartialBatch, SampleReader, SkippedSample, TrainingDataset
from pretrain.data.worker_pool import run_workers
from pretrain.errors import UserError

__all__ = ["Batch", "DataConfig", "Decoder", "EvalLoader", "Loader", "build_eval_loader", "build_loader"]

log = logging.getLogger(__name__)

PARTIAL_SIZE = 256
"""Samples a worker decodes at a time: larger shares of a batch are spread over workers."""
MIN_JUDGED = 1000
"""Samples from which on the rate of bad ones is judged; before, as if there had been so many."""
MAX_NAMED = 20
"""Bad samples that are named in the log; all are counted."""


class Loader:
    """ShuffledSource batches of this process's share, from `load`ed state or the beginning.

    Args:
        order: what is read when.
        store: reads samples by shard, the shards of all sources counted through.
        decoders: by modality.
        batch_size: B, over all processes.
        rank: this process, of `world` on `nodes` machines.
        workers: processes that read and decode; 0 does it in this process.
        max_bad_rate: share of unusable samples above which the run stops.
        max_bad_run: unusable samples in a row after which it stops.
        pin: batches in page-locked memory.
        piece: samples a worker decodes at a time.
        names: of all shards, for `digest`.
        scouted: a Reader whose shards are fetched and indexed ahead; None where they are at hand.

    Raises:
        ConfigError: a batch size that cannot be divided so.
    """

    def __init__(
        self,
        order: Order,
        store: SampleReader,
        decoders: Mapping[str, Decoder],
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        nodes: int = 1,
        workers: int = 0,
        max_bad_rate: float = 0.01,
        max_bad_run: int = 100,
        pin: bool = False,
        piece: int = PARTIAL_SIZE,
        names: Sequence[str] = (),
        scouted: ShardReader | None = None,
    ) -> None:
        order.check(batch_size, world, nodes)
        self.order, self.decoders, self.batch_size = order, decoders, batch_size
        self.rank, self.world, self.nodes, self.workers, self.pin = rank, world, nodes, workers, pin
        self.max_bad_rate, self.max_bad_run = max_bad_rate, max_bad_run
        self.pieces = -(-batch_size // world // piece)
        self.names, self.scouted = names, scouted
        self.bad: Counter[str] = Counter()
        """Unusable samples met so far by this process, by reason."""
        self._training = TrainingDataset(order, store, decoders, max_attempts=max_bad_run)
        self._batch = 0  # the next the trainer will take
        self._seen = 0  # slots filled
        self._run = 0  # unusable samples since the last usable one
        self._named = 0
        self._last: SkippedSample | None = None

    @property
    def shard_count(self) -> int:
        """Shards of all sources."""
        return sum(len(source.counts) for source in self.order.sources)

    def digest(self) -> str:
        """A name for data and order: a run resumes only where it is the same. Folders may have moved."""
        return hashlib.blake2b("\n".join([self.order.digest(), *self.names]).encode(), digest_size=8).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """Where the trainer is, to be saved; plain numbers and words, less than 10 KB."""
        return {
            "position": self._batch * self.batch_size,
            "batch_size": self.batch_size,
            "data": self.digest(),
            "seen": self._seen,
            "run": self._run,
            "bad": {reason[:100]: n for reason, n in self.bad.most_common(50)},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved state. Raises UserError where data, seed or batch size are not those of the state."""
        if state["data"] != self.digest():
            raise UserError(
                "the checkpoint was made with other data (shards, their counts, weights), another seed, or another "
                "data.window, data.streams, data.block or data.replacement: to resume they must be the same"
            )
        if state["batch_size"] != self.batch_size:
            raise UserError(
                f"data.batch_size={self.batch_size}, but the checkpoint was made with {state['batch_size']}: to resume it "
                "must be the same"
            )
        self._batch, self._seen, self._run = state["position"] // self.batch_size, state["seen"], state["run"]
        self.bad = Counter(state["bad"])

    def first_samples(self, count: int) -> Batch:
        """The first `count` samples of the run, read here and now: the same on every process, and none is used up.

        Raises UserError where they cannot be used.
        """
        piece = self._training[np.arange(count)]
        if piece.problem:
            raise UserError(piece.problem)
        if piece.batch is None:
            bad = piece.bad[-1]
            raise UserError(f"no sample can be used: the last tried is {bad.key} ({bad.reason}: {bad.detail})")
        return piece.batch

    def __iter__(self) -> Iterator[Batch]:
        with (
            run_workers(self._training, self._positions(self._batch), self.workers) as pieces,
            run_prefetcher(self.scouted, self._ahead, self._batch, self._reach()) as tell,
        ):
            while True:
                parts = [self._checked(next(pieces)) for _ in range(self.pieces)]
                self._judge()
                batch = merge(parts, self.decoders, self.pin)
                self._batch += 1
                tell(self._batch)
                yield batch

    def _ahead(self, batch: int) -> list[int]:
        """The shards of a batch that this node serves."""
        node = self.rank * self.nodes // self.world
        positions = self.order.positions(batch, self.batch_size, node, self.nodes, self.nodes)
        source, shard, _ = self.order.locate(positions)
        shards: list[int] = np.unique(self._training.first[source] + shard).tolist()
        return shards

    def _reach(self) -> int:
        """Batches until every window in use is over."""
        streams = max(1, self.order.streams // self.nodes)
        return 1 + self.order.window_samples * streams * self.nodes // self.batch_size

    def _positions(self, start: int) -> Iterator[Ints]:
        """What each piece holds, batch after batch."""
        for batch in count(start):
            mine = self.order.positions(batch, self.batch_size, self.rank, self.world, self.nodes)
            yield from np.array_split(mine, self.pieces)

    def _checked(self, piece: PartialBatch) -> Batch:
        """Counts what was bad in a piece, in the order of the samples. Raises UserError where it is too much."""
        if piece.problem:
            raise UserError(piece.problem)
        last = -1
        for bad in piece.bad:
            if bad.slot > last + 1:
                self._run = 0
            last = bad.slot
            self._run += 1
            self._count(bad)
            if self._run > self.max_bad_run:
                raise UserError(
                    f"{self._run} samples in a row cannot be used, more than data.max_bad_run={self.max_bad_run}; "
                    f"the last is {bad.key} ({bad.reason}: {bad.detail}); {self._reasons()}"
                )
        self._run = self._run if last == piece.slots - 1 else 0
        self._seen += piece.slots
        assert piece.batch is not None
        return piece.batch

    def _judge(self) -> None:
        """Once a batch, so that the size of pieces makes no difference. Raises UserError for too high a rate."""
        total = self.bad.total()
        if total > self.max_bad_rate * max(self._seen, MIN_JUDGED):
            last = f"the last is {self._last.key} ({self._last.reason}: {self._last.detail}); " if self._last else ""
            raise UserError(
                f"{total:,} of {self._seen:,} samples cannot be used, more than data.max_bad_rate={self.max_bad_rate}; "
                f"{last}{self._reasons()}"
            )

    def _count(self, bad: SkippedSample) -> None:
        self.bad[bad.reason] += 1
        self._named += 1
        self._last = bad
        if self._named <= MAX_NAMED:
            more = " (further ones are only counted)" if self._named == MAX_NAMED else ""
            log.warning("%s cannot be used and is replaced: %s: %s%s", bad.key, bad.reason, bad.detail, more)

    def _reasons(self) -> str:
        return "by reason: " + ", ".join(f"{reason} {n:,}" for reason, n in self.bad.most_common(5))


def build_loader(
    data: DataConfig, decoders: Mapping[str, Decoder], seed: int, rank: int = 0, world: int = 1, nodes: int = 1
) -> Loader:
    """The training loader that a configuration asks for. Collective where there is a process group.

    Raises:
        ConfigError: no shards, numbers that do not fit one another, a batch larger than the data.
        UserError: shards that are damaged or cannot be read.
    """
    store: SampleReader
    scouted: ShardReader | None = None
    if data.train == "synthetic":
        sources = [ShardSource([synthetic.SAMPLES] * synthetic.SHARDS)]
        store, names = synthetic.SyntheticReader(data.caption), ["synthetic"]
        decoders = {name: synthetic.NoiseDecoder(each) if hasattr(each, "size") else each for name, each in decoders.items()}
    else:
        given = resolve_sources(data.train, "data.train")
        paths = [path for source in given for path in source.shards]
        numbers = count_samples_once(paths, data.build_cache(), "data.train")
        sources, at = [], 0
        for source in given:
            own = numbers[at : at + len(source.shards)]
            sources.append(ShardSource(own, source.weight if source.weight is not None else float(max(sum(own), 1))))
            at += len(own)
        held = 2 * data.window * len(sources) * max(1, data.streams // nodes)  # windows in use, and the next ones
        store = ShardReader(paths, data.build_cache(), numbers, max_open=min(held, _max_open_files()))
        scouted = store if rank % (world // nodes) == 0 and is_prefetch_needed(paths, store.cache) else None
        names = [path.rsplit("/", 1)[-1] for path in paths]
    order = Order(sources, seed, data.window, data.streams, data.block, data.replacement)
    return Loader(
        order,
        store,
        decoders,
        data.batch_size,
        rank,
        world,
        nodes,
        data.workers,
        data.max_bad_rate,
        data.max_bad_run,
        pin=torch.cuda.is_available(),
        names=names,
        scouted=scouted,
    )


def _max_open_files() -> int:
    """Files a worker may hold open: a quarter of what the system allows a process."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 512 if soft == resource.RLIM_INFINITY else max(16, min(512, soft // 4))
