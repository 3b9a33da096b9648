"""Stages within one pretraining run (train.stages): smaller images, shorter texts and larger batches first, the full size last.

    train:
      stages:
        - {until: 0.9, image.size: 96, image.patch_dropout: 0.5, text.length: 32, data.batch_size: 512, optim.lr: 1.0e-3}

The configuration itself is the last stage, and the model is built for it. What a stage does not set is as there. Which stage a
step belongs to is a pure function of the configuration and the number of samples of an epoch, so that resuming needs no state.

Source: CLIPA (Li et al. 2023, arXiv:2305.07017).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from fractions import Fraction
from math import ceil
from typing import Any, NamedTuple

from pretrain.data.batch_sizes import BatchRange, BatchSizes
from pretrain.errors import ConfigError, closest
from pretrain.optim import OptimConfig
from pretrain.printable import format_count
from pretrain.training.flops import FlopCounter, build_sample

SETTINGS: dict[str, type] = {
    "image.size": int,
    "image.patch_dropout": float,
    "text.length": int,
    "data.batch_size": int,
    "optim.lr": float,
}
"""What a stage may set, and the type of its value."""


class StageSettings(NamedTuple):
    """An entry of train.stages."""

    until: Fraction | int
    """The end of the stage: a fraction of the run, or a number of samples."""
    changes: dict[str, Any]
    """By key of SETTINGS."""


@dataclass(frozen=True)
class Stage:
    """Consecutive steps of a run with the same sizes."""

    number: int
    """From 1."""
    begin: int
    """Its first step, from 0."""
    end: int
    """The first step after it."""
    position: int
    """Samples of all steps before it."""
    batch_size: int
    optim: OptimConfig
    patch_dropout: float | None
    """Of the image tower; None where the run has no stages."""
    config: Any
    """The configuration with what the stage changes."""

    @property
    def steps(self) -> int:
        """The number of its steps."""
        return self.end - self.begin


class RunStages(Sequence[Stage]):
    """The stages of a run, at least one."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = tuple(stages)
        self.batches = BatchSizes([BatchRange(s.begin, s.position, s.batch_size) for s in stages])
        self._begins = [stage.begin for stage in stages]

    @classmethod
    def constant(cls, steps: int, batch_size: int, optim: OptimConfig) -> RunStages:
        """Return the only stage of a run that has no stages."""
        return cls([Stage(1, 0, steps, 0, batch_size, optim, None, None)])

    def __len__(self) -> int:
        return len(self._stages)

    def __getitem__(self, index: Any) -> Any:
        return self._stages[index]

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self._stages[-1].end

    @property
    def total_samples(self) -> int:
        """Samples of the whole run."""
        return self.batches.position(self.total_steps)

    def at(self, step: int) -> Stage:
        """Return the stage of a step, from 0; the last one from the end of the run on."""
        return self._stages[bisect_right(self._begins, step) - 1]

    def identity(self) -> str | None:
        """Return what must not change when the run resumes: where batches change their size; None where they do not."""
        sizes = [stage.batch_size for stage in self._stages]
        changes = [stage for stage, before in zip(self._stages, [0, *sizes], strict=False) if stage.batch_size != before]
        if len(changes) == 1:
            return None
        return ", ".join(f"{s.batch_size} samples a step from step {s.begin}" for s in changes)

    def describe(self, costs: Sequence[float] | None = None) -> list[str]:
        """Return a line for each stage; none where the run has one.

        costs: floating-point operations of a sample in each stage.
        """
        if len(self) == 1:
            return []
        totals = [c * s.steps * s.batch_size for c, s in zip(costs or [0.0] * len(self), self._stages, strict=True)]
        lines = []
        for i, stage in enumerate(self._stages):
            size = f"{stage.steps:,} x {format_count(stage.batch_size, 'sample')}"
            line = f"stage {stage.number} of {len(self)}: steps {stage.begin + 1:,} to {stage.end:,} ({size})"
            changes = parse(stage.config.train.stages)[i].changes if i < len(self) - 1 else {}
            line += "".join(f", {key}={value}" for key, value in changes.items()) or ", the configuration itself"
            if costs is not None:
                relative = f", {costs[i] / max(1.0, costs[-1]):.0%} of the last stage's" if i < len(self) - 1 else ""
                share = totals[i] / max(1.0, sum(totals))
                line += f"; {costs[i] / 1e9:,.3g} GFLOP a sample{relative}; {share:.0%} of the run's computation"
            lines.append(line)
        return lines


# ---------------------------------------------------------------------------------------------------------------------
# Settings


def parse(entries: Sequence[Mapping[str, Any]]) -> list[StageSettings]:
    """Return the entries of train.stages, with values of their types. Raises ConfigError."""
    stages: list[StageSettings] = []
    for i, entry in enumerate(entries):
        values, where = _flatten(entry), f"train.stages[{i}]"
        if "until" not in values:
            raise ConfigError(f"{where}={dict(entry)} needs until, where the stage ends: a fraction of the run, or samples")
        until = _parse_until(values.pop("until"), where)
        for key in values:
            if key not in SETTINGS:
                valid = ["until", *SETTINGS]
                raise ConfigError(f"{where} has no key {key!r}{closest(key, valid)}; valid keys are {', '.join(valid)}")
        if not values:
            raise ConfigError(f"{where}={dict(entry)} changes nothing: set one of {', '.join(SETTINGS)}")
        changes = {key: _parse_value(key, values[key], where) for key in SETTINGS if key in values}
        before = stages[-1].until if stages else 0
        if isinstance(until, Fraction) == isinstance(before, Fraction) and until <= before:
            raise ConfigError(
                f"{where}.until={entry['until']} is not after that of the stage before it ({entries[i - 1]['until']}): give "
                "stages in the order of the run"
            )
        stages.append(StageSettings(until, changes))
    return stages


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return values by dotted key: {image: {size: 96}} is {image.size: 96}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _parse_until(value: Any, where: str) -> Fraction | int:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and 0 < value < 1:
        return Fraction(str(value))
    if is_number and value > 1 and value == int(value):
        return int(value)
    raise ConfigError(
        f"{where}.until={value!r} must be a fraction of the run, above 0 and below 1, or a whole number of samples above 1"
    )


def _parse_value(key: str, value: Any, where: str) -> Any:
    kind = SETTINGS[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or (kind is int and value != int(value)):
        raise ConfigError(f"{where}.{key}={value!r} must be {'a whole number' if kind is int else 'a number'}")
    return kind(value)


def stage_configs(config: Any) -> list[Any]:
    """Return the configuration of each stage, the last one the configuration itself. Raises ConfigError."""
    configs = []
    for i, settings in enumerate(parse(config.train.stages)):
        changed = config
        for key, value in settings.changes.items():
            section, _, name = key.partition(".")
            old = getattr(config, section, None)
            if not is_dataclass(old) or name not in {f.name for f in fields(old)}:
                raise ConfigError(f"train.stages[{i}].{key}={value}: the configuration has no {key}")
            changed = replace(changed, **{section: replace(getattr(changed, section), **{name: value})})
        for section in (changed.image, changed.text, changed.data, changed.optim):
            if hasattr(section, "check"):
                _check_section(section, i)
        configs.append(changed)
    return [*configs, config]


def _check_section(section: Any, i: int) -> None:
    try:
        section.check()
    except ConfigError as error:
        raise ConfigError(f"train.stages[{i}]: {error}") from error


def check(config: Any, processes: int) -> None:
    """Refuse stages that cannot run, before anything is built. Raises ConfigError."""
    for i, changed in enumerate(stage_configs(config)[:-1]):
        where = f"train.stages[{i}]"
        if changed.data.batch_size % (processes * config.train.chunks):
            raise ConfigError(
                f"{where}.data.batch_size={changed.data.batch_size} must be divisible by processes x train.chunks = "
                f"{processes} x {config.train.chunks}"
            )
        length, longest = (getattr(text, "length", 0) for text in (changed.text, config.text))
        if length > longest:
            raise ConfigError(f"{where}.text.length={length} is above text.length={longest}, for which the model has positions")


# ---------------------------------------------------------------------------------------------------------------------
# The stages of a run


def resolve(config: Any, epoch_size: int) -> RunStages:
    """Return the stages of a run with their steps; one where train.stages is empty.

    `until` rounds up to whole batches of its stage. A fraction is one of the samples, or of the steps where train.steps is the
    length of the run. The length is exact: a run of train.samples or train.epochs reads as many, rounded up to whole batches.

    epoch_size: samples of all sources together. Raises ConfigError for a stage without steps.
    """
    train = config.train
    total = Fraction(train.samples) if train.samples else Fraction(str(train.epochs)) * epoch_size
    configs, settings = stage_configs(config), parse(train.stages)
    stages: list[Stage] = []
    begin = position = 0
    for i, changed in enumerate(configs):
        size = changed.data.batch_size
        until = settings[i].until if i < len(settings) else Fraction(1)
        if train.steps and isinstance(until, Fraction):
            end = ceil(until * train.steps)
        else:
            end = begin + ceil((until * (total if isinstance(until, Fraction) else 1) - position) / size)
        if end <= begin and settings:
            _refuse_empty(i, settings, begin, position)
        dropout = getattr(changed.image, "patch_dropout", None) if settings else None
        stages.append(Stage(i + 1, begin, end, position, size, changed.optim, dropout, changed))
        position += (end - begin) * size
        begin = end
    return RunStages(stages)


def _refuse_empty(i: int, settings: list[StageSettings], begin: int, position: int) -> None:
    until = float(settings[min(i, len(settings) - 1)].until)
    reached = f"the stages before it end at step {begin:,}, after {format_count(position, 'sample')}"
    if i < len(settings):
        raise ConfigError(f"train.stages[{i}].until={until:g} leaves the stage no step: {reached}")
    raise ConfigError(
        f"train.stages[{i - 1}].until={until:g} leaves the last stage, the configuration itself, no step: {reached}; lower it, "
        "or make the run longer"
    )


def build_config(config: Any) -> Any:
    """Return the configuration to build the model from: where any stage drops patches, the image tower is built to."""
    rates = [getattr(changed.image, "patch_dropout", 0.0) for changed in stage_configs(config)]
    if max(rates) == rates[-1]:
        return config
    return replace(config, image=replace(config.image, patch_dropout=max(rates)))


def prepare_model(model: Any, config: Any) -> None:
    """Let the towers of a DualEncoder take the inputs of every stage. Raises ConfigError where one cannot."""
    configs = stage_configs(config)
    for i, changed in enumerate(configs[:-1]):
        if changed.image is not None and changed.image.size != config.image.size:
            try:
                model.tower("image").accept_size(changed.image.size)
            except ConfigError as error:
                raise ConfigError(f"train.stages[{i}].image.size={changed.image.size}: {error}") from error
    if len(configs) > 1:
        set_patch_dropout(model, getattr(config.image, "patch_dropout", None))


def measure_costs(model: Any, config: Any) -> list[int]:
    """Return the floating-point operations of a sample in each stage, forward and backward, with texts of full length.

    model: a DualEncoder that was prepared; it does not change.
    """
    counter = FlopCounter(model)
    audio_samples = getattr(model.tower("audio"), "samples", None) if "audio" in model.towers else None
    texts = config.data.draw + (config.data.draw_negatives if config.data.negatives is not None else 0)
    costs = []
    for changed in stage_configs(config):
        size, length = (getattr(changed.image, "size", None), getattr(changed.text, "length", None))
        counter.patch_dropout = getattr(changed.image, "patch_dropout", None)
        counter.add(build_sample(size, length, texts, audio_samples))
        costs.append(counter.take())
    return costs


def set_patch_dropout(model: Any, fraction: float | None) -> None:
    """Set the fraction of patches that the image towers inside a model leave out in training; None = leave it as it is."""
    if fraction is not None:
        for module in model.modules():
            if getattr(module, "modality", None) == "image":
                module.set_patch_dropout(fraction)
