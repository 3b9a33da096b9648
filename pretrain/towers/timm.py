"""The image tower: any timm image model, transformer or convolutional.

    image: {name: vit_base_patch16_224, size: 112, args: {embed_dim: 192, depth: 6, num_heads: 3}, pool: avg}
    image: {name: vit_base_patch16_clip_224.openai, size: 224}
    image: {name: resnet50, size: 224, weights: resnet50.pth}
    image: {name: resnet50, size: 224, stride: 16}
    image: {name: vit_tiny_patch16_224, size: 72, stem: [32, 64, 64, 128, 128, 128], args: {embed_dim: 128, depth: 2}}

The model is built for `size`, which may differ from its published size; timm then interpolates pretrained position
embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from pretrain.config import check_numbers
from pretrain.errors import ConfigError
from pretrain.ops import CLIP_MEAN, CLIP_STD, Color, parse_color, use_onednn
from pretrain.runtime.deferred_imports import without_unused
from pretrain.towers import TokenSequence, Tower, dilation, image_sizes, used_parameters, weight_files
from pretrain.towers.dilation import CoarseCells, Convolution
from pretrain.towers.layer_numbers import number_layers
from pretrain.towers.meta_copy import copy_to_meta
from pretrain.towers.pooling import detect_head_pooling, get_head_norm, set_pooling
from pretrain.towers.timm_models import (
    RESERVED_ARGS,
    ModelConfig,
    create_dilated,
    create_model,
    load_weights,
    loads_published,
    patch_side,
)

BUILDS_EMPTY = True
"""build() works on the meta device: it computes nothing with the weights. The text tower does, to see how its model pools."""


@dataclass
class Config(ModelConfig):
    """Settings of an image tower."""

    tower: str = "timm"
    """Name of this file."""
    mean: list[float] | None = None
    """Subtracted from the channels, which are scaled to [0, 1]. null: that of the model whose weights are loaded, else
    CLIP's."""
    std: list[float] | None = None
    """The channels are divided by it after that; null as for `mean`."""
    resize: Literal["crop", "squash", "pad"] = "crop"
    """In evaluation. crop: the short side is resized to `size`, then the center is cropped. squash: both sides to `size`. pad:
    the long side to `size`, with borders beside the rest; training then crops from the image with its borders, too."""
    pad_color: str = "white"
    """Of the borders of resize=pad: a color's name, "#rrggbb", or "mean", the mean color by which images are normalized."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """How images are resized."""
    pool: Literal["tower", "cls", "avg", "map"] = "tower"
    """tower: the model's own pooling. avg: the mean of the normalized grid tokens. cls: the class token. map: attention
    pooling with a learned query (SigLIP)."""
    trainable_blocks: int = -1
    """-1 trains everything, 0 freezes the tower, n trains the last n blocks, the final norm and the pooler."""
    checkpointing: bool = False
    """Whether to recompute activations in the backward pass: less memory, a third more time."""

    def check(self) -> None:
        """Raise ConfigError for an impossible value or combination."""
        if self.size < 1 or not 0 <= self.patch_dropout < 1 or self.trainable_blocks < -1:
            raise ConfigError(
                f"image.size={self.size} must be 1 or more, image.patch_dropout={self.patch_dropout} from 0 to below 1, "
                f"image.trainable_blocks={self.trainable_blocks} -1 or more"
            )
        for key, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and (len(values) != 3 or (key == "std" and min(values) <= 0)):
                raise ConfigError(
                    f"image.{key}={values} must be three numbers, one for each channel" + ", above 0" * (key == "std")
                )
        if self.pad_color != "white" and self.resize != "pad":
            raise ConfigError(f"image.pad_color={self.pad_color} is for image.resize=pad, not {self.resize}")
        parse_color(self.pad_color)
        self.check_model()
        check_numbers(self, "image", stride="[1, inf)", mean="[0, inf)", std="(0, inf)")


class ImageTower(Tower):
    """A timm model without its classifier.

    Inputs are (b, 3, size, size): uint8, or floats that are already normalized.
    """

    modality = "image"
    pretrained_settings = "image.pretrained=true or image.weights=FILE"

    def __init__(self, model: nn.Module, config: Config, undilated: tuple[dict[str, Convolution], int] | None = None) -> None:
        """Wrap a timm model.

        undilated: with config.stride, the convolutions of the model without dilation, and its stride over config.stride.
        """
        super().__init__()
        self.model = model
        self.config = config
        self._undilated = undilated
        self._coarse_cells: CoarseCells | None = None
        """Which cells of the model's map are pooled; None = all."""
        self.mean_pool = config.pool == "avg"
        self.channels_last = False
        """Whether images are given to the model in NHWC. Convolutions keep that format, whatever that of their weights."""
        published = cast(dict[str, Any], model.pretrained_cfg) if config.weights or loads_published(config) else {}
        self.statistics = (
            [float(m) for m in config.mean or published.get("mean", CLIP_MEAN)],
            [float(s) for s in config.std or published.get("std", CLIP_STD)],
        )
        """(mean, standard deviation) of the channels, by which images are normalized."""
        for name, values in zip(("mean", "std"), self.statistics, strict=True):
            self.register_buffer(name, torch.tensor(values).reshape(3, 1, 1), persistent=False)
        self._layer_ids, self.depth = number_layers(model)
        self._takes_map = False
        """Whether the grid tokens are the last map of `forward_intermediates`; see _hides_its_map."""
        self._measure()

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> TokenSequence:
        """Encode images (b, 3, S, S): states (b, H W, C), pooled (b, P).

        `mask` is ignored, because images have no padding.
        """
        return self.encode(inputs)[1]

    def encode(self, inputs: Tensor) -> tuple[Any, TokenSequence]:
        """Return what is pooled of the timm model's forward_features(), and the TokenSequence that forward() returns."""
        images = self.normalize(inputs)
        if self._takes_map:
            features, maps = cast(Any, self.model).forward_intermediates(images, indices=1, output_fmt="NCHW")
            states, grid = self._to_tokens(maps[-1])
        else:
            features = cast(Any, self.model).forward_features(images)
            norm = get_head_norm(self.model) if self.mean_pool else None
            if norm is not None:
                features = norm(features)
            states, grid = self._to_tokens(features)
        pooled_states = states
        if self._coarse_cells is not None:
            features = self._coarse_cells.select(features)
            pooled_states = self._to_tokens(features)[0]
        pooled = pooled_states.mean(dim=1) if self.mean_pool else self._pool(features)
        return features, TokenSequence(states, states.new_ones(states.shape[:2], dtype=torch.bool), grid, pooled)

    def normalize(self, images: Tensor) -> Tensor:
        """Convert uint8 images (b, 3, S, S) to normalized floats; floats are returned unchanged."""
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if images.dtype != torch.uint8:
            return images
        mean, std = cast(Tensor, self.mean), cast(Tensor, self.std)
        return images.to(mean.dtype).sub_(255 * mean).div_(255 * std)

    def _pool(self, features: Any) -> Tensor:
        """Return the pooled output (b, P) of the model's own head."""
        out: Tensor = cast(Any, self.model).forward_head(features, pre_logits=True)
        return out

    def _to_tokens(self, features: Tensor) -> tuple[Tensor, tuple[int, int] | None]:
        """Return the grid tokens (b, H W, C) and their grid (H, W).

        features: (b, C, H, W), (b, H, W, C), or (b, prefix + H W, C) with class and register tokens first.
        The grid is None where patch dropout has removed tokens. Raises ConfigError for tokens that are no square grid.
        """
        if features.ndim == 4:
            if getattr(self.model, "output_fmt", "NCHW") != "NHWC":
                features = features.permute(0, 2, 3, 1)
            return features.flatten(1, 2), (features.shape[1], features.shape[2])
        drop = getattr(self.model, "patch_drop", None)
        if isinstance(drop, nn.Module) and drop.training and getattr(drop, "prob", 0) > 0:
            return features[:, getattr(self.model, "num_prefix_tokens", 0) :], None  # a random subset of the grid
        prefix = getattr(self.model, "num_prefix_tokens", None)
        tokens = features.shape[1]
        for count in [prefix] if prefix is not None else range(3):
            side = isqrt(tokens - count)
            if side * side == tokens - count:
                return features[:, count:], (side, side)
        raise ConfigError(
            f"image.name: {type(self.model).__name__} returns {tokens} tokens, which do not form a square grid; "
            "choose another model"
        )

    @property
    def pad_color(self) -> Color:
        """The color of the borders where images are padded."""
        return parse_color(self.config.pad_color, self.statistics[0])

    def layer_ids(self) -> dict[str, int]:
        """Return 0 for the stem, 1..L for the blocks of all stages, L + 1 for final norm and pooler.

        timm's own groups decide which is which.
        """
        return self._layer_ids

    def settings(self) -> dict[str, Any]:
        """Return the Config fields that build this architecture by timm's own name for it.

        They include the arguments that came with a model of the hub or of a folder.
        """
        model, (mean, std) = cast(Any, self.model), self.statistics
        args = {**getattr(model, "pretrained_model_args", {}), **self.config.args}
        args = {key: value for key, value in args.items() if key not in RESERVED_ARGS}
        name = model.pretrained_cfg["architecture"] if ":" in self.config.name else self.config.name
        return {"name": name, "pretrained": False, "weights": None, "mean": mean, "std": std, "args": args}

    def fit_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return weights of this architecture at another size, with their positions resampled by timm."""
        return weight_files.resample(self.model, weights, "model.")

    def accept_size(self, size: int) -> None:
        """Let forward() take images (b, 3, size, size), too; positions are resampled. Raises ConfigError where it cannot."""
        name, side = self.config.name, patch_side(self.model, self.config)
        if side and size % side:
            raise ConfigError(f"it is not a multiple of {name}'s patch of {side} px")
        if self.config.stride is not None:
            raise ConfigError(f"image.stride={self.config.stride} is for images of one size: leave out one of the two")
        if image_sizes.has_positions(self.model):
            image_sizes.resample_positions(self.model, size // (side or 1))
        meta = copy_to_meta(self).eval()
        try:
            width = meta.encode(torch.empty(2, 3, size, size, dtype=torch.uint8, device="meta"))[1].pooled.shape[-1]
        except (RuntimeError, AssertionError, ValueError, TypeError, AttributeError, ConfigError) as error:
            reason = " ".join(str(error).split())[:160]
            raise ConfigError(f"{name} takes images of image.size={self.config.size} only ({reason})") from error
        if width != self.pooled_width:
            raise ConfigError(f"{name} pools {width} numbers at this size, and {self.pooled_width} at {self.config.size} px")

    def set_patch_dropout(self, fraction: float) -> None:
        """Set the fraction of patches that are left out in training. Raises ConfigError where the model has no such layer."""
        drop = getattr(self.model, "patch_drop", None)
        if hasattr(drop, "prob"):
            cast(Any, drop).prob = fraction
        elif fraction:
            super().set_patch_dropout(fraction)

    @property
    def is_convolutional(self) -> bool:
        """Whether the model has more convolutions than the patch embedding of a vision transformer."""
        return sum(isinstance(module, nn.Conv2d) for module in self.model.modules()) > 1

    def set_channels_last(self, on: bool) -> None:
        """Give images to a convolutional model in NHWC, or stop doing so.

        Weights stay in NCHW: FSDP2 and safetensors take no other format, and a copy of a weight costs little beside the maps.
        """
        self.channels_last = on and self.is_convolutional

    def set_checkpointing(self, on: bool) -> None:
        """Recompute activations in the backward pass, or stop. Raises ConfigError where timm's model cannot."""
        try:
            cast(Any, self.model).set_grad_checkpointing(on)
        except (AssertionError, AttributeError) as error:
            if on:
                name = type(self.model).__name__
                raise ConfigError(
                    f"image.checkpointing=true: {name} cannot recompute activations; use image.checkpointing=false"
                ) from error

    def _measure(self) -> None:
        """Set the widths, the unused parameters and how the model pools.

        Widths and unused parameters come from one forward pass on the meta device, which computes nothing.
        """
        was_training = self.training
        self.eval()
        images = torch.empty(2, 3, self.config.size, self.config.size, dtype=torch.uint8, device="meta")
        meta = copy_to_meta(self).requires_grad_()
        if self._undilated is not None:
            self._coarse_cells = meta._coarse_cells = dilation.locate_coarse_cells(meta.model, *self._undilated, images)
        with without_unused():  # on the meta device, torch.cat is written in Python, and marked for torch's compiler
            self._takes_map = meta._takes_map = _hides_its_map(meta.model, images)
            features, out = meta.encode(images)
        self.width, self.pooled_width = out.states.shape[-1], out.pooled.shape[-1]
        self.token_count = out.states.shape[1]
        self.freeze_unused(used_parameters(out.pooled, dict(meta.named_parameters())))
        has_one_map = isinstance(features, Tensor) and not self._takes_map
        is_mean, is_max = detect_head_pooling(_HeadAndTokens(self), features.shape) if has_one_map else (False, False)
        self.pools_mean, self.pools_max = self.mean_pool or is_mean, is_max and not self.mean_pool
        self.train(was_training)


class _HeadAndTokens(nn.Module):
    """What a tower makes of its model's features: the pooled vector, and the grid tokens."""

    def __init__(self, tower: ImageTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.tower._pool(features), self.tower._to_tokens(features)[0]


def _hides_its_map(model: Any, images: Tensor) -> bool:
    """Return whether only forward_intermediates() returns the map of all positions, not forward_features().

    The latter returns class tokens only (PiT), or one tensor for each of several branches (CoaT, CrossViT).

    images: uint8 (b, 3, S, S) on the model's device.
    """
    if not hasattr(model, "forward_intermediates"):
        return False
    features = model.forward_features(images.float())
    if isinstance(features, (list, tuple)):
        return True
    if features.ndim != 3 or features.shape[1] > 2:
        return False
    maps = model.forward_intermediates(images.float(), indices=1, output_fmt="NCHW", intermediates_only=True)
    return bool(maps[-1].shape[2] * maps[-1].shape[3] > 1)


# ---------------------------------------------------------------------------------------------------------------------
# Building


def build(config: Config, tokenizer: Any = None) -> ImageTower:
    """Build an ImageTower.

    Raises ConfigError: an unknown model or argument, a size or a pooling that does not fit.
    """
    undilated, model = (None, create_model(config)) if config.stride is None else create_dilated(config)
    origin = load_weights(model, config)
    side = patch_side(model, config)
    if side and config.size % side:
        raise ConfigError(f"image.size={config.size} is not a multiple of {config.name}'s patch of {side} px")
    set_pooling(model, config.pool, config.name)
    try:
        tower = ImageTower(model, config, undilated)
    except (RuntimeError, AssertionError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"image.name={config.name} cannot be used at image.size={config.size}: {reason}") from error
    tower.weights_origin = origin
    use_onednn(model)
    tower.freeze(config.trainable_blocks)
    if config.checkpointing:
        tower.set_checkpointing(True)
    return tower
