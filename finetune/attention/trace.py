"""Attention weights recorded for maps, in the layout in which they were used or as a matrix.

A fusion called with `trace=Trace()` fills it: one Step for the attentions that were added at once, with one AttentionRecord
for each modality whose tokens were the queries. Shapes: B samples, H heads, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor


def _identity(weights: Tensor) -> Tensor:
    return weights


@dataclass(frozen=True)
class Weights:
    """The weights of one attention, as they multiplied the values: a node of the autograd graph."""

    used: Tensor
    """In any layout: by window, by region, or (B, H, Q, K) itself."""
    to_dense: Callable[[Tensor], Tensor] = _identity
    """A linear map of a tensor shaped like `used` to (B, H, Q, K), zero for keys that were not attended to."""
    key_runs: tuple[tuple[int, Weights | None], ...] = ()
    """Where keys are summaries: the lengths of consecutive runs of keys, each with the weights with which its summaries
    attended to tokens (None: the run is plain tokens)."""

    def to_matrix(self, transform: Callable[[Tensor], Tensor] = _identity) -> Tensor:
        """Return (B, Q, K): the mean over heads of `transform(used)`, where K counts tokens.

        Weights on summaries are multiplied by the summaries' own weights on the tokens, transformed in the same way.
        """
        matrix_BQK = self.to_dense(transform(self.used)).mean(dim=1)
        if not self.key_runs:
            return matrix_BQK
        runs = matrix_BQK.split([count for count, _ in self.key_runs], dim=2)
        pairs = zip(runs, self.key_runs, strict=True)
        return torch.cat([run if read is None else run @ read.to_matrix(transform) for run, (_, read) in pairs], dim=2)

    def list_tensors(self) -> list[Tensor]:
        """Return `used` of these weights and of all that they contain."""
        return [self.used, *(t for _, read in self.key_runs if read is not None for t in read.list_tensors())]


@dataclass(frozen=True)
class AttentionRecord:
    """The attention of one modality's queries to the tokens of `contexts`."""

    query: str
    contexts: tuple[str, ...]
    """The columns of the matrix are the tokens of these modalities, in this order."""
    weights: Weights


@dataclass(frozen=True)
class Step:
    """Attentions that read the same states and whose results were added at once."""

    kind: Literal["self", "cross", "joint"]
    """joint: one softmax over the tokens of several modalities."""
    layer: int
    records: tuple[AttentionRecord, ...]


@dataclass
class Trace:
    """The record of one forward pass: passed empty to a fusion, which fills it.

    Passing one selects the exact path, which stores Q x K weights per head and layer.
    """

    steps: list[Step] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    """Modality -> number of tokens."""
    grids: dict[str, tuple[int, int] | None] = field(default_factory=dict)

    def begin(self, modalities: dict[str, tuple[int, tuple[int, int] | None]]) -> None:
        """Clear the trace for a new pass; `modalities`: name -> (number of tokens, grid)."""
        self.steps = []
        self.sizes = {name: size for name, (size, _) in modalities.items()}
        self.grids = {name: grid for name, (_, grid) in modalities.items()}

    def split_matrices(self, step: Step, transform: Callable[[Tensor], Tensor] = _identity) -> dict[tuple[str, str], Tensor]:
        """Return (query, context) -> (B, Q, K): the matrices of a step, split by modality."""
        matrices: dict[tuple[str, str], Tensor] = {}
        for record in step.records:
            blocks = record.weights.to_matrix(transform).split([self.sizes[name] for name in record.contexts], dim=2)
            matrices.update({(record.query, name): block for name, block in zip(record.contexts, blocks, strict=True)})
        return matrices

    def list_tensors(self) -> list[Tensor]:
        """Return every weights tensor once, for torch.autograd.grad."""
        tensors = {id(t): t for step in self.steps for record in step.records for t in record.weights.list_tensors()}
        return list(tensors.values())
