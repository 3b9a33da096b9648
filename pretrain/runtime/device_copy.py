"""Copies from the host to a GPU that the host does not wait for.

Only a copy from page-locked memory runs beside the computation, and only on a stream of its own. Two rules follow from that
stream. The computing stream waits for the copy before it reads. Memory that is freed while the computing stream still reads it
may not be used by the next copy: `record_stream` tells the allocator. On the CPU nothing is copied, and no thread is started.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from pretrain.runtime.background import run_ahead

T = TypeVar("T")


class TensorHolder(Protocol):
    """A batch: an object that holds tensors."""

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        """Return the same with its tensors on `device`."""
        ...

    def tensors(self) -> Iterable[Tensor]:
        """Return all tensors that it holds."""
        ...


B = TypeVar("B", bound=TensorHolder)


def copy_async(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on `device`, without waiting for a GPU."""
    if device.type == "cuda" and tensor.device.type == "cpu" and torch.cuda.is_available():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class CopyStream(Generic[B]):
    """A stream of a GPU on which batches are copied while others are computed with."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def start(self, batch: B) -> tuple[B, torch.cuda.Event]:
        """Start to copy a batch of page-locked tensors; return the copy, and the event after which it is complete."""
        with torch.cuda.stream(self._stream):
            return batch.to(self.device, non_blocking=True), self._stream.record_event()

    def finish(self, copy: B, copied: torch.cuda.Event) -> B:
        """Let the current stream wait for a copy, and keep its memory until that stream has read it; return the copy."""
        computing = torch.cuda.current_stream(self.device)
        computing.wait_event(copied)
        for tensor in copy.tensors():
            if tensor.is_cuda:
                tensor.record_stream(computing)
        return copy


@contextmanager
def feed(
    items: Iterator[tuple[T, B | None]], device: torch.device, is_ahead: bool, interrupt: Callable[[], None]
) -> Iterator[Iterator[tuple[T, B | None]]]:
    """Copy the batches of `items` to `device` while the context is open.

    Args:
        items: each with an object that is passed on as it is; None instead of a batch as well. Tensors are page-locked where
            `device` is a GPU.
        device: where the batches are needed.
        is_ahead: read and copy in a thread, one batch ahead of the caller.
        interrupt: makes a read of `items` that does not return fail.
    """
    if device.type != "cuda":

        def move(item: tuple[T, B | None]) -> tuple[T, B | None]:
            tag, batch = item
            return tag, None if batch is None else batch.to(device)

        if not is_ahead:
            yield map(move, items)
            return
        with run_ahead(items, move, interrupt) as results:
            yield results
        return
    stream: CopyStream[B] = CopyStream(device)

    def start(item: tuple[T, B | None]) -> tuple[T, Any]:
        tag, batch = item
        return tag, None if batch is None else stream.start(batch)

    def finish(item: tuple[T, Any]) -> tuple[T, B | None]:
        tag, started = item
        return tag, None if started is None else stream.finish(*started)

    if not is_ahead:
        yield (finish(start(item)) for item in items)
        return
    with run_ahead(_on_device(items, device), start, interrupt) as started_items:
        yield map(finish, started_items)


def _on_device(items: Iterator[T], device: torch.device) -> Iterator[T]:
    """Iterate with `device` as the current one: it is a setting of each thread, and page-locked memory belongs to it."""
    with torch.cuda.device(device):
        yield from items
