"""What one worker process does: positions in, a collated piece of a batch out. Everything is a function of the positions.

Workers report what they could not use instead of raising: the loader counts it in the order of the samples, and decides.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch

from pretrain.data import BadSample
from pretrain.data.batch import Batch, Decoder, collate
from pretrain.data.order import Order
from pretrain.data.sample_json import read_fields
from pretrain.data.shards.paths import RawSample
from pretrain.data.shuffle import Ints, KeyedGenerator
from pretrain.errors import UserError


class SampleReader(Protocol):
    """Where samples come from: reader.Reader, or synthetic.Synthetic."""

    def read(self, shard: int, sample: int) -> RawSample:
        """One sample. Raises BadSample, UserError."""
        ...

    def key(self, shard: int, sample: int) -> str:
        """Its key "shard/KEY"."""
        ...


@dataclass
class SkippedSample:
    """A sample that could not be used."""

    slot: int
    """Where it should have gone, counted in the piece."""
    key: str
    reason: str
    detail: str


@dataclass
class PartialBatch:
    """Part of a batch, as a worker hands it over."""

    batch: Batch | None
    """None: there is no usable sample in it (evaluation), or a slot could not be filled (training)."""
    slots: int
    bad: list[SkippedSample] = field(default_factory=list)
    problem: str = ""
    """Why the run must stop: a line for the user."""


class _SampleDecoder:
    """What training and evaluation share: reading and decoding one sample."""

    def __init__(self, store: SampleReader, decoders: Mapping[str, Decoder], train: bool) -> None:
        self.store, self.decoders, self.train = store, decoders, train
        self.generators = KeyedGenerator()

    def decode(self, shard: int, sample: int, *seed: int | str) -> tuple[RawSample, dict[str, Any]]:
        """The raw sample, and its item in each modality, each with its own random numbers. Raises BadSample."""
        raw = self.store.read(shard, sample)
        try:
            items = {}
            for name, decoder in self.decoders.items():
                items[name] = decoder(raw, self.generators.of(*seed, name), self.train)
            return raw, items
        except BadSample:
            raise
        except Exception as error:  # a bug, not bad content: say where it was met
            error.add_note(f"while decoding sample {raw.key}")
            raise

    def bad(self, slot: int, shard: int, sample: int, error: BadSample) -> SkippedSample:
        return SkippedSample(slot, self.store.key(shard, sample), error.reason, error.detail[:200])


class TrainingDataset(_SampleDecoder, torch.utils.data.Dataset[PartialBatch]):
    """Positions -> piece; a sample that cannot be used is replaced by a substitute of its window.

    Args:
        order: what is read when.
        store: reads samples; its shards are those of all sources, one source after the other.
        decoders: by modality.
        max_attempts: substitutes tried for one slot.
    """

    def __init__(self, order: Order, store: SampleReader, decoders: Mapping[str, Decoder], max_attempts: int) -> None:
        super().__init__(store, decoders, train=True)
        self.order, self.max_attempts = order, max_attempts
        self.first = np.cumsum([0, *(len(source.counts) for source in order.sources)])  # shard of each source

    def __getitem__(self, positions: Ints) -> PartialBatch:
        try:
            return self._piece(positions)
        except UserError as error:
            return PartialBatch(None, len(positions), problem=str(error))

    def _piece(self, positions: Ints) -> PartialBatch:
        items: dict[str, list[Any]] = {name: [] for name in self.decoders}
        keys: list[str] = []
        bad: list[SkippedSample] = []
        source, shard, sample = self.order.locate(positions)
        places = zip((self.first[source] + shard).tolist(), sample.tolist(), strict=True)
        for slot, (position, place) in enumerate(zip(positions.tolist(), places, strict=True)):
            for attempt in range(self.max_attempts + 1):
                try:
                    raw, decoded = self.decode(*place, self.order.seed, "sample", position)
                    break
                except BadSample as error:
                    bad.append(self.bad(slot, *place, error))
                    other_source, other_shard, other = self.order.substitute(position, attempt)
                    place = (int(self.first[other_source]) + other_shard, other)
            else:
                return PartialBatch(None, slot + 1, bad)
            keys.append(raw.key)
            for name, item in decoded.items():
                items[name].append(item)
        return PartialBatch(collate(items, self.decoders, keys), len(positions), bad)


class EvaluationDataset(_SampleDecoder, torch.utils.data.Dataset[PartialBatch]):
    """(shard, sample) pairs -> piece; a sample that cannot be used is left out."""

    def __init__(self, store: SampleReader, decoders: Mapping[str, Decoder]) -> None:
        super().__init__(store, decoders, train=False)

    def __getitem__(self, places: Sequence[tuple[int, int]]) -> PartialBatch:
        items: dict[str, list[Any]] = {name: [] for name in self.decoders}
        keys: list[str] = []
        notes: list[dict[str, Any]] = []
        bad: list[SkippedSample] = []
        try:
            for slot, place in enumerate(places):
                try:
                    raw, decoded = self.decode(*place, "evaluation", *place)
                except BadSample as error:
                    bad.append(self.bad(slot, *place, error))
                    continue
                keys.append(raw.key)
                notes.append(_read_fields_or_empty(raw))
                for name, item in decoded.items():
                    items[name].append(item)
        except UserError as error:
            return PartialBatch(None, len(places), problem=str(error))
        if not keys:
            return PartialBatch(None, len(places), bad)
        batch = collate(items, self.decoders, keys)
        batch.targets["json"] = notes
        return PartialBatch(batch, len(places), bad)


def _read_fields_or_empty(raw: RawSample) -> dict[str, Any]:
    """The json of a sample; {} where there is none to be read."""
    try:
        return read_fields(raw.members)
    except BadSample:
        return {}


# ---- the process -----------------------------------------------------------------------------------------------------


def init_worker(_: int) -> None:
    """Settings of a worker process: one thread, and signals left to the trainer.

    Ctrl-C, and the SIGTERM that launchers and schedulers send to all processes of a job, are answered by the trainer, which
    still needs its workers to end in good order, and then ends them itself. A second SIGTERM is meant for the worker.
    """
    torch.set_num_threads(1)
    if "cv2" in sys.modules:
        sys.modules["cv2"].setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def first(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, first)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
