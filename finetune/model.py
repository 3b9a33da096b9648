"""FusionModel: aligned encoders, a fusion that lets their tokens read each other, and a task's head. Trained as one.

Shapes: b = pictures (samples), m = texts a picture, T = tokens of a text, N = tokens, C = width of a token,
D = width of the shared space.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.fusion.blocks import Fusion
from finetune.trace import Trace
from pretrain import registry
from pretrain.config import ConfigError
from pretrain.model import DualEncoder
from pretrain.towers import TokenSequence

Features = dict[str, Tensor]
"""What a head returns, by name: (b, ...) a sample each, so that chunks can be put together."""
Source = Literal["auto", "aligned", "tower"]


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


class FusionModel(nn.Module):
    """encoder, fusion (or None) and head. Training calls the model, never a part of it, so that every strategy's hooks run."""

    head: Head

    def __init__(self, encoder: DualEncoder, fusion: Fusion | None, sources: dict[str, str]) -> None:
        """`sources`: modality -> aligned (tokens in the shared space) or tower (the tower's own states)."""
        super().__init__()
        self.encoder = encoder
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
        """{modality: (b, ...)} -> what the head returns."""
        found: Features = self.head(self, inputs, masks, targets or {}, trace)
        return found

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
        """`tokens` and, if asked for, `embed`, from one pass through the tower."""
        if modality == "text":
            inputs, mask = _rows(inputs, mask)
        found: TokenSequence = self.encoder.tower(modality)(inputs, mask)
        project = self.encoder.projection(modality)
        embedding = None
        if embed:
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

    def layout(self) -> tuple[dict[str, str], dict[str, int]]:
        """Parameter -> its part (a tower's modality, `heads` for projections and scale, `fusion`, `head`), and -> its layer
        for those in towers."""
        part_of: dict[str, str] = {}
        layer_of: dict[str, int] = {}
        for name, _ in self.named_parameters():
            top = name.split(".")[0]
            part_of[name] = "heads" if top == "encoder" else top
        for modality in self.encoder.towers:
            start = f"encoder.towers.{modality}."
            for name, layer in self.encoder.tower(modality).layer_ids().items():
                part_of[start + name] = modality
                layer_of[start + name] = layer
        return part_of, layer_of

    def parameter_counts(self) -> dict[str, dict[str, int]]:
        """{part: {"total": n, "trainable": n}}."""
        part_of, _ = self.layout()
        found: dict[str, dict[str, int]] = {}
        for name, p in self.named_parameters():
            count = found.setdefault(part_of.get(name, "heads"), {"total": 0, "trainable": 0})
            count["total"] += p.numel()
            count["trainable"] += p.numel() * p.requires_grad
        return found


def _rows(ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(b, m, T) -> (b m, T); (b, T) stays."""
    return ids.flatten(0, -2), None if mask is None else mask.flatten(0, -2)


# ---------------------------------------------------------------------------------------------------------------------
# Assembly


def sources_of(encoder: DualEncoder, tokens: Source) -> dict[str, str]:
    """Where each modality's tokens come from; `auto`: the shared space where the tower pools their mean."""
    if tokens != "auto":
        wrong = [name for name in encoder.towers if tokens == "aligned" and not encoder.tower(name).pools_mean]
        if wrong:
            raise ConfigError(
                f"tokens=aligned: the {wrong[0]} tower does not pool the mean of its tokens, so they have no place in the "
                f"shared space; use tokens=tower (or auto), or pretrain with {wrong[0]}.pool=avg"
            )
        return dict.fromkeys(encoder.towers, tokens)
    return {name: "aligned" if encoder.tower(name).pools_mean else "tower" for name in encoder.towers}


def widths(encoder: DualEncoder, sources: dict[str, str]) -> dict[str, int]:
    """Modality -> C of its tokens."""
    return {
        name: encoder.projection(name).out_features if source == "aligned" else encoder.tower(name).width
        for name, source in sources.items()
    }


def build(encoder: DualEncoder, fusion: Any, context: Any, tokens: Source = "auto") -> FusionModel:
    """Encoder and new fusion, from Configs (fusion None: without); the head is the task's to add. Raises ConfigError."""
    sources = sources_of(encoder, tokens)
    made = None
    if fusion is not None:
        pictures = [name for name in encoder.towers if name == "image"]
        made = registry.part("fusion", fusion.name).build(fusion, widths(encoder, sources), context=context, pictures=pictures)
    return FusionModel(encoder, made, sources)
