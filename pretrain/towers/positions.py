"""Learned positions of a tower at another size: what `init` brings is resampled to the images and texts of the new run.

Shapes: L = rows of the old table, n = rows of the new one, C = width.
"""

from __future__ import annotations

import torch
from torch import Tensor

KEPT = 20
"""The first positions of texts stay as they are: most captions are this short, and these are trained best."""


def stretch(table: Tensor, rows: int, first: int = 0) -> Tensor:
    """Return a table of text positions (L, C) with another number of rows (n, C).

    A shorter table has the first rows. In a longer one the first KEPT positions stay, and the others are spread evenly over the
    rest, with linear interpolation between them, and beyond the last one along its slope: Long-CLIP, arXiv:2403.15378, section
    3.2, which goes from 77 to 248 rows, for any number.

    first: rows before position 0, which stay as they are.
    """
    if rows <= len(table):
        return table[:rows].clone()
    head, positions = table[:first], table[first:].double()
    kept, count = min(KEPT, max(0, len(positions) - 2)), rows - first
    step = (len(positions) - kept) / (count - kept)
    places = kept + step * torch.arange(count - kept, dtype=torch.float64, device=table.device)
    lower = places.floor().long().clamp(max=len(positions) - 2)
    share = (places - lower)[:, None]
    spread = (1 - share) * positions[lower] + share * positions[lower + 1]
    return torch.cat([head, positions[:kept].to(table.dtype), spread.to(table.dtype)])
