"""The process group: rank and world size, gathering with gradient, reductions, objects.

All of it works in one process without a group: world_size() is 1 and the collectives are the identity, so that no caller
needs a branch. Legend: b = rows of this process, B = b * world_size, in rank order.
"""

from __future__ import annotations

import datetime
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
import torch.distributed as td
from torch import Tensor

from pretrain.runtime import flight_recorder


def is_initialized() -> bool:
    """Return whether a process group exists, of one process or more."""
    return td.is_available() and td.is_initialized()


def rank() -> int:
    """Return the rank of this process in the run, from 0."""
    return td.get_rank() if is_initialized() else 0


def world_size() -> int:
    """Return the number of processes in the run."""
    return td.get_world_size() if is_initialized() else _assumed.processes


def local_rank() -> int:
    """Return the rank of this process on its node, from 0, which is the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if is_initialized() else 0


def local_world_size() -> int:
    """Return the number of the run's processes on this node (DeepSpeed's launcher calls it LOCAL_SIZE)."""
    if not is_initialized():
        return _assumed.processes // _assumed.nodes
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size())


def nodes() -> int:
    """Return the number of nodes in the run; all have the same number of processes."""
    return max(1, world_size() // local_world_size())


def is_main() -> bool:
    """Return whether this is rank 0, the process that writes files and prints."""
    return rank() == 0


def device() -> torch.device:
    """Return the device of this process: its own GPU, or the CPU."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def has_gpu() -> bool:
    """Return whether the processes of the run compute on GPUs."""
    return torch.cuda.is_available() if _assumed.gpu is None else _assumed.gpu


class _World(NamedTuple):
    """Size of the run that this process assumes without a group; gpu=None: ask this machine."""

    processes: int = 1
    nodes: int = 1
    gpu: bool | None = None


_assumed = _World()


@contextmanager
def assume_world(processes: int, nodes: int, gpu: bool) -> Iterator[None]:
    """Make world_size(), nodes() and has_gpu() answer for a run that will be started elsewhere.

    Inside the block the configuration of that run can be checked on this machine. Only without a process group; collectives
    do not work inside.
    """
    global _assumed
    previous, _assumed = _assumed, _World(processes, nodes, gpu)
    try:
        yield
    finally:
        _assumed = previous


def setup(timeout_seconds: float = 600.0) -> None:
    """Join the process group that the launcher's environment variables describe; without them, do nothing.

    timeout_seconds: limit of every collective, so that a dead or stalled rank ends the others.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return
    flight_recorder.enable()
    # torch 2.15 renames collectives; older versions know the old names only.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    td.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_seconds))
    global _reported
    _reported = open_shared_store("reported")


def open_shared_store(name: str) -> td.Store:
    """Open a key-value store that all processes share. Collective.

    It has its own connection, which outlives the group. A launcher that restarts the processes may keep its store, so a
    random prefix separates the keys of each start.
    """
    world = broadcast_object(os.urandom(8).hex())
    return td.PrefixStore(f"{name}/{world}", td.distributed_c10d._get_default_store().clone())


def set_timeout(timeout_seconds: float) -> None:
    """Set the limit of every later collective, in seconds."""
    if world_size() > 1:
        set_group_timeout = getattr(td, "set_timeout", None) or td.distributed_c10d._set_pg_timeout
        set_group_timeout(datetime.timedelta(seconds=timeout_seconds))


_reported: td.Store | None = None
"""The messages that a process of the run has printed."""


def is_first_to_report(line: str) -> bool:
    """Return whether no other process reported `line` before: an error that all share is printed once."""
    try:
        return _reported is None or _reported.add(line, 1) == 1
    except RuntimeError:  # the store is gone
        return True


_waits = 0
"""How many times this process has entered `others_wait`; all processes count alike."""


@contextmanager
def others_wait() -> Iterator[None]:
    """Let all other ranks wait at the end of the block until rank 0 has left it, however long it takes. Collective.

    They ask the store, since a collective would end the run after its timeout. The watchdog ends them if rank 0 dies.
    """
    global _waits
    _waits += 1
    key = f"main/{_waits}"
    try:
        yield
    finally:
        if _reported is not None and is_main():
            with suppress(RuntimeError):  # the store is gone: the collective that follows says so
                _reported.set(key, "")
    if _reported is None or is_main():
        return
    begin = time.monotonic()
    while not _reported.check([key]):
        time.sleep(min(0.5, max(0.001, (time.monotonic() - begin) / 10)))


def ensure_group() -> None:
    """Create a group of one process if there is none: DDP, FSDP and DeepSpeed need a group."""
    if not is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        td.init_process_group(backend, store=td.HashStore(), rank=0, world_size=1)


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if is_initialized():
        td.destroy_process_group()


def pin_threads(count: int) -> int:
    """Set and return the number of torch's CPU threads; 0 divides the node's cores among its processes."""
    threads = count or max(1, len(os.sched_getaffinity(0)) // local_world_size())
    torch.set_num_threads(threads)
    return threads


def barrier() -> None:
    """Wait until every process has reached this call. Collective."""
    if world_size() > 1:
        td.barrier()


# ---------------------------------------------------------------------------------------------------------------------
# Collectives with gradient


class _Gather(torch.autograd.Function):
    """Forward: all_gather. Backward: reduce_scatter, which sums the gradients of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        out = rows.new_empty(world_size() * rows.shape[0], *rows.shape[1:])
        td.all_gather_into_tensor(out, rows.contiguous())
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous()
        out = grad.new_empty(grad.shape[0] // world_size(), *grad.shape[1:])
        td.reduce_scatter_tensor(out, grad, op=td.ReduceOp.SUM)
        return out


def gather(rows: Tensor) -> Tensor:
    """Gather the rows of all ranks in rank order, with gradient: (b, ...) -> (B, ...). Collective.

    b is equal on all ranks. A loss over local rows against gathered columns, averaged over local rows, has exact gradients
    under strategies that average gradients over ranks (DDP, FSDP, ZeRO).
    """
    return rows if world_size() == 1 else _Gather.apply(rows)


def gather_many(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Gather several tensors (b, D_i) of one dtype with gradient, in ONE collective."""
    if world_size() == 1:
        return list(tensors)
    widths = [tensor.shape[1] for tensor in tensors]
    return list(gather(torch.cat(list(tensors), dim=1)).split(widths, dim=1))


class _GatherRows(torch.autograd.Function):
    """Forward: each rank receives the rows it requested. Backward: their gradients return and are summed."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send_rows: Tensor, order: Tensor, sent: list[int], received: list[int]) -> Tensor:
        ctx.save_for_backward(send_rows, order)
        ctx.shape, ctx.sent, ctx.received = rows.shape, sent, received
        by_sender = rows.new_empty(len(order), *rows.shape[1:])
        td.all_to_all_single(by_sender, rows[send_rows], received, sent)
        return torch.empty_like(by_sender).index_copy_(0, order, by_sender)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        send_rows, order = ctx.saved_tensors
        returned = grads[0].new_empty(len(send_rows), *ctx.shape[1:])
        td.all_to_all_single(returned, grads[0][order], ctx.sent, ctx.received)
        return grads[0].new_zeros(ctx.shape).index_add_(0, send_rows, returned), None, None, None, None


def gather_rows(tensors: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    """Gather only the rows `index` (q,), with gradient: [(b, ...)] -> [(q, ...)]. Collective.

    The result equals gather(tensor)[index], but only the requested rows are sent and held. b, q, shapes and dtypes are equal
    on all ranks; the requested rows differ. Integers and bools have no gradient.
    """
    if world_size() == 1:
        return [rows[index] for rows in tensors]
    b = len(tensors[0])
    requests = gather_without_grad(index).view(world_size(), -1).cpu()  # (rank, q): the rows that each rank requests
    by_rank = [rows[rows // b == rank()] % b for rows in requests]
    send_rows = torch.cat(by_rank).to(index.device)
    order = (index // b).argsort(stable=True)
    received = (requests[rank()] // b).bincount(minlength=world_size()).tolist()
    plan = (send_rows, order, [len(rows) for rows in by_rank], received)
    return [
        _GatherRows.apply(rows.to(torch.uint8), *plan).bool() if rows.dtype == torch.bool else _GatherRows.apply(rows, *plan)
        for rows in tensors
    ]


@torch.no_grad()
def gather_without_grad(rows: Tensor) -> Tensor:
    """Gather the rows of all ranks without gradient, in any dtype: (b, ...) -> (B, ...). Collective."""
    if world_size() == 1:
        return rows
    out = rows.new_empty(world_size() * rows.shape[0], *rows.shape[1:])
    td.all_gather_into_tensor(out, rows.contiguous())
    return out


@torch.no_grad()
def mean(value: Tensor) -> Tensor:
    """Return the mean of a tensor over ranks, without gradient. Collective."""
    if world_size() == 1:
        return value
    value = value.detach().clone()
    td.all_reduce(value)
    return value / world_size()


@torch.no_grad()
def mean_many(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the means of several tensors over ranks, float32 on the CPU, in ONE collective; waits for the device.

    Shapes are equal on all ranks. All tensors are sent from the device of the first.
    """
    device = tensors[0].device
    flat = mean(torch.cat([tensor.detach().to(device, torch.float32).flatten() for tensor in tensors])).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


@torch.no_grad()
def maximum(value: Tensor) -> Tensor:
    """Return the elementwise maximum over ranks: a flag that is 1 on any rank is 1. Collective."""
    if world_size() == 1:
        return value
    value = value.detach().clone()
    td.all_reduce(value, op=td.ReduceOp.MAX)
    return value


@torch.no_grad()
def logsumexp(values: Tensor) -> Tensor:
    """Return log(sum over ranks of exp(value)), elementwise, in two reductions of the size of `values`. Collective.

    At least one rank's value must be finite; -inf is an empty sum.
    """
    if world_size() == 1:
        return values
    largest = maximum(values)
    sums = (values - largest).exp_()
    td.all_reduce(sums)
    return sums.log_().add_(largest)


def start_ring_shift(tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Start to send tensors to the next rank; the returned function waits for those of the previous rank. Collective.

    Shapes and dtypes are equal on all ranks. The tensors must not change before the wait. There is no gradient.
    """
    if world_size() == 1 or not tensors:
        return lambda: list(tensors)
    following, previous = (rank() + 1) % world_size(), (rank() - 1) % world_size()
    sent = [tensor.contiguous() for tensor in tensors]  # referenced by wait(), so that they outlive the transfer
    received = [torch.empty_like(tensor) for tensor in sent]
    works = td.batch_isend_irecv(
        [td.P2POp(td.isend, tensor, following) for tensor in sent]
        + [td.P2POp(td.irecv, tensor, previous) for tensor in received]
    )

    def wait() -> list[Tensor]:
        for work in works:
            work.wait()
        sent.clear()
        return received

    return wait


def gather_objects(item: Any) -> list[Any]:
    """Return the picklable objects of all ranks in rank order, on every rank. Collective."""
    if world_size() == 1:
        return [item]
    out: list[Any] = [None] * world_size()
    td.all_gather_object(out, item)
    return out


def broadcast_object(item: Any) -> Any:
    """Return the object of rank 0 on every rank. Collective."""
    if world_size() == 1:
        return item
    box = [item]
    td.broadcast_object_list(box, src=0)
    return box[0]
