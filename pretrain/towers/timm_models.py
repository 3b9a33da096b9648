"""Creation of a timm model from an image tower's settings: its arguments, its published weights or those of a file.

timm and its hub raise errors of many types; whatever does not fit is refused with the setting's name.
"""

from __future__ import annotations

import difflib
import inspect
import re
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from pretrain.errors import ConfigError, closest
from pretrain.towers import dilation, stem, weight_files
from pretrain.towers.dilation import Convolution

RESERVED_ARGS = {
    "img_size": "use image.size",
    "num_classes": "leave it out: towers have no classifier",
    "features_only": "leave it out: towers need the whole model",
}
"""Arguments of timm that image.args may not set, and what to do instead."""


@dataclass
class ModelConfig:
    """Which timm model, at which size, and where its weights come from."""

    name: str = "vit_base_patch16_224"
    """A timm model name, with or without a tag (`vit_base_patch16_clip_224.openai`), `hf-hub:...` or `local-dir:...`."""
    size: int = 224
    """Side of the square image, pixels."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments passed to the timm model: embed_dim, depth, num_heads, drop_path_rate, ..."""
    stem: list[int] = field(default_factory=list)
    """Widths of 3 x 3 convolutions that replace a vision transformer's patch embedding. The first, and each that is wider
    than the one before it, halves the resolution: [32, 64, 64, 128] makes patches of 8 px. Empty keeps the model's own."""
    stride: int | None = None
    """Pixels between the tokens of a convolutional model: 16 or 8, computed by dilation. null: between the cells that it pools,
    mostly 32 px. It may be set in fine-tuning alone, because weights and embedding stay the same: exactly for ResNet, RegNetX,
    MobileNetV2, EfficientNet-Lite and ConvNeXt, nearly for models whose blocks pool; see dilation.py."""
    pretrained: bool | None = None
    """Whether the model is loaded with its published weights. null: if `name` names weights, by a tag
    (`vit_base_patch16_clip_224.openai`), `hf-hub:` or `local-dir:`; a bare architecture (`resnet50`) starts at random."""
    weights: str | None = None
    """Weights of this model to start from, in place of published ones: a file (safetensors, pth, pt, bin) or a folder that
    timm's save_for_hf wrote. Names are timm's; the classifier and the prefixes of other trainers are ignored."""
    patch_dropout: float = 0.0
    """Fraction of the patches that are left out in training, 0 to 1 (0.5: about twice the speed)."""

    def check_model(self) -> None:
        """Raise ConfigError for settings of the model that exclude each other."""
        self._check_stem()
        if self.stride is not None and "output_stride" in self.args:
            raise ConfigError(
                f"image.stride={self.stride} keeps the embedding, and image.args.output_stride={self.args['output_stride']} "
                "changes it: leave out one of the two"
            )
        for key in RESERVED_ARGS:
            if key in self.args:
                raise ConfigError(f"image.args.{key} cannot be set; {RESERVED_ARGS[key]}")

    def _check_stem(self) -> None:
        if not self.stem:
            return
        if min(self.stem) < 1 or any(after < before for before, after in pairwise(self.stem)):
            raise ConfigError(
                f"image.stem={self.stem} must list widths of 1 or more, none smaller than the one before, "
                "for example [32, 64, 64, 128]"
            )
        if self.pretrained and not self.weights:
            raise ConfigError("image.stem has no published weights: use image.pretrained=false, or leave out image.stem")
        if "patch_size" in self.args:
            raise ConfigError(f"image.args.patch_size is set by image.stem, to {stem.patch_size(self.stem)} px: leave it out")


def create_model(config: ModelConfig) -> nn.Module:
    """Create the timm model. Raises ConfigError, which names the setting that does not fit."""
    import timm

    bare = config.name.split(".")[0]
    if ":" not in config.name and not timm.is_model(bare):
        near = difflib.get_close_matches(bare, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models()"
        raise ConfigError(f"image.name={config.name!r} is not a timm model; {hint}")
    folder_args = _read_folder_args(config)
    args: dict[str, Any] = {**folder_args, **config.args, "num_classes": 0}
    is_published = loads_published(config) and not config.name.startswith("local-dir:")  # load_weights reads folders
    if config.patch_dropout:
        args["patch_drop_rate"] = config.patch_dropout
    if config.stem:
        args |= stem.vit_arguments(config.stem)
    if config.stride is not None:
        args["output_stride"] = config.stride
    try:
        try:
            model = timm.create_model(config.name, pretrained=is_published, img_size=config.size, **args)
        except TypeError as error:
            if "'img_size'" not in str(error):
                raise
            model = timm.create_model(config.name, pretrained=is_published, **args)  # convolutional: takes any size
    except TypeError as error:
        raise ConfigError(_explain_argument_error(config, error)) from error
    except Exception as error:  # timm and its hub raise errors of many types
        # Python 3.11 reports an argument given twice as a bare KeyError wherever another exception is being handled.
        if isinstance(error, KeyError) and error.args[0] in config.args:
            raise ConfigError(_explain_fixed_argument(config, error.args[0])) from error
        if config.stride is not None and isinstance(error, AssertionError):
            raise ConfigError(dilation.explain_refusal(config.stride, config.name)) from error
        name = f"image.name={config.name}" + (" with its published weights" if is_published else "")
        hint = "; image.weights=FILE loads your own, image.pretrained=false starts at random" if is_published else ""
        raise ConfigError(
            f"{name} cannot be built with image.args={config.args}: {' '.join(str(error).split())[:300]}{hint}"
        ) from error
    if folder_args:
        published = cast(Any, model)
        published.pretrained_model_args = {**getattr(model, "pretrained_model_args", {}), **folder_args}
    return model


def create_dilated(config: ModelConfig) -> tuple[tuple[dict[str, Convolution], int], nn.Module]:
    """Create the timm model with image.stride.

    Returns (the convolutions of the model without it, its stride over image.stride), and the model. Raises ConfigError.
    """
    assert config.stride is not None
    with torch.device("meta"):
        plain = create_model(replace(config, stride=None, pretrained=False))
    ratio = dilation.check_stride(plain, config.stride, config.name)
    model = create_model(config)
    dilation.check_weights(plain, model, config.stride, config.name)
    return (dilation.read_geometry(plain), ratio), model


def loads_published(config: ModelConfig) -> bool:
    """Return whether the model is built with the published weights that `name` names."""
    if config.weights or config.pretrained is not None:
        return bool(config.pretrained) and not config.weights
    return not config.stem and (":" in config.name or "." in config.name)


def load_weights(model: Any, config: ModelConfig) -> str:
    """Load the file or folder that the configuration names; return where the weights are from, empty for random ones.

    The model takes over mean and standard deviation of a folder. Raises ConfigError.
    """
    kind, _, folder = config.name.partition(":")
    source = config.weights or (folder if kind == "local-dir" and loads_published(config) else None)
    if source is None:
        return f"{config.name}, published" if loads_published(config) else ""
    classifier = model.pretrained_cfg.get("classifier") or ()
    report = weight_files.load_weights(model, source, (classifier,) if isinstance(classifier, str) else tuple(classifier))
    model.pretrained_cfg = {**model.pretrained_cfg, **report.statistics}
    return str(report)


def patch_side(model: nn.Module, config: ModelConfig) -> int | None:
    """Return the side of the model's patches in pixels, of which image.size must be a multiple.

    None where any size fits, as for patches that overlap (PVT).
    """
    if config.stem:
        return stem.patch_size(config.stem)
    embed = getattr(model, "patch_embed", None)
    patch = getattr(embed, "patch_size", None)
    side = patch[0] if isinstance(patch, tuple) else patch
    convolutions = [m for m in embed.modules() if isinstance(m, nn.Conv2d)] if isinstance(embed, nn.Module) else []
    overlaps = any(m.kernel_size == (side, side) != m.stride for m in convolutions)
    return side if isinstance(side, int) and not overlaps else None


def _read_folder_args(config: ModelConfig) -> dict[str, Any]:
    """Return the arguments with which timm built the model whose folder image.weights names. Raises ConfigError."""
    content = weight_files.read_folder_config(Path(config.weights)) if config.weights else {}
    args = content.get("model_args")
    if content.get("architecture") != config.name.split(".")[0] or not isinstance(args, dict):
        return {}
    return {key: value for key, value in args.items() if key not in RESERVED_ARGS and value is not None}


def _explain_argument_error(config: ModelConfig, error: TypeError) -> str:
    """Return a message that names the argument that does not fit, and the closest one that does."""
    import timm

    match = re.search(r"argument '(\w+)'", str(error))
    if match is None:
        return f"image.args={config.args} does not fit {config.name}: {' '.join(str(error).split())[:200]}"
    argument = match[1]
    if argument == "output_stride" and config.stride is not None:
        return dilation.explain_refusal(config.stride, config.name)
    if "multiple values" in str(error):
        return _explain_fixed_argument(config, argument)
    if argument == "embed_layer":
        return f"image.stem: {config.name} has no patch embedding to replace; image.stem is for vision transformers"
    if argument == "patch_drop_rate":
        return f"image.patch_dropout: {config.name} has no patch dropout; only plain vision transformers have it"
    model = type(timm.create_model(config.name, num_classes=0))
    return f"image.args.{argument}: {config.name} takes no such argument" + closest(
        argument, [name for name in inspect.signature(model.__init__).parameters if name != "self"]
    )


def _explain_fixed_argument(config: ModelConfig, argument: str) -> str:
    return f"image.args.{argument} is fixed by {config.name}: choose another model, or leave it out"
