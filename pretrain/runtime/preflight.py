"""Checks before training: the launcher's processes form one group, with equal code, data and settings.

A launcher can start the wrong number of processes, or processes that form no common group: each would train a separate copy
without an error. The nodes of one run can hold unequal data, code or configuration. So every process checks its environment
first (`check_launcher`), and all processes compare fingerprints once they form a group (`require_equal`).
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from pretrain.errors import ConfigError, UserError
from pretrain.runtime import orphans
from pretrain.runtime.agree import gather_or_raise

TASKS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
    "MV2_COMM_WORLD_SIZE": "mpirun",
}
"""Environment variables that hold the number of started tasks, and the command that sets them. (Not SLURM_NTASKS: it is set
in a batch script as well, which is one process only.)"""

PROBES = 64
"""At most about this many shards are opened for the fingerprint of the data."""


def check_launcher(env: Mapping[str, str] = os.environ, gpus: int | None = None) -> None:
    """Raise ConfigError for a wrong number of processes, or for processes without a common group.

    gpus: the number of GPUs that this process can use; None = torch's count.
    """
    world = env.get("WORLD_SIZE")
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in env]
    if world is None and "ACCELERATE_MIXED_PRECISION" in env and "MASTER_ADDR" in env:
        # accelerate's launcher for one process sets the address only when several processes were requested.
        raise ConfigError(
            "accelerate launch was asked for several processes and started ONE (it does so without a GPU and with --cpu); "
            "use --multi_gpu, which starts them on CPUs too, or clipfuse pretrain CONFIG --nproc N"
        )
    if world is not None and int(world) > 1 and missing:
        raise ConfigError(
            f"WORLD_SIZE={world} without {', '.join(missing)}: the processes cannot find each other; "
            "a launcher sets all of them (clipfuse pretrain CONFIG --nproc N, torchrun, deepspeed)"
        )
    _check_tasks(env, int(world or 1))
    _check_gpus(env, torch.cuda.device_count() if gpus is None else gpus)


def _check_tasks(env: Mapping[str, str], world: int) -> None:
    """Raise ConfigError if srun or mpirun started several tasks that do not form one process group."""
    for name, starter in TASKS.items():
        tasks = int(env.get(name, "1"))
        if tasks < 2:
            continue
        agents = int(env.get("GROUP_WORLD_SIZE", tasks if world >= tasks else 1))
        if agents < tasks:
            raise ConfigError(
                f"{starter} started {tasks} tasks that do not know each other ({name}={tasks}, this run has {world} "
                f"process{'es' if world > 1 else ''}): each would train a separate copy; start one task, or on Slurm "
                "clipfuse pretrain CONFIG --on slurm --nodes N --nproc M"
            )


def _check_gpus(env: Mapping[str, str], gpus: int) -> None:
    """Raise ConfigError if this node has more processes than GPUs."""
    local = int(env.get("LOCAL_RANK", "0"))
    if gpus and local >= gpus:
        raise ConfigError(
            f"process {env.get('RANK', '0')} is number {local} on its node, which has {gpus} GPU{'s' if gpus > 1 else ''} "
            f"(CUDA_VISIBLE_DEVICES={env.get('CUDA_VISIBLE_DEVICES', 'unset')}); start one process for each GPU"
        )


def check_accelerate(precision: str, strategy: str, env: Mapping[str, str] = os.environ) -> None:
    """Raise ConfigError if settings of accelerate's launcher contradict the run's configuration."""
    names = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
    mixed = env.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed not in ("no", names[precision]):
        raise ConfigError(
            f"accelerate launch has mixed_precision={mixed}, but the run uses train.precision={precision}; "
            "give accelerate `--mixed_precision no`, or set both to the same"
        )
    for name, library, strategies in (("FSDP", "FSDP", ("fsdp2",)), ("DEEPSPEED", "DeepSpeed", ("zero1", "zero2", "zero3"))):
        if env.get(f"ACCELERATE_USE_{name}", "").lower() in ("true", "1") and strategy not in strategies:
            raise ConfigError(
                f"accelerate launch has {library}, but the run uses train.strategy={strategy}; remove "
                f"{library} from accelerate's configuration, or set train.strategy={' or '.join(strategies)}"
            )


# ---------------------------------------------------------------------------------------------------------------------
# Fingerprints


def require_equal(name: str, value: Any) -> None:
    """Raise the same UserError on every process if `value` differs between processes. Collective.

    name: what the value is, for the message. value: plain values (str, numbers, dict, list), or a function that returns them
    and may raise UserError; an error that all processes share is raised as it is. For a dict, the message names the first key
    that differs.
    """
    failure: UserError | None = None

    def describe() -> tuple[str, Any]:
        nonlocal failure
        try:
            return os.uname().nodename, value() if callable(value) else value
        except UserError as error:
            failure = error
            return os.uname().nodename, str(error)

    values = gather_or_raise(describe)
    differing = [rank for rank, (_, other) in enumerate(values) if other != values[0][1]]
    if not differing:
        if failure is not None:
            raise failure
        return
    rank = differing[0]
    key, first, second = _difference(values[0][1], values[rank][1])
    more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
    raise UserError(
        f"{name} differs between processes: {key + ' is ' if key else ''}{first} on process 0 ({values[0][0]}) and "
        f"{second} on process {rank} ({values[rank][0]}){more}; make it equal on every machine"
    )


def _difference(left: Any, right: Any, prefix: str = "") -> tuple[str, str, str]:
    """Return the dotted key of the first difference between two values, and both values there."""
    if isinstance(left, dict) and isinstance(right, dict):
        for key in {**left, **right}:
            if left.get(key) != right.get(key):
                return _difference(left.get(key), right.get(key), f"{prefix}.{key}" if prefix else str(key))
    return prefix, _shorten(left), _shorten(right)


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def code_fingerprint(*packages: str) -> dict[str, str]:
    """Return digests of the packages' source files (default: pretrain), and versions of Python and torch."""
    fingerprint = {"python": ".".join(map(str, sys.version_info[:2])), "torch": torch.__version__}
    for package in packages or ("pretrain",):
        origin = sys.modules[package].__file__ if package in sys.modules else None
        if origin is None:
            continue
        folder = Path(origin).parent
        for path in sorted(folder.rglob("*.py")):
            name = f"{package}/{path.relative_to(folder).as_posix()}"
            fingerprint[name] = hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
    return fingerprint


def data_fingerprint(paths: Sequence[str]) -> dict[str, Any]:
    """Return a fingerprint of shards: all names, and of some the size and a digest of the first 4 KB.

    paths: local paths or urls of the shards.
    """
    names = [path.rsplit("/", 1)[-1] for path in paths]
    fingerprint: dict[str, Any] = {"number of shards": len(paths)}
    for path, name in list(zip(paths, names, strict=True))[:: max(1, len(paths) // PROBES)]:
        with suppress(OSError), open(path, "rb") as file:  # urls and unreadable files fail when they are read
            beginning = hashlib.blake2b(file.read(4096), digest_size=8).hexdigest()
            fingerprint[name] = f"{os.fstat(file.fileno()).st_size:,} bytes, beginning {beginning}"
    return {**fingerprint, "names of shards": hashlib.blake2b("\n".join(names).encode(), digest_size=8).hexdigest()}


# ---------------------------------------------------------------------------------------------------------------------
# Launchers that end


def watch_parent(env: Mapping[str, str] = os.environ, every_seconds: float = 1.0) -> None:
    """Start a thread that ends this process when its launcher has ended.

    A launcher killed by SIGKILL leaves its processes running: they would hold GPUs and the run folder while a new launcher
    starts the same run again. Applies only under launchers that outlive their processes (torch's, so ours and accelerate's,
    and DeepSpeed's): a process that a user's own script started may outlive the script.
    """
    if "TORCHELASTIC_RUN_ID" not in env and "CROSS_SIZE" not in env:
        return
    parent, rank = os.getppid(), env.get("RANK", "0")

    def report() -> None:
        print(f"clipfuse: the launcher (process {parent}) is gone; process {rank} ends", file=sys.stderr, flush=True)

    orphans.exit_with_parent(parent, every_seconds, report)
