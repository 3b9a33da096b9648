"""fit(), the only training loop, with optimizer, schedule, logging, evaluation, saving and stopping.

Eight calls lead from the command to the gradient:

    cli.main -> run_with_exit_code -> run_training -> run -> train -> fit -> train_step -> Strategy.backward -> loss.backward()
    (launch/cli/, runtime/entrypoint.py, launch/cli/train.py, runtime/entrypoint.py, train.py, loop.py, step.py, strategies/)

A process that a launcher starts begins at `python -m pretrain`, without launch/: one call fewer. Under DeepSpeed the backward
pass is its engine's. A cached step (train.chunks > 1) has one call more.

A step is a consumed batch, skipped ones included, so that the data position is always step * batch_size. Everything random
in a step is seeded from (seed, step, rank, chunk). Resuming bit for bit needs nothing else.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pretrain import strategies
from pretrain.checkpoints import store
from pretrain.config import check_numbers
from pretrain.data.loader import Loader
from pretrain.data.order import Order
from pretrain.errors import ConfigError, UserError
from pretrain.optim import OptimConfig, WeightAverage, learning_rate
from pretrain.runtime import distributed, memory
from pretrain.runtime.agree import on_main
from pretrain.runtime.console import ProgressBar, log_info
from pretrain.runtime.files import save_weights
from pretrain.runtime.signals import catch_stop_signals
from pretrain.runtime.watchdog import Watchdog
from pretrain.strategies import Precision, Strategy
from pretrain.strategies.batch_norm import refuse_chunks
from pretrain.strategies.blocks import CompileMode
from pretrain.training.flops import FlopCounter
from pretrain.training.metrics import RunLog, check_trackers
from pretrain.training.objective import Objective
from pretrain.training.run_dir import RunFolder
from pretrain.training.step import train_step
from pretrain.training.throughput import ThroughputMeter


@dataclass
class TrainConfig:
    """Run length, precision, parallelism and logging."""

    steps: int = 0
    """Length of the run in optimizer steps. Set exactly one of steps, samples, epochs."""
    samples: int = 0
    """Length in samples seen; rounded up to whole batches."""
    epochs: float = 0.0
    """Length in epochs E of all sources together: ceil(E * samples / batch) steps."""
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
    eval_every: int = 0
    """Steps between evaluations on data.val; 0 = only at the end."""
    log_every: int = 10
    """Steps between lines in metrics.jsonl."""
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
        for name in ("chunks", "save_every", "log_every", "max_skipped"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name}={getattr(self, name)} must be at least 1")
        for name in ("keep", "eval_every", "threads"):
            if getattr(self, name) < 0:
                raise ConfigError(f"train.{name}={getattr(self, name)} must be at least 0")
        check_trackers(self.trackers)
        strategies.check(
            self.strategy,
            self.precision,
            self.compile,
            self.offload,
            self.deepspeed,
            self.replicas,
            self.gradient_compression,
        )
        check_numbers(self, "train", steps="[0, inf)", samples="[0, inf)", epochs="[0, inf)", timeout="(0, inf)")

    def total_steps(self, batch_size: int, order: Order) -> int:
        """Return the number of steps of the whole run."""
        if self.steps:
            return self.steps
        return math.ceil(self.samples / batch_size) if self.samples else order.steps(self.epochs, batch_size)


@dataclass
class RunPlan:
    """The numbers, settings and callbacks that fit() needs besides the components of a run."""

    seed: int
    batch_size: int
    """Samples a step, over all processes."""
    total_steps: int
    train: TrainConfig
    optim: OptimConfig
    resolved_config: dict[str, Any]
    """The whole configuration, for trackers and for messages about memory."""
    identity: dict[str, Any]
    """What must not change between stop and resume: data, seed, batch size."""
    save_files: Callable[[Path], None]
    """Writes config.yaml and tokenizer/ into a checkpoint."""
    primary_metric: str = ""
    """The evaluation metric, higher is better, that decides `best`."""
    flops: FlopCounter | None = None
    """Counts the forward and backward operations of this process's part of a batch, for MFU; None = unknown."""
    convert_weights: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    """Turns trained weights into those of model.safetensors, where the two differ (adapters are merged); None = the same."""


@dataclass
class Outcome:
    """How a run ended: done, or stopped by a signal and resumable."""

    state: Literal["done", "stopped"]
    reason: str
    """Why it stopped; empty when it is done."""
    step: int
    results: dict[str, float]
    """The metrics of the last evaluation."""


def fit(
    plan: RunPlan,
    folder: RunFolder,
    strategy: Strategy,
    model: nn.Module,
    objective: Objective,
    loader: Loader,
    evaluate: Callable[[nn.Module], dict[str, float]] | None,
    resume_from: Path | None,
) -> Outcome:
    """Train `model` up to plan.total_steps. Collective.

    Args:
        model: not wrapped yet; the strategy wraps it.
        resume_from: a checkpoint folder; None = start from the model's present weights.
        evaluate: returns metrics of a model; None = no evaluation.
    """
    run = _Run(plan, folder, strategy, model, loader, evaluate)
    train = plan.train
    with Watchdog(
        train.timeout, lambda reason: folder.write_status("failed", reason, run.step, any_rank=True), folder.path
    ) as watchdog:
        begin = run.restore(resume_from)
        run.leave_branch(resume_from)
        # The loader's processes end by whatever error the loop ends, after the error is recorded.
        with (
            closing(RunLog(folder, plan.resolved_config, train.trackers, train.audit, begin)) as log,
            closing(ProgressBar(plan.total_steps, begin)) as bar,
            catch_stop_signals() as stop,
            closing(iter(loader)) as batches,
            run.record_failure(watchdog),
        ):
            folder.write_status("running", "", begin)
            meter = ThroughputMeter(plan.batch_size, plan.total_steps, begin, strategy.device, plan.flops, train.precision)
            skipped_in_a_row = torch.zeros((), device=strategy.device)
            strategy.model.train()

            for step in range(begin, plan.total_steps):
                # -- one batch, one optimizer step
                watchdog.mark(step, "waiting for data")
                with meter.time_data_wait():
                    batch = next(batches)
                watchdog.mark(step, "computing")
                lr = learning_rate(step, plan.total_steps, plan.optim)
                out = train_step(strategy, objective, batch, train.chunks, lr, (plan.seed, step, distributed.rank()))
                run.step = step + 1
                meter.count_step(batch)
                run.uncounted_skipped += out["skipped"]
                skipped_in_a_row = (skipped_in_a_row + 1) * out["skipped"]
                if run.average is not None:
                    run.average.update(strategy.local_shards().items(), step, 1 - out["skipped"])
                log.write_audit(run.step, batch.keys)
                bar.step(run.step)

                # -- metrics
                is_last = run.step == plan.total_steps
                if run.step % train.log_every == 0 or is_last:
                    run.count_skipped()
                    line = meter.build_line(run.step, lr, out, run.skipped, dict(loader.bad))
                    log.write_metrics(line)
                    bar.log(line, meter.seconds_left(run.step))
                if run.step % train.log_every == 0 or is_last or strategy.device.type == "cpu":
                    run.refuse_divergence(int(skipped_in_a_row))

                # -- evaluation, checkpoint, stop
                is_best = False
                if evaluate is not None and (is_last or (train.eval_every and run.step % train.eval_every == 0)):
                    watchdog.mark(step, "evaluating")
                    with meter.exclude():
                        is_best = run.evaluate_safely(log)
                stop_signal = stop.agreed_signal()
                if is_last or stop_signal or is_best or run.step % train.save_every == 0:
                    watchdog.mark(step, "saving")
                    with meter.exclude():
                        run.save(is_best, is_complete=is_last and not int(skipped_in_a_row))
                if stop_signal and not is_last:
                    reason = f"stopped by {stop_signal}"
                    folder.write_status("stopped", reason, run.step)
                    return Outcome("stopped", reason, run.step, run.results)
            if begin >= plan.total_steps:
                log_info(f"nothing left to train: step {run.step} of {plan.total_steps} is done")
            folder.write_status("done", "", run.step)
            return Outcome("done", "", run.step, run.results)


_TRAINER_STATE: dict[str, Any] = {
    "step": int,
    "skipped": int,
    "best": float | int,
    "identity": dict,
    "results": dict,
    "loader": dict,
}
_LOADER_STATE: dict[str, Any] = {"position": int, "seen": int, "run": int, "bad": dict}


def _load_trainer_state(path: Path) -> dict[str, Any]:
    """Return what `_Run.save` wrote into trainer.pt. Raises UserError where the file is damaged or holds something else."""
    state = store.load_tensors(path)
    for values, kinds in ((state, _TRAINER_STATE), (state.get("loader"), _LOADER_STATE)):
        for name, kind in kinds.items():
            value: Any = values.get(name) if isinstance(values, dict) else None
            if not isinstance(value, kind) or isinstance(value, bool) or (kind is int and not 0 <= value < 1 << 62):
                raise UserError(f"{path} is damaged: {name} is {value!r:.80}")
    numbers = [*state["results"].values(), *state["loader"]["bad"].values()]
    names = [state.get("good"), *state["results"], *state["loader"]["bad"]]
    if not all(isinstance(n, int | float) for n in numbers) or not all(isinstance(n, str | None) for n in names):
        raise UserError(f"{path} is damaged: its results or its counts of bad samples are not numbers by name")
    if (state.get("good") or "step-0") != Path(state.get("good") or "step-0").name:
        raise UserError(f"{path} is damaged: good is {state['good']!r:.80}")
    try:
        json.dumps([state["identity"], state["loader"]["data"], state["loader"]["batch_size"]])  # plain values only
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error!r:.200}") from error
    return state


def _read_trainable_weights(folder: Path, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Return the weights in a folder. Raises UserError where one of `shapes` is missing or differs."""
    weights = store.read_weights(folder)
    for name, shape in shapes.items():
        if name not in weights or weights[name].shape != shape:
            actual = list(weights[name].shape) if name in weights else "not there"
            raise UserError(f"{folder / 'model.safetensors'} does not fit: {name} is {actual}, the model has {list(shape)}")
    return weights


class _Run:
    """The state of one fit(), and how it is saved, restored and evaluated."""

    def __init__(
        self,
        plan: RunPlan,
        folder: RunFolder,
        strategy: Strategy,
        model: nn.Module,
        loader: Loader,
        evaluate: Callable[[nn.Module], dict[str, float]] | None,
    ) -> None:
        self.plan, self.folder, self.strategy, self.model = plan, folder, strategy, model
        self.loader, self.evaluate = loader, evaluate
        self.average: WeightAverage | None = None
        self.step = 0
        self.skipped = 0
        """Steps skipped so far, without those in `uncounted_skipped`."""
        self.uncounted_skipped = torch.zeros((), device=strategy.device)
        """Steps skipped since the device was last read."""
        self.saved: Path | None = None
        """The checkpoint that was saved, or resumed from, last; at the step `saved_step`."""
        self.saved_step = self.saved_skipped = 0
        self.good: Path | None = None
        """The last checkpoint that a step with finite gradients has followed, so that its weights are known to be good."""
        self.best_score = -math.inf
        self.results: dict[str, float] = {}

    # -----------------------------------------------------------------------------------------------------------------
    # Saving and resuming

    def restore(self, checkpoint: Path | None) -> int:
        """Set up the strategy and load the checkpoint, if there is one. Collective.

        Weights are loaded before the strategy wraps the model, the optimizer state after. Returns the step to resume from, 0
        without a checkpoint. Raises ConfigError for a checkpoint of another run.
        """
        trainer_state: dict[str, Any] | None = None
        if checkpoint is not None:
            trainer_state = _load_trainer_state(checkpoint / "state" / "trainer.pt")
            for name, value in self.plan.identity.items():
                if trainer_state["identity"].get(name) != value:
                    raise ConfigError(
                        f"cannot resume {checkpoint}: {name} is {value!r} now and was {trainer_state['identity'].get(name)!r}; "
                        "a run resumes with the same data, seed, batch size and model (resume=never run=NEW starts another)"
                    )
            store.load_weights(self.model, store.read_weights(_training_weights_folder(checkpoint)), checkpoint)
        refuse_chunks(self.model, self.plan.train.chunks)
        self.strategy.setup(self.model)
        self.strategy.compile(self.plan.train.compile)
        if checkpoint is None or trainer_state is None:
            if self.plan.optim.average:
                self.average = WeightAverage(self.strategy.local_shards().items(), self.plan.optim.average)
            return 0
        self.strategy.load(checkpoint / "state")
        if self.plan.optim.average:
            raw = store.read_weights(_training_weights_folder(checkpoint))
            averaged = checkpoint / "state" / "average" if self.plan.convert_weights is not None else checkpoint
            # The strategy shards the average as it shards the weights.
            self.strategy.load_full_weights(_read_trainable_weights(averaged, self.strategy.trainable_shapes()))
            self.average = WeightAverage(self.strategy.local_shards().items(), self.plan.optim.average)
            self.strategy.load_full_weights(raw)
        self.loader.load_state_dict(trainer_state["loader"])
        self.skipped, self.best_score, self.step = trainer_state["skipped"], trainer_state["best"], trainer_state["step"]
        self.results = trainer_state["results"]
        if checkpoint.resolve().parent == self.folder.checkpoints.resolve():
            checkpoint = self.folder.checkpoints / checkpoint.name  # as rotation spells it, however resume=PATH does
        self.saved, self.saved_step, self.saved_skipped = checkpoint, self.step, self.skipped
        good = checkpoint.parent / (trainer_state.get("good") or ".")
        self.good = good if good in store.list_complete(checkpoint.parent) else None
        log_info(f"resuming {checkpoint} at step {self.step} of {self.plan.total_steps}")
        return self.step

    def leave_branch(self, checkpoint: Path | None) -> None:
        """Set aside the checkpoints that are not on the way to `checkpoint`, from which this start resumes. Collective.

        They are those that resume=PATH leaves, and later ones that are damaged. `best` is decided anew if it was one of them.
        Raises OSError.
        """

        def leave() -> bool:
            checkpoints = self.folder.checkpoints
            if checkpoint is not None and (abandoned := store.set_aside(checkpoints, checkpoint, self.step)):
                names = ", ".join(folder.name for folder in abandoned[-3:])
                log_info(f"moved to {checkpoints}/abandoned until a checkpoint of this branch is known to be good: {names}")
            self.folder.record_command(self.step)
            if checkpoint is None or store.read_pointer(checkpoints, "best") is not None:
                return True
            is_best = self.results.get(self.plan.primary_metric) == self.best_score
            if is_best and checkpoint.resolve().parent == checkpoints.resolve():
                store.point_to(checkpoints, "best", checkpoint)
                return True
            return False

        if not on_main(leave):
            self.best_score = -math.inf

    def count_skipped(self) -> None:
        """Add the steps that the device counted as skipped to `skipped`; waits for the device."""
        self.skipped += int(self.uncounted_skipped)
        self.uncounted_skipped.zero_()

    def find_good(self) -> Path | None:
        """Return the last checkpoint that a step with finite gradients has followed.

        Skipped steps change no weights: the first step that is not skipped computes with the weights of the checkpoint.
        """
        self.count_skipped()
        if self.saved is not None and self.skipped - self.saved_skipped < self.step - self.saved_step:
            self.good = self.saved
        return self.good

    def save(self, best: bool = False, is_complete: bool = False) -> None:
        """Save a checkpoint of the present step. Collective.

        is_complete: the run ends here with a finite loss, so that no earlier checkpoint is needed.
        """
        good = self.find_good()
        raw = weights = self.strategy.full_weights()
        resume_weights: dict[str, dict[str, Tensor]] = {}
        """By folder below state/: the weights that resuming reads where model.safetensors holds others."""
        if self.average is not None:
            resume_weights["weights"] = raw
            with self.averaged_weights():
                weights = self.strategy.full_weights()
        if self.plan.convert_weights is not None:
            resume_weights |= {"weights": raw} if self.average is None else {"average": weights}
            weights = self.plan.convert_weights(weights)

        def save_state(folder: Path) -> None:
            self.strategy.save(folder)
            if distributed.is_main():
                trainer_state = {
                    "step": self.step,
                    "identity": self.plan.identity,
                    "loader": self.loader.state_dict(),
                    "skipped": self.skipped,
                    "best": self.best_score,
                    "results": self.results,
                    "good": good.name if good is not None and good.parent == self.folder.checkpoints else None,
                }
                store.save_tensors(folder / "trainer.pt", trainer_state)
                for name, tensors in resume_weights.items():
                    (folder / name).mkdir()
                    save_weights(folder / name / "model.safetensors", tensors)

        self.saved = store.save(
            self.folder.checkpoints,
            self.step,
            weights,
            self.plan.save_files,
            save_state,
            keep=self.plan.train.keep,
            best=best,
            good=good,
            is_good=is_complete,
        )
        self.saved_step, self.saved_skipped = self.step, self.skipped

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Put the averaged weights into the model inside the `with` block, and the trained ones back after it."""
        if self.average is None:
            yield
            return
        local_shards = self.strategy.local_shards()
        trained = {name: shard.clone() for name, shard in local_shards.items()}
        with torch.no_grad():
            torch._foreach_copy_(list(local_shards.values()), list(self.average.weights.values()))
        self.strategy.refresh()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(list(local_shards.values()), list(trained.values()))
            self.strategy.refresh()

    @contextmanager
    def record_failure(self, watchdog: Watchdog) -> Iterator[None]:
        """Write an error raised inside to status.json, explained where memory or a lost process caused it."""
        try:
            yield
        except BaseException as error:
            explained = (
                memory.explain_out_of_memory(
                    error, self.plan.resolved_config, self.step, distributed.world_size(), self.strategy.device
                )
                or error
            )
            explained = watchdog.diagnose(explained) or explained
            reason = str(explained) if isinstance(explained, UserError) else f"{type(explained).__name__}: {explained}"
            if isinstance(explained, KeyboardInterrupt):
                reason = "interrupted before a checkpoint could be written"
            self.folder.write_status("failed", reason, self.step)
            if explained is error:
                raise
            raise explained from error

    # -----------------------------------------------------------------------------------------------------------------
    # Evaluation

    def evaluate_safely(self, log: RunLog) -> bool:
        """Evaluate, and return whether the model is the best so far.

        An evaluation that fails (its shards are gone, for example) loses no training: a checkpoint is saved first.
        """
        try:
            return self._evaluate(log)
        except UserError:
            self.save()
            raise

    def _evaluate(self, log: RunLog) -> bool:
        """Evaluate the averaged weights, log the metrics, and return whether they are the best so far."""
        assert self.evaluate is not None
        with self.averaged_weights(), self.strategy.full_model() as model:
            self.results = self.evaluate(model)
        self.strategy.model.train()
        samples_seen = self.step * self.plan.batch_size
        metrics = {f"val/{name}": value for name, value in self.results.items()}
        log.write_metrics({"step": self.step, "samples_seen": samples_seen, "time": time.time(), **metrics})
        score = self.results.get(self.plan.primary_metric)
        if score is None or not score > self.best_score:
            return False
        self.best_score = score
        return True

    def refuse_divergence(self, skipped_in_a_row: int) -> None:
        """Raise UserError after train.max_skipped consecutive steps with a non-finite gradient."""
        if skipped_in_a_row < self.plan.train.max_skipped:
            return
        good = self.find_good()
        if good is not None:
            resume = f"the last checkpoint with finite losses is {good}: resume={good} goes on from it"
            resume += ", not from the later ones" if good != self.saved else ""
        elif self.saved is not None:
            resume = f"{self.saved} gives no finite losses, and no earlier one is there: start anew with another run=NAME"
        else:
            resume = "no checkpoint was saved before"
        raise UserError(
            f"the gradient was not finite for {skipped_in_a_row} steps in a row (step {self.step}); {resume}; lower "
            f"optim.lr={self.plan.optim.lr}, raise optim.warmup, or use train.precision=bf16 or fp32"
        )


def _training_weights_folder(checkpoint: Path) -> Path:
    """Return the folder with the weights that training resumes from.

    It is state/weights where model.safetensors holds others: averaged weights, or weights with adapters merged.
    """
    folder = checkpoint / "state" / "weights"
    return folder if folder.exists() else checkpoint
