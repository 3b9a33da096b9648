"""The `train` section of a configuration, and the numbers, settings and callbacks of one run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from pretrain import strategies
from pretrain.checkpoints.remote import check_address
from pretrain.config import check_numbers
from pretrain.errors import ConfigError
from pretrain.optim import OptimConfig
from pretrain.strategies import Precision
from pretrain.strategies.blocks import CompileMode
from pretrain.training.flops import FlopCounter
from pretrain.training.metrics import check_trackers
from pretrain.training.profile import parse_steps
from pretrain.training.stages import RunStages, parse

EVALUATIONS = 10
"""Evaluations of a run with train.eval_every=null, enough for a curve."""


@dataclass
class TrainConfig:
    """Run length, precision, parallelism and logging."""

    steps: int = 0
    """Length of the run in optimizer steps. Set exactly one of steps, samples, epochs."""
    samples: int = 0
    """Length in samples seen; rounded up to whole batches."""
    epochs: float = 0.0
    """Length in epochs E of all sources together: ceil(E * samples / batch) steps."""
    stages: list[dict[str, Any]] = field(default_factory=list)
    """Stages of a pretraining run before the last one, which is the configuration itself (CLIPA, arXiv:2305.07017). Each has
    `until`, its end, as a fraction of the run or in samples, and some of image.size, image.patch_dropout, text.length,
    data.batch_size and optim.lr: [{until: 0.9, image.size: 96, data.batch_size: 512}]. Smaller images use resampled positions,
    shorter texts the first ones. Warm-up, schedule and weight averaging count the steps of the whole run; optim.lr of a stage
    is the peak of that schedule. A fraction is one of the samples, or of the steps where train.steps is given; a run that may
    be made longer later gives samples. [] = none."""
    precision: Precision = "fp32"
    """fp32, bf16 or fp16 matrix products; weights and optimizer state stay float32."""
    strategy: str = "single"
    """How the model is distributed over processes: single (one process), ddp (a copy on each), fsdp2 (weights, gradients and
    optimizer state sharded), or DeepSpeed's stages, which shard: zero1 (optimizer state), zero2 (gradients too), zero3
    (weights too)."""
    offload: bool = False
    """zero1 to zero3: keep the optimizer state (under zero3 the weights too) in CPU memory and step there; slower, for large
    models."""
    deepspeed: str | None = None
    """zero1 to zero3: a JSON file with DeepSpeed's own communication and memory settings (launch/deepspeed/); null = ours."""
    replicas: int = 1
    """fsdp2: groups of processes that hold all weights each (hybrid sharding), so that weights are gathered within a group
    only; for example the number of nodes. It must divide the number of processes."""
    gradient_compression: Literal["none", "bf16"] = "none"
    """ddp: bf16 halves the bytes that gradients send between processes; it rounds them, so they are not exact."""
    chunks: int = 1
    """Chunks that each process divides its part of the batch into, to save memory: same gradient, same steps (cached step)."""
    save_every: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 3
    """Newest checkpoints to keep in addition to the best one, and to the last one after which losses were finite; 0 = all."""
    background_saves: bool = True
    """Write checkpoints in the background: a step waits only until what is saved has been copied to the memory of process 0.
    The files are the same. false: a step waits until the checkpoint is written."""
    max_failed_saves: int = 3
    """Saves in a row that may not succeed, since the disk is full or cannot be written, before the run ends with an error.
    The last save of a run must succeed."""
    copy_to: str | None = None
    """Where complete checkpoints are copied in the background: s3://BUCKET/PREFIX, gs://, az://, hf://, or a folder; rotated as
    here. resume=s3://BUCKET/PREFIX goes on from the newest on another machine. null = nowhere."""
    eval_every: int | None = None
    """Steps between evaluations on data.val; 0 = only at the end. null: ten evaluations, or fewer where they would read more
    than a third as many samples as training does."""
    log_every: int = 10
    """Steps between lines in metrics.jsonl."""
    profile: str | None = None
    """START:STOP, for example 10:15: process 0 writes a trace of the steps after step START, up to step STOP, into the run
    folder (profile-START-STOP.json.gz), and prints where their time goes; null = none."""
    audit: bool = False
    """Write the keys of every consumed sample to audit-RANK.jsonl."""
    compile: CompileMode = "false"
    """true: compile the towers' blocks with torch.compile, a minute or more at the start; default is the same. reduce-overhead:
    CUDA graphs too, for small models on fast GPUs (single and ddp). max-autotune: try more kernels, for many minutes."""
    deterministic: bool = False
    """On GPUs: use only kernels whose result does not vary from run to run, where bits matter more than speed. Resuming is then
    bit for bit on the same kind of GPU and number of processes, as it is on CPUs in any case."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Accelerate's trackers that receive the metrics: tensorboard, wandb, mlflow, ...; [] = none."""
    threads: int = 0
    """CPU threads per process; 0 = the machine's cores divided by its processes. Resuming bit for bit needs the same number."""
    max_skipped: int = 10
    """Consecutive steps with a non-finite gradient after which the run stops with an error."""
    on_spike: Literal["ignore", "log", "skip", "rollback"] = "log"
    """A step whose loss is far above the last ones': log it; skip its update, for which each step averages the loss over all
    processes; or rollback: go back to the last good checkpoint of save_every and on with the next data. rollback also does so
    after max_skipped. A step with a non-finite gradient is skipped in any case."""
    spike_window: int = 128
    """Steps whose losses a spike is compared with, by their median; no step is judged before there are so many."""
    spike_factor: float = 6.0
    """A spike is this many standard deviations (1.4826 MAD, at least 1 % of the median) above the median of the window. Normal
    noise exceeds 6 once in a billion steps."""
    max_rollbacks: int = 3
    """Rollbacks to one checkpoint, after which the next spike ends the run with an error."""
    timeout: float = 600.0
    """Seconds after which a collective that does not complete (a dead or hung process) ends the run."""

    def check(self) -> None:
        """Refuse impossible lengths and intervals. Raises ConfigError."""
        lengths = [name for name in ("steps", "samples", "epochs") if getattr(self, name) != 0]
        if len(lengths) != 1:
            settings = " and ".join(f"train.{name}={getattr(self, name)}" for name in lengths) or "none of them"
            raise ConfigError(f"give exactly one of train.steps, train.samples, train.epochs; given: {settings}")
        if getattr(self, lengths[0]) < 0:
            raise ConfigError(f"train.{lengths[0]}={getattr(self, lengths[0])} must be above 0")
        for name in ("chunks", "save_every", "log_every", "max_skipped", "max_rollbacks", "max_failed_saves"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name}={getattr(self, name)} must be at least 1")
        for name in ("keep", "eval_every", "threads"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"train.{name}={getattr(self, name)} must be at least 0")
        steps = parse_steps(self.profile)
        if steps and 0 < self.steps <= steps.start:
            raise ConfigError(f"train.profile={self.profile} begins at the end of the run: train.steps={self.steps}")
        check_trackers(self.trackers)
        parse(self.stages)
        if self.copy_to is not None:
            check_address(self.copy_to, "train.copy_to")
        strategies.check(
            self.strategy,
            self.precision,
            self.compile,
            self.offload,
            self.deepspeed,
            self.replicas,
            self.gradient_compression,
        )
        intervals = dict.fromkeys(("steps", "samples", "epochs"), "[0, inf)") | {"spike_window": "[3, 1000000]"}
        check_numbers(self, "train", **intervals, timeout="(0, inf)", spike_factor="(0, inf)")

    def evaluation_interval(self, total_steps: int, total_samples: int, val_samples: int) -> int:
        """Return the steps between evaluations; 0 = only at the end.

        Args:
            total_steps: of the whole run.
            total_samples: of the whole run.
            val_samples: samples that one evaluation reads.
        """
        if self.eval_every is not None:
            return self.eval_every
        # The forward passes of an evaluation cost about a third of a training step for each sample.
        count = min(EVALUATIONS, total_samples // (3 * max(1, val_samples)))
        return math.ceil(total_steps / count) if count > 1 else 0


@dataclass
class RunPlan:
    """The numbers, settings and callbacks that fit() needs besides the components of a run."""

    seed: int
    stages: RunStages
    """Batch size and learning rate of each step, and the length of the run."""
    eval_every: int
    """Steps between evaluations; 0 = only at the end."""
    train: TrainConfig
    optim: OptimConfig
    """That of the last stage."""
    resolved_config: dict[str, Any]
    """The whole configuration, for trackers and for messages about memory."""
    identity: dict[str, Any]
    """What must not change between stop and resume: data, seed, batch size."""
    save_files: Callable[[Path], None]
    """Writes config.yaml and tokenizer/ into a checkpoint."""
    write_config: Callable[[], None] = lambda: None
    """Writes config.yaml and environment.json into the run folder, once the run is known to begin or to resume."""
    primary_metric: str = ""
    """The evaluation metric, higher is better, that decides `best`."""
    flops: FlopCounter | None = None
    """Counts the forward and backward operations of this process's part of a batch, for MFU; None = unknown."""
    convert_weights: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    """Turns trained weights into those of model.safetensors, where the two differ (adapters are merged); None = the same."""

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.stages.total_steps
