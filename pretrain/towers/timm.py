"""Pictures: any timm image model, transformer or convolutional.

    image: {name: vit_base_patch16_224, size: 112, args: {embed_dim: 192, depth: 6, num_heads: 3}, pool: avg}
    image: {name: vit_base_patch16_clip_224.openai, size: 224, pretrained: true}
    image: {name: vit_tiny_patch16_224, size: 72, stem: [32, 64, 64, 128, 128, 128], args: {embed_dim: 128, depth: 2}}

Another size than the model's own is built for that size; pretrained position embeddings are interpolated by timm.
"""

from __future__ import annotations

import difflib
import inspect
import re
from dataclasses import dataclass, field
from itertools import pairwise
from math import isqrt
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pretrain.errors import ConfigError, closest
from pretrain.ops import CLIP_MEAN, CLIP_STD, use_onednn
from pretrain.towers import TokenSequence, Tower, stem, used_parameters
from pretrain.towers.pooling import head_norm, repool

TAKEN = {"img_size": "image.size", "num_classes": "nothing: towers have no classes", "features_only": "nothing"}
"""Arguments of timm that have a place of their own here."""


@dataclass
class Config:
    """An image tower."""

    tower: str = "timm"
    """This file."""
    name: str = "vit_base_patch16_224"
    """A timm model name, with or without a tag (`vit_base_patch16_clip_224.openai`), `hf-hub:...` or `local-dir:...`."""
    size: int = 224
    """Side of the square picture, pixels."""
    args: dict[str, Any] = field(default_factory=dict)
    """Passed to the timm model: embed_dim, depth, num_heads, drop_path_rate, ..."""
    stem: list[int] = field(default_factory=list)
    """Widths of 3 x 3 convolutions in place of a vision transformer's patch embedding; the first, and each that is wider
    than the one before it, halves the picture: [32, 64, 64, 128] makes patches of 8 px. Empty: the model's own."""
    pretrained: bool = False
    """Whether the model comes with its published weights."""
    mean: list[float] | None = None
    """Subtracted from channels scaled to [0, 1]; null takes a pretrained model's own, else CLIP's."""
    std: list[float] | None = None
    """Divides the channels after that; null as for `mean`."""
    resize: Literal["crop", "squash"] = "crop"
    """Evaluation: short side to `size` and the centre, or both sides to `size`."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """How pictures are resized."""
    pool: Literal["tower", "cls", "avg", "map"] = "tower"
    """tower: the model's own. avg: the mean of the normalised grid tokens. cls: the class token. map: attention pooling
    with a learned query (SigLIP)."""
    patch_dropout: float = 0.0
    """Share of the patches left out in training, 0 to 1 (0.5: about twice the speed)."""
    trainable_blocks: int = -1
    """-1 trains everything, 0 freezes the tower, n trains the last n blocks, the final norm and the pooler."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""

    def check(self) -> None:
        """Raises ConfigError."""
        if self.size < 1 or not 0 <= self.patch_dropout < 1 or self.trainable_blocks < -1:
            raise ConfigError(
                f"image.size={self.size} (from 1), image.patch_dropout={self.patch_dropout} (0 to below 1), "
                f"image.trainable_blocks={self.trainable_blocks} (from -1) do not fit together"
            )
        for key, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and (len(values) != 3 or (key == "std" and min(values) <= 0)):
                raise ConfigError(f"image.{key}={values} must be three numbers, one a channel" + ", above 0" * (key == "std"))
        self._check_stem()
        for key in TAKEN:
            if key in self.args:
                raise ConfigError(f"image.args.{key} is not passed on; use {TAKEN[key]}")

    def _check_stem(self) -> None:
        if not self.stem:
            return
        if min(self.stem) < 1 or any(after < before for before, after in pairwise(self.stem)):
            raise ConfigError(f"image.stem={self.stem} must be widths from 1 that do not shrink, as [32, 64, 64, 128]")
        if self.pretrained:
            raise ConfigError("image.stem has no published weights: use image.pretrained=false, or leave the stem out")
        if "patch_size" in self.args:
            raise ConfigError(f"image.args.patch_size is set by image.stem, to {stem.patch(self.stem)} px: leave it out")


class ImageTower(Tower):
    """A timm model without its classifier. inputs (b, 3, size, size): uint8, or floats that are already normalised."""

    modality = "image"

    def __init__(self, model: nn.Module, config: Config) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.mean_pool = config.pool == "avg"
        own = cast(dict[str, Any], model.pretrained_cfg) if config.pretrained else {}
        self.statistics = (
            [float(m) for m in config.mean or own.get("mean", CLIP_MEAN)],
            [float(s) for s in config.std or own.get("std", CLIP_STD)],
        )
        """Mean and standard deviation of the channels, which pictures are normalised with."""
        for name, values in zip(("mean", "std"), self.statistics, strict=True):
            self.register_buffer(name, torch.tensor(values).reshape(3, 1, 1), persistent=False)
        self._ids, self.depth = _layer_ids(model)
        self._measure()

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> TokenSequence:
        """inputs (b, 3, S, S) -> states (b, H W, C), pooled (b, P). `mask` is not used: a picture has no padding."""
        return self.encode(inputs)[1]

    def encode(self, inputs: Tensor) -> tuple[Tensor, TokenSequence]:
        """The model's own feature map or tokens, and what forward() makes of them."""
        features = self._model("forward_features", self.normalize(inputs))
        norm = head_norm(self.model) if self.mean_pool else None
        if norm is not None:
            features = norm(features)
        states, grid = self._tokens(features)
        pooled = states.mean(dim=1) if self.mean_pool else self._model("forward_head", features, pre_logits=True)
        return features, TokenSequence(states, states.new_ones(states.shape[:2], dtype=torch.bool), grid, pooled)

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 (b, 3, S, S) -> floats of mean 0 and deviation 1; floats pass."""
        if images.dtype != torch.uint8:
            return images
        mean, std = cast(Tensor, self.mean), cast(Tensor, self.std)
        return images.to(mean.dtype).sub_(255 * mean).div_(255 * std)

    def _model(self, method: str, *inputs: Any, **kwargs: Any) -> Tensor:
        out: Tensor = getattr(self.model, method)(*inputs, **kwargs)
        return out

    def _tokens(self, features: Tensor) -> tuple[Tensor, tuple[int, int] | None]:
        """(b, C, H, W), (b, H, W, C) or (b, prefix + H W, C) -> (b, H W, C) and (H, W)."""
        if features.ndim == 4:
            if getattr(self.model, "output_fmt", "NCHW") != "NHWC":
                features = features.permute(0, 2, 3, 1)
            return features.flatten(1, 2), (features.shape[1], features.shape[2])
        drop = getattr(self.model, "patch_drop", None)
        if isinstance(drop, nn.Module) and drop.training and getattr(drop, "prob", 0) > 0:
            return features[:, getattr(self.model, "num_prefix_tokens", 0) :], None  # which are left is chance
        prefix = getattr(self.model, "num_prefix_tokens", None)
        tokens = features.shape[1]
        for count in [prefix] if prefix is not None else range(3):
            side = isqrt(tokens - count)
            if side * side == tokens - count:
                return features[:, count:], (side, side)
        raise ConfigError(f"image.name: {type(self.model).__name__} returns {tokens} tokens, which are no square grid")

    def layer_ids(self) -> dict[str, int]:
        """Stem 0, blocks 1..L (over all stages), final norm and pooler L + 1; by timm's own grouping."""
        return self._ids

    def settings(self) -> dict[str, Any]:
        """The architecture by its plain name, with the arguments that a hub or folder entry brought."""
        made, (mean, std) = cast(Any, self.model), self.statistics
        args = {**getattr(made, "pretrained_model_args", {}), **self.config.args}
        args = {key: value for key, value in args.items() if key not in TAKEN}
        name = made.pretrained_cfg["architecture"] if ":" in self.config.name else self.config.name
        return {"name": name, "pretrained": False, "mean": mean, "std": std, "args": args}

    def set_checkpointing(self, on: bool) -> None:
        """Raises ConfigError where timm has none for this model."""
        try:
            cast(Any, self.model).set_grad_checkpointing(on)
        except (AssertionError, AttributeError) as error:
            if on:
                name = type(self.model).__name__
                raise ConfigError(f"image.checkpointing: {name} cannot recompute activations") from error

    def _measure(self) -> None:
        """Shapes and reached parameters from one forward on the meta device: nothing is computed."""
        training = self.training
        self.eval()
        meta = {f"tower.{name}": p.detach().to("meta").requires_grad_() for name, p in self.named_parameters()}
        buffers = {f"tower.{name}": b.to("meta") for name, b in self.named_buffers()}
        picture = torch.empty(2, 3, self.config.size, self.config.size, dtype=torch.uint8, device="meta")
        features, out = functional_call(_Encode(self), {**meta, **buffers}, (picture,))
        self.width, self.pooled_width = out.states.shape[-1], out.pooled.shape[-1]
        self.freeze_unused(name.removeprefix("tower.") for name in used_parameters(out.pooled, meta))
        mean, largest = self._head_pools(features.shape)
        self.pools_mean, self.pools_max = self.mean_pool or mean, largest and not self.mean_pool
        self.train(training)

    @torch.no_grad()
    def _head_pools(self, shape: torch.Size) -> tuple[bool, bool]:
        """Whether the model's own head does nothing but take the mean, or the maximum, of its grid tokens: tried on numbers."""
        features = torch.linspace(-2, 3, shape.numel()).sin().reshape(shape)
        pooled, tokens = self._model("forward_head", features, pre_logits=True), self._tokens(features)[0]
        kinds = (tokens.mean(dim=1), tokens.amax(dim=1))
        mean, largest = (pooled.shape == kind.shape and torch.allclose(pooled, kind, atol=1e-5) for kind in kinds)
        return mean, largest


class _Encode(nn.Module):
    """A tower's forward with the model's own features beside the result."""

    def __init__(self, tower: ImageTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, inputs: Tensor) -> tuple[Tensor, TokenSequence]:
        return self.tower.encode(inputs)


def _layer_ids(model: nn.Module) -> tuple[dict[str, int], int]:
    """timm's groups as 0 (stem), 1..L (blocks), L + 1 (the rest), and L."""
    matcher = cast(Any, model).group_matcher(coarse=False)
    names = [name for name, _ in model.named_parameters()]
    orders = {name: _order(name, matcher) for name in names}
    blocks = sorted({order for order in orders.values() if order is not None and order[0] > 0})
    ids = {None: len(blocks) + 1} | {order: i for i, order in enumerate(blocks, 1)}
    return {f"model.{name}": ids[order] if order is None or order[0] > 0 else 0 for name, order in orders.items()}, len(blocks)


def _order(name: str, matcher: Any) -> tuple[float, ...] | None:
    """(group, block, ...) by timm's rules; None for what stands behind the blocks."""
    if callable(matcher):
        found = matcher(name)
        order = tuple(found) if isinstance(found, tuple) else (found,)
        return None if order[0] in (99999, float("inf")) else tuple(float(o) for o in order)
    for group, spec in enumerate(matcher.values()):
        for pattern, suffix in spec if isinstance(spec, (list, tuple)) else [(spec, None)]:
            match = re.match(pattern, name)
            if match:
                order = (group, *(int(g) for g in match.groups() if g is not None), *(suffix or ()))
                return None if order[-1] == 99999 else tuple(float(o) for o in order)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Building


def build(config: Config, tokenizer: Any = None) -> ImageTower:
    """An ImageTower. Raises ConfigError: an unknown model or argument, a size or a pooling that does not fit."""
    model = _create(config)
    side = patch_side(model, config)
    if side and config.size % side:
        raise ConfigError(f"image.size={config.size} is not a multiple of {config.name}'s patch of {side} px")
    repool(model, config.pool, config.name)
    try:
        tower = ImageTower(model, config)
    except (RuntimeError, AssertionError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"image.name={config.name} cannot be used at image.size={config.size}: {reason}") from error
    use_onednn(model)
    tower.freeze(config.trainable_blocks)
    if config.checkpointing:
        tower.set_checkpointing(True)
    return tower


def patch_side(model: nn.Module, config: Config) -> int | None:
    """Pixels that the sides of a picture must be a multiple of; None where any will do."""
    if config.stem:
        return stem.patch(config.stem)
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    side = patch[0] if isinstance(patch, tuple) else patch
    return side if isinstance(side, int) else None


def _create(config: Config) -> nn.Module:
    import timm

    bare = config.name.split(".")[0]
    if ":" not in config.name and not timm.is_model(bare):
        near = difflib.get_close_matches(bare, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models()"
        raise ConfigError(f"image.name={config.name!r} is not a timm model; {hint}")
    args: dict[str, Any] = {**config.args, "num_classes": 0}
    if config.patch_dropout:
        args["patch_drop_rate"] = config.patch_dropout
    if config.stem:
        args |= stem.arguments(config.stem)
    try:
        try:
            return timm.create_model(config.name, pretrained=config.pretrained, img_size=config.size, **args)
        except TypeError as error:
            if "'img_size'" not in str(error):
                raise
            return timm.create_model(config.name, pretrained=config.pretrained, **args)  # convolutional: any size
    except TypeError as error:
        raise ConfigError(_unexpected(config, error)) from error
    except Exception as error:  # timm and its hub raise what they like
        what = f"image.name={config.name}" + (" with its weights" if config.pretrained else "")
        raise ConfigError(
            f"{what} cannot be built with image.args={config.args}: {' '.join(str(error).split())[:300]}"
        ) from error


def _unexpected(config: Config, error: TypeError) -> str:
    """Names the argument that the model does not take, and those near it."""
    import timm

    found = re.search(r"argument '(\w+)'", str(error))
    if found is None:
        return f"image.args={config.args} does not fit {config.name}: {' '.join(str(error).split())[:200]}"
    if "multiple values" in str(error):
        return f"image.args.{found[1]} is fixed by {config.name}: choose another model, or leave it out"
    if found[1] == "embed_layer":
        return f"image.stem: {config.name} has no patch embedding to replace; it is for vision transformers"
    if found[1] == "patch_drop_rate":
        return f"image.patch_dropout: {config.name} has no patch dropout; it is for plain vision transformers"
    model = type(timm.create_model(config.name, num_classes=0))
    return f"image.args.{found[1]}: {config.name} takes no such argument" + closest(
        found[1], [name for name in inspect.signature(model.__init__).parameters if name != "self"]
    )
