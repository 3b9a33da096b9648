"""What attention leaves behind for the maps: its weights, in whatever layout it used them, and how they read as a matrix.

A fusion called with `trace=Trace()` fills it: one Step for everything that happened at once, one AttentionRecord for each
modality that asked in it. Shapes: B samples, H heads, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor


def _same(weights: Tensor) -> Tensor:
    return weights


@dataclass(frozen=True)
class Weights:
    """The weights of one attention, as they multiplied the values: a node of the autograd graph."""

    used: Tensor
    """Any layout: windows, or regions, or (B, H, Q, K) itself."""
    spread: Callable[[Tensor], Tensor] = _same
    """Linear: anything of the shape of `used` -> (B, H, Q, K), zero where nothing was looked at."""
    within: tuple[tuple[int, Weights | None], ...] = ()
    """Where keys were summaries: runs of keys, and the weights with which each run was read (None: plain tokens)."""

    def matrix(self, weigh: Callable[[Tensor], Tensor] = _same) -> Tensor:
        """(B, Q, K): the mean over heads of `weigh(used)`, for summaries composed with theirs, so that K counts tokens."""
        matrix_BQK = self.spread(weigh(self.used)).mean(dim=1)
        if not self.within:
            return matrix_BQK
        runs = matrix_BQK.split([count for count, _ in self.within], dim=2)
        pairs = zip(runs, self.within, strict=True)
        return torch.cat([run if read is None else run @ read.matrix(weigh) for run, (_, read) in pairs], dim=2)

    def tensors(self) -> list[Tensor]:
        """Every `used` in it."""
        return [self.used, *(t for _, read in self.within if read is not None for t in read.tensors())]


@dataclass(frozen=True)
class AttentionRecord:
    """One modality looked at others: the columns of its matrix are the tokens of `asked`, in that order."""

    query: str
    asked: tuple[str, ...]
    weights: Weights


@dataclass(frozen=True)
class Step:
    """Attentions that read the same states and were added at once."""

    kind: Literal["self", "cross", "joint"]
    """joint: one softmax over the tokens of several modalities."""
    layer: int
    records: tuple[AttentionRecord, ...]


@dataclass
class Trace:
    """Handed empty to a fusion, which fills it. Asking for it takes the exact path: Q x K weights a head and layer."""

    steps: list[Step] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    """Tokens of each modality."""
    grids: dict[str, tuple[int, int] | None] = field(default_factory=dict)

    def begin(self, modalities: dict[str, tuple[int, tuple[int, int] | None]]) -> None:
        """Forgets what was there; name -> number of tokens, grid."""
        self.steps = []
        self.sizes = {name: size for name, (size, _) in modalities.items()}
        self.grids = {name: grid for name, (_, grid) in modalities.items()}

    def blocks(self, step: Step, weigh: Callable[[Tensor], Tensor] = _same) -> dict[tuple[str, str], Tensor]:
        """(query, asked) -> (B, Q, K): the matrices of a step, cut by modality."""
        out: dict[tuple[str, str], Tensor] = {}
        for record in step.records:
            parts = record.weights.matrix(weigh).split([self.sizes[name] for name in record.asked], dim=2)
            out.update({(record.query, name): part for name, part in zip(record.asked, parts, strict=True)})
        return out

    def tensors(self) -> list[Tensor]:
        """Every weights tensor once, for torch.autograd.grad."""
        found = {id(t): t for step in self.steps for record in step.records for t in record.weights.tensors()}
        return list(found.values())
