"""Adaptation of pretrained encoders: freezing, low-rank adapters, another image size.

    adapt: {trainable_blocks: {image: 0}, lora: {rank: 8, towers: [text]}, image_size: 336}
    optim: {lr: 1e-4, layer_decay: 0.75, lr_scale: {fusion: 10, task: 10}}     # new layers faster: see pretrain/optim.py

Order: load the pretrained weights, call adapt_encoder(), load the run's own weights (when resuming), then let the strategy
wrap the model. May import lora.py and pretrain. finetune/wise_ft.py interpolates between pretrained and fine-tuned weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, cast

from torch import Tensor, nn

from finetune.adapt import lora
from finetune.adapt.lora import LoraConfig
from pretrain.config import check_numbers
from pretrain.errors import ConfigError
from pretrain.model import DualEncoder, ModelSchema
from pretrain.towers import used_parameters
from pretrain.towers.timm import ImageTower
from pretrain.towers.timm_models import patch_side


@dataclass
class AdaptConfig:
    """Which weights of the pretrained encoders are trained, and how the encoders change before training."""

    trainable_blocks: dict[str, int] = field(default_factory=dict)
    """By tower: -1 (the default of a tower not named) trains everything. 0 freezes the tower and its projection, so that its
    embeddings do not change. n trains the last n blocks, the final norm, the pooler and the projection."""
    freeze: list[str] = field(default_factory=list)
    """Prefixes of the names of parameters to freeze (`encoder.projections`, `encoder.towers.text.model.embeddings`)."""
    fork: list[str] = field(default_factory=list)
    """Towers that are copied for the fusion. It reads the tokens of the copy, which is trained with it from the first step,
    while embeddings still come from the tower itself. With the tower frozen, an index built before stays valid."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters in the towers; rank 0 = none."""
    image_size: int | None = None
    """Side of the images in pixels; null = as pretrained. Position embeddings are interpolated (bicubic)."""
    contrastive: float = 0.0
    """Weight of the contrastive loss added to the task's loss, so that embeddings stay searchable; 0 = off."""

    def check(self) -> None:
        """Raise ConfigError for a value out of range."""
        if self.contrastive < 0:
            raise ConfigError(f"adapt.contrastive={self.contrastive} is the weight of a loss and must be at least 0")
        if self.image_size is not None and self.image_size < 1:
            raise ConfigError(f"adapt.image_size={self.image_size} is a number of pixels and must be at least 1")
        for name, blocks in self.trainable_blocks.items():
            if blocks < -1:
                raise ConfigError(
                    f"adapt.trainable_blocks.{name}={blocks} must be -1 (everything), 0 (nothing) or a number of blocks"
                )
        check_numbers(self, "adapt", contrastive="[0, inf)")


def adapt_encoder(encoder: DualEncoder, config: AdaptConfig, schema: ModelSchema) -> ModelSchema:
    """Change the pretrained encoder in place as configured, and return its new schema (image size).

    Towers that were frozen in pretraining are trained unless `config` freezes them. Raises ConfigError for a tower, block or
    layer that does not exist, and for settings that exclude each other.
    """
    if config.image_size is not None:
        schema = resize_image_tower(encoder, config.image_size, schema)
    for name in (*config.trainable_blocks, *config.lora.towers, *config.fork):
        encoder.tower(name)  # raises ConfigError for a wrong name
    adapters = (config.lora.towers or list(encoder.towers)) if config.lora.rank else []
    adapters = [name for name in adapters if config.trainable_blocks.get(name, -1)]  # a frozen tower gets none
    if both := [name for name in config.fork if name in adapters]:
        raise ConfigError(
            f"adapt.fork and adapt.lora both name the {both[0]} tower, but all weights of a tower's copy are trained; leave "
            "out one of the two, or name the other towers in adapt.lora.towers"
        )
    lora.check_targets([encoder.tower(name) for name in adapters], config.lora)
    for name in encoder.towers:
        blocks = config.trainable_blocks.get(name, -1)
        if name in adapters and blocks > 0:
            raise ConfigError(
                f"adapt.trainable_blocks.{name}={blocks} and adapt.lora both name the {name} tower, but adapters replace the "
                f"training of its weights; leave out one of the two, or name the other towers in adapt.lora.towers"
            )
        freeze_tower(encoder, name, blocks)
        if name in adapters:
            lora.inject_adapters(encoder.tower(name), config.lora)
    return schema


def freeze_tower(encoder: DualEncoder, modality: str, blocks: int) -> None:
    """Freeze all but the last `blocks` blocks of a tower, see AdaptConfig.trainable_blocks.

    0 freezes its projection too. Raises ConfigError for more blocks than the tower has.
    """
    tower = encoder.tower(modality)
    if blocks > tower.depth:
        raise ConfigError(
            f"adapt.trainable_blocks.{modality}={blocks}, but the {modality} tower has {tower.depth} blocks; -1 trains all"
        )
    tower.freeze(blocks)
    encoder.projection(modality).requires_grad_(blocks != 0)


def freeze_by_name(model: nn.Module, prefixes: Iterable[str]) -> None:
    """Freeze the parameters whose dotted names begin with one of the prefixes; others stay as they are.

    Raises ConfigError for a prefix that no parameter has.
    """
    for prefix in prefixes:
        parameters = [p for name, p in model.named_parameters() if name == prefix or name.startswith(f"{prefix.rstrip('.')}.")]
        if not parameters:
            first_words = sorted({name.split(".")[0] for name, _ in model.named_parameters()})
            raise ConfigError(
                f"adapt.freeze: no parameter's name begins with {prefix!r}; they begin with {', '.join(first_words)}"
            )
        for parameter in parameters:
            parameter.requires_grad_(False)


def freeze_unused(model: nn.Module, outputs: Iterable[Tensor]) -> list[str]:
    """Freeze every parameter that none of the outputs depends on, and return their names.

    A task that reads only tokens does not use a pooler or logit_scale, and DDP and ZeRO would wait for their gradients.
    `outputs` are those of one small forward pass with gradients enabled; nothing is computed here.

    Raises:
        ConfigError: the model does not call a layer that has an adapter.
    """
    tensors: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    used = {name for out in outputs if out.requires_grad for name in used_parameters(out, tensors)}
    unused = [name for name in tensors if name not in used]
    for name in unused:
        if ".lora_" in name:
            layer = lora.strip_adapter(name).rpartition(".")[0]
            raise ConfigError(
                f"adapt.lora: the model does not call the adapter of {layer}; leave its last word out of adapt.lora.targets"
            )
        tensors[name].requires_grad_(False)
    return unused


# ---------------------------------------------------------------------------------------------------------------------
# Another image size


def resize_image_tower(encoder: DualEncoder, size: int, schema: ModelSchema) -> ModelSchema:
    """Change the image tower in place to images of `size` x `size` pixels, and return the new schema.

    timm interpolates the position embeddings (bicubic, antialiased). Raises ConfigError where the patch does not divide the
    size, or the tower's size cannot change.
    """
    tower = encoder.tower("image")
    if size == schema.image.size:
        return schema
    if not isinstance(tower, ImageTower):
        raise ConfigError(
            f"adapt.image_size={size}: image.tower={schema.image.tower} has a fixed size; only timm's towers can change it"
        )
    model = cast(Any, tower.model)
    side = patch_side(model, tower.config)
    if side and size % side:
        raise ConfigError(f"adapt.image_size={size} is not a multiple of {schema.image.name}'s patch of {side} px")
    was_trainable = {name: p.requires_grad for name, p in tower.named_parameters()}
    try:
        if hasattr(model, "set_input_size"):
            model.set_input_size(img_size=(size, size))
        tower.config = replace(tower.config, size=size)
        tower._measure()
    except (RuntimeError, AssertionError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"adapt.image_size={size}: {schema.image.name} cannot change its size: {reason}") from error
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_(was_trainable.get(name, True) and name not in tower.unused_parameters)
    return replace(schema, image=replace(schema.image, size=size))


# ---------------------------------------------------------------------------------------------------------------------
# Weights for checkpoints


def build_adapter_merger(config: AdaptConfig) -> Callable[[dict[str, Tensor]], dict[str, Tensor]] | None:
    """Return the function that merges adapters into the plain model's weights; None without adapters."""
    alpha = config.lora.alpha
    return (lambda weights: lora.merge_adapters(weights, alpha)) if config.lora.rank else None
