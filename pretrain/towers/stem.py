"""A stem of small convolutions in place of a vision transformer's patch embedding.

One large patch in one product is the hardest part of a vision transformer to train; a few 3 x 3 convolutions see edges and
textures sooner, cost as much as a block and leave the grid as it was (Xiao et al. 2021, "Early Convolutions Help Transformers
See Better", arXiv:2106.14881). Theirs normalise over the batch; these do so within a picture, so that a gradient depends on
no neighbour and chunks, processes and resumed runs agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from math import gcd, prod
from typing import Any

from torch import nn


class ConvStem(nn.Sequential):
    """(b, 3, S, S) -> (b, widths[-1], S / p, S / p): a 3 x 3 convolution, GroupNorm and GELU for each width.

    The first convolution and each that widens halve the picture, so that p = patch(widths).
    """

    def __init__(self, widths: Sequence[int], channels: int = 3) -> None:
        layers: list[nn.Module] = []
        for before, width, stride in zip([channels, *widths], widths, _strides(widths), strict=False):
            layers.append(nn.Conv2d(before, width, 3, stride, padding=1, bias=False))
            layers += [nn.GroupNorm(gcd(width, max(1, width // 16)), width), nn.GELU()]
        super().__init__(*layers)


def patch(widths: Sequence[int]) -> int:
    """Pixels from one position of the stem's grid to the next."""
    return prod(_strides(widths))


def _strides(widths: Sequence[int]) -> list[int]:
    return [2, *(2 if after > before else 1 for before, after in pairwise(widths))]


def arguments(widths: Sequence[int]) -> dict[str, Any]:
    """Of timm's VisionTransformer, which projects what the stem gives, 1 x 1, to its own width."""
    from timm.models.vision_transformer_hybrid import HybridEmbed

    return {"embed_layer": partial(HybridEmbed, ConvStem(widths)), "patch_size": 1}
