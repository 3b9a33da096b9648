"""Batch, the Decoder protocol, and collation. Modalities are identified by name, never by position.

Legend: b = samples in the batch, k = texts of a sample, T = tokens of a text.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from pretrain.data.captions import caption_id
from pretrain.data.length_groups import RowGroups
from pretrain.data.text_packing import PackedTexts
from pretrain.errors import ConfigError

if TYPE_CHECKING:
    from pretrain.data.shards.paths import RawSample


SENT_BY_VALUE = 2**16
"""Bytes up to which a tensor of a batch is sent between processes by value."""


class Decoder(Protocol):
    """Decoder of one modality: it turns a raw sample into an item, and collates items into a batch.

    A decoder whose batches differ in shape (texts trimmed to the longest) also has
    `merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]`. It returns what one `collate` over all items would.

    A decoder of texts that are encoded in groups of fixed shapes has `length_groups` (a LengthGroups), or a TextPacking where
    they are packed, for Batch.groups; None = neither.

    A decoder that provides targets has `targets(items) -> dict[str, Tensor | list]`, sample first, for Batch.targets.
    Its `collate` may return None: it then provides targets only, and the batch has no input of its name.

    A decoder with `blank_item` is of a modality that a sample may lack, see `allow_missing`. The worker leaves None in its
    place, and `collate` the blank item.

    A decoder whose targets depend on what others drew has `complete(batch, items)`, which adds to a partial batch at the end;
    items: those of all modalities.

    A decoder with `random_key` gets the random numbers of that modality, in place of those of its own name: two that have the
    same draw the same.
    """

    def __call__(self, sample: RawSample, rng: np.random.Generator, train: bool) -> Any:
        """Return the item of one sample; all randomness comes from `rng`.

        Raises:
            BadSample: the content cannot be used.
        """
        ...

    def collate(self, items: list[Any]) -> tuple[Any, Tensor | None] | None:
        """Return (input, mask) of several items, batch dimension first; the mask may be None, the input an EncodedInput."""
        ...


class EncodedInput(ABC):
    """An input that becomes a tensor where its batch is moved to a device, by work that is done there."""

    @abstractmethod
    def to(self, device: torch.device | str, non_blocking: bool = False) -> Tensor:
        """Return the input, batch dimension first, on `device`."""

    @abstractmethod
    def join(self, others: Sequence[Any]) -> Self:
        """Return this input with those of further partial batches, of the same class, behind it."""


@dataclass
class Batch:
    """A batch of b samples: inputs and masks by modality, keys and targets."""

    inputs: dict[str, Tensor]
    """By modality: "image" (b, 3, H, W) uint8, "text" (b, T) int64, or (b, k, T) with k texts per sample, ... Before the batch
    is moved to its device, an EncodedInput as well."""
    masks: dict[str, Tensor]
    """By modality, where it has a mask: "text" (b, T) or (b, k, T) bool, True where there is a token."""
    keys: list[str]
    """ "shard/KEY" of each sample."""
    targets: dict[str, Any] = field(default_factory=dict)
    """Training: "caption_id" (b,) or (b, k) int64, equal for equal captions; with data.incomplete=keep "present", by modality
    (b,) bool, whether a sample has it. Evaluation: "captions", a list of all captions
    of each sample, and "json", a dict for each sample."""
    groups: dict[str, RowGroups | PackedTexts] = field(default_factory=dict)
    """By modality, where its rows are encoded in groups of fixed shapes or packed: how the b or b k rows are."""

    def __len__(self) -> int:
        return len(self.keys)

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields as worker processes send them: small tensors by value, as arrays.

        torch sends a tensor as a file descriptor, over a connection of its own: half a millisecond on either side.
        """
        return {name: _replace_tensors(value) for name, value in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({name: _restore_tensors(value) for name, value in state.items()})

    def _map(self, function: Any) -> Batch:
        """Return the batch with `function` applied to each tensor and list, also to those in nested dicts."""

        def apply(value: Any) -> Any:
            return {name: apply(v) for name, v in value.items()} if isinstance(value, Mapping) else function(value)

        return Batch(apply(self.inputs), apply(self.masks), function(self.keys), apply(self.targets), self.groups)

    def tensors(self) -> Iterator[Tensor]:
        """Iterate over all tensors of the batch."""
        values: list[Any] = [self.inputs, self.masks, self.targets, *map(vars, self.groups.values())]
        while values:
            value = values.pop()
            if isinstance(value, Mapping):
                values += value.values()
            elif isinstance(value, Tensor):
                yield value

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the batch with its tensors on `device`."""
        movable = (Tensor, EncodedInput)
        batch = self._map(lambda v: v.to(device, non_blocking=non_blocking) if isinstance(v, movable) else v)
        return replace(batch, groups={name: groups.to(device, non_blocking) for name, groups in self.groups.items()})

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory, from which copies to a GPU can be asynchronous."""
        batch = self._map(lambda v: v.pin_memory() if isinstance(v, Tensor) else v)
        return replace(batch, groups={name: groups.pin_memory() for name, groups in self.groups.items()})

    def slice(self, start: int, end: int) -> Batch:
        """Return samples [start, end) as views: tensors are not copied. Groups are those of these samples alone."""
        sliced: dict[str, RowGroups | PackedTexts] = {}
        for name, groups in self.groups.items():
            texts = len(groups.row_lengths) // max(1, len(self))  # a sample
            sliced[name] = groups.slice(start * texts, end * texts)
        return replace(self._map(lambda v: v[start:end]), groups=sliced)

    def chunk(self, count: int) -> list[Batch]:
        """Split the batch into `count` batches, in order, whose sizes differ by at most one."""
        return list(self.iterate_chunks(count))

    def iterate_chunks(self, count: int) -> Iterator[Batch]:
        """Yield the batches of `chunk` one by one: the texts of each are grouped or packed when it is asked for."""
        ends = [len(self) * i // count for i in range(count + 1)]
        return (self.slice(a, b) for a, b in pairwise(ends))


@dataclass
class _SmallTensor:
    """A tensor that is sent by value."""

    array: np.ndarray[Any, Any]


def _replace_tensors(value: Any) -> Any:
    """Replace the small tensors on the CPU in nested mappings by arrays."""
    if isinstance(value, dict):
        return {name: _replace_tensors(v) for name, v in value.items()}
    is_small = type(value) is Tensor and value.device.type == "cpu" and value.nbytes <= SENT_BY_VALUE
    if is_small and not value.requires_grad and value.dtype != torch.bfloat16:
        return _SmallTensor(value.numpy())
    return value


def _restore_tensors(value: Any) -> Any:
    """Undo `_replace_tensors`."""
    if isinstance(value, dict):
        return {name: _restore_tensors(v) for name, v in value.items()}
    return torch.from_numpy(value.array) if isinstance(value, _SmallTensor) else value


def allow_missing(decoders: Mapping[str, Any], train: bool) -> dict[str, Any]:
    """Return copies of decoders by modality that let samples lack modalities, of which they need two.

    Each has `blank(train)`, the item of a sample without its modality. Raises ConfigError for one without, or fewer than three.
    """
    if len(decoders) < 3:
        raise ConfigError(
            f"data.incomplete=keep is for three towers or more: a sample without {' or '.join(decoders)} has no pair; use bad"
        )
    copies = {}
    for name, decoder in decoders.items():
        if not hasattr(decoder, "blank"):
            raise ConfigError(
                f"data.incomplete=keep: the decoder of {name}.tower has no blank(), the item of a sample without it"
            )
        copies[name] = copy.copy(decoder)
        copies[name].blank_item = decoder.blank(train)
    return copies


def collate(items: Mapping[str, list[Any]], decoders: Mapping[str, Decoder], keys: list[str]) -> Batch:
    """Collate decoded items into one batch.

    Args:
        items: the decoded items of each modality, one per sample; None where a sample lacks an optional one.
        decoders: by modality.
        keys: "shard/KEY" of each sample.
    """
    batch = Batch({}, {}, keys)
    items = dict(items)
    for name, decoder in decoders.items():
        blank_item = getattr(decoder, "blank_item", None)
        if blank_item is not None:
            present = [item is not None for item in items[name]]
            batch.targets.setdefault("present", {})[name] = torch.tensor(present, dtype=torch.bool)
            items[name] = [blank_item if item is None else item for item in items[name]]
        collated = decoder.collate(items[name])
        if collated is not None:
            batch.inputs[name], mask = collated
            if mask is not None:
                batch.masks[name] = mask
        if hasattr(decoder, "targets"):
            batch.targets.update(decoder.targets(items[name]))
            continue
        if keys and isinstance(items[name][0], str):  # one caption drawn per sample
            batch.targets["caption_id"] = torch.tensor([caption_id(text) for text in items[name]], dtype=torch.int64)
        elif keys and isinstance(items[name][0], tuple):  # k captions drawn per sample
            ids = [[caption_id(text) for text in texts] for texts in items[name]]
            batch.targets["caption_id"] = torch.tensor(ids, dtype=torch.int64)
        elif keys and isinstance(items[name][0], list):  # all captions of each sample
            batch.targets["captions"] = items[name]
    for decoder in decoders.values():
        if hasattr(decoder, "complete"):
            decoder.complete(batch, items)
    return batch


def merge(parts: list[Batch], decoders: Mapping[str, Decoder], pin: bool = False) -> Batch:
    """Merge partial batches, in order, into what one `collate` over all their samples would return.

    Args:
        parts: at least one partial batch.
        decoders: by modality.
        pin: put the tensors in page-locked memory.
    """
    merged = parts[0] if len(parts) == 1 else _join(parts, decoders, pin)
    _assign_groups(merged, decoders)
    return merged.pin_memory() if pin else merged  # what is page-locked already is not copied again


def _join(parts: list[Batch], decoders: Mapping[str, Decoder], pin: bool) -> Batch:
    """Join several partial batches, without groups; with `pin`, concatenate straight into page-locked memory."""
    merged = Batch({}, {}, [key for part in parts for key in part.keys])
    for name, decoder in decoders.items():
        if name not in parts[0].inputs:
            continue
        if hasattr(decoder, "merge"):
            merged.inputs[name], merged.masks[name] = decoder.merge([(p.inputs[name], p.masks[name]) for p in parts])
            continue
        merged.inputs[name] = _concatenate([part.inputs[name] for part in parts], pin)
        if name in parts[0].masks:
            merged.masks[name] = _concatenate([part.masks[name] for part in parts], pin)
    for name in parts[0].targets:
        merged.targets[name] = _concatenate([part.targets[name] for part in parts], pin)
    return merged


def _assign_groups(batch: Batch, decoders: Mapping[str, Decoder]) -> None:
    """Divide the rows of a whole batch into groups, for decoders that have `length_groups`."""
    for name, decoder in decoders.items():
        length_groups = getattr(decoder, "length_groups", None)
        if length_groups is not None and name in batch.masks:
            batch.groups[name] = length_groups.assign(batch.masks[name].sum(dim=-1).flatten().numpy())


def _concatenate(values: list[Any], pin: bool) -> Any:
    """Concatenate tensors or lists along the batch dimension, also those in nested dicts."""
    first = values[0]
    if isinstance(first, Mapping):
        return {name: _concatenate([value[name] for value in values], pin) for name in first}
    if isinstance(first, EncodedInput):
        return first.join(values[1:])
    if not isinstance(first, Tensor):
        return [item for value in values for item in value]
    if not pin:
        return torch.cat(values)
    rows = sum(len(tensor) for tensor in values)
    out = torch.empty(rows, *first.shape[1:], dtype=first.dtype, pin_memory=True)
    return torch.cat(values, out=out)
