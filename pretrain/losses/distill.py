"""CLIP's loss, and the distillation of similarities from stored teachers (data.teachers).

    loss: {name: distill, weight: 0.5, temperature: 0.02}

Each row of the student's similarities, softmaxed, is drawn to that of a teacher: KL(teacher || student), images to texts and
texts to images. A teacher with one modality only gives the similarities among images or among texts, without those of a sample
with itself. Only similarities are compared, so a teacher may have any width.

Source: Vasu et al., MobileCLIP, arXiv:2311.17049, section 3.

Small batches on the CPU are computed by the formula, with matrices (b, B) in memory; the others in tiles (divergence_tiles.py).

Shapes: b = local rows, B = all columns, D and E = widths of student and teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.config import check_numbers
from pretrain.errors import ConfigError
from pretrain.losses import NEGATIVES, PairConfig, clip, is_tiled, normalize_weights
from pretrain.losses.divergence_tiles import MASKED, TeacherSimilarities, divergence
from pretrain.losses.tiles import Settings
from pretrain.runtime import distributed

LOGIT_SCALE, LOGIT_BIAS = clip.LOGIT_SCALE, clip.LOGIT_BIAS
TAKES = ("weight", "negatives", "teachers")
"""Settings of `data` that change this loss. Weights and negatives change its contrastive part."""
NEEDS = ("teachers",)
"""Settings of `data` without which there is no such loss."""


@dataclass
class Config(PairConfig):
    """Settings of the two parts; those of the contrastive part are those of the clip loss."""

    name: str = "distill"
    """Name of this file."""
    weight: float = 0.5
    """Share of the distillation, 0 to 1; the contrastive loss has the rest."""
    temperature: float = 0.02
    """What a teacher's cosines are divided by before their softmax. Published CLIPs were trained at 0.01; larger values give
    more of the ranking among wrong pairs. The student's is its logit scale."""

    def check(self) -> None:
        """Raise ConfigError for an impossible value."""
        super().check()
        if not 0 <= self.weight <= 1 or not 1e-3 <= self.temperature <= 100:
            raise ConfigError(
                f"loss.weight={self.weight} must be from 0 to 1, and loss.temperature={self.temperature} from 0.001 to 100"
            )
        if self.exchange == "ring":
            raise ConfigError("loss.exchange=ring: the distill loss holds all features on each process; use gather")
        check_numbers(self, "loss")


class Loss(nn.Module):
    """(1 - weight) clip + weight (mean over teachers of KL)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.clip = config, clip.Loss(clip_config(config))
        self.max_logit: float | None = None

    def forward(
        self, features: dict[str, Tensor], scale: Tensor, bias: Tensor | None, targets: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss () and a report: both parts, and the share of samples that have all of a teacher's embeddings.

        features and scale: as for the clip loss. targets["teachers"]: see pretrain/data/teachers.py.
        """
        if "teachers" not in targets:
            raise ConfigError("loss.name=distill needs data.teachers, and this batch has no embeddings of teachers")
        self.clip.max_logit = self.max_logit
        contrastive, report = self.clip(features, scale, bias, targets)
        student = {name: x.to(torch.promote_types(x.dtype, torch.float32)) for name, x in features.items() if name != NEGATIVES}
        names = list(student)
        with torch.autocast(scale.device.type, enabled=False):
            all_student = dict(zip(names, distributed.gather_many([student[name] for name in names]), strict=True))
            losses, coverage = [], []
            for teacher in targets["teachers"].values():
                loss, covered = self._distill(student, all_student, teacher, scale)
                losses.append(loss)
                coverage.append(covered)
            distillation = torch.stack(losses).mean()
        weight = self.config.weight
        report |= {
            "clip_loss": contrastive.detach(),
            "distill_loss": distillation.detach(),
            "teacher_coverage": torch.stack(coverage).mean(),
        }
        return (1 - weight) * contrastive + weight * distillation, report

    def _distill(
        self, student: dict[str, Tensor], all_student: dict[str, Tensor], teacher: dict[str, Tensor], scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the distillation loss () of one teacher, and the fraction of local samples that it covers."""
        names = [name for name in student if name in teacher]
        mask = torch.stack([teacher[f"{name}_mask"] for name in names]).all(dim=0)  # (b,)
        all_mask = distributed.gather_without_grad(mask.to(torch.uint8)).bool()
        embeddings = {name: F.normalize(teacher[name].to(scale.dtype), dim=1) for name in names}
        all_embeddings = {name: distributed.gather_without_grad(x) for name, x in embeddings.items()}
        row_weights = normalize_weights(mask).to(scale.dtype)
        directions = [(name, other) for name in names for other in names if name != other] or [(names[0], names[0])]
        compute = divergence if self._is_tiled(mask) else dense_divergence
        settings = Settings(self.config.tile, self.config.precision)
        losses = []
        for rows, columns in directions:
            similarities = TeacherSimilarities(
                embeddings[rows] / self.config.temperature,
                all_embeddings[columns],
                row_weights,
                (~all_mask).to(torch.uint8),
                distributed.rank() * len(mask) if rows == columns else None,
            )
            losses.append(compute(student[rows], all_student[columns], scale, similarities, settings))
        return torch.stack(losses).mean(), mask.to(scale.dtype).mean()

    def _is_tiled(self, rows: Tensor) -> bool:
        """Return whether the divergence is computed in tiles, by the rule of the contrastive part (choose_settings)."""
        is_plain = rows.device.type == "cpu" and self.config.precision == "fp32"
        return not is_plain or is_tiled(len(rows), self.config.tile)


def dense_divergence(rows: Tensor, columns: Tensor, scale: Tensor, teacher: TeacherSimilarities, settings: Settings) -> Tensor:
    """Compute `divergence` of divergence_tiles.py by its formula. The logits (b, B) of both are held in memory."""
    left_out = teacher.is_left_out.bool()[None].expand(len(rows), -1)  # (b, B)
    if teacher.own_column is not None:
        left_out = left_out.clone()
        i = torch.arange(len(rows), device=rows.device)
        left_out[i, i + teacher.own_column] = True
    divergences = relational_divergence(teacher.rows @ teacher.columns.t(), scale * rows @ columns.t(), left_out)
    return (teacher.row_weights * divergences).mean()


def relational_divergence(target: Tensor, logits: Tensor, left_out: Tensor) -> Tensor:
    """Return KL(softmax(target) || softmax(logits)) of each row: (b, B) each -> (b,). left_out: (b, B) bool."""
    log_target = target.masked_fill(left_out, MASKED).log_softmax(dim=1)
    log_student = logits.masked_fill(left_out, MASKED).log_softmax(dim=1)
    return (log_target.exp() * (log_target - log_student).masked_fill(left_out, 0)).sum(dim=1)


def clip_config(config: Config) -> clip.Config:
    """Return the settings of the contrastive part."""
    shared = {name: getattr(config, name) for name in vars(PairConfig()) if name != "name"}
    return clip.Config(**shared)


def build(config: Config) -> Loss:
    """Build the loss."""
    return Loss(config)
