"""torch's flight recorder: which collectives each process has begun, and which process is missing in one.

torch keeps the last collectives of NCCL and gloo in a ring of TORCH_FR_BUFFER_SIZE entries. Format: torch.distributed's
flight_recorder package, version 2.10, as JSON.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch._C import _distributed_c10d

ENTRIES = 2000
"""Collectives that each process keeps. torch's default for NCCL; gloo keeps none by default."""

_DUMPS = {"nccl": "_dump_nccl_trace_json", "gloo": "_dump_fr_trace_json"}


def enable() -> None:
    """Make torch record collectives. Call it before the process group is made."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(ENTRIES))


def read_dumps() -> dict[str, dict[str, Any]]:
    """Return what torch has recorded in this process, {"nccl": ..., "gloo": ...}, without backends that recorded nothing."""
    dumps = {}
    for backend, name in _DUMPS.items():
        function = getattr(_distributed_c10d, name, None)
        dump = json.loads(function()) if function is not None else {}
        if dump.get("entries"):
            dumps[backend] = dump
    return dumps


def save_dumps(dumps: dict[str, dict[str, Any]], folder: Path, rank: int) -> None:
    """Write the dumps to flight-recorder-BACKEND-RANK.json in a folder. Raises OSError."""
    for backend, dump in dumps.items():
        (folder / f"flight-recorder-{backend}-{rank}.json").write_text(json.dumps(dump, indent=1), encoding="utf-8")


def summarize(dumps: dict[str, dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Return {backend: {sequence number: description}} of the last collectives of the group of all processes."""
    return {
        backend: {
            str(entry["collective_seq_id"]): _describe(entry)
            for entry in dump["entries"][-50:]
            if entry["process_group"][1] == "default_pg" and not entry["is_p2p"]
        }
        for backend, dump in dumps.items()
    }


def _describe(entry: dict[str, Any]) -> str:
    """Describe a collective: "all_reduce of Float [3]"."""
    name = entry["profiling_name"].split(":")[-1]
    shapes = ", ".join(f"{kind} {size}" for kind, size in zip(entry["input_dtypes"], entry["input_sizes"], strict=False))
    return f"{name} of {shapes}" if shapes else str(name)


def find_missing(summaries: dict[int, dict[str, dict[str, str]]]) -> str | None:
    """Name the processes that have not begun a collective in which others wait; None if all have begun the same.

    summaries: by rank, what `summarize` returned there.
    """
    for backend in _DUMPS:
        last = {rank: max(map(int, by_backend.get(backend, {})), default=0) for rank, by_backend in summaries.items()}
        if not last or min(last.values()) == max(last.values()):
            continue
        number = min(last.values()) + 1
        missing = [rank for rank, sequence in last.items() if sequence < number]
        waiting = [rank for rank, sequence in last.items() if sequence >= number]
        collective = next(
            (text for rank in waiting if (text := summaries[rank][backend].get(str(number)))), "an earlier collective"
        )
        verb = "has" if len(missing) == 1 else "have"
        return (
            f"{_name(missing)} {verb} not begun collective {number} ({collective}, {backend}), "
            f"in which {_name(waiting)} wait{'s' if len(waiting) == 1 else ''}"
        )
    return None


def _name(ranks: list[int]) -> str:
    """Return "process 1" or "processes 1, 2, 3, 4 and 5 more"."""
    shown = ", ".join(str(rank) for rank in sorted(ranks)[:4])
    more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
    return f"process{'es' if len(ranks) > 1 else ''} {shown}{more}"
