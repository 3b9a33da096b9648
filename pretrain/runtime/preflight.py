"""Is this the world that was asked for? What launchers get wrong is refused here, before anything trains.

A launcher can start the wrong number of processes, or processes that do not know each other; machines of one run can hold
unequal data, code or configuration. Either trains N lonely or contradicting copies without a word. So every process checks
its environment first (`check_launcher`), and all compare fingerprints once they are joined (`require_equal`).
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
"""Variables in which task starters say how many tasks they started, and who they are. (SLURM_NTASKS is set in a batch
script as well, where there is one process only.)"""


PROBES = 64
"""Shards looked into to tell data apart."""


def check_launcher(env: Mapping[str, str] = os.environ, gpus: int | None = None) -> None:
    """Refuses processes that a launcher started in the wrong number, or that do not know each other.

    gpus: how many this process sees; None asks torch. Raises ConfigError.
    """
    world = env.get("WORLD_SIZE")
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in env]
    if world is None and "ACCELERATE_MIXED_PRECISION" in env and "MASTER_ADDR" in env:
        # accelerate's launcher for one process writes the address only when several were asked for.
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
    """srun or mpirun started n tasks: one world must hold them all."""
    for name, starter in TASKS.items():
        tasks = int(env.get(name, "1"))
        if tasks < 2:
            continue
        agents = int(env.get("GROUP_WORLD_SIZE", tasks if world >= tasks else 1))
        if agents < tasks:
            raise ConfigError(
                f"{starter} started {tasks} tasks that do not know each other ({name}={tasks}, this run has {world} "
                f"process{'es' if world > 1 else ''}): each would train a copy of its own; start one task, or on Slurm "
                "clipfuse pretrain CONFIG --on slurm --nodes N --nproc M"
            )


def _check_gpus(env: Mapping[str, str], gpus: int) -> None:
    local = int(env.get("LOCAL_RANK", "0"))
    if gpus and local >= gpus:
        raise ConfigError(
            f"process {env.get('RANK', '0')} is number {local} on its machine, which has {gpus} GPU{'s' if gpus > 1 else ''} "
            f"(CUDA_VISIBLE_DEVICES={env.get('CUDA_VISIBLE_DEVICES', 'unset')}); start one process a GPU"
        )


def check_accelerate(precision: str, strategy: str, env: Mapping[str, str] = os.environ) -> None:
    """Refuses settings of accelerate's launcher that our own configuration contradicts. Raises ConfigError."""
    names = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
    mixed = env.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed not in ("no", names[precision]):
        raise ConfigError(
            f"accelerate launch says mixed_precision={mixed}, the run train.precision={precision}: ours is what counts; give "
            "accelerate `--mixed_precision no`, or both the same"
        )
    for name, what, fitting in (("FSDP", "FSDP", ("fsdp2",)), ("DEEPSPEED", "DeepSpeed", ("zero1", "zero2", "zero3"))):
        if env.get(f"ACCELERATE_USE_{name}", "").lower() in ("true", "1") and strategy not in fitting:
            raise ConfigError(
                f"accelerate launch says {what}, the run train.strategy={strategy}: ours is what counts; take {what} out of "
                f"accelerate's configuration, or choose train.strategy={' or '.join(fitting)}"
            )


# ---------------------------------------------------------------------------------------------------------------------
# Fingerprints


def require_equal(name: str, value: Any) -> None:
    """Refuses a value that differs between processes. Collective. Raises UserError with the same line everywhere.

    value: plain values (str, numbers, dict, list), or a function that makes them and may raise UserError: raised as it is
    where it meets all processes. Of a dict the error names the first key that differs.
    """
    failed: UserError | None = None

    def describe() -> tuple[str, Any]:
        nonlocal failed
        try:
            return os.uname().nodename, value() if callable(value) else value
        except UserError as error:
            failed = error
            return os.uname().nodename, str(error)

    everyone = gather_or_raise(describe)
    differing = [rank for rank, (_, other) in enumerate(everyone) if other != everyone[0][1]]
    if not differing:
        if failed is not None:
            raise failed
        return
    rank = differing[0]
    key, mine, theirs = _difference(everyone[0][1], everyone[rank][1])
    more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
    raise UserError(
        f"{name} differs between processes: {key + ' is ' if key else ''}{mine} on process 0 ({everyone[0][0]}) and "
        f"{theirs} on process {rank} ({everyone[rank][0]}){more}; make it equal on every machine"
    )


def _difference(left: Any, right: Any, prefix: str = "") -> tuple[str, str, str]:
    """Where two plain values part: dotted key, and both sides."""
    if isinstance(left, dict) and isinstance(right, dict):
        for key in {**left, **right}:
            if left.get(key) != right.get(key):
                return _difference(left.get(key), right.get(key), f"{prefix}.{key}" if prefix else str(key))
    return prefix, _short(left), _short(right)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def code_fingerprint(*packages: str) -> dict[str, str]:
    """Digest of every source file of the packages (default: pretrain), and the versions that numbers depend on."""
    prints = {"python": ".".join(map(str, sys.version_info[:2])), "torch": torch.__version__}
    for package in packages or ("pretrain",):
        origin = sys.modules[package].__file__ if package in sys.modules else None
        if origin is None:
            continue
        folder = Path(origin).parent
        for path in sorted(folder.rglob("*.py")):
            name = f"{package}/{path.relative_to(folder).as_posix()}"
            prints[name] = hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
    return prints


def data_fingerprint(paths: Sequence[str]) -> dict[str, Any]:
    """What tells two machines' shards apart without reading them: their names, and size and beginning of a few.

    paths: shards, local ones or urls.
    """
    names = [path.rsplit("/", 1)[-1] for path in paths]
    prints: dict[str, Any] = {"number of shards": len(paths)}
    for path, name in list(zip(paths, names, strict=True))[:: max(1, len(paths) // PROBES)]:
        with suppress(OSError), open(path, "rb") as file:  # urls and unreadable files are met when they are read
            beginning = hashlib.blake2b(file.read(4096), digest_size=8).hexdigest()
            prints[name] = f"{os.fstat(file.fileno()).st_size:,} bytes, beginning {beginning}"
    return {**prints, "names of shards": hashlib.blake2b("\n".join(names).encode(), digest_size=8).hexdigest()}


# ---------------------------------------------------------------------------------------------------------------------
# Orphans


def watch_parent(env: Mapping[str, str] = os.environ, every_seconds: float = 1.0) -> None:
    """Ends this process when the launcher that started it is gone.

    A launcher that is killed -9 leaves its processes running: they would hold GPUs and the run folder while a new launcher
    starts the same run again. Only for launchers that outlive their processes (torch's, so ours and accelerate's, and
    DeepSpeed's): what a person's own script starts may outlive the script.
    """
    if "TORCHELASTIC_RUN_ID" not in env and "CROSS_SIZE" not in env:
        return
    parent, rank = os.getppid(), env.get("RANK", "0")

    def report() -> None:
        print(f"clipfuse: the launcher (process {parent}) is gone; process {rank} ends", file=sys.stderr, flush=True)

    orphans.exit_with_parent(parent, every_seconds, report)
