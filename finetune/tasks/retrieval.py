"""Two-stage retrieval: a contrastive loss, and a matching loss on pairs that embeddings confuse most.

    task: {name: retrieval, rerank: 16}

After ALBEF (arXiv 2107.07651): two encoders rank, cross-attention re-ranks. The matching loss classifies the pairs of each
sample: its image with its caption, the image with a wrong caption, and the caption with a wrong image. Wrong ones are drawn
where the contrastive similarities are high, over the batch of all processes (hard_negatives.py). With `foils` it also
classifies negative captions from the data. Evaluation ranks by embeddings and re-ranks the first `rerank` candidates by the
matching score. Momentum distillation and masked language modeling are not part of this task.

With score=sum the contrastive logit is part of the final score, so matching need not learn what embeddings already know. With
weighting=undecided, the weight of a negative pair is 2 sigmoid(its contrastive logit - that of the positive pair): 0 where
embeddings reject it, 1 where they are undecided, at most 2. A positive pair has the total weight of its negatives.

Measured, on drawn captions with two places exchanged: without these weights, training with easy pairs separates 56 to 62 %
after 300 steps, and training on such pairs alone 88 %. With positive pairs of constant weight hardly any were learned in 450
steps. On the drawn catalog, from encoders trained for 250 steps, it was the other way round: after 250 steps with these weights
the matching logit told captions wrong in one attribute from right ones in 50 to 67 %, with weighting=equal in 71 to 98 %, and
with late_interaction, too, in 73 to 100 %.

Shapes: b = samples of this process, B = samples of all processes, P = negative captions per sample, F = those drawn from
them, S = 3 + F pairs per sample, T = tokens of a text, C = width of a token, D = width of the shared space.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.attention.trace import Trace
from finetune.model import Features, FusionModel
from finetune.tasks import EvalSetup, ExportSpec, Prediction, Survey, Task, global_weighted_mean, hard_negatives, require_towers
from finetune.tasks.matching_head import MatchingHead
from finetune.tasks.negative_captions import NegativeCaptions, describe_foils
from finetune.tasks.reranking import Gallery, Ranking, evaluate_reranking, rank_candidates
from pretrain import registry
from pretrain.config import check_numbers
from pretrain.data.batch import Batch
from pretrain.errors import ConfigError
from pretrain.printable import get_noun
from pretrain.runtime.console import log_info
from pretrain.towers import TokenSequence
from pretrain.training.objective import SCALARS

WINDOW = 200
"""Number of steps over which the matching loss is compared with that of a constant prediction."""


Encoded = tuple[TokenSequence, Tensor | None]
"""Tokens and embeddings, as FusionModel.tokens_and_embedding returns them."""


ADDED = ("weighting", "late_interaction")
"""Settings that came after runs had begun without them."""


@dataclass
class Config:
    """Weights of the losses, negatives, and re-ranking."""

    name: str = "retrieval"
    """Name of the task, which is the name of this file."""
    contrastive: float = 1.0
    """Weight of the contrastive loss. 0 is for frozen towers; with adapt.fork the copy that the fusion reads still learns.
    Embeddings of towers that learn without it drift: R@1 among similar scenes fell from 75 to 21 % in 450 steps."""
    matching: float = 1.0
    """Weight of the matching loss."""
    same_caption: Literal["keep", "ignore"] = "ignore"
    """ignore: in the contrastive loss, samples with equal captions are not each other's negatives. keep: they are. In the
    matching loss they never are."""
    foils: str | None = None
    """Field of a sample's json with negative captions, wrong about its image: a list of texts or of {caption: text}. null:
    negatives come from the batch alone. Samples without any are used as well."""
    draw: int = 1
    """F, negative captions drawn per sample and step, where `foils` names a field."""
    pool: int | None = None
    """P, negative captions of a sample from which F are drawn, with probability by their contrastive logit; null: P = F, so
    that all are used."""
    rerank: int = 16
    """Candidates per query that evaluation re-ranks; at most the whole gallery."""
    score: Literal["sum", "matching"] = "sum"
    """Score that orders the candidates. sum: matching logit + contrastive logit; the matching loss then weights pairs as
    `weighting` says. matching: the matching logit alone; all pairs have equal weight (ALBEF)."""
    weighting: Literal["undecided", "equal"] = "undecided"
    """Weights of negative pairs with score=sum. undecided: by how undecided embeddings are, see the module. equal: all pairs
    count alike, so that matching learns easy distinctions first; for encoders whose tokens do not hold yet what is left."""
    hidden: float = 2.0
    """Hidden width of the matching head as a multiple of the text token width."""
    late_interaction: bool = False
    """Add to the matching logit how similar each token of the text is to some token of the image, see late_interaction.py.
    Its errors reach the towers without a way through the fusion, which begins at zero. For tokens in the shared space."""

    def check(self) -> None:
        """Refuse values that do not fit together. Raises ConfigError."""
        if self.contrastive < 0 or self.matching <= 0:
            raise ConfigError(
                f"task.contrastive={self.contrastive} must be at least 0 and task.matching={self.matching} above 0; to train "
                "without the matching loss, use `clipfuse pretrain`"
            )
        if self.pool is not None and self.pool < self.draw:
            raise ConfigError(f"task.pool={self.pool} is smaller than task.draw={self.draw}, the number drawn from the pool")
        if self.draw < 1 or self.rerank < 1 or self.hidden <= 0:
            raise ConfigError(
                f"task.draw={self.draw} and task.rerank={self.rerank} must be at least 1, task.hidden={self.hidden} above 0"
            )
        check_numbers(self, "task", contrastive="[0, inf)", matching="(0, inf)", hidden="(0, inf)")


# ---------------------------------------------------------------------------------------------------------------------
# The task


class Retrieval(Task):
    """The retrieval task; see the module."""

    primary_metric = "reranked_R@1"
    chance = "random answers; of reranked recall, a random order of the candidates"
    can_split = False  # a sample's negatives come from the whole batch

    def __init__(self, config: Config) -> None:
        self.config = config
        self.contrastive_losses: dict[bool, nn.Module] = {}
        """By whether the model has a logit bias."""
        for has_bias, name in ((False, "clip"), (True, "siglip")):
            component = registry.get_component("losses", name)
            self.contrastive_losses[has_bias] = component.build(component.Config(name=name, same_caption=config.same_caption))
        self._excess: list[Tensor] = []  # of the last steps, the matching loss minus that of a constant prediction
        self._has_warned = False

    def build_decoders(self, towers: dict[str, Any]) -> dict[str, Any]:
        require_towers("retrieval", towers, self.subject, "text")
        decoders = {self.subject: towers[self.subject], "text": towers["text"]}
        if self.config.foils is not None:
            # The loader's random numbers are keyed on this name.
            decoders["foils"] = NegativeCaptions(towers["text"], self.config.foils, self.config.pool or self.config.draw)
        return decoders

    def build_head(self, model: FusionModel) -> MatchingHead:
        if model.fusion is None or (model.fusion.config.query, model.fusion.config.context) != ("text", self.subject):
            raise ConfigError(
                f"task.name=retrieval needs a fusion in which texts attend to {self.subject}: fusion.query=text, "
                f"fusion.context={self.subject}"
            )
        if self.config.late_interaction and set(model.token_sources.values()) != {"aligned"}:
            raise ConfigError(
                "task.late_interaction=true compares tokens of text and image, which lie in one space with tokens=aligned only"
            )
        width = model.widths["text"]
        hidden = max(1, round(width * self.config.hidden))
        return MatchingHead(width, hidden, self.config.draw, self.config.late_interaction)

    def export_spec(self) -> ExportSpec:
        return ExportSpec("match", "sigmoid", [], {"score": self.config.score})

    def encode(self, model: nn.Module, batch: Batch) -> Features:
        """Add the ids of samples and captions, which tell the model which pairs are positives."""
        ids = hard_negatives.hash_sample_ids(batch.keys, batch.targets["caption_id"])
        features: Features = model(batch.inputs, batch.masks, {**batch.targets, "ids": ids})
        return features

    def loss(self, features: Features, targets: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute contrastive loss + matching loss.

        The matching loss is the weighted mean of the binary cross-entropy over the pairs of all processes.
        """
        match = _at_least_float32(features["match"])
        weights = features["valid"].to(match.dtype)
        if self.config.score == "sum" and self.config.weighting == "undecided":
            negative_weights = weights[:, 1:] * features["difficulty"][:, 1:]
            weights = torch.cat([negative_weights.sum(dim=1, keepdim=True), negative_weights], dim=1)
        labels = torch.zeros_like(match)
        labels[:, 0] = 1
        losses = F.binary_cross_entropy_with_logits(match, labels, reduction="none")
        matching = global_weighted_mean(losses.flatten(), weights.flatten())
        report = self._matching_report(match.detach(), losses.detach(), labels, weights)
        loss = self.config.matching * matching
        if self.config.contrastive:
            pairs = {name: _at_least_float32(features[name]) for name in (self.subject, "text")}
            bias = features.get("logit_bias")
            contrastive_loss = self.contrastive_losses[bias is not None]
            contrastive, more = contrastive_loss(pairs, features["logit_scale"], bias, targets)
            loss = loss + self.config.contrastive * contrastive
            scalars = {name: features[name].detach().squeeze() for name in SCALARS if name in features}
            report |= {"contrastive_loss": contrastive.detach(), **more, **scalars}
        return loss, report

    @torch.no_grad()
    def _matching_report(self, match: Tensor, losses: Tensor, labels: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Return the weighted loss and accuracy of the matching head over this process's pairs."""
        count = weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
        loss = (losses * weights).sum() / count
        accuracy = (((match > 0) == (labels > 0.5)) * weights).sum() / count
        p = weights[:, 0].sum() / count  # the share of positive pairs; a constant prediction at best equals it
        constant = -(torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p))
        self._warn_if_constant(loss - constant, constant)
        return {"matching_loss": loss, "matching_accuracy": accuracy}

    def _warn_if_constant(self, excess: Tensor, constant: Tensor) -> None:
        """Warn once if the matching loss of WINDOW steps is no better than that of a constant prediction.

        It reads the losses only once per window, because reading them waits for the device.
        """
        if self._has_warned:
            return
        self._excess.append(excess)
        if len(self._excess) < WINDOW:
            return
        mean = float(torch.stack(self._excess).mean())
        self._excess.clear()
        if mean > -0.01 and float(constant) > 0.05:  # below 0.05 embeddings already decide nearly every pair
            self._has_warned = True
            log_info(
                f"warning: over the last {WINDOW} steps the matching loss was {mean + float(constant):.4f}; a constant "
                f"prediction has {float(constant):.4f}, so nothing is learned from the pairs. Raise optim.lr_scale of fusion "
                "and task, or lengthen optim.warmup; check that captions describe "
                f"their {get_noun(self.subject)}s"
            )

    def evaluate(self, model: FusionModel, shards: Any, setup: EvalSetup) -> dict[str, float]:
        """Compute recall before and after re-ranking. Collective. Raises UserError.

        Returns:
            image_to_text_R@K, text_to_image_R@K: recall by embeddings; R@1: their mean at K = 1.
            reranked_...: the same after re-ranking.
            image_to_text_ceiling, text_to_image_ceiling: recall that no order of the candidates can exceed.
            chance_...: recall and ceiling of random answers; chance_reranked_...: recall of a random order of the candidates.
            rerank_k, rerank_ms: candidates and milliseconds per query.
            samples, captions, bad_samples: counts.
        """
        head = cast(MatchingHead, model.head)
        return evaluate_reranking(model, shards, setup, head.match, self.config.rerank, self.config.score == "sum")

    def rank_images(
        self, model: FusionModel, gallery: Gallery, device: torch.device, captions: Tensor | None = None
    ) -> Ranking:
        """Rank the images of a gallery for some of its captions, as evaluation does.

        captions: (q,) int64, their rows; None = this process's share of all.
        """
        head, k, adds_similarity = cast(MatchingHead, model.head), self.config.rerank, self.config.score == "sum"
        return rank_candidates(model, gallery, device, head.match, k, adds_similarity, False, captions)

    def predict(
        self, model: FusionModel, inputs: dict[str, Tensor], masks: dict[str, Tensor], trace: Trace | None = None, top: int = 5
    ) -> Prediction:
        """Return the number that evaluation orders pairs by.

        With score=sum it is `score`, matching logit + contrastive logit, which is not a probability: (-inf, inf). With
        score=matching it is `match`, the probability that text and image match; `Prediction.score` is then its logit.
        """
        adds_similarity = self.config.score == "sum"
        text = model.tokens_and_embedding("text", inputs["text"], masks["text"], embed=adds_similarity)
        image = model.tokens_and_embedding(model.subject, inputs[model.subject], embed=adds_similarity)
        scores = self.score_pairs(model, text, image, trace)
        if not adds_similarity:
            return Prediction([[("match", p)] for p in scores.detach().sigmoid().tolist()], scores)
        return Prediction([[("score", score)] for score in scores.tolist()], scores, has_probabilities=False)

    def score_pairs(self, model: FusionModel, text: Encoded, image: Encoded, trace: Trace | None = None) -> Tensor:
        """Return (b,) float64, what evaluation orders pairs by, of b texts and b images.

        With score=matching, embeddings may be None.
        """
        logits = cast(MatchingHead, model.head).match(model, text[0], image[0], trace).double()
        if self.config.score != "sum":
            return logits
        similarity = (cast(Tensor, text[1]).double() * cast(Tensor, image[1]).double()).sum(dim=1)
        return logits + model.encoder.logit_scale.exp().double() * similarity


def _at_least_float32(values: Tensor) -> Tensor:
    """Convert bfloat16 and float16 to float32."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def build(config: Config, survey: Survey | None) -> Retrieval:
    """Build the task. Log how many of the first training samples have negative captions, where these are asked for. Collective.

    survey: iterates over the json of the training samples; None = the task of a trained model.
    """
    if survey is not None and config.foils is not None:
        log_info(describe_foils(config.foils, survey))
    return Retrieval(config)
