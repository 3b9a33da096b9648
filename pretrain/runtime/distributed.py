"""The process group: who am I, gather with gradient, agree with the others.

Everything works in one process without a group: world_size() is 1 and the collectives are the identity, so that no caller
needs a branch. Shapes: b = rows of this process, B = b * world_size, rank-major.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as td
from torch import Tensor


def is_initialized() -> bool:
    """Whether there is a process group (of one process or more)."""
    return td.is_available() and td.is_initialized()


def rank() -> int:
    """This process among all, from 0."""
    return td.get_rank() if is_initialized() else 0


def world_size() -> int:
    """Processes in the run."""
    return td.get_world_size() if is_initialized() else _planned.processes


def local_rank() -> int:
    """This process on its machine, from 0: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if is_initialized() else 0


def local_world_size() -> int:
    """Processes of the run on this machine (LOCAL_SIZE is DeepSpeed's name for it)."""
    if not is_initialized():
        return _planned.processes // _planned.nodes
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size())


def nodes() -> int:
    """Machines in the run, all with the same number of processes."""
    return max(1, world_size() // local_world_size())


def is_main() -> bool:
    """Whether this process writes the files and prints."""
    return rank() == 0


def device() -> torch.device:
    """Where this process computes: its own GPU, or the CPU."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def has_gpu() -> bool:
    """Whether the processes of the run compute on GPUs."""
    return torch.cuda.is_available() if _planned.gpu is None else _planned.gpu


class _World(NamedTuple):
    processes: int = 1
    nodes: int = 1
    gpu: bool | None = None


_planned = _World()


@contextmanager
def assume_world(processes: int, nodes: int, gpu: bool) -> Iterator[None]:
    """Inside, this process answers for a run that will be elsewhere, so that its configuration can be checked here.

    Only where there is no group; nothing can be gathered inside.
    """
    global _planned
    before, _planned = _planned, _World(processes, nodes, gpu)
    try:
        yield
    finally:
        _planned = before


def setup(timeout_seconds: float = 600.0) -> None:
    """Joins the group that a launcher described in the environment; without one, nothing happens.

    timeout_seconds bounds every collective, so that a dead or hung rank ends the others.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    td.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_seconds))
    global _said
    _said = open_shared_store("said")


def open_shared_store(name: str) -> td.Store:
    """Keys and values that all processes of this world see, over a connection of its own that outlives the group.

    A launcher that starts processes again may keep its store: the keys of an earlier world are not ours. Collective.
    """
    world = broadcast_object(os.urandom(8).hex())
    return td.PrefixStore(f"{name}/{world}", td.distributed_c10d._get_default_store().clone())


def set_timeout(timeout_seconds: float) -> None:
    """Another bound for every collective from here on."""
    if world_size() > 1:
        change = getattr(td, "set_timeout", None) or td.distributed_c10d._set_pg_timeout
        change(datetime.timedelta(seconds=timeout_seconds))


_said: td.Store | None = None


def is_first_to_report(line: str) -> bool:
    """Whether no other process of the run has said this line: N processes print an error they share once."""
    try:
        return _said is None or _said.add(line, 1) == 1
    except RuntimeError:  # the store is gone
        return True


def ensure_group() -> None:
    """A group of one where no launcher described any: what wraps a model (DDP, FSDP, DeepSpeed) wants one."""
    if not is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        td.init_process_group(backend, store=td.HashStore(), rank=0, world_size=1)


def shutdown() -> None:
    """Leaves the group."""
    if is_initialized():
        td.destroy_process_group()


def pin_threads(wanted: int) -> int:
    """Sets the CPU threads of this process and returns them: 0 shares the cores among the machine's processes."""
    threads = wanted or max(1, len(os.sched_getaffinity(0)) // local_world_size())
    torch.set_num_threads(threads)
    return threads


def barrier() -> None:
    """Waits for every process."""
    if world_size() > 1:
        td.barrier()


# ---------------------------------------------------------------------------------------------------------------------
# Collectives with gradient


class _Gather(torch.autograd.Function):
    """Forward: all_gather. Backward: the sum over ranks of the gradients of this rank's rows (reduce_scatter)."""

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
    """(b, ...) -> (B, ...) with gradient: every rank's rows, rank-major. Every rank must hold the same b.

    A loss over local rows against gathered columns, averaged over local rows, gives exact gradients under a strategy
    that averages gradients over ranks (DDP, FSDP, ZeRO).
    """
    return rows if world_size() == 1 else _Gather.apply(rows)


def gather_many(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`gather` for several (b, D_i) tensors of one dtype in ONE collective."""
    if world_size() == 1:
        return list(tensors)
    widths = [tensor.shape[1] for tensor in tensors]
    return list(gather(torch.cat(list(tensors), dim=1)).split(widths, dim=1))


class _Fetch(torch.autograd.Function):
    """Forward: each rank gets the rows it named, and no others. Backward: their gradients go home and are added up."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, wanted: Tensor, order: Tensor, sent: list[int], got: list[int]) -> Tensor:
        ctx.save_for_backward(wanted, order)
        ctx.shape, ctx.sent, ctx.got = rows.shape, sent, got
        received = rows.new_empty(len(order), *rows.shape[1:])
        td.all_to_all_single(received, rows[wanted], got, sent)
        return torch.empty_like(received).index_copy_(0, order, received)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        wanted, order = ctx.saved_tensors
        home = grads[0].new_empty(len(wanted), *ctx.shape[1:])
        td.all_to_all_single(home, grads[0][order], ctx.sent, ctx.got)
        return grads[0].new_zeros(ctx.shape).index_add_(0, wanted, home), None, None, None, None


def gather_rows(tensors: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    """[(b, ...)], (q,) rows of all B, rank-major -> [(q, ...)]: those rows, with gradient.

    What `gather` and indexing would give, but only the rows asked for travel and are held. b and q are the same on every
    rank, and so are shapes and dtypes. Integers and bools have no gradient.
    """
    if world_size() == 1:
        return [rows[index] for rows in tensors]
    b = len(tensors[0])
    asked = gather_without_grad(index).view(world_size(), -1).cpu()  # whom, and for what, everybody asks
    by_rank = [asks[asks // b == rank()] % b for asks in asked]
    wanted = torch.cat(by_rank).to(index.device)
    order = (index // b).argsort(stable=True)
    got = (asked[rank()] // b).bincount(minlength=world_size()).tolist()
    plan = (wanted, order, [len(asks) for asks in by_rank], got)
    return [
        _Fetch.apply(rows.to(torch.uint8), *plan).bool() if rows.dtype == torch.bool else _Fetch.apply(rows, *plan)
        for rows in tensors
    ]


@torch.no_grad()
def gather_without_grad(rows: Tensor) -> Tensor:
    """`gather` without gradient, for any dtype (bool and integers too)."""
    if world_size() == 1:
        return rows
    out = rows.new_empty(world_size() * rows.shape[0], *rows.shape[1:])
    td.all_gather_into_tensor(out, rows.contiguous())
    return out


@torch.no_grad()
def mean(value: Tensor) -> Tensor:
    """The mean over ranks of a tensor, for reports."""
    if world_size() == 1:
        return value
    value = value.detach().clone()
    td.all_reduce(value)
    return value / world_size()


@torch.no_grad()
def maximum(value: Tensor) -> Tensor:
    """The largest over ranks, for flags: any rank that says 1 makes it 1."""
    if world_size() == 1:
        return value
    value = value.detach().clone()
    td.all_reduce(value, op=td.ReduceOp.MAX)
    return value


def start_maximum(value: int) -> Callable[[], int]:
    """`maximum` of a small number on the CPU that nobody waits for now: the function gives the answer. Collective."""
    if world_size() == 1:
        return lambda: value
    flag = torch.tensor(value)
    work = td.all_reduce(flag, op=td.ReduceOp.MAX, async_op=True)

    def answer() -> int:
        work.wait()
        return int(flag)

    return answer


def gather_objects(item: Any) -> list[Any]:
    """One picklable thing of every rank, in rank order, on every rank."""
    if world_size() == 1:
        return [item]
    out: list[Any] = [None] * world_size()
    td.all_gather_object(out, item)
    return out


def broadcast_object(item: Any) -> Any:
    """What rank 0 holds, on every rank."""
    if world_size() == 1:
        return item
    box = [item]
    td.broadcast_object_list(box, src=0)
    return box[0]
