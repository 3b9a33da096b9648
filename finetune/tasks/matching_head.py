"""The head of the retrieval task: matching logits of texts and images, and the pairs it is trained on.

Shapes: b = samples of this process, P = negative captions per sample, F = those drawn from them, S = 3 + F pairs per sample,
T = tokens of a text, C = width of a token, D = width of the shared space.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.attention.trace import Trace
from finetune.model import Features, FusionModel, Head
from finetune.tasks import hard_negatives
from finetune.tasks.late_interaction import LateInteraction
from pretrain.runtime import distributed
from pretrain.towers import TokenSequence


class MatchingHead(Head):
    """Turns mean and maximum of the fused text tokens into the logit that text and image match."""

    def __init__(self, width: int, hidden: int, draw: int = 1, late_interaction: bool = False) -> None:
        """Make a head of text tokens of `width` with a hidden layer of `hidden` units.

        draw: F, negative captions drawn per sample. late_interaction: whether to add similarities of single tokens.
        """
        super().__init__()
        self.draw = draw
        self.norm = nn.LayerNorm(2 * width)
        self.up = nn.Linear(2 * width, hidden)
        self.out = nn.Linear(hidden, 1)
        self.late_interaction = LateInteraction(width) if late_interaction else None

    def forward(
        self,
        model: FusionModel,
        inputs: dict[str, Tensor],
        masks: dict[str, Tensor],
        targets: dict[str, Any],
        trace: Trace | None = None,
    ) -> Features:
        """Compute matching logits, and in training everything the losses need.

        With targets["ids"] (b, 2), see hard_negatives.hash_sample_ids, the features are:
            image, text: (b, D) embeddings; logit_scale (1,), and logit_bias where the model has one.
            match: (b, S) logits of the positive pair, the drawn caption, the F negative captions, the drawn image.
            valid: (b, S) bool, whether the pair exists.
            difficulty: (b, S) from 0 to 2, see retrieval.py; without gradient.
        Without them: match (b,).
        """
        if "ids" not in targets:
            text = model.tokens("text", inputs["text"], masks["text"])
            image = model.tokens(model.subject, inputs[model.subject])
            return {"match": self.match(model, text, image, trace)}
        text, text_embedding = model.tokens_and_embedding("text", inputs["text"], masks["text"])
        image, image_embedding = model.tokens_and_embedding(model.subject, inputs[model.subject])
        assert text_embedding is not None
        assert image_embedding is not None
        scale = model.encoder.logit_scale.exp()
        features = {model.subject: image_embedding, "text": text_embedding, "logit_scale": scale}
        if model.encoder.logit_bias is not None:
            features["logit_bias"] = model.encoder.logit_bias

        wrong_text, wrong_image = _draw_hard_negatives(image_embedding, text_embedding, scale, targets["ids"])
        negatives = None
        if "foils" in inputs:
            pool = inputs["foils"], masks["foils"], targets["negative_mask"]
            negatives = _draw_negative_captions(model, scale * image_embedding, text_embedding, pool, self.draw)
        longest = hard_negatives.max_token_count(
            text if negatives is None or negatives.tokens.states.shape[1] < text.states.shape[1] else negatives.tokens
        )
        text = hard_negatives.pad_tokens(text, longest)
        # Texts paired with the sample's own image, whose keys and values are computed once for all of them.
        texts = [text, hard_negatives.fetch_tokens(text, wrong_text.row)]
        valid = [torch.ones_like(wrong_text.valid), wrong_text.valid]
        margins = [torch.zeros_like(wrong_text.logit_margin), wrong_text.logit_margin]
        if negatives is not None:
            padded = hard_negatives.pad_tokens(negatives.tokens, longest)
            texts += [
                padded._replace(states=padded.states[i :: self.draw], mask=padded.mask[i :: self.draw])
                for i in range(self.draw)
            ]
            valid += list(negatives.valid.unbind(dim=1))
            margins += list(negatives.logit_margin.unbind(dim=1))
        with_own_image = self.match(model, _interleave(texts), image).unflatten(0, (-1, len(texts)))
        with_wrong_image = self.match(model, text, hard_negatives.fetch_tokens(image, wrong_image.row))
        features["match"] = torch.cat([with_own_image, with_wrong_image[:, None]], dim=1)
        features["valid"] = torch.stack([*valid, wrong_image.valid], dim=1)
        features["difficulty"] = 2 * torch.stack([*margins, wrong_image.logit_margin], dim=1).sigmoid()
        return features

    def match(self, model: FusionModel, text: TokenSequence, image: TokenSequence, trace: Trace | None = None) -> Tensor:
        """Compute matching logits (m b,) of texts (m b, T, C), m for each of b images."""
        fused = model.fuse({"text": text, model.subject: image}, trace)["text"]
        highest = fused.states.masked_fill(~fused.mask[..., None], torch.finfo(fused.states.dtype).min).amax(dim=1)
        highest = torch.where(fused.mask.any(dim=1, keepdim=True), highest, 0.0)
        logits: Tensor = self.out(F.gelu(self.up(self.norm(torch.cat([fused.pooled, highest], dim=1)))))[:, 0]
        if self.late_interaction is not None:
            logits = logits + self.late_interaction(fused, text, image)
        return logits


def _draw_hard_negatives(
    image: Tensor, text: Tensor, scale: Tensor, ids: Tensor
) -> tuple[hard_negatives.Negatives, hard_negatives.Negatives]:
    """Draw a wrong caption for each image and a wrong image for each caption. Collective."""
    with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
        first, second = hard_negatives.draw_uniform(len(image), 2, image.device)
        images, texts = distributed.gather_without_grad(image.detach()), distributed.gather_without_grad(text.detach())
        same, offset = hard_negatives.shares_id(ids), distributed.rank() * len(image)
        image_to_text, text_to_image = scale * image @ texts.T, scale * text @ images.T
        return (
            hard_negatives.draw_negatives(image_to_text, same, first, offset),
            hard_negatives.draw_negatives(text_to_image, same, second, offset),
        )


class _NegativeTexts(NamedTuple):
    """F negative captions of each of b samples."""

    tokens: TokenSequence
    """(b F, T, C), those of a sample adjacent."""
    valid: Tensor
    """(b, F) bool: True for negative captions, False for padding."""
    logit_margin: Tensor
    """(b, F): contrastive logit of the negative caption minus that of the sample's own caption."""


def _draw_negative_captions(
    model: FusionModel, image: Tensor, text: Tensor, pool: tuple[Tensor, Tensor, Tensor], draw: int
) -> _NegativeTexts:
    """Draw F of P negative captions per sample by the softmax of their contrastive logits. Collective.

    Args:
        model: encodes the negative captions.
        image: (b, D) embeddings times the logit scale.
        text: (b, D) embeddings of the samples' own captions.
        pool: ids (b, P, T), mask (b, P, T), valid (b, P).
        draw: F.
    """
    ids, mask, valid = pool
    b, P = valid.shape
    if draw == P:  # all are used: one pass through the tower, nothing to draw
        tokens, embedding = model.tokens_and_embedding("text", ids, mask)
        return _NegativeTexts(tokens, valid, _logit_margin(image, text, cast(Tensor, embedding)))
    with torch.no_grad():
        margin = _logit_margin(image, text, model.embed("text", ids, mask))
        uniform = torch.stack(hard_negatives.draw_uniform(b, P, ids.device), dim=1).double().clamp(min=1e-12)
        # The first F by logit + Gumbel noise are F draws without replacement (Gumbel top-k, arXiv 1903.06059).
        noisy = (margin.double() - (-uniform.log()).log()).masked_fill(~valid, -math.inf)
        chosen = noisy.topk(draw, dim=1).indices
    index = chosen[..., None].expand(-1, -1, ids.shape[2])
    tokens = model.tokens("text", ids.gather(1, index), mask.gather(1, index))
    return _NegativeTexts(tokens, valid.gather(1, chosen), margin.gather(1, chosen))


@torch.no_grad()
def _logit_margin(image: Tensor, text: Tensor, negatives: Tensor) -> Tensor:
    """Return contrastive logits of negative captions minus that of the own caption, (b, P).

    `image` and `text` are as in _draw_negative_captions, `negatives` are embeddings (b P, D).
    """
    margin: Tensor = (image[:, None] * (negatives.unflatten(0, (len(image), -1)) - text[:, None])).sum(dim=2)
    return margin


def _interleave(texts: list[TokenSequence]) -> TokenSequence:
    """Join m sequences (b, T, C) into one (b m, T, C), with the m texts of an image adjacent."""
    states = torch.stack([text.states for text in texts], dim=1).flatten(0, 1)
    mask = torch.stack([text.mask for text in texts], dim=1).flatten(0, 1)
    return texts[0]._replace(states=states, mask=mask)
