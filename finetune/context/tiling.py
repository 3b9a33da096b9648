"""A grid of tokens divided into square tiles, by reshape alone.

The grid is padded where the side does not divide it, and rolled where the tiles are shifted.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Tiling:
    """N = H W cells, row-major, as R tiles of P = sides[0] x sides[1] cells, at most as large as the grid."""

    grid: tuple[int, int]
    side: int
    shifted: bool = False
    """Whether tiles are moved by half a side, in each direction that has more than one (Swin, arXiv 2103.14030)."""

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of a tile, cells."""
        return min(self.side, self.grid[0]), min(self.side, self.grid[1])

    @property
    def counts(self) -> tuple[int, int]:
        """Number of tiles down and across."""
        return ceil(self.grid[0] / self.sides[0]), ceil(self.grid[1] / self.sides[1])

    @property
    def shifts(self) -> tuple[int, int]:
        """Cells by which the tiles are moved down and across."""
        down, across = (
            side // 2 if self.shifted and side < cells else 0 for side, cells in zip(self.sides, self.grid, strict=True)
        )
        return down, across

    @property
    def padded_grid(self) -> tuple[int, int]:
        """Height and width of the grid with padding, cells."""
        return self.counts[0] * self.sides[0], self.counts[1] * self.sides[1]

    def split(self, x_BHNF: Tensor) -> Tensor:
        """Divide into tiles: (B, H, N, F) -> (B, R, H, P, F), with zeros (False) in the padding."""
        (rows, cols), (p, q), (r, c) = self.grid, self.sides, self.counts
        x = x_BHNF.unflatten(2, (rows, cols))
        if self.padded_grid != self.grid:
            x = F.pad(x, (0, 0, 0, self.padded_grid[1] - cols, 0, self.padded_grid[0] - rows))
        if any(self.shifts):
            x = x.roll((-self.shifts[0], -self.shifts[1]), dims=(2, 3))
        tiles: Tensor = x.unflatten(3, (c, q)).unflatten(2, (r, p)).permute(0, 2, 4, 1, 3, 5, 6)
        return tiles.flatten(4, 5).flatten(1, 2)

    def join(self, x_BRHPF: Tensor) -> Tensor:
        """Undo split(): (B, R, H, P, F) -> (B, H, N, F)."""
        (rows, cols), sides, counts = self.grid, self.sides, self.counts
        x: Tensor = x_BRHPF.unflatten(3, sides).unflatten(1, counts).permute(0, 3, 1, 4, 2, 5, 6).flatten(4, 5).flatten(2, 3)
        if any(self.shifts):
            x = x.roll(self.shifts, dims=(2, 3))
        return x[:, :, :rows, :cols].flatten(2, 3)

    def build_valid_mask(self, mask_BN: Tensor | None, device: torch.device) -> Tensor:
        """Return (B or 1, R, P) bool: cells that are on the grid and, where there is a mask, True in it."""
        if mask_BN is None:
            mask_BN = torch.ones(1, self.grid[0] * self.grid[1], dtype=torch.bool, device=device)
        return self.split(mask_BN[:, None, :, None])[:, :, 0, :, 0]

    def build_neighbor_mask(self, device: torch.device) -> Tensor | None:
        """Return (R, P, P) bool: the pairs of cells of a tile that are neighbors on the grid; None: all.

        The roll of a shifted tiling brings opposite edges of the grid into one tile.
        """
        if not any(self.shifts):
            return None
        row = torch.arange(self.padded_grid[0], device=device).roll(-self.shifts[0]) < self.shifts[0]
        col = torch.arange(self.padded_grid[1], device=device).roll(-self.shifts[1]) < self.shifts[1]
        (r, c), (p, q) = self.counts, self.sides
        edge_RP = (2 * row[:, None] + col).view(r, p, c, q).transpose(1, 2).reshape(r * c, p * q)
        return edge_RP[:, :, None] == edge_RP[:, None, :]

    def index_cells(self, device: torch.device) -> Tensor:
        """Return (N,): the index of each cell of the grid in the flattened (R, P)."""
        tiles = self.counts[0] * self.counts[1]
        index = torch.arange(self.padded_grid[0] * self.padded_grid[1], device=device)
        return self.join(index.view(1, tiles, 1, -1, 1)).flatten()
