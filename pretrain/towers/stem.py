"""A stem of small convolutions that replaces a vision transformer's patch embedding.

A patch embedding is one large convolution, the hardest part of a vision transformer to train. A few 3 x 3 convolutions learn
edges and textures sooner, cost as much as a block, and give the same grid.

Source: Xiao et al. 2021, "Early Convolutions Help Transformers See Better", arXiv:2106.14881. Their convolutions use
BatchNorm. These use GroupNorm, which normalizes within an image: a gradient then depends on no other image, so that chunks,
processes and resumed runs agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from math import gcd, prod
from typing import Any

from torch import nn


class ConvStem(nn.Sequential):
    """For each width a 3 x 3 convolution, GroupNorm and GELU.

    (b, 3, S, S) -> (b, widths[-1], S / p, S / p).

    The first convolution, and each that is wider than the one before it, halves the resolution: p = patch_size(widths).
    """

    def __init__(self, widths: Sequence[int], channels: int = 3) -> None:
        layers: list[nn.Module] = []
        for before, width, stride in zip([channels, *widths], widths, _strides(widths), strict=False):
            layers.append(nn.Conv2d(before, width, 3, stride, padding=1, bias=False))
            layers += [nn.GroupNorm(gcd(width, max(1, width // 16)), width), nn.GELU()]
        super().__init__(*layers)


def patch_size(widths: Sequence[int]) -> int:
    """Return the patch size that the stem gives: pixels between neighboring positions of its grid."""
    return prod(_strides(widths))


def _strides(widths: Sequence[int]) -> list[int]:
    """Return the stride of each convolution: 2 for the first and for each that widens, else 1."""
    return [2, *(2 if after > before else 1 for before, after in pairwise(widths))]


def vit_arguments(widths: Sequence[int]) -> dict[str, Any]:
    """Return the arguments of timm's VisionTransformer that make it use this stem.

    The transformer projects the stem's output to its own width by a 1 x 1 convolution.
    """
    from timm.models.vision_transformer_hybrid import HybridEmbed

    return {"embed_layer": partial(HybridEmbed, ConvStem(widths)), "patch_size": 1}
