"""The work of a worker process: it turns positions into a collated partial batch.

The result is a function of the positions alone. Workers report unusable samples instead of raising. The loader counts them
in the order of the samples and decides whether the run stops.
"""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from types import FrameType
from typing import Any, NoReturn, Protocol

import numpy as np
import torch

from pretrain.data import BadSample, MissingContent
from pretrain.data.batch import Batch, Decoder, collate
from pretrain.data.members import explain_no_pair
from pretrain.data.order import Order
from pretrain.data.sample_filter import SampleFilter
from pretrain.data.sample_json import read_fields
from pretrain.data.shards.paths import RawSample
from pretrain.data.shuffle import Ints, KeyedGenerator
from pretrain.errors import UserError
from pretrain.runtime.orphans import exit_with_parent

MAX_FILTERED = 10_000
"""Samples passed over by data.keep and data.skip for one place of a batch, above which the run stops."""


class SampleReader(Protocol):
    """Reader of samples: shards.reader.ShardReader or synthetic.SyntheticReader."""

    def read(self, shard: int, sample: int) -> RawSample:
        """Read one sample. Raises BadSample or UserError."""
        ...

    def key(self, shard: int, sample: int) -> str:
        """Return the key "shard/KEY" of a sample."""
        ...


@dataclass
class SkippedSample:
    """A sample that could not be used."""

    slot: int
    """Its place in the partial batch, from 0."""
    key: str
    reason: str
    detail: str


@dataclass
class PartialBatch:
    """Part of a batch, as a worker returns it."""

    batch: Batch | None
    """None where no sample is usable (evaluation) or a slot could not be filled (training), and after an error."""
    slots: int
    bad: list[SkippedSample] = field(default_factory=list)
    filtered: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Samples passed over by data.keep and data.skip, by name of their shard and reason."""
    problem: str = ""
    """Why the run must stop, a one-line message for the user; "" where it need not."""


class _SampleDecoder:
    """Reading and decoding of one sample, shared by training and evaluation."""

    def __init__(self, reader: SampleReader, decoders: Mapping[str, Decoder], train: bool, least: int = 2) -> None:
        self.reader, self.decoders, self.train, self.least = reader, decoders, train, least
        self.generator = KeyedGenerator()

    def decode(self, shard: int, sample: int, *seed: int | str) -> tuple[RawSample, dict[str, Any]]:
        """Return the raw sample and its decoded item in each modality.

        Each decoder gets its own random numbers, keyed by `seed` and its modality, or its `random_key`.

        Raises:
            BadSample: the content cannot be used.
            UserError: the sample cannot be read.
        """
        raw = self.reader.read(shard, sample)
        try:
            items: dict[str, Any] = {}
            missing: list[str] = []
            for name, decoder in self.decoders.items():
                try:
                    key = getattr(decoder, "random_key", name)
                    items[name] = decoder(raw, self.generator.rekey(*seed, key), self.train)
                except MissingContent:
                    if getattr(decoder, "blank_item", None) is None:
                        raise
                    items[name] = None
                    missing.append(name)
            if missing:
                self._check_rest(missing)
            return raw, items
        except BadSample:
            raise
        except Exception as error:  # a bug in a decoder, not bad content: name the sample
            error.add_note(f"while decoding sample {raw.key}")
            raise

    def _check_rest(self, missing: Sequence[str]) -> None:
        """Raise BadSample where a sample without the missing modalities has too few of those it may lack."""
        optional = [name for name, decoder in self.decoders.items() if getattr(decoder, "blank_item", None) is not None]
        has = [name for name in optional if name not in missing]
        if len(has) < self.least:
            raise BadSample("no pair" if self.least > 1 else "no content", explain_no_pair(has, missing))

    def skip(self, slot: int, shard: int, sample: int, error: BadSample) -> SkippedSample:
        """Return the record of an unusable sample."""
        return SkippedSample(slot, self.reader.key(shard, sample), error.reason, error.detail[:200])


class TrainingDataset(_SampleDecoder, torch.utils.data.Dataset[PartialBatch]):
    """Data set of partial batches, indexed by positions.

    An unusable sample is replaced by another one of its window, and so is one that `sample_filter` passes over.

    Args:
        order: which sample is read at which position.
        reader: reads samples; the shards of all sources are numbered consecutively.
        decoders: by modality.
        max_attempts: number of unusable samples of a slot, besides the first one.
        sample_filter: data.keep and data.skip; None = neither is set.
    """

    def __init__(
        self,
        order: Order,
        reader: SampleReader,
        decoders: Mapping[str, Decoder],
        max_attempts: int,
        sample_filter: SampleFilter | None = None,
    ) -> None:
        super().__init__(reader, decoders, train=True)
        self.order, self.max_attempts, self.sample_filter = order, max_attempts, sample_filter
        self.first_shards = np.cumsum([0, *(len(source.counts) for source in order.sources)])  # of each source
        self.find_decoders: Callable[[int], Mapping[str, Decoder]] | None = None
        """Returns the decoders of a position, where they change; those of a partial batch are the same. None = `decoders`."""

    def __getitem__(self, positions: Ints) -> PartialBatch:
        try:
            return self._build_partial(positions)
        except UserError as error:
            return PartialBatch(None, len(positions), problem=str(error))

    def _build_partial(self, positions: Ints) -> PartialBatch:
        """Read, decode and collate the samples of these positions. Raises UserError."""
        if self.find_decoders is not None and len(positions):
            self.decoders = self.find_decoders(int(positions[0]))
        items: dict[str, list[Any]] = {name: [] for name in self.decoders}
        keys: list[str] = []
        partial = PartialBatch(None, 0)
        source, shard, sample = self.order.locate(positions)
        addresses = zip((self.first_shards[source] + shard).tolist(), sample.tolist(), strict=True)
        for position, address in zip(positions.tolist(), addresses, strict=True):
            usable = self._read_slot(position, address, partial)
            partial.slots += 1
            if usable is None:
                return partial
            raw, decoded = usable
            keys.append(raw.key)
            for name, item in decoded.items():
                items[name].append(item)
        partial.batch = collate(items, self.decoders, keys)
        return partial

    def _read_slot(
        self, position: int, address: tuple[int, int], partial: PartialBatch
    ) -> tuple[RawSample, dict[str, Any]] | None:
        """Return the sample at a position with its decoded items, or the first of its substitutes that can be used.

        None where more than `max_attempts` substitutes are unusable.

        Args:
            position: that of the slot.
            address: shard and sample at this position.
            partial: where samples that are replaced are recorded.

        Raises:
            UserError: a sample cannot be read, or `sample_filter` passes over more than MAX_FILTERED.
        """
        num_bad = num_filtered = 0
        for attempt in count():
            try:
                reason = self.sample_filter.find_reason(*address) if self.sample_filter is not None else ""
                if not reason:
                    return self.decode(*address, self.order.seed, "sample", position)
                key = self.reader.key(*address)
                partial.filtered[key.partition("/")[0], reason] += 1
                num_filtered += 1
                if num_filtered > MAX_FILTERED:
                    self._refuse_filter(key, reason)
            except BadSample as error:
                partial.bad.append(self.skip(partial.slots, *address, error))
                num_bad += 1
                if num_bad > self.max_attempts:
                    return None
            source, shard, sample = self.order.substitute(position, attempt)
            address = (int(self.first_shards[source]) + shard, sample)
        raise AssertionError("count() does not end")

    def _refuse_filter(self, key: str, reason: str) -> NoReturn:
        """Raise UserError for a filter that passes over all samples that were drawn for a slot."""
        assert self.sample_filter is not None
        raise UserError(
            f"{self.sample_filter.settings}: none of {MAX_FILTERED:,} samples drawn from a window of data.train passes; the "
            f"last is {key} ({reason}); where few pass, a larger data.window mixes more shards"
        )


class EvaluationDataset(_SampleDecoder, torch.utils.data.Dataset[PartialBatch]):
    """Data set of partial batches, indexed by [(shard, sample)]; unusable samples are left out.

    Args:
        reader: reads samples by shard.
        decoders: by modality; called with train=False.
        least: modalities that a sample has at least, where decoders let it lack some.
    """

    def __init__(self, reader: SampleReader, decoders: Mapping[str, Decoder], least: int = 2) -> None:
        super().__init__(reader, decoders, train=False, least=least)

    def __getitem__(self, addresses: Sequence[tuple[int, int]]) -> PartialBatch:
        items: dict[str, list[Any]] = {name: [] for name in self.decoders}
        keys: list[str] = []
        fields: list[dict[str, Any]] = []
        bad: list[SkippedSample] = []
        try:
            for slot, address in enumerate(addresses):
                try:
                    raw, decoded = self.decode(*address, "evaluation", *address)
                except BadSample as error:
                    bad.append(self.skip(slot, *address, error))
                    continue
                keys.append(raw.key)
                fields.append(_read_fields_or_empty(raw))
                for name, item in decoded.items():
                    items[name].append(item)
        except UserError as error:
            return PartialBatch(None, len(addresses), problem=str(error))
        if not keys:
            return PartialBatch(None, len(addresses), bad)
        batch = collate(items, self.decoders, keys)
        batch.targets["json"] = fields
        return PartialBatch(batch, len(addresses), bad)


def _read_fields_or_empty(raw: RawSample) -> dict[str, Any]:
    """Return the json fields of a sample; {} where it has none or they cannot be parsed."""
    try:
        return read_fields(raw.members)
    except BadSample:
        return {}


# ---- settings of a worker process ------------------------------------------------------------------------------------


def init_worker(parent: int, _: int) -> None:
    """Initialize a worker process: one thread, signals left to the trainer, and no life after it.

    Ctrl-C, and the SIGTERM that launchers and schedulers send to all processes of a job, are handled by the trainer. It still
    needs its workers to stop in good order, and then ends them itself. A second SIGTERM is meant for the worker.

    parent: the pid of the trainer. Without it the worker would wait for an answer of its storage, and hold files and GPUs.
    """
    exit_with_parent(parent)
    torch.set_num_threads(1)
    if "cv2" in sys.modules:
        sys.modules["cv2"].setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def ignore_once(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, ignore_once)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
