"""What of a pretrained model moves: freezing, low-rank adapters, another picture size. Plus lora.py and wise.py.

    adapt: {trainable_blocks: {image: 0}, lora: {rank: 8, towers: [text]}, image_size: 336}
    optim: {lr: 1e-4, layer_decay: 0.75, lr_scale: {fusion: 10, task: 10}}     # new layers faster: see pretrain/optim.py

Order: the pretrained weights are loaded first, then apply(), then the run's own weights (resuming), then the strategy wraps.
May import lora.py and pretrain's floors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, cast

from torch import Tensor, nn

from finetune.adapt import lora
from finetune.adapt.lora import LoraConfig
from pretrain.errors import ConfigError
from pretrain.model import DualEncoder, ModelSchema
from pretrain.towers import used_parameters
from pretrain.towers.timm import ImageTower, patch_side


@dataclass
class AdaptConfig:
    """What of the pretrained encoders moves, and how they change before training."""

    trainable_blocks: dict[str, int] = field(default_factory=dict)
    """By tower: -1 (any tower not named) trains everything, 0 freezes the tower with its projection, so that its embeddings
    stay what they were, n trains the last n blocks with final norm, pooler and projection."""
    freeze: list[str] = field(default_factory=list)
    """Parts of the model that stay as they are, by the beginning of their parameters' names (`encoder.projections`,
    `encoder.towers.text.model.embeddings`)."""
    fork: list[str] = field(default_factory=list)
    """Towers of which the fusion reads a copy of its own, that learns with it from the first step: tokens become what the task
    needs, embeddings do not follow. With the tower itself frozen, an index that was built before stays valid."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters in the towers; rank 0 = none."""
    image_size: int | None = None
    """Side of the pictures in pixels, where it is not the pretrained one: positions are interpolated (bicubic)."""
    contrastive: float = 0.0
    """Weight of the contrastive loss that is kept on beside the task's, so that embeddings stay searchable; 0 = off."""

    def check(self) -> None:
        """Raises ConfigError."""
        if self.contrastive < 0:
            raise ConfigError(f"adapt.contrastive={self.contrastive} is the weight of a loss: at least 0")
        if self.image_size is not None and self.image_size < 1:
            raise ConfigError(f"adapt.image_size={self.image_size} is a number of pixels: at least 1")
        for name, blocks in self.trainable_blocks.items():
            if blocks < -1:
                raise ConfigError(
                    f"adapt.trainable_blocks.{name}={blocks} must be -1 (everything), 0 (nothing) or a number of blocks"
                )


def apply(encoder: DualEncoder, config: AdaptConfig, schema: ModelSchema) -> ModelSchema:
    """Changes the pretrained encoder in place as configured; returns the schema of the model it now is (picture size).

    Every tower is thawed first, however it was pretrained. Raises ConfigError.
    """
    if config.image_size is not None:
        schema = resize(encoder, config.image_size, schema)
    for name in (*config.trainable_blocks, *config.lora.towers, *config.fork):
        encoder.tower(name)  # a wrong name is said now
    adapters = (config.lora.towers or list(encoder.towers)) if config.lora.rank else []
    adapters = [name for name in adapters if config.trainable_blocks.get(name, -1)]  # one that is frozen stays frozen
    if both := [name for name in config.fork if name in adapters]:
        raise ConfigError(
            f"adapt.fork and adapt.lora both speak of the {both[0]} tower: the copy that the fusion reads learns whole; leave "
            "out one, or name the other towers in adapt.lora.towers"
        )
    lora.check_targets([encoder.tower(name) for name in adapters], config.lora)
    for name in encoder.towers:
        blocks = config.trainable_blocks.get(name, -1)
        if name in adapters and blocks > 0:
            raise ConfigError(
                f"adapt.trainable_blocks.{name}={blocks} and adapt.lora both speak of the {name} tower: adapters replace the "
                f"training of its weights; leave out one, or name the other towers in adapt.lora.towers"
            )
        freeze(encoder, name, blocks)
        if name in adapters:
            lora.inject(encoder.tower(name), config.lora)
    return schema


def freeze(encoder: DualEncoder, modality: str, blocks: int) -> None:
    """As AdaptConfig.trainable_blocks says, with the projection of a tower that is frozen whole. Raises ConfigError."""
    tower = encoder.tower(modality)
    if blocks > tower.depth:
        raise ConfigError(
            f"adapt.trainable_blocks.{modality}={blocks}, but the {modality} tower has {tower.depth} blocks; -1 trains all"
        )
    tower.freeze(blocks)
    encoder.projection(modality).requires_grad_(blocks != 0)


def freeze_named(model: nn.Module, beginnings: Iterable[str]) -> None:
    """Freezes the parameters whose names begin so; nothing that was frozen thaws. Raises ConfigError for one without any."""
    for beginning in beginnings:
        found = [p for name, p in model.named_parameters() if name == beginning or name.startswith(f"{beginning.rstrip('.')}.")]
        if not found:
            parts = sorted({name.split(".")[0] for name, _ in model.named_parameters()})
            raise ConfigError(
                f"adapt.freeze: no parameter's name begins with {beginning!r}; they begin with {', '.join(parts)}"
            )
        for parameter in found:
            parameter.requires_grad_(False)


def freeze_unreached(model: nn.Module, outputs: Iterable[Tensor]) -> list[str]:
    """Freezes every parameter that none of the outputs depends on, and returns their names.

    A task that reads tokens only never reaches a pooler or logit_scale: without this DDP and ZeRO would wait for their
    gradients. `outputs` are those of one small forward pass with gradients on; nothing is computed here.
    """
    tensors: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    used = {name for out in outputs if out.requires_grad for name in used_parameters(out, tensors)}
    still = [name for name in tensors if name not in used]
    for name in still:
        if ".lora_" in name:
            layer = lora.plain_name(name).rpartition(".")[0]
            raise ConfigError(
                f"adapt.lora: the model passes by the adapter of {layer}; leave its last word out of adapt.lora.targets"
            )
        tensors[name].requires_grad_(False)
    return still


# ---------------------------------------------------------------------------------------------------------------------
# Another picture size


def resize(encoder: DualEncoder, size: int, schema: ModelSchema) -> ModelSchema:
    """The image tower for pictures of another side; its positions are interpolated by timm (bicubic, antialiased).

    Raises ConfigError where the patch does not divide it, or the tower cannot change.
    """
    tower = encoder.tower("image")
    if size == schema.image.size:
        return schema
    if not isinstance(tower, ImageTower):
        raise ConfigError(
            f"adapt.image_size={size}: image.tower={schema.image.tower} has a size of its own; only timm's towers change"
        )
    model = cast(Any, tower.model)
    side = patch_side(model, tower.config)
    if side and size % side:
        raise ConfigError(f"adapt.image_size={size} is not a multiple of {schema.image.name}'s patch of {side} px")
    trains = {name: p.requires_grad for name, p in tower.named_parameters()}
    try:
        if hasattr(model, "set_input_size"):
            model.set_input_size(img_size=(size, size))
        tower.config = replace(tower.config, size=size)
        tower._measure()
    except (RuntimeError, AssertionError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"adapt.image_size={size}: {schema.image.name} cannot change its size: {reason}") from error
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_(trains.get(name, True) and name not in tower.unused_parameters)
    return replace(schema, image=replace(schema.image, size=size))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def plain(config: AdaptConfig) -> Callable[[dict[str, Tensor]], dict[str, Tensor]] | None:
    """What turns the weights of training into those of the plain model; None where they are the same."""
    alpha = config.lora.alpha
    return (lambda weights: lora.merge(weights, alpha)) if config.lora.rank else None
