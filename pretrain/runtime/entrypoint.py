"""The process that every launcher starts: exit codes, errors in one line, early signals, and one process of a run."""

from __future__ import annotations

import argparse
import errno
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, ParamSpec

from pretrain.config import find_config
from pretrain.errors import ConfigError, UserError

P = ParamSpec("P")


DONE, FAILED, USAGE, STOPPED = 0, 1, 2, 75


def main(argv: list[str] | None = None, module: str = "pretrain") -> int:
    """Runs a training of `module` and returns the exit code: 0 done, 1 failed, 2 wrong usage, 75 stopped and resumable."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=__doc__)
    parser.add_argument("config", help="a YAML file, or the name of a shipped one")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and exit")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that replace the file's")
    args, rest = parser.parse_known_args(argv)
    return run_with_exit_code(run, args.config, args.settings + rest, args.dry_run, module)


DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
"""What a full or read-only disk answers, wherever it is met."""


def run_with_exit_code(work: Callable[P, int], *args: P.args, **kwargs: P.kwargs) -> int:
    """Call `work` and return its exit code; an expected failure becomes one line and its exit code."""
    try:
        return work(*args, **kwargs)
    except ConfigError as error:
        _tell(str(error))
        return USAGE
    except UserError as error:
        _tell(str(error))
        return FAILED
    except OSError as error:
        if error.errno not in DISK:
            raise
        _tell(f"cannot write: {error}; what was saved before is intact")
        return FAILED
    except EarlyStop as stop:
        _tell(f"stopped by {stop} before training began; the same command goes on")
        return STOPPED
    except KeyboardInterrupt:
        _tell("interrupted before a checkpoint could be written; the last one is intact")
        return FAILED


def _tell(line: str) -> None:
    """The one line, from one of the processes that have it to say."""
    dist = sys.modules.get("pretrain.runtime.distributed")
    if dist is None or dist.is_first_to_report(line):
        print(f"clipfuse: {line}", file=sys.stderr, flush=True)


class EarlyStop(BaseException):
    """A signal to stop came while the run was being built; there is nothing to save yet."""


@contextmanager
def raise_on_stop_signals() -> Iterator[None]:
    """SIGTERM, SIGINT and SIGUSR1 raise EarlyStop inside; fit() has handlers of its own."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise EarlyStop(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(config: str, settings: list[str], dry_run: bool, module: str = "pretrain") -> int:
    """Run one process of a training; returns the exit code.

    MODULE.train has load_config(), describe(), train(); its configs are configs/MODULE.
    """
    import importlib

    from pretrain.runtime import distributed, preflight
    from pretrain.runtime.console import log_info

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader's workers are the parallelism
    with raise_on_stop_signals():
        trainer: Any = importlib.import_module(f"{module}.train")
        path = find_config(config, module)
        preflight.check_launcher()
        preflight.watch_parent()
        distributed.setup()
        try:
            loaded = trainer.load_config(path, settings)
            preflight.check_accelerate(loaded.train.precision, loaded.train.strategy)
            distributed.set_timeout(loaded.train.timeout)
            if dry_run:
                trainer.describe(loaded)
                return DONE
            outcome = trainer.train(loaded)
            if outcome.state == "stopped":
                command = os.environ.get("CLIPFUSE_COMMAND") or shlex.join(["clipfuse", module, config, *settings])
                log_info(f"{outcome.reason} at step {outcome.step}, saved; go on with: {command}")
                return STOPPED
            results = ", ".join(f"{name} {value:.4g}" for name, value in outcome.results.items())
            log_info(f"done: {outcome.step} steps in {loaded.run}" + (f"; {results}" if results else ""))
            return DONE
        finally:
            distributed.shutdown()
