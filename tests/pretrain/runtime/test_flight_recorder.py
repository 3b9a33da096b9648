"""Dumps of torch's flight recorder, against torch's own analyzer of the same dumps."""

from typing import Any

import torch
import torch.distributed as td
from torch.distributed.flight_recorder.components.types import EntryState  # the analyzer's own reading of an entry

from pretrain.runtime import distributed, flight_recorder
from tests.support import world


def record() -> dict[str, dict[str, Any]]:
    """Run two collectives of all ranks, and a third that only rank 0 begins; return what torch recorded here."""
    distributed.barrier()
    distributed.maximum(torch.zeros(3))
    distributed.mean(torch.zeros(4, 2))
    if distributed.rank() == 0:
        td.all_gather_into_tensor(torch.zeros(4), torch.zeros(2), async_op=True)
    return flight_recorder.read_dumps()


def test_the_missing_process_and_its_collective_are_named() -> None:
    dumps = world.run(record, 2)
    text = flight_recorder.find_missing({rank: flight_recorder.summarize(dump) for rank, dump in enumerate(dumps)})
    entry = dumps[0]["gloo"]["entries"][-1]
    state = EntryState(entry, {0, 1})
    assert state.input_sizes == [[2]]
    name = state.profiling_name.removeprefix("gloo:")
    assert "gather" in name
    number = entry["collective_seq_id"]
    assert text == (f"process 1 has not begun collective {number} ({name} of Float [2], gloo), in which process 0 waits")


def test_equal_records_name_no_process() -> None:
    dumps = world.run(record, 2)
    assert (
        flight_recorder.find_missing({0: flight_recorder.summarize(dumps[1]), 1: flight_recorder.summarize(dumps[1])}) is None
    )


def test_many_processes_are_not_all_listed() -> None:
    done = {"nccl": {"7": "all_reduce of BFloat16 [8]", "8": "barrier"}}
    late = {"nccl": {"7": "all_reduce of BFloat16 [8]"}}
    text = flight_recorder.find_missing({rank: late if rank in (3, 5) else done for rank in range(8)})
    assert text == "processes 3, 5 have not begun collective 8 (barrier, nccl), in which processes 0, 1, 2, 4 and 2 more wait"
