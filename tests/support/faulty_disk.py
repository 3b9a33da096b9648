"""A run whose disk is slow or fails: an audit hook delays, or fails, the opening of the files of checkpoints."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.runtime import distributed, entrypoint
from tests.support import world


@dataclass(frozen=True)
class Disk:
    """What happens when a file of a checkpoint is opened to be written."""

    seconds: float = 0.0
    """How long it takes."""
    full_at: tuple[int, ...] = ()
    """The steps whose checkpoints find the disk full."""
    deleted_at: tuple[int, ...] = ()
    """The steps whose checkpoints find the folder `checkpoints` deleted."""
    delayed_file: str = ""
    """The end of the names that take `seconds`; all by default."""


def run_pretraining(processes: int, arguments: list[str], cwd: Path, disk: Disk) -> tuple[list[int], str]:
    """Run `python -m pretrain ARGUMENTS` as so many processes; return the exit codes by rank, and what rank 0 printed."""
    codes = world.run(_run, processes, str(cwd), arguments, disk, timeout=240)
    return codes, (cwd / "stderr-0").read_text()


def _run(folder: str, arguments: list[str], disk: Disk) -> int:
    os.chdir(folder)
    os.dup2(os.open(f"stderr-{distributed.rank()}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="1")  # checked, but the group exists
    sys.addaudithook(lambda event, args: _interfere(disk, args) if event == "open" else None)  # for this process only
    code = entrypoint.main(arguments)
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]
    return code


def _interfere(disk: Disk, args: tuple[Any, ...]) -> None:
    match = re.search(r"^(.*/checkpoints)/\.step-(\d+)\.partial/", str(args[0]))
    if match is None or not args[2] & (os.O_WRONLY | os.O_RDWR):
        return
    if str(args[0]).endswith(disk.delayed_file):
        time.sleep(disk.seconds)
    if int(match[2]) in disk.full_at:
        raise OSError(28, "No space left on device")
    if int(match[2]) in disk.deleted_at:
        shutil.rmtree(match[1])
