"""DualEncoder: a tower and a projection for each modality, one shared space, one logit scale.

Legend: b = samples, N = tokens, P = width of a tower's pooled vector, C = width of its tokens, D = width of the space.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain import registry
from pretrain.config import component_field, extra_components
from pretrain.data.images import AugmentConfig, ImageDecoder
from pretrain.data.text import TextDecoder
from pretrain.errors import ConfigError
from pretrain.towers import TokenSequence, Tower

LOGIT_SCALE = math.log(1 / 0.07)
"""CLIP's start."""
MAX_LOGIT_SCALE = math.log(100)
"""CLIP keeps the scale at or below 100, for stability."""


@dataclass
class ModelConfig:
    """What joins the towers."""

    dim: int = 512
    """D, the width of the shared space."""
    projection: Literal["linear", "none"] = "linear"
    """linear: a matrix without bias from each tower's pooled vector. none: that vector is the embedding (SigLIP)."""
    logit_scale: float | None = None
    """Logarithm of the scale at the start; null takes the loss's own."""
    logit_bias: float | None = None
    """Bias of the logits at the start; null takes the loss's own, which may be none."""

    def check(self) -> None:
        """Raises ConfigError."""
        if self.dim < 1:
            raise ConfigError(f"model.dim={self.dim} must be at least 1")
        if self.logit_scale is not None and not 0 <= self.logit_scale <= MAX_LOGIT_SCALE:
            raise ConfigError(
                f"model.logit_scale={self.logit_scale} is a logarithm and is kept between 0 and {MAX_LOGIT_SCALE:.3f}"
            )


@dataclass
class ModelSchema:
    """The part of a run's configuration that says what the model is: all that loading a checkpoint reads."""

    image: Any = component_field(registry.get_component, "towers", "tower", "timm")
    """What encodes pictures."""
    text: Any = component_field(registry.get_component, "towers", "tower", "transformers")
    """What encodes texts."""
    others: dict[str, Any] = extra_components(registry.get_component, "towers", "tower")
    """Towers of further modalities, by name: any other section with a `tower` (audio: {tower: my.module})."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """What joins them."""


class DualEncoder(nn.Module):
    """Encodes each modality into one space. Two modalities in practice; the names are the towers', any number works."""

    def __init__(
        self, towers: dict[str, Tower], dim: int, logit_scale: float, logit_bias: float | None, projected: bool = True
    ) -> None:
        super().__init__()
        self.towers = nn.ModuleDict(towers)
        made = {name: nn.Linear(tower.pooled_width, dim, bias=False) for name, tower in towers.items()} if projected else {}
        for name, matrix in made.items():
            nn.init.normal_(matrix.weight, std=towers[name].pooled_width ** -0.5)
        self.projections = nn.ModuleDict(made or {name: NoProjection(dim) for name in towers})
        self.logit_scale = nn.Parameter(torch.full((1,), logit_scale))  # never 0-d: ZeRO and FSDP2 refuse that
        self.logit_bias = None if logit_bias is None else nn.Parameter(torch.full((1,), logit_bias))

    def forward(self, inputs: dict[str, Tensor], masks: dict[str, Tensor]) -> dict[str, Tensor]:
        """{modality: (b, ...)}, {modality: (b, N)} -> {modality: (b, D) normalised, "logit_scale": (1,) exponentiated,
        "logit_bias": (1,) if there is one}. With k texts a sample, masks (b, k, N), (b, k, D). Modalities that the batch
        lacks are left out."""
        out = {name: self.encode(name, inputs[name], masks.get(name)) for name in self.towers if name in inputs}
        out["logit_scale"] = self.logit_scale.exp()
        if self.logit_bias is not None:
            out["logit_bias"] = self.logit_bias
        return out

    def encode(self, modality: str, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """(b, ...) -> (b, D), or (b, k, ...) with a mask (b, k, N) -> (b, k, D), L2-normalised, in float32 at least."""
        if mask is not None and mask.dim() == 3:
            flat = self.encode(modality, inputs.flatten(0, 1), mask.flatten(0, 1))
            return flat.reshape(*mask.shape[:2], -1)
        pooled = self.tower(modality)(inputs, mask).pooled
        embedding = self.projection(modality)(pooled)
        return F.normalize(embedding.to(torch.promote_types(embedding.dtype, torch.float32)), dim=-1)

    def tokens(self, modality: str, inputs: Tensor, mask: Tensor | None = None) -> TokenSequence:
        """The tower's tokens in the shared space: states (b, N, D), whose masked mean is the embedding before it is
        normalised. Raises ConfigError where the tower pools otherwise: its tokens are then not trained to lie there.
        """
        tower = self.tower(modality)
        if not tower.pools_mean:
            raise ConfigError(
                f"the {modality} tower does not pool by the mean of its tokens, so they have no place in the shared "
                f"space; pretrain with {modality}.pool=avg, or use the tower's own states"
            )
        found: TokenSequence = tower(inputs, mask)
        project = self.projection(modality)
        return found._replace(states=project(found.states), pooled=project(found.pooled))

    def tower(self, modality: str) -> Tower:
        """The tower of a modality. Raises ConfigError for one the model does not have."""
        if modality not in self.towers:
            raise ConfigError(f"the model has no tower for {modality!r}; it has {', '.join(self.towers)}")
        return cast(Tower, self.towers[modality])

    def projection(self, modality: str) -> nn.Linear | NoProjection:
        """(.., P) -> (.., D), no bias."""
        return cast("nn.Linear | NoProjection", self.projections[modality])

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keeps logit_scale in [0, ln 100]; called after each step."""
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def parameter_counts(self) -> dict[str, dict[str, int]]:
        """{modality: {"total": n, "trainable": n}}, each with its projection, and "scalars"."""
        scalars = [self.logit_scale] if self.logit_bias is None else [self.logit_scale, self.logit_bias]
        parts: dict[str, list[nn.Parameter]] = {
            name: [*self.tower(name).parameters(), *self.projection(name).parameters()] for name in self.towers
        }
        return {
            name: {
                "total": sum(p.numel() for p in part),
                "trainable": sum(p.numel() for p in part if p.requires_grad),
            }
            for name, part in {**parts, "scalars": scalars}.items()
        }


class NoProjection(nn.Module):
    """The pooled vector is the embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_features = self.out_features = width

    def forward(self, pooled: Tensor) -> Tensor:
        """(.., D) -> the same."""
        return pooled


def build(towers: dict[str, Any], config: ModelConfig, tokenizer: Any = None) -> DualEncoder:
    """{modality: a tower's Config} -> DualEncoder. A bias is made only where the configuration gives one.

    Raises ConfigError. Random numbers come from torch's global generator: seed it before.
    """
    made: dict[str, Tower] = {}
    for name, part in towers.items():
        made[name] = registry.get_component("towers", part.tower).build(part, tokenizer)
        if made[name].modality != name:
            raise ConfigError(f"{name}.tower={part.tower} encodes {made[name].modality}, not {name}")
    scale = LOGIT_SCALE if config.logit_scale is None else config.logit_scale
    projected = config.projection == "linear"
    for name, tower in made.items():
        if not projected and tower.pooled_width != config.dim:
            raise ConfigError(
                f"model.projection=none needs towers as wide as the shared space: the {name} tower's vectors have "
                f"{tower.pooled_width} numbers, model.dim={config.dim}"
            )
    return DualEncoder(made, config.dim, scale, config.logit_bias, projected)


def tower_configs(config: ModelSchema) -> dict[str, Any]:
    """The tower configurations by modality; a modality set to null is left out."""
    all_of = {"image": config.image, "text": config.text, **config.others}
    found = {modality: tower for modality, tower in all_of.items() if tower is not None}
    if len(found) < 2:
        raise ConfigError(f"a contrastive model needs two towers; the configuration has {', '.join(found) or 'none'}")
    return found


def build_decoders(
    config: ModelSchema, tokenizer: Any, model: DualEncoder, caption: str, augment: AugmentConfig | None = None, draw: int = 1
) -> dict[str, Any]:
    """What turns a raw sample into each tower's input. A tower's file may bring its own `decoder(config, tokenizer)`."""
    made: dict[str, Any] = {}
    for modality, tower in tower_configs(config).items():
        module = registry.get_component("towers", tower.tower)
        if hasattr(module, "decoder"):
            made[modality] = module.decoder(tower, tokenizer)
        elif modality == "image":
            made[modality] = ImageDecoder(tower.size, augment, tower.resize, tower.interpolation)
        elif modality == "text":
            made[modality] = TextDecoder(tokenizer, tower.length, caption, trim=model.tower(modality).trims, draw=draw)
        else:
            raise ConfigError(f"{modality}.tower={tower.tower}: {module.__name__} has no decoder(config, tokenizer)")
    return made


def portable_config(config: ModelSchema, model: DualEncoder) -> ModelSchema:
    """The configuration as a checkpoint keeps it: every architecture inline, so that loading needs no hub and no folder."""
    inlined: dict[str, Any] = {}
    for modality, tower in tower_configs(config).items():
        settings = getattr(model.towers[modality], "settings", None)
        changes = settings() if settings is not None else {}
        inlined[modality] = replace(tower, **changes)
    others = {modality: inlined.pop(modality) for modality in config.others}
    return replace(config, **inlined, others=others)
