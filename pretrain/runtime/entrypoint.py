"""One process of a run, as every launcher starts it: exit codes, error lines, signals during setup."""

from __future__ import annotations

import argparse
import errno
import os
import select
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, ParamSpec

from pretrain.config import find_config, load_values
from pretrain.config.static_schema import check_settings
from pretrain.errors import ConfigError, UserError
from pretrain.printable import one_safe_line

P = ParamSpec("P")

DONE, FAILED, USAGE, STOPPED = 0, 1, 2, 75
"""Exit codes: done, failed, wrong usage or configuration, stopped and resumable."""


def main(argv: list[str] | None = None, module: str = "pretrain") -> int:
    """Run one process of a training and return its exit code. module: "pretrain" or "finetune"."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=__doc__)
    parser.add_argument("config", help="a YAML file, or the name of a shipped one")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and exit")
    parser.add_argument("-v", "--verbose", action="store_true", help="with --dry-run: print the whole configuration, too")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that replace the file's")
    os.environ.setdefault("PYTHONSAFEPATH", "1")  # worker processes import nothing from the current folder
    args, rest = parser.parse_known_args(argv)
    if args.verbose and not args.dry_run:
        parser.error("-v prints the configuration with --dry-run")
    dry_run = DryRun(args.verbose) if args.dry_run else None
    return run_with_exit_code(run, args.config, args.settings + rest, dry_run, module)


DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
"""Error numbers of a disk that is full or cannot be written."""


def run_with_exit_code(work: Callable[P, int], *args: P.args, **kwargs: P.kwargs) -> int:
    """Call `work` and return its exit code, or print an expected failure in one line and return its code."""
    try:
        code = work(*args, **kwargs)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, and not at the interpreter's exit, where a closed pipe would be a traceback
        return code
    except BrokenPipeError:
        if not _is_stdout_closed():
            raise
        return 128 + signal.SIGPIPE  # as a shell reports programs that such a pipe ends
    except ConfigError as error:
        _print_error(str(error))
        return USAGE
    except UserError as error:
        _print_error(str(error))
        return FAILED
    except OSError as error:
        if error.errno not in DISK:
            raise
        _print_error(f"cannot write: {error}; what was saved before is intact")
        return FAILED
    except EarlyStop as stop:
        _print_error(f"stopped by {stop} before training began; run the same command again to resume")
        return STOPPED
    except KeyboardInterrupt:
        _print_error("interrupted before a checkpoint could be written; the last one is intact")
        return FAILED


def _is_stdout_closed() -> bool:
    """Return whether who read standard output has gone (`| head`); then point it to nowhere, so that nothing fails again."""
    try:
        output = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):  # no file
        return False
    poll = select.poll()
    poll.register(output, select.POLLOUT)
    is_closed = any(events & select.POLLERR for _, events in poll.poll(0))
    if is_closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return is_closed


def _print_error(line: str) -> None:
    """Print an error line to stderr, once for all processes that report the same one."""
    distributed = sys.modules.get("pretrain.runtime.distributed")  # imported only by commands that need torch
    if distributed is None or distributed.is_first_to_report(line):
        print(f"clipfuse: {one_safe_line(line)}", file=sys.stderr, flush=True)


class EarlyStop(BaseException):
    """A signal to stop arrived while the run was being built, when there was nothing to save yet."""


@dataclass
class _Hold:
    depth: int = 0
    """Number of `hold_stop_signals` blocks that are open."""
    signal: str | None = None
    """The last signal that arrived inside one."""


_hold = _Hold()


@contextmanager
def hold_stop_signals() -> Iterator[None]:
    """Let a signal that would raise EarlyStop inside the block raise it at the end of the block.

    Queues, conditions and locks of other threads need it: an exception in the middle of them leaves a lock that nobody
    releases, or a thread that nobody wakes.
    """
    _hold.depth += 1
    try:
        yield
    finally:
        _hold.depth -= 1
        if _hold.signal is not None and not _hold.depth:
            name, _hold.signal = _hold.signal, None
            raise EarlyStop(name)


@contextmanager
def raise_on_stop_signals() -> Iterator[None]:
    """Make SIGTERM, SIGINT and SIGUSR1 raise EarlyStop inside the block; fit() sets its own handlers."""

    def stop(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not _hold.depth:
            raise EarlyStop(name)
        _hold.signal = name

    _hold.signal = None
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class DryRun:
    """What `--dry-run` prints, and for which processes."""

    verbose: bool = False
    """Print the whole configuration as well."""
    processes: int = 0
    """Processes of the run; 0 = those that a launcher has started."""
    nodes: int = 1
    estimate: Callable[[Any, Any, int], list[str]] | None = None
    """(configuration, model, processes) -> lines on memory and time; None where nothing is there to estimate them."""


def run(config: str, settings: list[str], dry_run: DryRun | None, module: str = "pretrain", is_checked: bool = False) -> int:
    """Run one process of a training and return its exit code.

    config: a YAML file or the name of one in configs/MODULE; settings: key=value; dry_run: only print what would run; None =
    train. MODULE.train provides load_config(), describe() and train(). is_checked: check_settings() has passed.
    """
    path = find_config(config, module)
    if not is_checked:
        check_settings(path, settings, module)  # before torch is imported, which takes seconds
    import importlib

    from pretrain.runtime import deferred_imports

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader's workers run in parallel already
    with raise_on_stop_signals(), _explain_stopped_dry_run(dry_run is not None), ExitStack() as importing:
        importing.enter_context(deferred_imports.uncollected())
        from pretrain.runtime import distributed, performance, preflight
        from pretrain.runtime.console import log_info

        trainer: Any = importlib.import_module(f"{module}.train")
        preflight.check_launcher()
        preflight.watch_parent()
        early = performance.read_early(load_values(path, settings), str(path))
        performance.prepare_environment(early.performance, early.train.deterministic)
        distributed.setup()
        try:
            if dry_run is not None:
                return _describe(trainer, path, settings, dry_run)
            loaded = trainer.load_config(path, settings)
            preflight.check_accelerate(loaded.train.precision, loaded.train.strategy)
            distributed.set_timeout(loaded.train.timeout)
            if loaded.train.compile == "false":
                deferred_imports.import_libraries()
            importing.close()
            outcome = trainer.train(loaded)
            if outcome.state == "stopped":
                command = _resume_command(module, config, settings, loaded.resume)
                log_info(f"{outcome.reason} at step {outcome.step}, saved; resume with: {command}")
                return STOPPED
            return DONE
        finally:
            distributed.shutdown()


@contextmanager
def _explain_stopped_dry_run(is_dry_run: bool) -> Iterator[None]:
    """Turn a signal to stop a dry run into a UserError: there is nothing to resume."""
    try:
        yield
    except EarlyStop as stop:
        if is_dry_run:
            raise UserError(f"the dry run was stopped by {stop}; it has written nothing") from stop
        raise


def _describe(trainer: Any, path: Path, settings: list[str], dry_run: DryRun) -> int:
    """Print what would run, as it is configured for its processes, and return the exit code that the run would begin with."""
    from pretrain.runtime import distributed, preflight

    with ExitStack() as stack:
        if dry_run.processes:
            stack.enter_context(distributed.assume_world(dry_run.processes, dry_run.nodes, distributed.device().type == "cuda"))
        loaded = trainer.load_config(path, settings)
    preflight.check_accelerate(loaded.train.precision, loaded.train.strategy)
    error: UserError | None = trainer.describe(loaded, dry_run)
    return DONE if error is None else USAGE if isinstance(error, ConfigError) else FAILED


def _resume_command(module: str, config: str, settings: list[str], resume: str) -> str:
    """Return the command that goes on from the checkpoint just saved: with another `resume` the run would begin again.

    A Slurm job repeats its own script, which need not change: see training/session.py.
    """
    words = shlex.split(os.environ.get("CLIPFUSE_COMMAND", "")) or ["clipfuse", module, config, *settings]
    if resume != "auto" and words[0] == "clipfuse":
        words = [*(word for word in words if not word.startswith("resume=")), "resume=auto"]
    return shlex.join(words)
