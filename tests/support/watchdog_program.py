"""A group, a heartbeat and an all_reduce a step: what test_heartbeat.py starts. Arguments: MODE TIMEOUT."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch

from pretrain.errors import UserError
from pretrain.runtime import distributed
from pretrain.runtime.entrypoint import DONE, run_with_exit_code
from pretrain.runtime.watchdog import Watchdog


def main() -> int:
    mode, timeout = sys.argv[1], float(sys.argv[2])
    distributed.setup(60)
    distributed.set_timeout(timeout)
    with Watchdog(timeout, lambda why: print(f"recorded: {why}", flush=True)) as watchdog:
        try:
            for step in range(30):
                disturbed = step == 10 and distributed.rank() == 1
                watchdog.mark(step, "waiting for data")
                if disturbed and mode == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                if disturbed and mode == "freeze":
                    os.kill(os.getpid(), signal.SIGSTOP)
                if disturbed and mode == "raise":
                    raise ValueError("boom")
                if disturbed and mode == "refuse":
                    raise UserError("the disk is full")
                if disturbed and mode == "data":
                    time.sleep(1000)
                watchdog.mark(step, "computing")
                if disturbed and mode == "compute":
                    time.sleep(1000)
                time.sleep(0.05)
                distributed.maximum(torch.tensor(0))
        except Exception as error:
            told = watchdog.diagnose(error)
            if told is not None:
                raise told from error
            raise
    distributed.barrier()
    distributed.shutdown()
    return DONE


if __name__ == "__main__":
    sys.exit(run_with_exit_code(main))
