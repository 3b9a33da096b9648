"""A pretraining run: its configuration schema, and train(), which builds components and calls fit()."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from pretrain import config as configuration
from pretrain import model as models
from pretrain import registry, strategies
from pretrain.checkpoints import export, resuming, warm_start
from pretrain.checkpoints.loading import read_widths
from pretrain.config import SEED, check_numbers, component_field, text_field
from pretrain.data import length_groups
from pretrain.data.config import check_sources
from pretrain.data.loader import DataConfig, Loader
from pretrain.data.reinforced.decoders import SampleTeacherDecoder
from pretrain.data.teacher_settings import SAMPLES
from pretrain.data.teachers import TARGET, TeacherDecoder, count_covered, count_numbers
from pretrain.data.text import TextDecoder
from pretrain.data.text_packing import TextPacking
from pretrain.errors import ConfigError, UserError
from pretrain.evaluation.evaluate import EvalConfig, build_result, build_table, evaluate
from pretrain.evaluation.retrieval import list_pairs
from pretrain.model import DualEncoder, ModelSchema
from pretrain.optim import OptimConfig
from pretrain.runtime import distributed
from pretrain.runtime.agree import on_all, on_main
from pretrain.runtime.console import log_info
from pretrain.runtime.entrypoint import DryRun
from pretrain.training import dry_run, run_end, run_tokenizer, stages
from pretrain.training.config import TrainConfig
from pretrain.training.flops import FlopCounter
from pretrain.training.loop import Outcome, fit
from pretrain.training.objective import Contrastive
from pretrain.training.run_dir import RunFolder
from pretrain.training.session import (
    build_encoders,
    build_eval_decoders,
    build_loader,
    build_train_decoders,
    check_batch_and_evaluation,
    open_session,
)

SURVEYED = 1000
"""Samples of the training data for which embeddings of data.teachers are looked up when a run starts."""


@dataclass
class PretrainConfig(ModelSchema):
    """Configuration of a pretraining run: all that a YAML file or a key=value setting can set."""

    run: str = "pretrain"
    """Name of the run, whose folder is runs/NAME; a value with a slash is the path of the folder."""
    seed: int = 0
    """Seeds the order of the data, augmentation, initial weights and dropout."""
    resume: str = "auto"
    """auto = resume from the newest checkpoint in the run folder; never = start anew; PATH = resume from that checkpoint;
    s3://BUCKET/PREFIX = from the newest that train.copy_to has copied there, or one below it."""
    init: Any = text_field(None)
    """Initial weights of towers and projections: a run, a checkpoint or a published CLIP; or one for each tower,
    {image: RUN, text: RUN}. Tower sections that name no architecture take that of `init`."""
    init_partial: bool = False
    """Load those weights of init that fit, and initialize the rest; both are counted. If false, a difference is an error."""
    data: DataConfig = field(default_factory=DataConfig)
    """Shards, captions, batch size and loading."""
    loss: Any = component_field(registry.get_component, "losses", "name", "clip")
    """The contrastive loss."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer, learning-rate schedule and weight averaging."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Run length, precision, parallelism and logging."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation on data.val."""

    def check(self) -> None:
        """Raise ConfigError for combinations that cannot run."""
        warm_start.check(self.init)
        check_batch_and_evaluation(self)
        stages.check(self, distributed.world_size())
        check_numbers(self, "", seed=SEED)


def load_config(path: Path, settings: list[str]) -> PretrainConfig:
    """Load a run's configuration: a file, and key=value settings over it.

    Towers without an architecture take that of `init`.

    All code that runs, checks or measures a run loads its configuration here. Raises ConfigError, UserError.
    """
    values = configuration.load_values(path, settings)
    registry.allow_modules(registry.dotted_names(values))
    values = warm_start.with_init_defaults(values, resuming.find_saved(values, PretrainConfig.run))
    return configuration.build(PretrainConfig, values, str(path))


def train(config: PretrainConfig) -> Outcome:
    """Run one process of a pretraining run, from configuration to outcome. Collective. Raises UserError."""
    with open_session(config) as session:
        has_weights = strategies.has_initial_weights(config.train.strategy)
        components = build(resuming.without_sources(config, session.checkpoint), has_weights)
        models.choose_attention(components.model, session.device, config.train.precision)
        for line in models.describe_weights(components.model, config.init) if session.checkpoint is None else ():
            log_info(line)
        if session.checkpoint is None and config.init is not None:
            on_all(lambda: warm_start.load_weights(components.model, config.init, config.init_partial, components.tokenizer))
        exports = export.describe_formats(components.model, config, components.eval_decoders) if distributed.is_main() else ""
        if session.checkpoint is None:
            log_info(exports)
        portable = models.portable_config(config, components.model)
        resuming.refuse_other_model(portable, components.tokenizer, session.checkpoint, components.model)
        flop_counter = FlopCounter(components.model) if session.device.type == "cuda" else None
        primary_metric = choose_primary_metric(config)
        plan = session.build_plan(
            components.loader, portable, components.tokenizer, primary_metric, model=components.model, flops=flop_counter
        )
        pair_loss = registry.get_component("losses", config.loss.name).build(config.loss).to(session.device)
        if hasattr(pair_loss, "max_logit"):  # read before the strategy, which may shard the model
            pair_loss.max_logit = on_main(components.model.max_logit)
        prepare_teachers(config, components.loader)
        strategy = session.build_strategy()
        shapes = choose_text_shapes(config, components.model, session.device)
        if shapes != "dynamic":
            set_text_shapes(config, components.loader, shapes)
        objective = Contrastive(pair_loss)
        evaluation = build_evaluation(config, components, session.device)
        outcome = fit(
            plan, session.folder, strategy, components.model, objective, components.loader, evaluation, session.checkpoint
        )
        commands = suggest_commands(config, session.folder, outcome, exports)
        table = partial(build_results_table, config)
        run_end.print_end(session.folder, outcome, primary_metric, table, commands)
        return outcome


def choose_primary_metric(config: PretrainConfig) -> str:
    """Return the metric that decides which checkpoint is best: recall at 1 from the first modality of the first pair."""
    first, second = list_pairs(models.tower_configs(config))[0]
    return f"{first}_to_{second}_R@1"


def build_results_table(config: PretrainConfig, evaluated: run_end.Evaluated) -> Table:
    """Build the table that `clipfuse evaluate` would print for a checkpoint, from metrics that are known."""
    return build_table(
        build_result(
            evaluated.checkpoint,
            evaluated.step,
            models.tower_configs(config),
            config.data.val,
            config.eval.tasks,
            evaluated.metrics,
            None,
        )
    )


def suggest_commands(config: PretrainConfig, folder: RunFolder, outcome: Outcome, exports: str) -> list[list[str]]:
    """Return the words of the commands that a user may want next. exports: the line that names the formats."""
    commands, formats = [run_end.report_command(folder)], run_end.named_formats(exports)
    for command in (run_end.evaluate_command, run_end.index_command, run_end.finetune_command):
        commands += command(config, folder)
    if formats:
        commands.append(run_end.export_command(folder, formats[0], outcome.step))
    elif data := run_end.data_option(config):
        commands.append(["clipfuse", "embed", str(folder.path), *data, "--out", str(folder.path / "embeddings")])
    return commands


def describe(config: PretrainConfig, options: DryRun) -> UserError | None:
    """Print what would run (--dry-run), and return why it would be refused; None = it would run. Collective."""
    differences, destination = list(dry_run.list_differences(config)), dry_run.find_destination(config)
    check_sources(config.data.train, config.data.val)
    with run_tokenizer.temporary_tokenizer(config, destination.path, destination.checkpoint):
        components = build(resuming.without_sources(config, destination.checkpoint))
    model = components.model
    lines = []
    if destination.checkpoint is None:
        for line in models.describe_weights(model, config.init):
            log_info(line)
        if config.init is not None:
            warm_start.load_weights(model, config.init, config.init_partial, components.tokenizer)
            lines.append(f"init: {config.init} is there, and its weights fit")
    portable = models.portable_config(config, model)
    destination.check(lambda: resuming.refuse_other_model(portable, components.tokenizer, destination.checkpoint, model))
    plan = dry_run.closed_session(config, destination).build_plan(components.loader, portable, components.tokenizer, "")
    destination.check_identity(plan.identity)
    lines += plan.stages.describe(stages.measure_costs(model, config)) if config.train.stages else []
    lines += dry_run.estimate_lines(config, model, options)
    lines.append(export.describe_formats(model, config, components.eval_decoders))
    dry_run.print_summary(config, differences, destination, model.parameter_counts(), components.loader, options, lines)
    return destination.error


# ---------------------------------------------------------------------------------------------------------------------
# Components


@dataclass
class Components:
    """Tokenizer, model, training data and evaluation decoders of a pretraining run."""

    tokenizer: Any
    model: DualEncoder
    loader: Loader
    eval_decoders: dict[str, Any]
    """Decoders for evaluation, by modality."""


def build(config: PretrainConfig, has_weights: bool = True) -> Components:
    """Build the components of a run, those first that fail fastest.

    Initial weights are equal on every process; has_weights=False: see `models.build`.
    """
    loss = registry.get_component("losses", config.loss.name)
    if any(width > config.model.dim for width in getattr(config.loss, "matryoshka", ())):
        raise ConfigError(f"loss.matryoshka={config.loss.matryoshka}: embeddings have model.dim={config.model.dim} numbers")
    check_targets(config, loss)
    if config.model.logit_scale is None:
        config.model.logit_scale = loss.LOGIT_SCALE
    if config.model.logit_bias is None:
        config.model.logit_bias = loss.LOGIT_BIAS
    tokenizer, model = build_encoders(stages.build_config(config), has_weights)
    stages.prepare_model(model, config)
    models.set_performance(model, config.performance, distributed.device())
    decoders = [build_train_decoders(changed, tokenizer, model) for changed in stages.stage_configs(config)]
    if config.data.teachers is not None:
        teacher = build_teacher_decoder(config)
        for of_stage in decoders:
            of_stage[TARGET] = teacher
    loader = build_loader(config, decoders[-1])
    if config.train.stages:
        loader.set_stages(stages.resolve(config, loader.order.epoch_size).batches, decoders)
    return Components(tokenizer, model, loader, build_eval_decoders(config, tokenizer, model))


def check_targets(config: PretrainConfig, loss: Any) -> None:
    """Refuse settings of `data` that the loss would ignore, and a loss without those that it needs. Raises ConfigError."""
    for name in ("weight", "negatives", "teachers"):
        value = getattr(config.data, name)
        if value is not None and name not in getattr(loss, "TAKES", ()):
            hint = "; loss.name=distill does" if name == "teachers" else ""
            raise ConfigError(f"data.{name}={value!r:.80}: loss.name={config.loss.name} does not account for it{hint}")
        if value is None and name in getattr(loss, "NEEDS", ()):
            raise ConfigError(f"loss.name={config.loss.name} needs data.{name}")
    if config.data.incomplete == "keep":
        if "incomplete" not in getattr(loss, "TAKES", ()):
            raise ConfigError(f"data.incomplete=keep: loss.name={config.loss.name} does not account for it; clip and siglip do")
        if config.data.negatives is not None or config.data.weight is not None or config.loss.exchange == "ring":
            raise ConfigError(
                "data.incomplete=keep goes neither with data.weight and data.negatives, which are read with captions, nor with "
                "loss.exchange=ring"
            )


def build_teacher_decoder(config: PretrainConfig) -> TeacherDecoder | SampleTeacherDecoder:
    """Build the decoder of the embeddings of data.teachers. Collective. Raises ConfigError."""
    if config.data.teachers == SAMPLES:
        return SampleTeacherDecoder(config.data.caption, config.data.teacher_widths)
    from pretrain.embedding import teachers  # needs pyarrow, which other runs do not import

    return TeacherDecoder(teachers.build_readers(on_all(lambda: teachers.find_teachers(config.data.teachers))))


def prepare_teachers(config: PretrainConfig, loader: Loader) -> None:
    """Make the arrays of data.teachers, or find the width of those in samples; log how many of the first samples have some.

    Collective.

    Raises ConfigError where they cover none.
    """
    if config.data.teachers is None:
        return
    teacher = loader.decoders[TARGET]
    if isinstance(teacher, SampleTeacherDecoder):
        if teacher.width is None:
            teacher.width = on_main(lambda: count_numbers(loader.first_samples(1, [TARGET])))
    else:
        from pretrain.embedding import teachers

        teachers.prepare(on_all(lambda: teachers.find_teachers(config.data.teachers)))
    count = min(SURVEYED, loader.order.epoch_size)
    modalities = [name for name in ("text", TARGET) if name in loader.decoders]
    covered = on_main(lambda: count_covered(loader.first_samples(count, modalities)))
    found = ", ".join(f"{found:,} of {total:,} {name} embeddings" for name, (found, total) in covered.items())
    if not any(found for found, _ in covered.values()):
        raise ConfigError(
            f"data.teachers={config.data.teachers!r:.200} has no embedding of the first {count:,} samples of data.train: were "
            "they made of these shards, and of the captions of data.caption?"
        )
    log_info(f"data.teachers: {found} of the first {count:,} samples are there")


def choose_text_shapes(config: PretrainConfig, model: DualEncoder, device: torch.device) -> str:
    """Return how captions are encoded: "dynamic", "static" or "packed" (text.group_shapes). Raises ConfigError."""
    shapes: str = getattr(config.text, "group_shapes", "dynamic")
    if shapes == "dynamic":
        return shapes
    tower = model.tower("text")
    if shapes == "static" and not tower.trims:
        raise ConfigError(
            "text.group_shapes=static: the text tower's embeddings depend on the padding, which groups leave out; use auto"
        )
    if shapes == "packed" and not tower.packs:
        raise ConfigError(
            "text.group_shapes=packed is for causal text towers with text.pool=eot that take positions and an attention mask, "
            "such as clip_text_model; use auto"
        )
    if shapes != "auto":
        return shapes
    shards_weights = config.train.strategy in ("fsdp2", "zero3")  # they would gather the weights anew for every group
    if device.type == "cpu" or not tower.trims:
        return "dynamic"
    return "packed" if tower.packs else "dynamic" if shards_weights else "static"


def set_text_shapes(config: PretrainConfig, loader: Loader, shapes: str) -> None:
    """Let the loader divide captions into groups of fixed shapes, or pack them. Collective.

    The shapes are chosen from the first captions. They are a function of data, seed and captions per batch, so a run that
    resumes has the same. Raises UserError.
    """
    for decoders, batches in zip(loader.stage_decoders, loader.batches.ranges, strict=True):
        _set_text_shapes(config, loader, shapes, decoders, batches.size)


def _set_text_shapes(config: PretrainConfig, loader: Loader, shapes: str, decoders: Mapping[str, Any], batch_size: int) -> None:
    """Set the shapes of one stage. decoders: those of the stage, by modality. batch_size: over all processes."""
    decoder = decoders["text"]
    assert isinstance(decoder, TextDecoder)
    count, length = min(length_groups.SAMPLES, loader.order.epoch_size), decoder.length
    histogram = on_main(
        lambda: length_groups.count_lengths(loader.first_samples(count, ["text"], decoders).masks["text"], length)
    )
    texts = batch_size // distributed.world_size() // config.train.chunks * decoder.texts_per_sample
    if shapes == "packed":
        packing = decoder.length_groups = TextPacking(histogram)
        log_info(f"{texts:,} captions are packed into {packing.row_counts(texts)[0]:,} rows of {length} tokens")
        return
    groups = decoder.length_groups = length_groups.LengthGroups(histogram, config.text.static_groups)
    described = ", ".join(f"{n:,} x {tokens} tokens" for n, tokens in groups.shapes(texts))
    log_info(f"{texts:,} captions are encoded in groups of {described}")


def build_evaluation(
    config: PretrainConfig, components: Components, device: torch.device
) -> Callable[[Any], dict[str, float]] | None:
    """Build a function that evaluates a model on data.val; None if data.val is not set."""
    if not config.data.val:
        return None
    val, precision, cache = config.data.val, config.train.precision, config.data.build_cache()
    widths = read_widths(vars(config.loss), config.model.dim)
    return lambda model: evaluate(model, components.eval_decoders, val, config.eval, device, precision, cache, widths=widths)
