"""FusionModel: aligned encoders, a fusion that lets their tokens read each other, and a task's head. Trained as one.

Shapes: b = pictures (samples), m = texts a picture, T = tokens of a text, N = tokens, C = width of a token,
D = width of the shared space.
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
"""What a head returns, by name: (b, ...) a sample each, so that chunks can be put together."""
Source = Literal["auto", "aligned", "tower"]
CAPTION = "caption"
"""The input that asks for embeddings beside the task: texts (b, T) as the text tower reads them."""


class Head(nn.Module):
    """Base of all heads: what a task computes from a batch, and the weights that are its own."""

    def forward(
        self,
        model: FusionModel,
        inputs: dict[str, Tensor],
        masks: dict[str, Tensor],
        targets: dict[str, Any],
        trace: Trace | None = None,
    ) -> Features:
        """A batch -> what the task's loss scores. `model` gives tokens, embeddings and fusion; it fills `trace`.

        The same weights must take part whatever is in the batch, on every process: leave out a term by weight 0.
        """
        raise NotImplementedError(f"{type(self).__name__}.forward")


class TowerCopy(nn.Module):
    """A tower and its projection once more, for what the fusion reads: equal at first, all of it learns."""

    def __init__(self, encoder: DualEncoder, modality: str) -> None:
        super().__init__()
        self.tower = deepcopy(encoder.tower(modality))
        self.projection = deepcopy(encoder.projection(modality))
        self.tower.freeze(-1)
        self.projection.requires_grad_(True)


class FusionModel(nn.Module):
    """encoder, fusion (or None) and head. Training calls the model, never a part of it, so that every strategy's hooks run."""

    head: Head

    def __init__(
        self, encoder: DualEncoder, fusion: Fusion | None, sources: dict[str, str], forks: Collection[str] = ()
    ) -> None:
        """`sources`: modality -> aligned (tokens in the shared space) or tower (the tower's own states). `forks`: modalities
        whose tokens come from a copy of their tower."""
        super().__init__()
        self.encoder = encoder
        self.forks = nn.ModuleDict({name: TowerCopy(encoder, name) for name in forks})
        self.fusion = fusion
        self.sources = sources

    @property
    def widths(self) -> dict[str, int]:
        """Modality -> C of its tokens, fused or not."""
        return widths(self.encoder, self.sources)

    def forward(
        self,
        inputs: dict[str, Tensor],
        masks: dict[str, Tensor],
        targets: dict[str, Any] | None = None,
        trace: Trace | None = None,
    ) -> Features:
        """{modality: (b, ...)} -> what the head returns. With an input `caption`, a text of its own for each picture, also
        the embeddings of both and the scalars that a contrastive loss needs (aligned.py); the picture is encoded once."""
        if CAPTION not in inputs:
            found: Features = self.head(self, inputs, masks, targets or {}, trace)
            return found
        once = _Once(self)
        found = self.head(cast(FusionModel, once), inputs, masks, targets or {}, trace)
        kept = {
            f"{CAPTION}_image": once.embed("image", inputs["image"]),
            f"{CAPTION}_text": self.embed("text", inputs[CAPTION], masks[CAPTION]),
            "logit_scale": self.encoder.logit_scale.exp(),
        }
        if self.encoder.logit_bias is not None:
            kept["logit_bias"] = self.encoder.logit_bias
        return {**found, **kept}

    # -----------------------------------------------------------------------------------------------------------------
    # What heads are made of

    def tokens(self, modality: str, inputs: Tensor, mask: Tensor | None = None) -> TokenSequence:
        """Texts (b, T) or (b, m, T), then b m rows; pictures (b, 3, H, W) -> states (rows, N, C) as `sources` says."""
        return self.read(modality, inputs, mask, embed=False)[0]

    def embed(self, modality: str, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """(rows, ...) -> (rows, D), L2-normalised, in float32 at least: the contrastive embedding."""
        if modality == "text":
            inputs, mask = _rows(inputs, mask)
        return self.encoder.encode(modality, inputs, mask)

    def read(
        self, modality: str, inputs: Tensor, mask: Tensor | None = None, embed: bool = True
    ) -> tuple[TokenSequence, Tensor | None]:
        """`tokens` and, if asked for, `embed`, from one pass through the tower; where it is forked, from one through each."""
        if modality == "text":
            inputs, mask = _rows(inputs, mask)
        fork = cast(TowerCopy, self.forks[modality]) if modality in self.forks else None
        project = self.encoder.projection(modality) if fork is None else fork.projection
        found: TokenSequence = (self.encoder.tower(modality) if fork is None else fork.tower)(inputs, mask)
        embedding = None
        if embed and fork is not None:
            embedding = self.encoder.encode(modality, inputs, mask)
        elif embed:
            pooled = project(found.pooled)
            embedding = F.normalize(pooled.to(torch.promote_types(pooled.dtype, torch.float32)), dim=-1)
        if self.sources[modality] == "aligned":
            found = found._replace(states=project(found.states))
        return found, embedding

    def fuse(self, tokens: dict[str, TokenSequence], trace: Trace | None = None) -> dict[str, TokenSequence]:
        """The same sequences after reading each other. The query may have m rows to the context's one."""
        if self.fusion is None:
            raise ConfigError("this task reads fused tokens: leave out fusion=null, or name a fusion")
        fused: dict[str, TokenSequence] = self.fusion(tokens, trace)
        return fused

    # -----------------------------------------------------------------------------------------------------------------
    # What the loop and the optimizer ask of a model

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keeps logit_scale in its range; called after each step."""
        self.encoder.clamp_()

    def parameter_layout(self) -> tuple[dict[str, str], dict[str, int]]:
        """Parameter -> the part that optim.lr_scale knows it by (a tower's modality; `heads`: projections and scale; `fusion`;
        `task`), and, for those in towers, -> layer."""
        parts = {"encoder": "heads", "forks": "heads", "fusion": "fusion", "head": "task"}
        part_of = {name: parts[name.split(".")[0]] for name, _ in self.named_parameters()}
        layer_of: dict[str, int] = {}
        towers = {f"encoder.towers.{name}": (name, self.encoder.tower(name)) for name in self.encoder.towers}
        towers |= {f"forks.{name}.tower": (name, cast(Tower, fork.tower)) for name, fork in self.forks.items()}
        for prefix, (modality, tower) in towers.items():
            for name, layer in tower.layer_ids().items():
                part_of[f"{prefix}.{name}"] = modality
                layer_of[f"{prefix}.{name}"] = layer
        return part_of, layer_of

    def parameter_counts(self) -> dict[str, dict[str, int]]:
        """{part: {"total": n, "trainable": n}}: towers, scalars, forked towers, fusion, task."""
        found = self.encoder.parameter_counts()
        forks = [(f"{name} forked", fork) for name, fork in self.forks.items()]
        for part, module in (*forks, ("fusion", self.fusion), ("task", self.head)):
            parameters = [] if module is None else list(module.parameters())
            found[part] = {
                "total": sum(p.numel() for p in parameters),
                "trainable": sum(p.numel() for p in parameters if p.requires_grad),
            }
        return found


class _Once:
    """A model that passes pictures through their tower once, whoever asks; all else is the model's own."""

    def __init__(self, model: FusionModel) -> None:
        self._model = model
        self._read: tuple[Tensor, tuple[TokenSequence, Tensor | None]] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def read(
        self, modality: str, inputs: Tensor, mask: Tensor | None = None, embed: bool = True
    ) -> tuple[TokenSequence, Tensor | None]:
        if modality != "image":
            return self._model.read(modality, inputs, mask, embed)
        if self._read is None or self._read[0] is not inputs:
            self._read = inputs, self._model.read(modality, inputs, mask)
        return self._read[1]

    def tokens(self, modality: str, inputs: Tensor, mask: Tensor | None = None) -> TokenSequence:
        return self.read(modality, inputs, mask, embed=False)[0]

    def embed(self, modality: str, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        return cast(Tensor, self.read(modality, inputs, mask)[1])


def _rows(ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(b, m, T) -> (b m, T); (b, T) stays."""
    return ids.flatten(0, -2), None if mask is None else mask.flatten(0, -2)


# ---------------------------------------------------------------------------------------------------------------------
# Assembly


def sources_of(encoder: DualEncoder, tokens: Source) -> dict[str, str]:
    """Where each modality's tokens come from; `auto`: the shared space where the tower pools the mean or the maximum of its
    tokens, so that what was aligned is made of them."""
    pools = {name: encoder.tower(name).pools_mean or encoder.tower(name).pools_max for name in encoder.towers}
    if tokens != "auto":
        wrong = [name for name, has in pools.items() if tokens == "aligned" and not has]
        if wrong:
            raise ConfigError(
                f"tokens=aligned: the {wrong[0]} tower does not pool the mean or the maximum of its tokens, so they have no "
                f"place in the shared space; use tokens=tower (or auto), or pretrain with {wrong[0]}.pool=avg"
            )
        return dict.fromkeys(encoder.towers, tokens)
    return {name: "aligned" if has else "tower" for name, has in pools.items()}


def widths(encoder: DualEncoder, sources: dict[str, str]) -> dict[str, int]:
    """Modality -> C of its tokens."""
    return {
        name: encoder.projection(name).out_features if source == "aligned" else encoder.tower(name).width
        for name, source in sources.items()
    }


def build(encoder: DualEncoder, fusion: Any, context: Any, tokens: Source = "auto", forks: Collection[str] = ()) -> FusionModel:
    """Encoder and new fusion, from Configs (fusion None: without); the head is the task's to add. Raises ConfigError.

    `forks`: see FusionModel.
    """
    sources = sources_of(encoder, tokens)
    made = None
    if fusion is not None:
        pictures = [name for name in encoder.towers if name == "image"]
        made = registry.get_component("fusion", fusion.name).build(
            fusion, widths(encoder, sources), context=context, pictures=pictures
        )
        if set(sources.values()) == {"aligned"}:
            made.tie_query_key_()
    return FusionModel(encoder, made, sources, forks)
