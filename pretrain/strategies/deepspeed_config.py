"""train.deepspeed=FILE.json: DeepSpeed's settings of how bytes move, laid over ours (launch/deepspeed/ has such files).

Only what leaves the numbers as they are: bucket sizes, overlap, prefetching, logging. Precision, clipping, accumulation,
optimizer and stage are words of our own configuration; a file that sets them is refused, not half obeyed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pretrain.errors import ConfigError, closest

COMMENT = "_command"
"""A key for people: JSON has no comments."""
TOP = ("comms_logger", "flops_profiler", "memory_breakdown", "steps_per_print", "wall_clock_breakdown", "zero_optimization")
ZERO = (
    "allgather_bucket_size",
    "allgather_partitions",
    "contiguous_gradients",
    "overlap_comm",
    "reduce_bucket_size",
    "reduce_scatter",
    "round_robin_gradients",
    "stage",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
    "sub_group_size",
)


def read(path: str, stage: int) -> dict[str, Any]:
    """The settings in a file. Raises ConfigError for one that is not there, no JSON, or sets what is not for it to set."""
    try:
        given = json.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"train.deepspeed={path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"train.deepspeed={path} is no JSON: {error}") from error
    if not isinstance(given, dict) or not isinstance(given.get("zero_optimization", {}), dict):
        raise ConfigError(f"train.deepspeed={path} must hold settings of DeepSpeed: {{zero_optimization: {{...}}}}")
    given.pop(COMMENT, None)
    zero = given.get("zero_optimization", {})
    for key, choices, prefix in [(k, TOP, "") for k in given] + [(k, ZERO, "zero_optimization.") for k in zero]:
        if key not in choices:
            raise ConfigError(
                f"train.deepspeed={path}: {prefix}{key} is not for this file{closest(key, list(choices))}; it may set "
                f"{', '.join(choices)} (precision, clipping, offload and stage are words under train. and optim.)"
            )
    if zero.get("stage", stage) != stage:
        raise ConfigError(
            f"train.deepspeed={path} is for stage {zero['stage']}; choose train.strategy=zero{zero['stage']}, or another file"
        )
    return given


def merge(ours: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Our settings with those of a file in their place."""
    zero = {**ours["zero_optimization"], **given.get("zero_optimization", {})}
    return {**ours, **given, "zero_optimization": zero}
