"""fit(): the only training loop. It owns optimizer, schedule, logging, evaluation, saving and stopping.

Eight calls lead from the command to the gradient:

    cli.main -> run_with_exit_code -> run_training -> run -> train -> fit -> train_step -> Strategy.backward -> loss.backward()
    (launch/cli/, runtime/entrypoint.py, launch/cli/train.py, runtime/entrypoint.py, train.py, loop.py, step.py, strategies/)

A process that a launcher starts begins at `python -m pretrain`, without launch/: one call less. DeepSpeed's backward is its
engine's, and a cached step (train.chunks > 1) has one call more.

A step is a consumed batch, skipped ones included, so that the data position is always step * batch_size. Everything random
in a step is seeded from (seed, step, rank, chunk). That is all there is to resuming bit for bit.
"""

from __future__ import annotations

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
from pretrain.data.loader import Batch, Loader
from pretrain.data.order import Order
from pretrain.errors import ConfigError, UserError
from pretrain.optim import OptimConfig, WeightAverage, learning_rate
from pretrain.runtime import distributed, memory
from pretrain.runtime.console import ProgressBar, log_info
from pretrain.runtime.files import save_weights
from pretrain.runtime.signals import catch_stop_signals
from pretrain.runtime.watchdog import Watchdog
from pretrain.strategies import Precision, Strategy
from pretrain.strategies.batch_norm import refuse_chunks
from pretrain.training.metrics import RunLog, check_trackers
from pretrain.training.objective import Objective
from pretrain.training.run_dir import RunFolder
from pretrain.training.step import train_step
from pretrain.training.throughput import Meter


@dataclass
class TrainConfig:
    """How long a run is, how precise, how spread, how often it speaks."""

    steps: int = 0
    """Length of the run in optimizer steps. Exactly one of steps, samples, epochs is given."""
    samples: int = 0
    """Length in samples seen; rounded up to whole batches."""
    epochs: float = 0.0
    """Length in epochs E of all sources together: ceil(E * samples / batch) steps."""
    precision: Precision = "fp32"
    """fp32, bf16 or fp16 matrix products; weights and moments stay float32."""
    strategy: str = "single"
    """How the model is spread over processes: single (one process), ddp (a copy on each), fsdp2 (weights, gradients and
    moments cut into shares), zero1 (moments), zero2 (and gradients), zero3 (and weights) by DeepSpeed."""
    offload: bool = False
    """zero1 to zero3: keep moments (and under zero3 the weights) in CPU memory and step there; slower, for large models."""
    deepspeed: str | None = None
    """zero1 to zero3: a JSON file with DeepSpeed's settings of how bytes move (launch/deepspeed/); null = ours."""
    chunks: int = 1
    """Divides each process's share of the batch for memory only: same gradient, same steps (cached step)."""
    save_every: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 3
    """Newest checkpoints to keep beside the best one; 0 = all."""
    eval_every: int = 0
    """Steps between evaluations on data.val; 0 = only at the end."""
    log_every: int = 10
    """Steps between lines in metrics.jsonl."""
    audit: bool = False
    """Write the keys of every consumed sample to audit-RANK.jsonl."""
    compile: bool = False
    """torch.compile the model (minutes at the start, faster steps on GPUs)."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Trackers of accelerate that get the metrics: tensorboard, wandb, mlflow, ...; [] = none."""
    threads: int = 0
    """CPU threads per process; 0 = this machine's cores shared by its processes. Resuming bit for bit needs the same number."""
    max_skipped: int = 10
    """Steps in a row with a non-finite gradient after which the run stops with an error."""
    timeout: float = 600.0
    """Seconds after which a collective without answer (a dead or hung process) ends the run."""

    def check(self) -> None:
        """Refuses impossible lengths and intervals."""
        given = [name for name in ("steps", "samples", "epochs") if getattr(self, name) != 0]
        if len(given) != 1:
            said = " and ".join(f"train.{name}={getattr(self, name)}" for name in given) or "none of them"
            raise ConfigError(f"give exactly one of train.steps, train.samples, train.epochs; given: {said}")
        if getattr(self, given[0]) < 0:
            raise ConfigError(f"train.{given[0]}={getattr(self, given[0])} must be above 0")
        for name in ("chunks", "save_every", "log_every", "max_skipped"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name}={getattr(self, name)} must be at least 1")
        for name in ("keep", "eval_every", "threads"):
            if getattr(self, name) < 0:
                raise ConfigError(f"train.{name}={getattr(self, name)} must be at least 0")
        check_trackers(self.trackers)
        strategies.check(self.strategy, self.precision, self.compile, self.offload, self.deepspeed)

    def total_steps(self, batch_size: int, order: Order) -> int:
        """Steps of the whole run."""
        if self.steps:
            return self.steps
        return math.ceil(self.samples / batch_size) if self.samples else order.steps(self.epochs, batch_size)


@dataclass
class RunPlan:
    """All that fit() needs to know about a run beside its moving parts."""

    seed: int
    batch_size: int
    """Samples a step, over all processes."""
    total_steps: int
    train: TrainConfig
    optim: OptimConfig
    resolved: dict[str, Any]
    """The whole configuration, for trackers."""
    identity: dict[str, Any]
    """What must not change between stop and resume: data, seed, batch size."""
    files: Callable[[Path], None]
    """Writes config.yaml and tokenizer/ into a checkpoint."""
    primary: str = ""
    """The evaluation number, higher is better, that decides `best`."""
    flops: Callable[[Batch], float] | None = None
    """Forward and backward operations of this process's share of a batch, for MFU; None = unknown."""
    plain: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    """Trained weights -> those that model.safetensors holds, where the two differ (adapters are merged); None = the same."""


@dataclass
class Outcome:
    """How a run ended: done, or stopped by a signal and resumable."""

    state: Literal["done", "stopped"]
    why: str
    step: int
    results: dict[str, float]


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
    """Trains `model` from `resume_from` (or from where it is) to plan.total_steps. Collective; one run a folder."""
    run = _Run(plan, folder, strategy, model, loader, evaluate)
    train = plan.train
    with Watchdog(train.timeout, lambda why: folder.status("failed", why, run.step, anyone=True)) as watchdog:
        begin = run.restore(resume_from)
        folder.status("running", "", begin)
        log = RunLog(folder, plan.resolved, train.trackers, train.audit, begin)
        bar = ProgressBar(plan.total_steps, begin)
        with closing(log), closing(bar), run.record_failure(watchdog), catch_stop_signals() as stop:
            batches = iter(loader)
            meter = Meter(plan.batch_size, plan.total_steps, begin, strategy.device, plan.flops)
            in_a_row = torch.zeros((), device=strategy.device)
            skipped = torch.zeros((), device=strategy.device)
            strategy.model.train()

            for step in range(begin, plan.total_steps):
                # -- one batch, one optimizer step
                watchdog.mark(step, "waiting for data")
                with meter.waiting():
                    batch = next(batches)
                watchdog.mark(step, "computing")
                lr = learning_rate(step, plan.total_steps, plan.optim)
                out = train_step(strategy, objective, batch, train.chunks, lr, (plan.seed, step, distributed.rank()))
                run.step = step + 1
                meter.stepped(batch)
                skipped += out["skipped"]
                in_a_row = (in_a_row + 1) * out["skipped"]
                if run.average is not None:
                    run.average.update(strategy.local_shards().items(), step, 1 - out["skipped"])
                log.audit(run.step, batch.keys)
                bar.step(run.step)

                # -- numbers
                last = run.step == plan.total_steps
                if run.step % train.log_every == 0 or last:
                    run.skipped += int(skipped)
                    skipped.zero_()
                    line = meter.line(run.step, lr, out, run.skipped, dict(loader.bad))
                    log.metrics(line)
                    bar.log(line, meter.eta(run.step))
                if run.step % train.log_every == 0 or last or strategy.device.type == "cpu":
                    run.refuse_if_lost(int(in_a_row))

                # -- evaluation, checkpoint, stop
                best = False
                if evaluate is not None and (last or (train.eval_every and run.step % train.eval_every == 0)):
                    watchdog.mark(step, "evaluating")
                    with meter.paused():
                        best = run.evaluate_or_save(log)
                stopping = stop.agreed_signal()
                if last or stopping or best or run.step % train.save_every == 0:
                    watchdog.mark(step, "saving")
                    with meter.paused():
                        run.skipped += int(skipped)
                        skipped.zero_()
                        run.save(best)
                if stopping and not last:
                    why = f"stopped by {stopping}"
                    folder.status("stopped", why, run.step)
                    return Outcome("stopped", why, run.step, run.results)
            if begin >= plan.total_steps:
                log_info(f"nothing left to do: step {run.step} of {plan.total_steps} is done")
            folder.status("done", "", run.step)
            return Outcome("done", "", run.step, run.results)


class _Run:
    """The state of one fit()."""

    def __init__(
        self,
        plan: RunPlan,
        folder: RunFolder,
        strategy: Strategy,
        model: nn.Module,
        loader: Loader,
        evaluate: Callable[[nn.Module], dict[str, float]] | None,
    ) -> None:
        self.plan, self.folder, self.strategy, self.bare = plan, folder, strategy, model
        self.loader, self.evaluate = loader, evaluate
        self.average: WeightAverage | None = None
        self.step = 0
        self.skipped = 0
        self.best = -math.inf
        self.saved = -1
        self.results: dict[str, float] = {}

    # -----------------------------------------------------------------------------------------------------------------
    # There and back

    def restore(self, source: Path | None) -> int:
        """Weights before wrapping, optimizer after; returns the step to go on from."""
        trainer: dict[str, Any] | None = None
        if source is not None:
            trainer = store.load_tensors(source / "state" / "trainer.pt")
            for name, value in self.plan.identity.items():
                if trainer["identity"].get(name) != value:
                    raise ConfigError(
                        f"cannot resume {source}: {name} is {value!r} now and was {trainer['identity'].get(name)!r}; "
                        "a run goes on with the same data, seed, batch size and model (resume=never run=NEW starts another)"
                    )
            store.load_weights(self.bare, store.read_weights(_raw(source)), source)
        refuse_chunks(self.bare, self.plan.train.chunks)
        self.strategy.setup(self.bare)
        if self.plan.train.compile:
            self.strategy.compile()
        if source is None or trainer is None:
            if self.plan.optim.average:
                self.average = WeightAverage(self.strategy.local_shards().items(), self.plan.optim.average)
            return 0
        self.strategy.load(source / "state")
        if self.plan.optim.average:
            raw = store.read_weights(_raw(source))
            averaged = source / "state" / "average" if self.plan.plain is not None else source
            self.strategy.load_full_weights(store.read_weights(averaged))  # cuts the average the way the strategy cuts weights
            self.average = WeightAverage(self.strategy.local_shards().items(), self.plan.optim.average)
            self.strategy.load_full_weights(raw)
        self.loader.load_state_dict(trainer["loader"])
        self.skipped, self.best, self.step = trainer["skipped"], trainer["best"], trainer["step"]
        self.results, self.saved = trainer["results"], trainer["step"]
        log_info(f"resuming {source} at step {self.step} of {self.plan.total_steps}")
        return self.step

    def save(self, best: bool = False) -> None:
        """A checkpoint of the step reached."""
        raw = weights = self.strategy.full_weights()
        kept: dict[str, dict[str, Tensor]] = {}
        """By folder below state/: what resuming reads where model.safetensors holds something else."""
        if self.average is not None:
            kept["weights"] = raw
            with self.averaged():
                weights = self.strategy.full_weights()
        if self.plan.plain is not None:
            kept |= {"weights": raw} if self.average is None else {"average": weights}
            weights = self.plan.plain(weights)

        def state(folder: Path) -> None:
            self.strategy.save(folder)
            if distributed.is_main():
                trainer = {
                    "step": self.step,
                    "identity": self.plan.identity,
                    "loader": self.loader.state_dict(),
                    "skipped": self.skipped,
                    "best": self.best,
                    "results": self.results,
                }
                store.save_tensors(folder / "trainer.pt", trainer)
                for name, tensors in kept.items():
                    (folder / name).mkdir()
                    save_weights(folder / name / "model.safetensors", tensors)

        keep = self.plan.train.keep
        store.save(self.folder.checkpoints, self.step, weights, self.plan.files, state, keep=keep, best=best)
        self.saved = self.step

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model holds the averaged weights inside."""
        if self.average is None:
            yield
            return
        local_shards = self.strategy.local_shards()
        kept = {name: piece.clone() for name, piece in local_shards.items()}
        with torch.no_grad():
            torch._foreach_copy_(list(local_shards.values()), list(self.average.weights.values()))
        self.strategy.refresh()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(list(local_shards.values()), list(kept.values()))
            self.strategy.refresh()

    @contextmanager
    def record_failure(self, watchdog: Watchdog) -> Iterator[None]:
        """Write an error that is raised inside to status.json; explain those of memory and of lost processes."""
        try:
            yield
        except BaseException as error:
            explained = (
                memory.explain_out_of_memory(
                    error, self.plan.resolved, self.step, distributed.world_size(), self.strategy.device
                )
                or error
            )
            explained = watchdog.diagnose(explained) or explained
            why = str(explained) if isinstance(explained, UserError) else f"{type(explained).__name__}: {explained}"
            self.folder.status("failed", why, self.step)
            if explained is error:
                raise
            raise explained from error

    # -----------------------------------------------------------------------------------------------------------------
    # Evaluation

    def evaluate_or_save(self, log: RunLog) -> bool:
        """An evaluation that fails (its shards are gone, for example) costs no training."""
        try:
            return self._evaluate(log)
        except UserError:
            self.save()
            raise

    def _evaluate(self, log: RunLog) -> bool:
        """Runs the evaluation; whether it is the best so far."""
        assert self.evaluate is not None
        with self.averaged(), self.strategy.full_model() as model:
            self.results = self.evaluate(model)
        self.strategy.model.train()
        seen = self.step * self.plan.batch_size
        named = {f"val/{name}": value for name, value in self.results.items()}
        log.metrics({"step": self.step, "samples_seen": seen, "time": time.time(), **named})
        score = self.results.get(self.plan.primary)
        if score is None or not score > self.best:
            return False
        self.best = score
        return True

    def refuse_if_lost(self, in_a_row: int) -> None:
        if in_a_row >= self.plan.train.max_skipped:
            raise UserError(
                f"the gradient was not finite for {in_a_row} steps in a row (step {self.step}); the last checkpoint is "
                f"intact; lower optim.lr={self.plan.optim.lr}, raise optim.warmup, or use train.precision=bf16 or fp32"
            )


def _raw(source: Path) -> Path:
    """The folder of a checkpoint's weights as training left them: apart where model.safetensors holds their average."""
    apart = source / "state" / "weights"
    return apart if apart.exists() else source
