"""Loss spikes: found by a rolling median, then ignored, logged, skipped, or undone from the last good checkpoint.

A step is a spike where its loss, averaged over all processes, exceeds

    median + factor * max(1.4826 * MAD, 0.01 * |median|)

of the finite losses of the last `window` steps. MAD is their median absolute deviation; times 1.4826 it estimates the standard
deviation of a normal distribution, and outliers hardly move it (Rousseeuw & Croux 1993). The floor of 1 % keeps a plateau of
nearly equal losses quiet. No step is judged before the window is full. A stage (train.stages) begins a new window, because the
loss depends on the size of the batch.

    log, rollback    no step sends a message: the losses of all steps are averaged at log steps, with the metrics, and judged
                     there, also before a checkpoint is saved
    skip             the decision must come before the update: the loss (4 bytes) is averaged in every step. Where it is a
                     spike, the loss is multiplied by NaN on the device, and the step is skipped as every step with a
                     non-finite gradient is. Under fp16 the loss scale is halved, as by an overflow.

A rollback restores weights and optimizer at the next log step, and leaves the step and the data where they are: the batches
since the checkpoint are consumed, as PaLM's recipe has it (Chowdhery et al. 2022, section 5.1). So the data position stays a
function of the step. Which checkpoint is good is decided by judged losses alone, and only checkpoints of train.save_every
count, so that a run that was stopped in between goes the same way.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.data.batch import Batch
from pretrain.runtime import distributed
from pretrain.runtime.console import log_info
from pretrain.training.config import TrainConfig
from pretrain.training.objective import Features, Objective

MAD_TO_DEVIATION = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
RELATIVE_FLOOR = 0.01
"""Smallest deviation that is assumed, as a fraction of the median."""


class RollingMedian:
    """The finite losses of the last steps, float32, (window,) on one device, oldest first; NaN where there is none yet."""

    def __init__(self, window: int, factor: float, device: torch.device | str = "cpu") -> None:
        self.factor = factor
        self.losses = torch.full((window,), math.nan, device=device)

    def clear(self) -> None:
        """Forget all losses."""
        self.losses = torch.full_like(self.losses, math.nan)

    def threshold(self) -> Tensor:
        """Return the loss () above which a step is a spike; NaN, which no loss exceeds, until the window is full."""
        median = self.losses.median()
        deviation = MAD_TO_DEVIATION * (self.losses - median).abs().median()
        return median + self.factor * torch.maximum(deviation, RELATIVE_FLOOR * median.abs())

    def add(self, loss: Tensor) -> None:
        """Add a loss () if it is finite, and drop the oldest. Nothing waits for the device."""
        shifted = torch.cat([self.losses[1:], loss.reshape(1)])
        self.losses = torch.where(torch.isfinite(loss), shifted, self.losses)


class SpikeWatch:
    """Judges the losses of a run and keeps count; every process holds the same and decides alike.

    Args:
        device: where training computes; with train.on_spike=skip losses are judged there.
    """

    def __init__(self, train: TrainConfig, device: torch.device) -> None:
        self.mode, self.max_skipped, self.max_rollbacks = train.on_spike, train.max_skipped, train.max_rollbacks
        self.median = RollingMedian(train.spike_window, train.spike_factor, device if self.mode == "skip" else "cpu")
        self._rows: list[Tensor] = []
        """For each step that is not judged yet: (loss, 1 if skipped), and the threshold in the mode `skip`."""
        self._guarded: tuple[Tensor, Tensor, Tensor] | None = None
        """In the mode `skip`: this process's loss in the present step, the mean over processes, and the threshold."""
        self._restarts: set[int] = set()
        """Steps, from 1, that are not judged yet and begin a stage."""
        self._was_spike = False
        self.count = 0
        """Spikes so far."""
        self.open = 0
        """The first spike that no rollback has answered yet, as a step from 1; 0 = none."""
        self.failed_in_a_row = 0
        """Consecutive steps with a non-finite gradient or loss up to the last judged step."""
        self.good = self.candidate = 0
        """Steps of the checkpoint to go back to and of the newest one, which a step with a usual loss must follow; 0 = none."""
        self._noted = (0, 0, 0, 0)
        """The step of the newest checkpoint that was noted; and before that `candidate`, `good` and `returns`."""
        self.rollbacks = self.undone_steps = self.returns = 0
        """Rollbacks so far, the steps that they undid, and the rollbacks to `good` alone."""

    # -----------------------------------------------------------------------------------------------------------------
    # In every step

    def guard(self, loss: Tensor) -> Tensor:
        """Return the loss to backpropagate: that of a spike is NaN in the mode `skip`. Collective there.

        loss: (), averaged over this process's samples.
        """
        if self.mode != "skip":
            return loss
        local = loss.detach()
        mean, threshold = distributed.mean(local.float()), self.median.threshold()
        self.median.add(mean)
        self._guarded = (local, mean, threshold)
        return loss * torch.where(mean > threshold, math.nan, 1.0)

    def restart(self, step: int) -> None:
        """Compare the losses from step `step` on, from 1, with none before it: it begins a stage with other batches."""
        if self.mode == "skip":
            self.median.clear()
        else:
            self._restarts.add(step)

    def record(self, out: dict[str, Tensor]) -> None:
        """Keep what a step returned, on the device, until it is judged."""
        if self.mode == "skip":
            assert self._guarded is not None
            out["loss"], mean, threshold = self._guarded
            self._rows.append(torch.stack([mean, out["skipped"].float(), threshold]))
        elif self.mode != "ignore":
            self._rows.append(torch.stack([out["loss"].detach().float(), out["skipped"].float()]))

    # -----------------------------------------------------------------------------------------------------------------
    # At log steps, and before a checkpoint is saved

    def pending(self) -> Tensor:
        """Return the rows that must be averaged over processes before they are judged: (steps, 2), or empty."""
        if self.mode == "skip" or not self._rows:
            return torch.zeros(0, 2, device=self._rows[0].device if self._rows else None)
        return torch.stack(self._rows)

    def judge(self, means: Tensor, step: int) -> None:
        """Judge the steps up to `step`.

        means: what `pending` returned, averaged over all processes.
        """
        if not self._rows:
            return
        rows = (torch.stack(self._rows) if self.mode == "skip" else means).cpu()
        first = step - len(rows) + 1
        self._rows = []
        for number, row in enumerate(rows, first):
            if number in self._restarts:
                self._restarts.remove(number)
                self.median.clear()
            threshold = row[2] if self.mode == "skip" else self.median.threshold()
            if self.mode != "skip":
                self.median.add(row[0])
            self._count(number, float(row[0]), bool(row[1] > 0.5), float(threshold))

    def _count(self, step: int, loss: float, is_skipped: bool, threshold: float) -> None:
        is_spike = loss > threshold and (not is_skipped or self.mode == "skip")
        if is_spike:
            self.count += 1
            if not self._was_spike:
                consequence = "; its update is skipped" if self.mode == "skip" else ""
                log_info(f"step {step}: loss {loss:.4f} is a spike, above {threshold:.4f}{consequence}")
            self.open = self.open or (step if self.mode == "rollback" else 0)
        self._was_spike = is_spike
        is_usual = math.isfinite(loss) and not is_skipped and not is_spike
        self.failed_in_a_row = 0 if is_usual or is_spike else self.failed_in_a_row + 1
        if self.candidate and self.candidate < step and not self.open and is_usual:
            if self.candidate != self.good:
                self.good, self.returns = self.candidate, 0
            self.candidate = 0
        elif is_spike:
            self.candidate = 0

    def metrics(self) -> dict[str, int]:
        """Return the counts for a line of metrics.jsonl."""
        if self.mode == "ignore":
            return {}
        counts = {"spikes": self.count}
        return counts if self.mode != "rollback" else counts | {"rollbacks": self.rollbacks, "undone_steps": self.undone_steps}

    # -----------------------------------------------------------------------------------------------------------------
    # Rollbacks

    def describe_cause(self, step: int) -> str:
        """Return what calls for a rollback at a step."""
        if self.open:
            return f"step {step}: the loss of step {self.open} is a spike"
        return f"step {step}: {self.failed_in_a_row} steps in a row were skipped"

    def note_checkpoint(self, step: int) -> None:
        """Remember the checkpoint of a step, all of which are judged, as one to go back to."""
        if not self.open:
            self._noted = (step, self.candidate, self.good, self.returns)
            self.candidate = step

    def forget_checkpoint(self, step: int) -> None:
        """Undo `note_checkpoint` of this step, if it was the newest: the checkpoint could not be written."""
        noted, candidate, good, returns = self._noted
        if noted == step == self.candidate:
            self.candidate = candidate
        elif noted == step == self.good:
            self.good, self.returns = good, returns

    def can_roll_back(self) -> bool:
        """Return whether there is a checkpoint to go back to."""
        return self.mode == "rollback" and self.good > 0

    def is_due(self) -> bool:
        """Return whether a spike, or too many skipped steps in a row, call for a rollback."""
        return self.mode == "rollback" and (self.open > 0 or (self.good > 0 and self.failed_in_a_row >= self.max_skipped))

    def close_spike(self) -> None:
        """Go on without a rollback, since there is no checkpoint to go back to."""
        self.open = self.good = self.candidate = 0

    def note_rollback(self, step: int, window: list[float]) -> None:
        """Count a rollback at a step; `window` are the losses that were in the window at the checkpoint."""
        self.rollbacks += 1
        self.returns += 1
        self.undone_steps += step - self.good
        self.open = self.failed_in_a_row = self.candidate = 0
        self._was_spike = False
        self._load_window(window)

    # -----------------------------------------------------------------------------------------------------------------
    # Saving and resuming

    COUNTS = ("count", "open", "failed_in_a_row", "good", "candidate", "rollbacks", "undone_steps", "returns")

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers; all recorded steps must have been judged."""
        assert not self._rows
        counts = {name: getattr(self, name) for name in self.COUNTS}
        return {"losses": self.median.losses.tolist(), "was_spike": int(self._was_spike), **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; the window may have another length now."""
        for name in self.COUNTS:
            setattr(self, name, state[name])
        self._was_spike = bool(state["was_spike"])
        self._load_window(state["losses"])

    def _load_window(self, losses: list[float]) -> None:
        length = len(self.median.losses)
        padded = [*[math.nan] * length, *losses][-length:]
        self.median.losses = torch.tensor(padded, dtype=torch.float32, device=self.median.losses.device)


class GuardedObjective:
    """An objective whose loss a SpikeWatch guards."""

    def __init__(self, objective: Objective, spikes: SpikeWatch) -> None:
        self.objective, self.spikes, self.can_split = objective, spikes, objective.can_split

    def encode(self, model: nn.Module, batch: Batch) -> Features:
        """Encode as the objective does."""
        return self.objective.encode(model, batch)

    def loss(self, features: Features, targets: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss to backpropagate, and the report."""
        loss, report = self.objective.loss(features, targets)
        return self.spikes.guard(loss), report


def find_state_error(state: Any) -> str | None:
    """Return why something is not what SpikeWatch.state_dict returns; None where it is."""
    if not isinstance(state, dict) or not isinstance(state.get("losses"), list):
        return f"it holds no losses: {state!r:.80}"
    if not all(isinstance(loss, float) for loss in state["losses"]):
        return "its losses are not numbers"
    for name in ("was_spike", *SpikeWatch.COUNTS):
        if type(state.get(name)) is not int or not 0 <= state[name] < 1 << 62:
            return f"{name} is {state.get(name)!r:.80}"
    return None
