"""Projections of a tower's pooled vector into the shared space: a matrix, two layers, or none.

Legend: P = width of a pooled vector, D = width of the shared space.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

ProjectionKind = Literal["linear", "mlp", "none"]


class MLPProjection(nn.Module):
    """Two layers with biases and a ReLU between them, as in CLAP: (..., P) -> (..., D). The inner width is D."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.in_features, self.out_features = width, dim
        self.linear1, self.linear2 = nn.Linear(width, dim), nn.Linear(dim, dim)
        for layer in (self.linear1, self.linear2):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """Project `pooled` (..., P)."""
        projected: Tensor = self.linear2(nn.functional.relu(self.linear1(pooled)))
        return projected


class NoProjection(nn.Module):
    """The identity in place of a projection: the pooled vector is the embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_features = self.out_features = width

    def forward(self, pooled: Tensor) -> Tensor:
        """Return `pooled` (..., D) unchanged."""
        return pooled


Projection = nn.Linear | MLPProjection | NoProjection


def build_projections(kind: ProjectionKind, widths: Mapping[str, int], dim: int) -> dict[str, Projection]:
    """Build a projection for each modality, from its tower's pooled width P. Weights are from torch's global generator."""
    if kind == "none":
        return {name: NoProjection(dim) for name in widths}
    if kind == "mlp":
        return {name: MLPProjection(width, dim) for name, width in widths.items()}
    matrices = {name: nn.Linear(width, dim, bias=False) for name, width in widths.items()}
    for name, matrix in matrices.items():
        nn.init.normal_(matrix.weight, std=widths[name] ** -0.5)
    return {**matrices}
