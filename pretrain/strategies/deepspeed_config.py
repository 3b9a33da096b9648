"""Reads train.deepspeed=FILE.json: DeepSpeed's settings of communication and logging.

They replace our defaults; launch/deepspeed/ has such files. A file may set only what does not change the numbers: bucket
sizes, overlap, prefetching, logging. Precision, clipping, accumulation, optimizer and stage belong to our own configuration.
A file that sets any of them is refused, so that no setting is ignored silently.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pretrain.errors import ConfigError, closest

COMMENT_KEY = "_command"
"""A key that is ignored. Files use it as a comment, which JSON lacks."""
TOP_LEVEL_KEYS = (
    "comms_logger",
    "flops_profiler",
    "memory_breakdown",
    "steps_per_print",
    "wall_clock_breakdown",
    "zero_optimization",
)
ZERO_KEYS = (
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
    """Return the settings in a file for that stage of ZeRO.

    Raises ConfigError: a file that is missing, is not JSON, is for another stage, or sets a key that it may not set.
    """
    try:
        settings = json.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"train.deepspeed={path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"train.deepspeed={path} is not JSON: {error}") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("zero_optimization", {}), dict):
        raise ConfigError(f"train.deepspeed={path} must hold settings of DeepSpeed: {{zero_optimization: {{...}}}}")
    settings.pop(COMMENT_KEY, None)
    zero = settings.get("zero_optimization", {})
    keys = [(k, TOP_LEVEL_KEYS, "") for k in settings] + [(k, ZERO_KEYS, "zero_optimization.") for k in zero]
    for key, choices, prefix in keys:
        if key not in choices:
            raise ConfigError(
                f"train.deepspeed={path} may not set {prefix}{key}{closest(key, list(choices))}; it may set "
                f"{', '.join(choices)} (set precision, clipping, offload and stage under train. and optim.)"
            )
    if zero.get("stage", stage) != stage:
        raise ConfigError(
            f"train.deepspeed={path} is for stage {zero['stage']}; choose train.strategy=zero{zero['stage']}, or another file"
        )
    return settings


def merge(defaults: dict[str, Any], file_settings: dict[str, Any]) -> dict[str, Any]:
    """Return the default settings, replaced by those of a file where it has them."""
    zero = {**defaults["zero_optimization"], **file_settings.get("zero_optimization", {})}
    return {**defaults, **file_settings, "zero_optimization": zero}
