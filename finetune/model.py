"""FusionModel: aligned encoders, cross-attention between their tokens, and the head of a task.

Shapes: b = images (samples), m = texts per image, T = tokens of a text, N = tokens of a sequence, C = width of a token,
D = width of the shared space, rows = b for images and b m for texts.
"""

from __future__ import annotations

from collections.abc import Collection
from copy import deepcopy
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.attention.trace import Trace
from finetune.fusion.blocks import Fusion
from pretrain import registry
from pretrain.errors import ConfigError
from pretrain.model import DualEncoder
from pretrain.towers import TokenSequence, Tower

Features = dict[str, Tensor]
"""Output of a head, by name: (b, ...), one row per sample, so that the outputs of chunks can be concatenated."""
TokenSource = Literal["auto", "aligned", "tower"]
CAPTION = "caption"
"""Name of an optional input (b, T): a caption per image. It makes the model return contrastive embeddings as well."""


class Head(nn.Module):
    """Base class of all heads: a task's own weights, and what it computes from a batch."""

    def forward(
        self,
        model: FusionModel,
        inputs: dict[str, Tensor],
        masks: dict[str, Tensor],
        targets: dict[str, Any],
        trace: Trace | None = None,
    ) -> Features:
        """Compute the features that the task's loss scores.

        Every batch must use the same weights on every process: leave out a term by giving it weight 0.

        Args:
            model: computes tokens, embeddings and fused tokens.
            inputs: {modality: (b, ...)}.
            masks: {modality: (b, T) or (b, m, T) bool}, True for real tokens.
            targets: targets of the batch, by name.
            trace: where given, the fusion records its attention in it.

        Returns:
            Features, each (b, ...).
        """
        raise NotImplementedError(f"{type(self).__name__}.forward")


class TowerCopy(nn.Module):
    """A trainable copy of a tower and its projection, which computes the tokens for fusion (adapt.fork)."""

    def __init__(self, encoder: DualEncoder, modality: str) -> None:
        super().__init__()
        self.tower = deepcopy(encoder.tower(modality))
        self.projection = deepcopy(encoder.projection(modality))
        self.tower.freeze(-1)
        self.projection.requires_grad_(True)


class FusionModel(nn.Module):
    """Encoders, a fusion (or None) and a head.

    Training calls the model itself, never one of its submodules, so that the hooks of every strategy run.
    """

    head: Head

    def __init__(
        self,
        encoder: DualEncoder,
        fusion: Fusion | None,
        token_sources: dict[str, str],
        tower_copies: Collection[str] = (),
        subject: str = "image",
    ) -> None:
        """Join encoders and fusion; the caller assigns `head`.

        Args:
            encoder: the aligned encoders.
            fusion: None for a task that reads embeddings only.
            token_sources: modality -> "aligned" (tokens projected into the shared space) or "tower" (the tower's own states).
            tower_copies: modalities whose tokens come from a copy of their tower.
            subject: the modality that texts are about, image or audio.
        """
        super().__init__()
        self.encoder = encoder
        self.subject = subject
        self.forks = nn.ModuleDict({name: TowerCopy(encoder, name) for name in tower_copies})  # named so in checkpoints
        self.fusion = fusion
        self.token_sources = token_sources

    @property
    def widths(self) -> dict[str, int]:
        """Token width C by modality, the same before and after fusion."""
        return token_widths(self.encoder, self.token_sources)

    def forward(
        self,
        inputs: dict[str, Tensor],
        masks: dict[str, Tensor],
        targets: dict[str, Any] | None = None,
        trace: Trace | None = None,
    ) -> Features:
        """Return the head's features of {modality: (b, ...)} inputs.

        Where the inputs hold a caption of each image (CAPTION), the result also has the embeddings of images and captions
        and the scalars of a contrastive loss (see tasks/with_contrastive.py). Each image is then encoded only once.
        """
        if CAPTION not in inputs:
            features: Features = self.head(self, inputs, masks, targets or {}, trace)
            return features
        cached = _CachedSubjectModel(self)
        features = self.head(cast(FusionModel, cached), inputs, masks, targets or {}, trace)
        contrastive = {
            f"{CAPTION}_{self.subject}": cached.embed(self.subject, inputs[self.subject]),
            f"{CAPTION}_text": self.embed("text", inputs[CAPTION], masks[CAPTION]),
            "logit_scale": self.encoder.logit_scale.exp(),
        }
        if self.encoder.logit_bias is not None:
            contrastive["logit_bias"] = self.encoder.logit_bias
        return {**features, **contrastive}

    # -----------------------------------------------------------------------------------------------------------------
    # Tokens, embeddings and fusion, for heads

    def tokens(self, modality: str, inputs: Tensor, mask: Tensor | None = None) -> TokenSequence:
        """Encode texts (b, T) or (b, m, T), or images (b, 3, H, W), into tokens with states (rows, N, C)."""
        return self.tokens_and_embedding(modality, inputs, mask, embed=False)[0]

    def embed(self, modality: str, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the contrastive embeddings (rows, D), L2-normalized, in float32 or float64."""
        if modality == "text":
            inputs, mask = _rows(inputs, mask)
        return self.encoder.encode(modality, inputs, mask)

    def tokens_and_embedding(
        self, modality: str, inputs: Tensor, mask: Tensor | None = None, embed: bool = True
    ) -> tuple[TokenSequence, Tensor | None]:
        """Return `tokens` and, with `embed`, also `embed` from one pass through the tower.

        Where the modality has a tower copy, tokens come from the copy and embeddings from the original tower.
        """
        if modality == "text":
            inputs, mask = _rows(inputs, mask)
        tower_copy = cast(TowerCopy, self.forks[modality]) if modality in self.forks else None
        project = self.encoder.projection(modality) if tower_copy is None else tower_copy.projection
        tokens: TokenSequence = (self.encoder.tower(modality) if tower_copy is None else tower_copy.tower)(inputs, mask)
        embedding = None
        if embed and tower_copy is not None:
            embedding = self.encoder.encode(modality, inputs, mask)
        elif embed:
            pooled = project(tokens.pooled)
            embedding = F.normalize(pooled.to(torch.promote_types(pooled.dtype, torch.float32)), dim=-1)
        if self.token_sources[modality] == "aligned":
            tokens = tokens._replace(states=project(tokens.states))
        return tokens, embedding

    def fuse(self, tokens: dict[str, TokenSequence], trace: Trace | None = None) -> dict[str, TokenSequence]:
        """Return the sequences after cross-attention; the query may have m rows per row of the context.

        Raises ConfigError where the model has no fusion.
        """
        if self.fusion is None:
            raise ConfigError("this task reads fused tokens, but fusion=null: leave that out, or name a fusion")
        fused: dict[str, TokenSequence] = self.fusion(tokens, trace)
        return fused

    # -----------------------------------------------------------------------------------------------------------------
    # For the training loop and the optimizer

    @torch.no_grad()
    def clamp_(self) -> None:
        """Clamp logit_scale to its range; called after each optimizer step."""
        self.encoder.clamp_()

    def parameter_layout(self) -> tuple[dict[str, str], dict[str, int]]:
        """Return the part of the model that each parameter belongs to, and the layer of those in towers.

        Parts are the names in optim.lr_scale: a tower's modality, `heads` (projections and scale), `fusion`, `task`.
        """
        parts = {"encoder": "heads", "forks": "heads", "fusion": "fusion", "head": "task"}
        part_of = {name: parts[name.split(".")[0]] for name, _ in self.named_parameters()}
        layer_of: dict[str, int] = {}
        towers = {f"encoder.towers.{name}": (name, self.encoder.tower(name)) for name in self.encoder.towers}
        towers |= {f"forks.{name}.tower": (name, cast(Tower, copy.tower)) for name, copy in self.forks.items()}
        for prefix, (modality, tower) in towers.items():
            for name, layer in tower.layer_ids().items():
                part_of[f"{prefix}.{name}"] = modality
                layer_of[f"{prefix}.{name}"] = layer
        return part_of, layer_of

    def parameter_counts(self) -> dict[str, dict[str, int]]:
        """Count parameters by part of the model, as {part: {"total": n, "trainable": n}}."""
        counts = self.encoder.parameter_counts()
        copies = [(f"{name} forked", copy) for name, copy in self.forks.items()]
        for part, module in (*copies, ("fusion", self.fusion), ("task", self.head)):
            parameters = [] if module is None else list(module.parameters())
            counts[part] = {
                "total": sum(p.numel() for p in parameters),
                "trainable": sum(p.numel() for p in parameters if p.requires_grad),
            }
        return counts


class _CachedSubjectModel:
    """A view of a FusionModel that encodes a batch of images or sounds once for all requests."""

    def __init__(self, model: FusionModel) -> None:
        self._model = model
        self._cache: tuple[Tensor, tuple[TokenSequence, Tensor | None]] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def tokens_and_embedding(
        self, modality: str, inputs: Tensor, mask: Tensor | None = None, embed: bool = True
    ) -> tuple[TokenSequence, Tensor | None]:
        if modality != self._model.subject:
            return self._model.tokens_and_embedding(modality, inputs, mask, embed)
        if self._cache is None or self._cache[0] is not inputs:
            self._cache = inputs, self._model.tokens_and_embedding(modality, inputs, mask)
        return self._cache[1]

    def tokens(self, modality: str, inputs: Tensor, mask: Tensor | None = None) -> TokenSequence:
        return self.tokens_and_embedding(modality, inputs, mask, embed=False)[0]

    def embed(self, modality: str, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        return cast(Tensor, self.tokens_and_embedding(modality, inputs, mask)[1])


def _rows(ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Flatten ids and mask (b, m, T) to (b m, T); leave (b, T) as it is."""
    return ids.flatten(0, -2), None if mask is None else mask.flatten(0, -2)


# ---------------------------------------------------------------------------------------------------------------------
# Assembly


def find_subject(fusion: Any, towers: Collection[str]) -> str:
    """Return the modality that texts are about, image or another: what the fusion joins with texts, else the first tower's.

    fusion: Config of the fusion, or None. towers: the modalities of the encoders.
    """
    named = (fusion.context, fusion.query) if fusion is not None else ()
    candidates = [name for name in (*named, "image", *towers) if name != "text" and (name in towers or name in named)]
    return candidates[0] if candidates else "image"


def choose_token_sources(encoder: DualEncoder, tokens: TokenSource) -> dict[str, str]:
    """Return "aligned" or "tower" for each modality.

    `auto` takes tokens in the shared space where the tower pools the mean or the maximum of its tokens: contrastive
    training then aligned the tokens too. Raises ConfigError for tokens=aligned with another pooling, or another projection
    than a matrix.
    """
    if encoder.has_mlp:
        if tokens == "aligned":
            raise ConfigError(
                "tokens=aligned: the projection has two layers (model.projection=mlp), so single tokens have no meaning in the "
                "shared space; use tokens=tower (or auto)"
            )
        return dict.fromkeys(encoder.towers, "tower")
    pools = {name: encoder.tower(name).pools_mean or encoder.tower(name).pools_max for name in encoder.towers}
    if tokens != "auto":
        wrong = [name for name, has in pools.items() if tokens == "aligned" and not has]
        if wrong:
            raise ConfigError(
                f"tokens=aligned: the {wrong[0]} tower does not pool the mean or the maximum of its tokens, so they are not "
                f"trained to lie in the shared space; use tokens=tower (or auto), or pretrain with {wrong[0]}.pool=avg"
            )
        return dict.fromkeys(encoder.towers, tokens)
    return {name: "aligned" if has else "tower" for name, has in pools.items()}


def token_widths(encoder: DualEncoder, sources: dict[str, str]) -> dict[str, int]:
    """Return the token width C of each modality."""
    return {
        name: encoder.projection(name).out_features if source == "aligned" else encoder.tower(name).width
        for name, source in sources.items()
    }


def build(
    encoder: DualEncoder, fusion: Any, context: Any, tokens: TokenSource = "auto", tower_copies: Collection[str] = ()
) -> FusionModel:
    """Build a model without a head: the given encoders and a new fusion. The task adds the head.

    Args:
        encoder: the aligned encoders.
        fusion: Config of the fusion; None for a model without one.
        context: Config of the context, which decides how images are attended to.
        tokens: where the tokens that fusion reads come from.
        tower_copies: see FusionModel.

    Raises:
        ConfigError: the parts do not fit together.
    """
    sources = choose_token_sources(encoder, tokens)
    fusion_module = None
    if fusion is not None:
        image_modalities = [name for name in encoder.towers if name != "text"]  # those whose tokens may have a grid
        fusion_module = registry.get_component("fusion", fusion.name).build(
            fusion, token_widths(encoder, sources), context=context, image_modalities=image_modalities
        )
        if {sources.get(name) for name in (fusion.query, fusion.context)} == {"aligned"}:
            fusion_module.tie_query_key_()
    return FusionModel(encoder, fusion_module, sources, tower_copies, find_subject(fusion, list(encoder.towers)))
