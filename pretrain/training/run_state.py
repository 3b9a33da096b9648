"""The state of one fit(): how it is saved, restored and evaluated."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.checkpoints import rotation, store
from pretrain.checkpoints.writing import Content, tensors_file, weights_file
from pretrain.data.loader import Loader
from pretrain.errors import UserError
from pretrain.optim import WeightAverage
from pretrain.printable import format_count
from pretrain.runtime import distributed, memory
from pretrain.runtime.agree import on_main
from pretrain.runtime.console import log_info
from pretrain.runtime.signals import EvaluationStop, StopRequest
from pretrain.runtime.watchdog import Watchdog
from pretrain.strategies import Strategy
from pretrain.strategies.batch_norm import refuse_chunks
from pretrain.towers.meta_copy import is_on_meta
from pretrain.training.config import RunPlan
from pretrain.training.metrics import RunLog, describe_results
from pretrain.training.run_dir import RunFolder
from pretrain.training.saving import Save, Saves
from pretrain.training.spikes import SpikeWatch
from pretrain.training.trainer_state import load_trainer_state, read_trainable_weights, refuse_other_identity


class Run:
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
        self._saved_best_score = -math.inf
        """The score of the checkpoint that `best` names."""
        self.saves = Saves(folder.checkpoints, plan.train)
        self.results: dict[str, float] = {}
        self.is_evaluation_due = False
        """Whether a signal ended the evaluation of this step, which is made up for when the run resumes."""
        self.spikes = SpikeWatch(plan.train, strategy.device)

    # -----------------------------------------------------------------------------------------------------------------
    # Saving and resuming

    def restore(self, checkpoint: Path | None) -> int:
        """Set up the strategy and load the checkpoint, if there is one. Collective.

        Weights are loaded before the strategy wraps the model, the optimizer state after. Returns the step to resume from, 0
        without a checkpoint. Raises ConfigError for a checkpoint of another run.
        """
        trainer_state: dict[str, Any] | None = None
        if checkpoint is not None:
            trainer_state = load_trainer_state(checkpoint / "state" / "trainer.pt")
            refuse_other_identity(trainer_state, self.plan.identity, checkpoint)
            if not is_on_meta(self.model):  # else setup() brings the weights
                store.load_weights(self.model, store.read_weights(store.training_weights_folder(checkpoint)), checkpoint)
        refuse_chunks(self.model, self.plan.train.chunks)
        self.strategy.setup(self.model)
        self.strategy.compile(self.plan.train.compile)
        if checkpoint is None or trainer_state is None:
            if self.plan.optim.average:
                self.average = WeightAverage(self.strategy.local_shards().items(), self.plan.optim.average)
            return 0
        self._load_optimizer_and_average(checkpoint)
        if "spikes" in trainer_state:
            self.spikes.load_state_dict(trainer_state["spikes"])
        self.loader.load_state_dict(trainer_state["loader"])
        self.skipped, self.best_score, self.step = trainer_state["skipped"], trainer_state["best"], trainer_state["step"]
        self._saved_best_score = self.best_score
        self.results = trainer_state["results"]
        self.is_evaluation_due = trainer_state.get("is_evaluation_due") is True and self.evaluate is not None
        if checkpoint.resolve().parent == self.folder.checkpoints.resolve():
            checkpoint = self.folder.checkpoints / checkpoint.name  # as rotation spells it, however resume=PATH does
        self.saved, self.saved_step, self.saved_skipped = checkpoint, self.step, self.skipped
        good = checkpoint.parent / (trainer_state.get("good") or ".")
        self.good = good if good in store.list_complete(checkpoint.parent) else None
        log_info(f"resuming {checkpoint} at step {self.step} of {self.plan.total_steps}")
        return self.step

    def _load_optimizer_and_average(self, checkpoint: Path) -> None:
        """Load the optimizer state, and the averaged weights if there are any, while the model has the trained ones."""
        self.strategy.load(checkpoint / "state")
        if self.plan.optim.average:
            raw = store.read_weights(store.training_weights_folder(checkpoint))
            averaged = checkpoint / "state" / "average" if self.plan.convert_weights is not None else checkpoint
            # The strategy shards the average as it shards the weights.
            self.strategy.load_full_weights(read_trainable_weights(averaged, self.strategy.trainable_shapes()))
            self.average = WeightAverage(self.strategy.local_shards().items(), self.plan.optim.average)
            self.strategy.load_full_weights(raw)

    def leave_branch(self, checkpoint: Path | None) -> None:
        """Set aside the checkpoints that are not on the way to `checkpoint`, from which this start resumes. Collective.

        They are those that resume=PATH leaves, and later ones that are damaged. `best` is decided anew if it was one of them.
        Raises OSError.
        """

        def leave() -> bool:
            checkpoints = self.folder.checkpoints
            if checkpoint is not None and (abandoned := rotation.set_aside(checkpoints, checkpoint, self.step)):
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
            self.best_score = self._saved_best_score = -math.inf

    def count_skipped(self) -> None:
        """Add the steps that the device counted as skipped to `skipped`; waits for the device."""
        self.skipped += int(self.uncounted_skipped)
        self.uncounted_skipped.zero_()

    def find_good(self) -> Path | None:
        """Return the last checkpoint that a step with finite gradients has followed.

        Skipped steps change no weights: the first step that is not skipped computes with the weights of the checkpoint.
        """
        self.count_skipped()
        if self.spikes.can_roll_back():
            return self._checkpoint(self.spikes.good)
        if self.saved is not None and self.skipped - self.saved_skipped < self.step - self.saved_step:
            self.good = self.saved
        return self.good

    def save(self, best: bool = False, is_complete: bool = False, is_last: bool = False) -> None:
        """Save a checkpoint of the present step, in the background with train.background_saves. Collective.

        A save that fails is counted, and the run goes on until train.max_failed_saves failed in a row.

        Args:
            best: of all evaluated ones.
            is_complete: the run ends here with a finite loss, so that no earlier checkpoint is needed.
            is_last: nothing else would hold the work. So the checkpoint is there when this returns.

        Raises:
            SaveError: too many saves failed, or the last one.
        """
        self.settle(may_end=not is_last)
        if self.plan.train.on_spike != "ignore":
            (losses,) = distributed.mean_many([self.spikes.pending()])
            self.spikes.judge(losses, self.step)
        if self.step % self.plan.train.save_every == 0:
            self.spikes.note_checkpoint(self.step)
        good = self.find_good()
        content = self._collect(good)
        save = Save(self.step, self.skipped, self._checkpoint(self.step), self.best_score if best else None)
        self.saves.start(save, content, best=best, good=good, is_good=is_complete)
        if is_last or not self.plan.train.background_saves:
            self.settle(is_last=is_last)

    def _collect(self, good: Path | None) -> Content:
        """Return the files of a checkpoint of the present step, whose tensors are copies in host memory. Collective.

        Empty on other ranks than 0.
        """
        optimizer_state = self.strategy.saved_state()
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
        if not distributed.is_main():
            return {}
        trainer_state = {
            "step": self.step,
            "identity": self.plan.identity,
            "loader": self.loader.state_dict(),
            "skipped": self.skipped,
            "best": self.best_score,
            "results": dict(self.results),
            "is_evaluation_due": self.is_evaluation_due,
            "spikes": self.spikes.state_dict(),
            "good": good.name if good is not None and good.parent == self.folder.checkpoints else None,
        }
        return {
            "state/optimizer.pt": tensors_file(optimizer_state),
            "state/trainer.pt": tensors_file(trainer_state),
            **{f"state/{name}/model.safetensors": weights_file(tensors) for name, tensors in resume_weights.items()},
            "model.safetensors": weights_file(weights),
            **self.saves.files,
        }

    def settle(self, is_last: bool = False, may_end: bool = True) -> None:
        """Wait for the save in flight, if there is one, and note whether its checkpoint is there. Collective.

        Args:
            is_last: nothing else would hold the work: a failure ends the run.
            may_end: too many failures in a row end the run.

        Raises:
            SaveError: the save failed, and the run ends for it.
        """
        save = self.saves.wait()
        if save is None:
            return
        if save.is_there():
            self.saved, self.saved_step, self.saved_skipped = save.path, save.step, save.skipped
            self._saved_best_score = self._saved_best_score if save.best_score is None else save.best_score
        else:
            self.best_score = self._saved_best_score
            self.spikes.forget_checkpoint(save.step)
        if save.failure is not None:
            self.saves.report_failure(save.failure, is_last, may_end)

    def _checkpoint(self, step: int) -> Path:
        return self.folder.checkpoints / f"step-{step:07d}"

    # -----------------------------------------------------------------------------------------------------------------
    # Log steps

    def average_numbers(self, out: dict[str, Tensor], row: Tensor) -> tuple[dict[str, float], Tensor]:
        """Return what a step returned, and another tensor, averaged over processes in one collective.

        Judges the losses since the last log step, and counts a save in the background that has ended.
        """
        self.count_skipped()
        names = [name for name in out if name != "skipped"]
        is_saved = torch.full((), float(self.saves.is_done()))  # 1 on rank 0 alone, so that all ranks learn of it
        tensors = [*(out[name] for name in names), self.spikes.pending(), row, is_saved]
        *means, losses, row_mean, is_saved = distributed.mean_many(tensors)
        self.spikes.judge(losses, self.step)
        if is_saved > 0:
            self.settle()
        return {name: float(mean) for name, mean in zip(names, means, strict=True)}, row_mean

    def roll_back(self) -> bool:
        """Go back to the weights and the optimizer state of the last good checkpoint; step and data stay. Collective.

        Returns False where there is no usable checkpoint. Raises UserError after train.max_rollbacks to the same one.
        """
        self.settle()
        spikes, checkpoint = self.spikes, self._checkpoint(self.spikes.good)
        cause = spikes.describe_cause(self.step)
        error = on_main(lambda: store.integrity_error(checkpoint)) if spikes.good else "none is known to be good"
        if error:
            log_info(f"{cause}; there is no checkpoint to go back to ({error}), so the run goes on")
            spikes.close_spike()
            return False
        if spikes.returns >= spikes.max_rollbacks:
            raise UserError(
                f"{cause}, after {format_count(spikes.returns, 'rollback')} to {checkpoint} (train.max_rollbacks); lower "
                f"optim.lr={self.plan.optim.lr}, raise optim.warmup, or resume={checkpoint} with train.on_spike=log"
            )
        trainer_state = load_trainer_state(checkpoint / "state" / "trainer.pt")
        raw = store.read_weights(store.training_weights_folder(checkpoint))
        self.strategy.load_full_weights(raw)
        with torch.no_grad():
            for name, buffer in self.strategy.module.named_buffers():
                if name in raw:
                    buffer.copy_(raw[name])
        self._load_optimizer_and_average(checkpoint)
        is_same_stage = spikes.good > self.plan.stages.at(self.step).begin
        spikes.note_rollback(self.step, trainer_state["spikes"]["losses"] if is_same_stage else [])
        log_info(
            f"{cause}; back to {checkpoint.name}, on with step {self.step + 1}: the updates of steps {spikes.good + 1} to "
            f"{self.step} are undone (rollback {spikes.returns} of at most {spikes.max_rollbacks})"
        )
        return True

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

    def evaluate_safely(self, log: RunLog, stop: StopRequest) -> bool:
        """Evaluate, and return whether the model is the best so far.

        An evaluation that fails (its shards are gone, for example) loses no training: a checkpoint is saved first. A signal to
        stop ends it, and it is due when the run resumes.
        """
        self.settle()  # whether the best checkpoint so far is there decides which one is the best
        try:
            with stop.interrupting():
                is_best = self._evaluate(log)
        except EvaluationStop:
            self.is_evaluation_due = True
            log_info(f"the evaluation at step {self.step} is not finished: it begins anew when the run resumes")
            return False
        except UserError:
            self.save(is_last=True)
            raise
        self.is_evaluation_due = False
        return is_best

    def _evaluate(self, log: RunLog) -> bool:
        """Evaluate the averaged weights, log the metrics, and return whether they are the best so far."""
        assert self.evaluate is not None
        with self.averaged_weights(), self.strategy.full_model() as model:
            self.results = self.evaluate(model)
        self.strategy.model.train()
        samples_seen = self.plan.stages.batches.position(self.step)
        metrics = {f"val/{name}": value for name, value in self.results.items()}
        log.write_metrics({"step": self.step, "samples_seen": samples_seen, "time": time.time(), **metrics})
        log_info(f"step {self.step}/{self.plan.total_steps}  {describe_results(self.results, self.plan.primary_metric)}")
        score = self.results.get(self.plan.primary_metric)
        if score is None or not score > self.best_score:
            return False
        self.best_score = score
        return True

    def refuse_divergence(self, skipped_in_a_row: int) -> None:
        """Raise UserError after train.max_skipped consecutive steps with a non-finite gradient."""
        if skipped_in_a_row < self.plan.train.max_skipped:
            return
        self.settle(may_end=False)
        good = self.find_good()
        if good is not None:
            resume = f"the last checkpoint with finite losses is {good}: resume={good} goes on from it"
            resume += ", not from the later ones" if good != self.saved else ""
        elif self.saved is not None:
            resume = f"{self.saved} gives no finite losses, and no earlier one is there: start anew with another run=NAME"
        else:
            resume = "no checkpoint was saved before"
        spiked = " or the loss a spike" if self.spikes.mode == "skip" else ""
        raise UserError(
            f"the gradient was not finite{spiked} for {skipped_in_a_row} steps in a row (step {self.step}); {resume}; lower "
            f"optim.lr={self.plan.optim.lr}, raise optim.warmup, or use train.precision=bf16 or fp32"
        )
