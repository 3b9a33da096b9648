"""Blocks of columns that travel from rank to rank, so that no rank holds the columns of all ranks.

Each of W ranks starts with its own block of b columns. In W steps every rank works on every block. While it works, the next
block arrives. What is summed over ranks, such as the gradient of a block, travels with its block and ends where it began.

Sources: Inf-CL (Cheng et al., arXiv:2410.17243) for the softmax; SigLIP (Zhai et al., arXiv:2303.15343) for the sigmoid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from pretrain.runtime import distributed

Work = Callable[[int, Sequence[Tensor], Sequence[Tensor]], None]
"""Called with (step, block, sums). At step 0 the block is this rank's own. It adds to `sums` in place."""


def visit_blocks(block: Sequence[Tensor], sums: Sequence[Tensor], work: Work, is_ring: bool) -> Sequence[Tensor]:
    """Call `work` on the block of each rank if `is_ring`, else on this one, which then holds all columns; return its sums."""
    if is_ring:
        return pass_around(block, sums, work)
    work(0, block, sums)
    return sums


def pass_around(block: Sequence[Tensor], sums: Sequence[Tensor], work: Work) -> Sequence[Tensor]:
    """Call `work` on the block of each rank; return the sums of this rank's block, to which all ranks have added. Collective.

    block: tensors that no rank changes. sums: tensors that belong to the block. Shapes and types are equal on all ranks.
    """
    steps = distributed.world_size()
    for step in range(steps):
        is_last = step == steps - 1
        receive_block = None if is_last else distributed.start_ring_shift(block)
        work(step, block, sums)
        sums = distributed.start_ring_shift(sums)()
        if receive_block is not None:
            block = receive_block()
    return sums
