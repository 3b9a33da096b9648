"""fit(), the only training loop, with optimizer, schedule, logging, evaluation, saving and stopping.

Eight calls lead from the command to the gradient:

    cli.main -> run_with_exit_code -> run_training -> run -> train -> fit -> train_step -> Strategy.backward -> loss.backward()
    (launch/cli/, runtime/entrypoint.py, launch/cli/train.py, runtime/entrypoint.py, train.py, loop.py, step.py, strategies/)

A process that a launcher starts begins at `python -m pretrain`, without launch/: one call fewer. Under DeepSpeed the backward
pass is its engine's. A cached step (train.chunks > 1) has one call more.

A step is a consumed batch, skipped ones included, so that the data position is a function of the step: step * batch_size, or
what train.stages say. Everything random in a step is seeded from (seed, step, rank, chunk). Resuming bit for bit needs nothing
else.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from pretrain.data.loader import Loader
from pretrain.optim import learning_rate
from pretrain.runtime import distributed
from pretrain.runtime.console import ProgressBar, log_info
from pretrain.runtime.signals import catch_stop_signals
from pretrain.runtime.watchdog import Watchdog
from pretrain.strategies import Strategy
from pretrain.training.config import RunPlan
from pretrain.training.metrics import RunLog
from pretrain.training.objective import Objective
from pretrain.training.profile import DATA, FORWARD, OPTIMIZER, SAVING, StepProfiler
from pretrain.training.rank_times import RankTimes, TimedObjective
from pretrain.training.replaced_samples import ReplacedSamples
from pretrain.training.run_dir import RunFolder
from pretrain.training.run_state import Run
from pretrain.training.spikes import GuardedObjective
from pretrain.training.stages import Stage, set_patch_dropout
from pretrain.training.step import train_step
from pretrain.training.throughput import ThroughputMeter


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
    run = Run(plan, folder, strategy, model, loader, evaluate)
    train = plan.train
    with Watchdog(
        train.timeout,
        lambda reason: folder.write_status("failed", reason, run.step, any_rank=True),
        folder.path,
        run.saves.writer.wait_briefly,
    ) as watchdog:
        begin = run.restore(resume_from)
        run.leave_branch(resume_from)
        run.saves.prepare(plan)
        if begin < plan.total_steps:  # a finished run keeps the configuration that trained it
            plan.write_config()  # whatever refuses a checkpoint has done so
        # The loader's processes and a save in flight end by whatever error the loop ends, after the error is recorded.
        with (
            run.saves,
            closing(RunLog(folder, plan.resolved_config, train.trackers, train.audit, begin)) as log,
            closing(ReplacedSamples(folder.path, loader, begin)) as replaced,
            closing(ProgressBar(plan.total_steps, begin)) as bar,
            closing(StepProfiler(train.profile, folder.path, strategy)) as profiler,
            catch_stop_signals() as stop,
            closing(iter(loader)) as batches,
            run.record_failure(watchdog),
        ):
            folder.write_status("running", "", begin)
            meter = ThroughputMeter(plan.stages.batches, plan.total_steps, begin, strategy.device, plan.flops, train.precision)
            skipped_in_a_row = torch.zeros((), device=strategy.device)
            timed = TimedObjective(objective, strategy.device)
            rank_times = RankTimes(timed, watchdog.describe, loader.workers)
            guarded = GuardedObjective(timed, run.spikes)
            strategy.model.train()

            was_evaluation_due = run.is_evaluation_due
            if was_evaluation_due:  # a signal ended it
                watchdog.mark(begin, "evaluating")
                bar.show("evaluating")
                is_best = run.evaluate_safely(log, stop)
                if run.is_evaluation_due:
                    reason = f"stopped by {stop.agreed_signal()}"
                    folder.write_status("stopped", reason, run.step)
                    return Outcome("stopped", reason, run.step, run.results)
                run.save(is_best, is_last=begin >= plan.total_steps)

            stage: Stage | None = None
            for step in range(begin, plan.total_steps):
                # -- a stage begins, or the run resumes within one
                if stage is not plan.stages.at(step):
                    stage = plan.stages.at(step)
                    set_patch_dropout(strategy.module, stage.patch_dropout)
                    meter.set_patch_dropout(stage.patch_dropout)
                    if step == stage.begin > 0:
                        run.spikes.restart(step + 1)
                # -- one batch, one optimizer step
                watchdog.mark(step, "waiting for data")
                profiler.begin_step(step)
                with meter.time_data_wait(), profiler.phase(DATA):
                    batch = next(batches)
                watchdog.mark(step, "computing")
                lr = learning_rate(step, plan.total_steps, stage.optim)
                seeds = (plan.seed, step, distributed.rank())
                with profiler.phase(FORWARD):
                    out = train_step(strategy, guarded, batch, train.chunks, lr, seeds)
                run.step = step + 1
                meter.count_step(batch)
                run.uncounted_skipped += out["skipped"]
                run.spikes.record(out)
                skipped_in_a_row = (skipped_in_a_row + 1) * out["skipped"]
                if run.average is not None:
                    with profiler.phase(OPTIMIZER):
                        run.average.update(strategy.local_shards().items(), step, 1 - out["skipped"])
                log.write_audit(run.step, batch.keys)
                bar.step(run.step)

                # -- metrics
                is_last = run.step == plan.total_steps
                if run.step % train.log_every == 0 or is_last:
                    row = rank_times.row(meter.wait_seconds, meter.count_steps(run.step))
                    numbers, means = run.average_numbers(out, row)
                    line = meter.build_line(run.step, lr, numbers, run.skipped, loader.bad, loader.filtered)
                    line |= run.spikes.metrics() | ({"stage": stage.number} if len(plan.stages) > 1 else {})
                    replaced.write(run.step)
                    line |= rank_times.compare(means, run.step, line["step_seconds"])
                    log.write_metrics(line)
                    bar.log(line, meter.seconds_left(run.step))
                    if run.spikes.is_due() and run.roll_back():
                        skipped_in_a_row.zero_()
                is_read = run.step % train.log_every == 0 or is_last or strategy.device.type == "cpu"
                if is_read and not run.spikes.can_roll_back():
                    run.refuse_divergence(int(skipped_in_a_row))

                # -- evaluation, checkpoint, stop
                is_best = False
                if evaluate is not None and (is_last or (plan.eval_every and run.step % plan.eval_every == 0)):
                    watchdog.mark(step, "evaluating")
                    bar.show("evaluating")
                    with meter.exclude(), profiler.phase(SAVING):
                        is_best = run.evaluate_safely(log, stop)
                stop_signal = stop.agreed_signal()
                if is_last or stop_signal or is_best or run.step % train.save_every == 0:
                    watchdog.mark(step, "saving")
                    replaced.write(run.step)
                    with meter.exclude(), profiler.phase(SAVING):
                        is_complete = is_last and not int(skipped_in_a_row)
                        run.save(is_best, is_complete, is_last=is_last or bool(stop_signal))
                if stop_signal and (not is_last or run.is_evaluation_due):
                    reason = f"stopped by {stop_signal}"
                    folder.write_status("stopped", reason, run.step)
                    run.saves.finish()
                    return Outcome("stopped", reason, run.step, run.results)
            if begin >= plan.total_steps and not was_evaluation_due:
                log_info(
                    f"nothing left to train: step {run.step} of {plan.total_steps} is done, as {folder.path}/config.yaml says; "
                    "run=NEW trains with other settings"
                )
            folder.write_status("done", "", run.step)
            run.saves.finish()
            return Outcome("done", "", run.step, run.results)
