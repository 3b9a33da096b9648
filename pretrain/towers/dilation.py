"""Finer grids of convolutional models by dilation, for image.stride.

A layer of stride 2 computes every second position of its map. Without its stride, and with the layers after it dilated by 2,
the same weights compute all positions: every second cell of the fine map is a cell of the coarse one (the "a trous" algorithm;
Long et al. 2015, arXiv 1411.4038, section 3.2; Yu & Koltun 2016, arXiv 1511.07122). timm builds such models where their
family has the argument `output_stride`. Pooling reads the coarse cells, so the pooled vector does not change.

That is exact for convolutions and for normalization by stored statistics or of one position. Squeeze-and-excitation and
response normalization (EfficientNet-B, RegNetY, ConvNeXt V2) take means over the map, which differ a little between the two
grids; so does BatchNorm in training. ResNet-D pools between its stages, at 8 px over other cells. Layers without padding
(ConvNeXt) leave out what remains of a size that 32 does not divide.

Shapes: b samples, C channels, H, W cells of the fine map, r = ratio.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any, cast

import torch
from torch import Tensor, nn

from pretrain.errors import ConfigError


@dataclass(frozen=True)
class CoarseCells:
    """Which cells of a fine map are those of the model without dilation: every `ratio`-th one from `offset`."""

    ratio: int
    offset: int

    def select(self, features: Tensor) -> Tensor:
        """Return the coarse map of a fine one: (b, C, H, W) -> (b, C, ceil((H - offset) / r), ceil((W - offset) / r))."""
        return features[..., self.offset :: self.ratio, self.offset :: self.ratio]


@dataclass(frozen=True)
class Convolution:
    """The geometry of one convolution, the same in both directions."""

    kernel: int
    stride: int
    dilation: int
    padding: int | None
    """Pixels before the first; None = as TensorFlow's "same", which depends on the size of the map."""

    def count_padding(self, side: int) -> int:
        """Return the cells of padding before the first cell of a map of `side` x `side`."""
        if self.padding is not None:
            return self.padding
        last = (ceil(side / self.stride) - 1) * self.stride
        return max(last + (self.kernel - 1) * self.dilation + 1 - side, 0) // 2


def get_stride(model: nn.Module) -> int:
    """Return the pixels between neighboring cells of a timm model's last map.

    Raises ValueError for a model that does not say; all that can be dilated do.
    """
    info: Any = getattr(model, "feature_info", None)
    try:
        return int(info[-1]["reduction"])
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{type(model).__name__} has no feature_info") from error


def read_geometry(model: nn.Module) -> dict[str, Convolution]:
    """Return the convolutions of a model by name, without those whose two directions differ."""
    from timm.layers import Conv2dSame

    convolutions = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and isinstance(module.padding, tuple):
            pairs = (module.kernel_size, module.stride, module.dilation, module.padding)
            if all(a == b for a, b in cast(Any, pairs)):
                kernel, stride, dilation, padding = (pair[0] for pair in pairs)
                is_same = isinstance(module, Conv2dSame)
                convolutions[name] = Convolution(int(kernel), stride, dilation, None if is_same else int(padding))
    return convolutions


def locate_coarse_cells(model: nn.Module, before: dict[str, Convolution], ratio: int, images: Tensor) -> CoarseCells:
    """Return which cells of a dilated model's map are those of the model without dilation.

    With TensorFlow's padding they begin at 1 where a layer that lost its stride reads a map of an even size.

    Args:
        model: dilated, on the meta device.
        before: the geometry of the same model without dilation.
        ratio: the stride of that model over the stride of this one.
        images: (b, 3, S, S) on the meta device.

    Raises:
        ValueError: the branches of a layer begin at different cells, as in no model of timm's.
    """
    after = read_geometry(model)
    undone = [name for name in after if name in before and before[name].stride > after[name].stride]
    sides: dict[str, int] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: sides.update({name: args[0].shape[-1]}))
        for name in undone
    ]
    try:
        with torch.no_grad():
            cast(Any, model).forward_features(images.float())
    finally:
        for hook in hooks:
            hook.remove()
    offset = 0
    for spacing in sorted({after[name].dilation for name in undone}):  # cells between those of the coarse map, so far
        shifts = set()
        for name in undone:
            if after[name].dilation == spacing:
                coarse_side = len(range(offset, sides[name], spacing))
                shifts.add(after[name].count_padding(sides[name]) - spacing * before[name].count_padding(coarse_side))
        if len(shifts) != 1:
            raise ValueError("the branches of its layers begin at different cells")
        offset += shifts.pop()
    return CoarseCells(ratio, offset)


def check_stride(model: nn.Module, stride: int, name: str) -> int:
    """Return the ratio of the model's own stride to image.stride. Raises ConfigError where there is none.

    model: without dilation; it may be on the meta device.
    """
    try:
        own = get_stride(model)
    except ValueError as error:
        raise ConfigError(explain_refusal(stride, name)) from error
    if own % stride:
        finer = [str(own // ratio) for ratio in (2, 4) if own % ratio == 0]
        raise ConfigError(f"image.stride={stride} must divide the stride of {name}, {own} px: {' or '.join(finer)}")
    return own // stride


def check_weights(plain: nn.Module, dilated: nn.Module, stride: int, name: str) -> None:
    """Raise ConfigError where a model has other weights with dilation than without.

    A block whose only change is its stride has a projection beside it; without the stride it needs none.
    """
    before, after = ({key: value.shape for key, value in model.state_dict().items()} for model in (plain, dilated))
    if before != after:
        raise ConfigError(
            f"image.stride={stride}: without its last stride {name} has other weights: {min(before.items() ^ after.items())[0]}"
        )


def explain_refusal(stride: int, name: str) -> str:
    """Return the message for a model that timm does not dilate to this stride."""
    return (
        f"image.stride={stride}: timm does not dilate {name} to this stride; it dilates ResNet, RegNet, EfficientNet, ConvNeXt "
        "and other convolutional models to 16 or 8 px. The tokens of a vision transformer are its patches"
    )
