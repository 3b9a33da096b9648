"""Settings of torch that decide speed and determinism, for a whole process.

    prepare_environment(config, deterministic)      environment variables, before CUDA initializes
    with process_settings(config, deterministic):   flags of torch, which have their former values after the block
    use_settings(config)                            both, for a command that ends with its process
    name_deepspeed_device()                         before anything imports DeepSpeed
    read_settings()                                 what is in force, for environment.json

The settings of a model (channels_last, fast_norm) are set by `pretrain.model.set_performance`. All of them decide how fast the
same model is computed, so they may change when a run is resumed. On the CPU none changes a bit but
performance.channels_last=true.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from pretrain import config as configuration
from pretrain.config.values import Section, without
from pretrain.errors import UserError

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Environment variables that torch's allocator reads once, when CUDA initializes; the second is the older name."""
CUBLAS_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
SHORT = 128
"""Tokens up to which attention as plain products is faster on a CPU in bf16; see choose_attention."""


@dataclass
class PerformanceConfig:
    """How GPUs compute, apart from train.precision. train.deterministic=true overrides cudnn_benchmark."""

    tf32: bool = True
    """Let GPUs round the factors of fp32 products and convolutions of the towers to TF32 (11 bits; sums stay float32): up to
    eight times as fast. The products of the loss have loss.precision instead."""
    cudnn_benchmark: bool = True
    """Let cuDNN time its kernels for each shape and take the fastest: images of a run have one shape."""
    channels_last: Literal["auto", "true", "false"] = "auto"
    """NHWC maps in convolutional image towers, which tensor cores read without transposing. auto: on GPUs. Weights and files
    keep their format. Vision transformers are not convolutional."""
    expandable_segments: bool = True
    """Let the GPU's allocator grow its segments, so that texts of varying length do not fragment memory. Ignored where
    PYTORCH_ALLOC_CONF or PYTORCH_CUDA_ALLOC_CONF is set."""
    fast_norm: bool = True
    """Under bf16 and fp16 on GPUs: normalization layers of timm models read and write half precision (sums stay float32),
    without a copy of their input in float32."""


@dataclass
class _TrainSettings:
    """The part of the `train` section that must be known before CUDA initializes."""

    deterministic: bool = False


@dataclass
class EarlyConfig:
    """The settings that must be known before CUDA initializes; `read_early` reads them."""

    performance: PerformanceConfig = field(default_factory=PerformanceConfig)
    train: _TrainSettings = field(default_factory=_TrainSettings)


def read_early(values: dict[str, Any], where: str) -> EarlyConfig:
    """Read the settings that must be known before CUDA initializes from a run's plain values. Raises ConfigError.

    where: the origin of the values, for error messages.
    """
    train = values.get("train")
    early = without(values, [key for key in values if key not in ("performance", "train")])
    if isinstance(train, Section):
        early["train"] = without(train, [key for key in train if key != "deterministic"])
    elif train is not None:  # not a section: the complete schema refuses it
        early = without(early, ["train"])
    return configuration.build(EarlyConfig, early, where)


# ---------------------------------------------------------------------------------------------------------------------
# Settings of the process


def prepare_environment(config: PerformanceConfig, deterministic: bool = False) -> None:
    """Set the environment variables that CUDA's libraries read once. Variables that are set already stay.

    Call it before the first CUDA call of the process.
    """
    if config.expandable_segments and not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"
    if deterministic:
        os.environ.setdefault(CUBLAS_VARIABLE, ":4096:8")  # the workspace with which cuBLAS is deterministic


def use_settings(config: PerformanceConfig, deterministic: bool = False) -> None:
    """Set the environment variables and torch's flags, for the rest of the process."""
    prepare_environment(config, deterministic)
    _set_tf32(config.tf32)
    torch.backends.cudnn.benchmark = config.cudnn_benchmark and not deterministic
    torch.backends.cudnn.deterministic = deterministic
    _set_deterministic_algorithms(deterministic)
    checks: Any = torch.utils.deterministic
    if deterministic:
        checks.fill_uninitialized_memory = False  # it would write every new tensor once, to find errors


@contextmanager
def process_settings(config: PerformanceConfig, deterministic: bool = False) -> Iterator[None]:
    """Use the settings inside the block; afterwards torch's flags have their former values.

    Raises UserError where train.deterministic=true meets an operation that cannot be deterministic.
    """
    cuda: Any = torch.backends.cuda
    cudnn: Any = torch.backends.cudnn
    matmul, conv = cuda.matmul.fp32_precision, cudnn.conv.fp32_precision
    flags = cudnn.benchmark, cudnn.deterministic
    fused = cuda.flash_sdp_enabled()
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    checks: Any = torch.utils.deterministic
    fill = checks.fill_uninitialized_memory
    use_settings(config, deterministic)
    try:
        yield
    except RuntimeError as error:
        if deterministic and "does not have a deterministic implementation" in str(error):
            operation = str(error).split(" does not have")[0]
            raise UserError(
                f"train.deterministic=true: {operation} has no deterministic implementation here; leave train.deterministic out"
            ) from error
        raise
    finally:
        cuda.matmul.allow_tf32, cudnn.allow_tf32 = matmul == "tf32", conv == "tf32"
        cuda.matmul.fp32_precision = matmul
        cudnn.benchmark, cudnn.deterministic = flags
        cuda.enable_flash_sdp(fused)
        _set_deterministic_algorithms(*algorithms)
        checks.fill_uninitialized_memory = fill


def choose_attention(longest: int, device_type: str, precision: str) -> None:
    """Let attention on a CPU in bf16 and fp16 be computed as plain products, where sequences are short.

    torch's fused attention for CPUs has a slow backward pass in half precision. Forward and backward of 128 sequences with 3
    heads of 64 took 61 ms for 49 tokens, 21 for 16 and 73 for 77; plain products took 15, 3 and 30, and as many as fused ones
    from about 128 tokens on. They are computed in float32 and rounded once, so the result is not less exact.

    longest: tokens of the longest sequence; 0 = not known.
    """
    if device_type == "cpu" and precision != "fp32" and 0 < longest <= SHORT:
        torch.backends.cuda.enable_flash_sdp(False)  # named after CUDA, and obeyed on CPUs, too


def _set_deterministic_algorithms(mode: bool, warn_only: bool = False) -> None:
    """Call torch.use_deterministic_algorithms where it changes something: it imports torch's compiler, which takes seconds."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if before != (mode, warn_only):
        torch.use_deterministic_algorithms(mode, warn_only=warn_only)


def _set_tf32(is_allowed: bool) -> None:
    """Allow or forbid TF32 in products and convolutions on GPUs.

    Everything here reads `fp32_precision`. It is set by the older `allow_tf32`, which sets `fp32_precision` and all that is
    older. After `fp32_precision = "tf32"` alone, torch.get_float32_matmul_precision() raises, which torch.compile calls under
    max-autotune (seen in torch 2.14).
    """
    torch.backends.cuda.matmul.allow_tf32 = is_allowed
    torch.backends.cudnn.allow_tf32 = is_allowed


def name_deepspeed_device() -> None:
    """Name this machine's device for DeepSpeed, which otherwise warns when it is imported, also by accelerate."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


def read_settings() -> dict[str, Any]:
    """Return the settings in force, read back from torch and the environment."""
    cudnn: Any = torch.backends.cudnn
    return {
        "tf32_products": torch.backends.cuda.matmul.fp32_precision == "tf32",
        "tf32_convolutions": cudnn.conv.fp32_precision == "tf32",
        "cudnn_benchmark": cudnn.benchmark,
        "cudnn_deterministic": cudnn.deterministic,
        "fused_attention": torch.backends.cuda.flash_sdp_enabled(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "expandable_segments": _uses_expandable_segments(),
        **{name: os.environ[name] for name in (*ALLOCATOR_VARIABLES, CUBLAS_VARIABLE) if name in os.environ},
    }


def _uses_expandable_segments() -> bool | None:
    """Return whether the GPU's allocator uses expandable segments; None where there is no GPU, or torch does not tell."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.init()
    try:
        return bool(torch.cuda.memory._snapshot()["allocator_settings"]["expandable_segments"])
    except (AttributeError, KeyError, TypeError):
        return None
