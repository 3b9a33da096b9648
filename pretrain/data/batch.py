"""Batch: what the loader hands out. Modalities are names, never positions.

Legend: b samples in the batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pretrain.data.captions import caption_id

if TYPE_CHECKING:
    from pretrain.data.shards.paths import RawSample


class Decoder(Protocol):
    """Turns the raw sample into one modality's input.

    A decoder whose batches have different shapes (texts trimmed to the longest) also has
    `merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]`, which gives what one `collate` over all would.

    A decoder that knows answers as well has `targets(items) -> dict[str, Tensor | list]`, sample first, for Batch.targets.
    Its `collate` may return None: it then gives targets only, and the batch has no input of its name.
    """

    def __call__(self, sample: RawSample, rng: np.random.Generator, train: bool) -> Any:
        """The item of one sample; random only through rng. Raises BadSample for content that cannot be used."""
        ...

    def collate(self, items: list[Any]) -> tuple[Tensor, Tensor | None] | None:
        """(input, mask) of several items, batch first."""
        ...


@dataclass
class Batch:
    """b samples."""

    inputs: dict[str, Tensor]
    """By modality: "image" (b, 3, H, W) uint8, "text" (b, T) int64, or (b, k, T) with k texts a sample, ..."""
    masks: dict[str, Tensor]
    """By modality, of those that have one: "text" (b, T) or (b, k, T) bool, True where there is a token."""
    keys: list[str]
    """ "shard/KEY" of each sample."""
    targets: dict[str, Any] = field(default_factory=dict)
    """Training: "caption_id" (b,) or (b, k) int64, equal for equal captions. Evaluation: "captions", all of each sample, and
    "json"."""

    def __len__(self) -> int:
        return len(self.keys)

    def _each(self, change: Any) -> Batch:
        def of(values: Mapping[str, Any]) -> dict[str, Any]:
            return {name: change(value) for name, value in values.items()}

        return Batch(of(self.inputs), of(self.masks), change(self.keys), of(self.targets))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same on a device; lists stay where they are."""
        return self._each(lambda v: v.to(device, non_blocking=non_blocking) if isinstance(v, Tensor) else v)

    def pin_memory(self) -> Batch:
        """The same in page-locked memory, from which copies to a GPU need not be waited for."""
        return self._each(lambda v: v.pin_memory() if isinstance(v, Tensor) else v)

    def slice(self, start: int, end: int) -> Batch:
        """Samples start up to end, without copying tensors."""
        return self._each(lambda v: v[start:end])

    def chunk(self, count: int) -> list[Batch]:
        """`count` parts in order, whose sizes differ by at most one."""
        ends = [len(self) * i // count for i in range(count + 1)]
        return [self.slice(a, b) for a, b in pairwise(ends)]


def collate(items: Mapping[str, list[Any]], decoders: Mapping[str, Decoder], keys: list[str]) -> Batch:
    """One batch of decoded items, by modality."""
    batch = Batch({}, {}, keys)
    for name, decoder in decoders.items():
        made = decoder.collate(items[name])
        if made is not None:
            batch.inputs[name], mask = made
            if mask is not None:
                batch.masks[name] = mask
        if hasattr(decoder, "targets"):
            batch.targets.update(decoder.targets(items[name]))
            continue
        if keys and isinstance(items[name][0], str):  # the caption drawn
            batch.targets["caption_id"] = torch.tensor([caption_id(text) for text in items[name]], dtype=torch.int64)
        elif keys and isinstance(items[name][0], tuple):  # the captions drawn
            ids = [[caption_id(text) for text in texts] for texts in items[name]]
            batch.targets["caption_id"] = torch.tensor(ids, dtype=torch.int64)
        elif keys and isinstance(items[name][0], list):  # all captions
            batch.targets["captions"] = items[name]
    return batch


def merge(parts: list[Batch], decoders: Mapping[str, Decoder], pin: bool = False) -> Batch:
    """Pieces collated apart -> the batch as collated in one go; in page-locked memory where wanted."""
    if len(parts) == 1:
        return parts[0].pin_memory() if pin else parts[0]
    whole = Batch({}, {}, [key for part in parts for key in part.keys])
    for name, decoder in decoders.items():
        if name not in parts[0].inputs:
            continue
        if hasattr(decoder, "merge"):
            whole.inputs[name], whole.masks[name] = decoder.merge([(p.inputs[name], p.masks[name]) for p in parts])
            continue
        whole.inputs[name] = _concatenate([part.inputs[name] for part in parts], pin)
        if name in parts[0].masks:
            whole.masks[name] = _concatenate([part.masks[name] for part in parts], pin)
    for name in parts[0].targets:
        values = [part.targets[name] for part in parts]
        whole.targets[name] = torch.cat(values) if isinstance(values[0], Tensor) else [v for value in values for v in value]
    return whole


def _concatenate(tensors: list[Tensor], pin: bool) -> Tensor:
    if not pin:
        return torch.cat(tensors)
    rows = sum(len(tensor) for tensor in tensors)
    out = torch.empty(rows, *tensors[0].shape[1:], dtype=tensors[0].dtype, pin_memory=True)
    return torch.cat(tensors, out=out)
