"""DualEncoder: a tower and a projection for each modality, one shared space, one logit scale.

Legend: b = samples, k = texts a sample, N = tokens, P = width of a pooled vector, D = width of the shared space.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain import registry
from pretrain.config import check_numbers, component_field, extra_components
from pretrain.data.audio import AudioDecoder
from pretrain.data.images import AugmentConfig, ImageDecoder
from pretrain.data.length_groups import RowGroups
from pretrain.data.text import TextDecoder
from pretrain.data.text_packing import PackedTexts
from pretrain.errors import ConfigError
from pretrain.ops import WHITE
from pretrain.projections import MLPProjection, Projection, ProjectionKind, build_projections
from pretrain.runtime import performance
from pretrain.runtime.performance import PerformanceConfig
from pretrain.towers import TokenSequence, Tower

M = TypeVar("M", bound=nn.Module)
LOGIT_SCALE = math.log(1 / 0.07)
"""Logarithm of CLIP's initial scale."""
MAX_LOGIT_SCALE = math.log(100)
"""Logarithm of the largest scale: CLIP keeps it at or below 100, for stability."""


@dataclass
class ModelConfig:
    """The shared space that joins the towers: projections, scale and bias of the logits."""

    dim: int = 512
    """D, the width of the shared space."""
    projection: ProjectionKind = "linear"
    """linear: a matrix without bias maps each tower's pooled vector to the embedding. mlp: two layers with biases and a ReLU
    between them (CLAP); single tokens have no place in the shared space. none: the pooled vector is the embedding (SigLIP)."""
    logit_scale: float | None = None
    """Logarithm of the initial scale of the logits; null = the default of the loss."""
    logit_bias: float | None = None
    """Initial bias of the logits; null = the default of the loss, which may be no bias."""

    def check(self) -> None:
        """Raise ConfigError for a width or a scale out of range."""
        if self.dim < 1:
            raise ConfigError(f"model.dim={self.dim} must be at least 1")
        if self.logit_scale is not None and not 0 <= self.logit_scale <= MAX_LOGIT_SCALE:
            raise ConfigError(
                f"model.logit_scale={self.logit_scale} is a logarithm and is kept between 0 and {MAX_LOGIT_SCALE:.3f}"
            )
        check_numbers(self, "model")


@dataclass
class ModelSchema:
    """The part of a configuration that defines the model and how it is computed; loading a checkpoint reads no other part."""

    image: Any = component_field(registry.get_component, "towers", "tower", "timm")
    """The image tower."""
    text: Any = component_field(registry.get_component, "towers", "tower", "transformers")
    """The text tower."""
    others: dict[str, Any] = extra_components(registry.get_component, "towers", "tower")
    """Towers of further modalities, by name: each other section with the key `tower` (audio: {tower: audio, ...})."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The shared space."""
    performance: PerformanceConfig = field(default_factory=PerformanceConfig)
    """How GPUs compute the model; may change when a run is resumed."""


class DualEncoder(nn.Module):
    """Encoders of two or more modalities, named by the keys of `towers`, into one shared space."""

    def __init__(
        self,
        towers: dict[str, Tower],
        dim: int,
        logit_scale: float,
        logit_bias: float | None,
        projection: ProjectionKind = "linear",
    ) -> None:
        super().__init__()
        self.towers = nn.ModuleDict(towers)
        widths = {name: tower.pooled_width for name, tower in towers.items()}
        self.projections = nn.ModuleDict(build_projections(projection, widths, dim))
        self.logit_scale = nn.Parameter(torch.full((1,), logit_scale))  # shape (1,): ZeRO and FSDP2 refuse 0-d parameters
        self.logit_bias = None if logit_bias is None else nn.Parameter(torch.full((1,), logit_bias))

    def forward(
        self, inputs: dict[str, Tensor], masks: dict[str, Tensor], groups: dict[str, RowGroups | PackedTexts] | None = None
    ) -> dict[str, Tensor]:
        """Encode every modality of the batch.

        inputs: {modality: (b, ...)}; masks: {modality: (b, N)}. Returns {modality: (b, D) normalized, "logit_scale": (1,)
        exponentiated, "logit_bias": (1,) if the model has one}. With k texts a sample, a mask is (b, k, N) and the result
        (b, k, D). Modalities that the batch lacks are left out. groups: by modality, where its rows are to be encoded in
        groups of fixed shapes, or packed; the result is the same.
        """
        groups = groups or {}
        out = {
            name: self.encode(name, inputs[name], masks.get(name), groups.get(name)) for name in self.towers if name in inputs
        }
        out["logit_scale"] = self.logit_scale.exp()
        if self.logit_bias is not None:
            out["logit_bias"] = self.logit_bias
        return out

    def encode(
        self, modality: str, inputs: Tensor, mask: Tensor | None = None, groups: RowGroups | PackedTexts | None = None
    ) -> Tensor:
        """Return L2-normalized embeddings, in float32 or wider.

        (b, ...) -> (b, D); with a mask (b, k, N), (b, k, ...) -> (b, k, D). groups: of the b or b k rows.
        """
        if mask is not None and mask.dim() == 3:
            flat = self.encode(modality, inputs.flatten(0, 1), mask.flatten(0, 1), groups)
            return flat.reshape(*mask.shape[:2], -1)
        tower = self.tower(modality)
        if groups is None:
            pooled = tower(inputs, mask).pooled
        elif isinstance(groups, PackedTexts):
            pooled = tower.pool_packed(inputs, mask, groups.tokens, groups.starts)
        else:
            pooled = tower.pool_groups(inputs, mask, groups.sections(inputs.shape[1]))
        embedding = self.projection(modality)(pooled)
        return F.normalize(embedding.to(torch.promote_types(embedding.dtype, torch.float32)), dim=-1)

    def tokens(self, modality: str, inputs: Tensor, mask: Tensor | None = None) -> TokenSequence:
        """Return the tower's tokens projected into the shared space: states (b, N, D).

        The mean of the states over the mask is the embedding before it is normalized; with image.stride, the mean of those on
        the coarser grid. Raises ConfigError for a tower that does not pool by the mean: training does not bring its single
        tokens into the shared space.
        """
        tower = self.tower(modality)
        if self.has_mlp:
            raise ConfigError(
                "the projection has two layers (model.projection=mlp), so single tokens have no meaning in the shared space; "
                "use the towers' own states"
            )
        if not tower.pools_mean:
            raise ConfigError(
                f"the {modality} tower does not pool by the mean of its tokens, so single tokens have no meaning in the shared "
                f"space; pretrain with {modality}.pool=avg, or use the tower's own states"
            )
        tokens: TokenSequence = tower(inputs, mask)
        project = self.projection(modality)
        return tokens._replace(states=project(tokens.states), pooled=project(tokens.pooled))

    def tower(self, modality: str) -> Tower:
        """Return the tower of a modality. Raises ConfigError if the model has none for it."""
        if modality not in self.towers:
            raise ConfigError(f"the model has no tower for {modality!r}; it has {', '.join(self.towers)}")
        return cast(Tower, self.towers[modality])

    def projection(self, modality: str) -> Projection:
        """Return the projection of a modality: (..., P) -> (..., D)."""
        return cast(Projection, self.projections[modality])

    @property
    def has_mlp(self) -> bool:
        """Whether projections are no linear maps: the mean of projected tokens is then not the projection of their mean."""
        return any(isinstance(projection, MLPProjection) for projection in self.projections.values())

    @torch.no_grad()
    def clamp_(self) -> None:
        """Clamp logit_scale to [0, ln 100], in place; the step calls it after each update."""
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    @torch.no_grad()
    def max_logit(self) -> float:
        """Return a bound of every |logit|, bias aside, that holds from now to the end of training.

        Embeddings have length 1, up to 2 % for rounding in any precision. Imported weights may begin above the largest scale.
        """
        return 1.02 * max(math.exp(MAX_LOGIT_SCALE), float(self.logit_scale.detach().exp()))

    def parameter_counts(self) -> dict[str, dict[str, int]]:
        """Return {modality: {"total": n, "trainable": n}}, projections included, and the same of "scalars"."""
        scalars = [self.logit_scale] if self.logit_bias is None else [self.logit_scale, self.logit_bias]
        parameters: dict[str, list[nn.Parameter]] = {
            name: [*self.tower(name).parameters(), *self.projection(name).parameters()] for name in self.towers
        }
        return {
            name: {
                "total": sum(p.numel() for p in group),
                "trainable": sum(p.numel() for p in group if p.requires_grad),
            }
            for name, group in {**parameters, "scalars": scalars}.items()
        }


def build(towers: dict[str, Any], config: ModelConfig, tokenizer: Any = None, has_weights: bool = True) -> DualEncoder:
    """Build a DualEncoder from {modality: tower's Config}; it has a logit_bias only if `config` sets one.

    has_weights: if false, towers are built on the meta device where their module says BUILDS_EMPTY, so that the host never
    holds their weights; the others have random ones.

    Initial weights come from torch's global random generator: seed it before. Raises ConfigError.
    """
    built: dict[str, Tower] = {}
    for name, tower_config in towers.items():
        module = registry.get_component("towers", tower_config.tower)
        is_empty = not has_weights and getattr(module, "BUILDS_EMPTY", False)
        with torch.device("meta") if is_empty else nullcontext():
            built[name] = module.build(tower_config, tokenizer)
        if built[name].modality != name:
            raise ConfigError(f"{name}.tower={tower_config.tower} encodes {built[name].modality}, not {name}")
    scale = LOGIT_SCALE if config.logit_scale is None else config.logit_scale
    for name, tower in built.items():
        if config.projection == "none" and tower.pooled_width != config.dim:
            raise ConfigError(
                f"model.projection=none needs towers as wide as the shared space: the pooled vectors of the {name} tower have "
                f"{tower.pooled_width} numbers, model.dim={config.dim}"
            )
    return DualEncoder(built, config.dim, scale, config.logit_bias, config.projection)


def set_performance(model: nn.Module, config: PerformanceConfig, device: torch.device) -> None:
    """Set how the towers inside a model are computed on `device`: memory format of images, precision of normalization."""
    on_gpu = device.type == "cuda"
    for module in model.modules():
        if isinstance(module, Tower):
            module.set_channels_last(config.channels_last == "true" or (config.channels_last == "auto" and on_gpu))
        if isinstance(getattr(module, "_fast_norm", None), bool):  # timm's layers read set_fast_norm() while they are built
            cast(Any, module)._fast_norm = config.fast_norm and on_gpu


def choose_attention(model: nn.Module, device: torch.device, precision: str) -> None:
    """Choose torch's implementation of attention for training the towers inside a model.

    Inside performance.process_settings, which puts the choice back.
    """
    counts = [module.token_count for module in model.modules() if isinstance(module, Tower)]
    performance.choose_attention(max(counts, default=0) if all(counts) else 0, device.type, precision)


@contextmanager
def on_device(model: M, config: ModelSchema, device: torch.device) -> Iterator[M]:
    """Move a loaded model to `device` and yield it; inside the block its `performance` settings are in force."""
    with performance.process_settings(config.performance):
        set_performance(model, config.performance, device)
        yield model.to(device)


def read_performance(model: nn.Module) -> dict[str, Any]:
    """Return how the towers inside a model are computed: modalities with channels_last, and whether any norm is fast."""
    modules = list(model.modules())
    return {
        "channels_last": [m.modality for m in modules if isinstance(m, Tower) and getattr(m, "channels_last", False)],
        "fast_norm": any(getattr(m, "_fast_norm", False) for m in modules),
    }


def describe_weights(model: DualEncoder, init: Any = None) -> list[str]:
    """Return a line for each tower that `init` does not load: where its weights are from, or that they are random.

    init: a run for all towers, or {modality: run}.
    """
    lines = []
    for name in model.towers:
        tower = model.tower(name)
        origin = tower.weights_origin
        if origin is None or isinstance(init, str) or name in (init or {}):
            continue
        if origin:
            lines.append(f"{name} tower: weights from {origin}")
            continue
        is_frozen = not any(parameter.requires_grad for parameter in tower.parameters())
        hint = f"; {tower.pretrained_settings} starts from trained ones" if tower.pretrained_settings else ""
        lines.append(f"{name} tower: random weights{', and frozen' if is_frozen else ''}{hint}")
    return lines


def tower_configs(config: ModelSchema) -> dict[str, Any]:
    """Return the tower configurations by modality, without those set to null.

    Raises ConfigError for fewer than two.
    """
    configs = {"image": config.image, "text": config.text, **config.others}
    used = {modality: tower for modality, tower in configs.items() if tower is not None}
    if len(used) < 2:
        raise ConfigError(f"a contrastive model needs two towers; the configuration has {', '.join(used) or 'none'}")
    return used


def build_decoders(
    config: ModelSchema, tokenizer: Any, model: DualEncoder, caption: str, augment: AugmentConfig | None = None, draw: int = 1
) -> dict[str, Any]:
    """Build, by modality, the decoder that turns a raw sample into the tower's input.

    A tower's module may bring its own `decoder(config, tokenizer)`. caption: where a sample's captions are read from;
    draw: captions drawn for each sample. Raises ConfigError for a modality without a decoder.
    """
    decoders: dict[str, Any] = {}
    for modality, tower in tower_configs(config).items():
        module = registry.get_component("towers", tower.tower)
        if hasattr(module, "decoder"):
            decoders[modality] = module.decoder(tower, tokenizer)
        elif modality == "image":
            color = getattr(model.tower(modality), "pad_color", WHITE)
            decoders[modality] = ImageDecoder(tower.size, augment, tower.resize, tower.interpolation, pad_color=color)
        elif modality == "text":
            trim = model.tower(modality).trims
            decoders[modality] = TextDecoder(tokenizer, tower.length, caption, trim=trim, draw=draw)
        elif modality == "audio" and hasattr(tower, "pad"):
            built = cast(Any, model.tower(modality))
            decoders[modality] = AudioDecoder(built.rate, built.seconds, tower.pad)
        else:
            raise ConfigError(f"{modality}.tower={tower.tower}: {module.__name__} has no decoder(config, tokenizer)")
    return decoders


def portable_config(config: ModelSchema, model: DualEncoder) -> ModelSchema:
    """Return the configuration with every architecture inline, so that loading needs no hub and no folder."""
    inlined: dict[str, Any] = {}
    for modality, tower in tower_configs(config).items():
        settings = getattr(model.towers[modality], "settings", None)
        changes = settings() if settings is not None else {}
        inlined[modality] = replace(tower, **changes)
    others = {modality: inlined.pop(modality) for modality in config.others}
    return replace(config, **inlined, others=others)
