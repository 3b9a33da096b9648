"""A program with a process group, a watchdog and one all_reduce per step, started by test_watchdog.py.

Arguments: MODE TIMEOUT. In step 10, rank 1 fails in the way that MODE names ("nothing" = it does not).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch

from pretrain.checkpoints.background import CheckpointWriter, Report
from pretrain.errors import UserError
from pretrain.runtime import distributed
from pretrain.runtime.agree import on_main
from pretrain.runtime.entrypoint import DONE, run_with_exit_code
from pretrain.runtime.watchdog import Watchdog


def save_slowly(report: Report) -> Path:
    """Take longer than others need to find that a process died."""
    time.sleep(4.0)
    print("saved", flush=True)
    return Path()


def main() -> int:
    mode, timeout = sys.argv[1], float(sys.argv[2])
    distributed.setup(60)
    distributed.set_timeout(timeout)
    writer = CheckpointWriter(True)
    record = partial(print, "recorded:", flush=True)
    with Watchdog(timeout, record, Path.cwd(), writer.wait_briefly) as watchdog:
        try:
            for step in range(30):
                fails_here = step == 10 and distributed.rank() == 1
                if step == 10 and mode == "die" and distributed.rank() == 0:
                    writer.start("a checkpoint", save_slowly)
                watchdog.mark(step, "waiting for data")
                if fails_here and mode == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                if fails_here and mode == "freeze":
                    os.kill(os.getpid(), signal.SIGSTOP)
                if fails_here and mode == "raise":
                    raise ValueError("boom")
                if fails_here and mode == "refuse":
                    raise UserError("the disk is full")
                if fails_here and mode == "data":
                    time.sleep(1000)
                if step == 10 and mode == "save":  # rank 0 works for longer than the timeout of collectives
                    watchdog.mark(step, "saving")
                    on_main(lambda: time.sleep(1.5 * timeout))
                watchdog.mark(step, "computing")
                if fails_here and mode == "compute":
                    time.sleep(1000)
                time.sleep(0.05)
                distributed.maximum(torch.tensor(0))
        except Exception as error:
            diagnosis = watchdog.diagnose(error)
            if diagnosis is not None:
                raise diagnosis from error
            raise
        finally:
            writer.finish()
    distributed.barrier()
    distributed.shutdown()
    return DONE


if __name__ == "__main__":
    sys.exit(run_with_exit_code(main))
