"""What `--dry-run` prints: settings that differ from the defaults, parameters, data, device, and where the run would go.

The trainers build everything that a run starts from, and write nothing. With `verbose` the output is the whole configuration
as YAML, and all else stands before it in comments.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from pretrain import config as configuration
from pretrain.checkpoints import store
from pretrain.data.loader import Loader
from pretrain.data.shards.stores import is_store
from pretrain.errors import UserError
from pretrain.printable import format_count, hide_secrets_in, one_safe_line
from pretrain.runtime import distributed
from pretrain.runtime.entrypoint import DryRun
from pretrain.training import stages
from pretrain.training.run_dir import RunFolder
from pretrain.training.session import Session, find_checkpoint
from pretrain.training.trainer_state import load_trainer_state, refuse_other_identity

_LONGEST_VALUE = 160


# ---------------------------------------------------------------------------------------------------------------------
# Settings


def list_differences(config: Any, prefix: str = "") -> Iterator[str]:
    """Yield "key: value (default)" for each setting that differs from its default, in the order of the schema."""
    for spec in fields(config):
        key, value = f"{prefix}{spec.name}", getattr(config, spec.name)
        if "extra" in spec.metadata:
            for name, component in value.items():
                yield f"{prefix}{name}: {_format(configuration.to_dict(component))} (none)"
        elif "package" in spec.metadata and (value is None or getattr(value, spec.metadata["key"]) != spec.metadata["default"]):
            name = None if value is None else getattr(value, spec.metadata["key"])
            yield f"{key}.{spec.metadata['key']}: {_format(name)} ({spec.metadata['default']})"
            if value is not None:
                yield from list_differences(value, f"{key}.")
        elif is_dataclass(value):
            yield from list_differences(value, f"{key}.")
        elif value != (default := _default(spec)):
            yield f"{key}: {_format(value)} ({_format(default)})"


def _default(spec: Field[Any]) -> Any:
    if spec.default_factory is not MISSING:
        return spec.default_factory()
    return None if spec.default is MISSING else spec.default


def _format(value: Any) -> str:
    """Return a value in one line of YAML, without passwords, shortened."""
    text = one_safe_line(_flow(hide_secrets_in(value)))
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if value is None or value == "":
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


# ---------------------------------------------------------------------------------------------------------------------
# Where the run would go


@dataclass
class Destination:
    """The run folder, and whether a run would begin there, resume, or be refused."""

    path: Path
    checkpoint: Path | None = None
    """The checkpoint to resume from; None = a run that begins."""
    error: UserError | None = None
    """Why the run would be refused; None = it would not."""

    def check(self, refuse: Callable[[], object]) -> None:
        """Call a function that raises UserError where the run would be refused, and keep the first error."""
        try:
            refuse()
        except UserError as error:
            self.error = self.error or error

    def check_identity(self, identity: dict[str, Any]) -> None:
        """Keep the error of a checkpoint with other data, seed or batch size. identity: RunPlan's."""
        checkpoint = self.checkpoint
        if checkpoint is not None:
            self.check(
                lambda: refuse_other_identity(load_trainer_state(checkpoint / "state" / "trainer.pt"), identity, checkpoint)
            )

    def describe(self, total_steps: int) -> str:
        """Return the line about the folder. total_steps: of the whole run."""
        if self.error is not None:
            return f"{self.path}: refused: {self.error}"
        if self.checkpoint is not None:
            step = store.parse_step(self.checkpoint)
            is_own = self.checkpoint.resolve().parent.parent == self.path.resolve()
            origin = "" if is_own else f", from {self.checkpoint}"
            is_done = step >= total_steps
            state = f"is done at step {step:,}, nothing is left" if is_done else f"resumes at step {step:,} of {total_steps:,}"
            return f"{self.path}: {state}{origin}"
        return f"{self.path}: {'starts at step 0, no checkpoint is there' if self.path.exists() else 'a new folder'}"


def find_destination(config: Any) -> Destination:
    """Find where the run of a configuration would go, and from which checkpoint. Collective; writes nothing."""
    folder = RunFolder(config.run)
    destination = Destination(folder.path)
    destination.check(folder.refuse_unusable)

    def find() -> None:
        if is_store(config.resume):
            raise UserError(f"not known: --dry-run does not download resume={config.resume}")
        destination.checkpoint = find_checkpoint(config, folder)

    destination.check(find)
    return destination


def closed_session(config: Any, destination: Destination) -> Session:
    """Return the session of a run without its folder opened, to build the plan that a run would have."""
    folder = RunFolder(config.run)
    return Session(config, folder, destination.checkpoint, distributed.device(), distributed.pin_threads(config.train.threads))


# ---------------------------------------------------------------------------------------------------------------------
# Printing


def estimate_lines(config: Any, model: Any, options: DryRun) -> list[str]:
    """Return the lines on memory and time."""
    if options.estimate is None:
        return ["memory and time: not estimated under this launcher; clipfuse pretrain --dry-run and clipfuse plan do"]
    return options.estimate(config, model, options.processes or distributed.world_size())


def print_summary(
    config: Any,
    differences: list[str],
    destination: Destination,
    parameter_counts: dict[str, dict[str, int]],
    loader: Loader,
    dry_run: DryRun,
    more: list[str],
) -> None:
    """Print, on rank 0, what would run.

    Args:
        config: the resolved configuration.
        differences: its settings that differ from the defaults, as they were before components filled in theirs.
        parameter_counts: for each component of the model {"total": ..., "trainable": ...}.
        more: further lines, such as those on memory and exports.
    """
    epoch_size = loader.order.epoch_size
    run = stages.resolve(config, epoch_size)
    total_steps = run.total_steps
    if not distributed.is_main():
        return
    lines = ["settings that differ from the defaults, which are in parentheses:", *(f"  {line}" for line in differences), ""]
    for name, counts in parameter_counts.items():
        lines.append(f"{name:12} {counts['total']:>14,} parameters, {counts['trainable']:,} trainable")
    shards = "shard" if loader.shard_count == 1 else "shards"
    lines.append(f"{'data':12} {loader.shard_count:>14,} {shards}, {format_count(epoch_size, 'sample')} an epoch")
    epochs = run.total_samples / epoch_size
    steps = "step" if total_steps == 1 else "steps"
    batches = f"of {format_count(config.data.batch_size, 'sample')}" if len(run) == 1 else f"in {len(run)} stages"
    lines.append(f"{'run':12} {total_steps:>14,} {steps} {batches}, {epochs:.2f} epochs")
    lines += [f"device: {describe_device(config, dry_run)}", f"folder: {destination.describe(total_steps)}", *more]
    print_lines(config, lines, dry_run.verbose)


def print_lines(config: Any, lines: list[str], verbose: bool) -> None:
    """Print lines; verbose: in comments, and the whole configuration as YAML after them."""
    for line in lines:
        print(f"# {one_safe_line(line)}".rstrip() if verbose else one_safe_line(line))
    if verbose:
        print(configuration.to_yaml(config), end="")


def describe_device(config: Any, dry_run: DryRun) -> str:
    """Return the line about device, strategy and processes."""
    processes = dry_run.processes or distributed.world_size()
    nodes = dry_run.nodes if dry_run.processes else distributed.nodes()
    device = distributed.device()
    if device.type == "cuda":
        import torch

        name = torch.cuda.get_device_name(device)
    else:
        threads = config.train.threads or max(1, len(os.sched_getaffinity(0)) * nodes // processes)
        name = f"CPU, {format_count(threads, 'thread')} a process"
    where = f" on {format_count(nodes, 'node')}" if nodes > 1 else ""
    return (
        f"{name}; {format_count(processes, 'process')}{where}, train.strategy={config.train.strategy}, "
        f"train.precision={config.train.precision}"
    )
