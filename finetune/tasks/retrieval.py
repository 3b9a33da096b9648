"""Retrieval that looks twice: a contrastive loss, and a matching loss on the pairs that it finds hardest to tell apart.

    task: {name: retrieval, rerank: 16}

ALBEF (arXiv 2107.07651): two encoders rank, cross-attention decides. Each picture meets its caption, a wrong caption and
each caption a wrong picture, drawn where the contrastive similarities are high over the batch of all processes (mining.py);
with `foils`, also captions that are wrong in one word, where the data has such. Evaluation ranks by embeddings, and orders
the first `rerank` again by the matching score. Momentum distillation and masked language modelling are not part of this task.

With score=sum the embeddings have their say in the order, and matching need not learn what they know: a wrong pair counts as
far as they take it for the right one, 2 sigmoid(its contrastive logit - that of the right pair), which is 0 where they know
better, 1 where they toss a coin and at most 2; and a right pair counts as much as its wrong ones together. Else pairs that
anyone can tell apart hide those that nobody can: of drawn captions with two places exchanged, 56 to 62 % were told after 300
steps beside easy pairs, 88 % by themselves; and with right pairs that stood alone hardly any were learned in 450 steps.

Shapes: b = samples of this process, B = of all, P = foils a sample, F = those drawn of them, S = 3 + F pairs a sample,
T = tokens of a text, C = width of a token, D = width of the shared space.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.attention.trace import Trace
from finetune.model import Features, FusionModel, Head
from finetune.tasks import ExportSpec, Prediction, EvalSetup, Survey, Task, hard_negatives, global_weighted_mean
from finetune.tasks.negative_captions import NegativeCaptions
from finetune.tasks.reranking import evaluate_reranking
from pretrain import registry
from pretrain.data.batch import Batch
from pretrain.errors import ConfigError
from pretrain.runtime import distributed
from pretrain.runtime.console import log_info
from pretrain.towers import TokenSequence
from pretrain.training.objective import SCALARS

WINDOW = 200
"""Steps over which the matching loss is compared with that of a constant answer."""


@dataclass
class Config:
    """Ranking by embeddings, and again by cross-attention."""

    name: str = "retrieval"
    """This file."""
    contrastive: float = 1.0
    """Weight of the contrastive loss. 0 is for towers that are frozen (with adapt.fork the fusion's words still learn): the
    embeddings of those that learn without it drift (R@1 among drawn near misses fell from 75 to 21 % in 450 steps)."""
    matching: float = 1.0
    """Weight of the matching loss."""
    same_caption: Literal["keep", "ignore"] = "ignore"
    """ignore: samples with the caption of this one are not its negatives in the contrastive loss; in matching never."""
    foils: str | None = None
    """Field of a sample's json with captions that are wrong about its picture: a list of texts or of {caption: text}. null:
    negatives come from the batch alone. A sample without any is used without."""
    draw: int = 1
    """F, foils drawn a sample and step, where there is a field of them."""
    pool: int | None = None
    """P, foils of a sample among which those are drawn, the likelier the more its embeddings take them for right; null: P = F,
    so that all are taken alike."""
    rerank: int = 16
    """Candidates of each query that evaluation looks at twice; at most the whole gallery."""
    score: Literal["sum", "matching"] = "sum"
    """What orders the candidates. sum: matching logit + contrastive logit; matching learns what embeddings leave open.
    matching: the matching logit alone, which learns from every pair alike (ALBEF)."""
    hidden: float = 2.0
    """Hidden width of the matching head, in widths of a text token."""

    def check(self) -> None:
        """Raises ConfigError."""
        if self.contrastive < 0 or self.matching <= 0:
            raise ConfigError(
                f"task.contrastive={self.contrastive} (at least 0) and task.matching={self.matching} (above 0) are weights of "
                "losses; without matching, `clipfuse pretrain` trains the same model"
            )
        if self.pool is not None and self.pool < self.draw:
            raise ConfigError(f"task.pool={self.pool} foils are fewer than task.draw={self.draw}, which are drawn among them")
        if self.draw < 1 or self.rerank < 1 or self.hidden <= 0:
            raise ConfigError(
                f"task.draw={self.draw} (from 1), task.rerank={self.rerank} (from 1) and task.hidden={self.hidden} (above 0) "
                "do not fit together"
            )


# ---------------------------------------------------------------------------------------------------------------------
# The model's part


class MatchingHead(Head):
    """Fused words -> their mean and their maximum -> the logit that text and picture belong together."""

    def __init__(self, width: int, config: Config) -> None:
        super().__init__()
        hidden = max(1, round(width * config.hidden))
        self.draw = config.draw
        self.norm = nn.LayerNorm(2 * width)
        self.up = nn.Linear(2 * width, hidden)
        self.out = nn.Linear(hidden, 1)

    def forward(
        self,
        model: FusionModel,
        inputs: dict[str, Tensor],
        masks: dict[str, Tensor],
        targets: dict[str, Any],
        trace: Trace | None = None,
    ) -> Features:
        """With targets["ids"] (b, 2), see mining.sample_ids: image and text (b, D), logit_scale (1,), match (b, S) logits of
        own pair, drawn caption, foils, drawn picture; real (b, S) bool, whether there is such a pair; open (b, S) from 0 to 2,
        how far embeddings take it for the right one, no gradient. Without: match (b,)."""
        if "ids" not in targets:
            text, image = model.tokens("text", inputs["text"], masks["text"]), model.tokens("image", inputs["image"])
            return {"match": self.match(model, text, image, trace)}
        text, text_row = model.tokens_and_embedding("text", inputs["text"], masks["text"])
        image, image_row = model.tokens_and_embedding("image", inputs["image"])
        assert text_row is not None
        assert image_row is not None
        scale = model.encoder.logit_scale.exp()
        found = {"image": image_row, "text": text_row, "logit_scale": scale}
        if model.encoder.logit_bias is not None:
            found["logit_bias"] = model.encoder.logit_bias

        wrong_text, wrong_image = _mine(image_row, text_row, scale, targets["ids"])
        foils = None
        if "foils" in inputs:
            given = inputs["foils"], masks["foils"], targets["negative_mask"]
            foils = _foils(model, scale * image_row, text_row, given, self.draw)
        longest = hard_negatives.max_token_count(
            text if foils is None or foils.tokens.states.shape[1] < text.states.shape[1] else foils.tokens
        )
        text = hard_negatives.pad_tokens(text, longest)
        about = [text, hard_negatives.fetch_tokens(text, wrong_text.row)]  # texts about the own picture, which is asked once for all
        real = [torch.ones_like(wrong_text.valid), wrong_text.valid]
        ahead = [torch.zeros_like(wrong_text.ahead), wrong_text.ahead]
        if foils is not None:
            words = hard_negatives.pad_tokens(foils.tokens, longest)
            about += [
                words._replace(states=words.states[i :: self.draw], mask=words.mask[i :: self.draw]) for i in range(self.draw)
            ]
            real += list(foils.real.unbind(dim=1))
            ahead += list(foils.ahead.unbind(dim=1))
        own = self.match(model, _interleaved(about), image).unflatten(0, (-1, len(about)))
        other = self.match(model, text, hard_negatives.fetch_tokens(image, wrong_image.row))
        found["match"] = torch.cat([own, other[:, None]], dim=1)
        found["valid"] = torch.stack([*real, wrong_image.valid], dim=1)
        found["difficulty"] = 2 * torch.stack([*ahead, wrong_image.ahead], dim=1).sigmoid()
        return found

    def match(self, model: FusionModel, text: TokenSequence, image: TokenSequence, trace: Trace | None = None) -> Tensor:
        """Texts (m b, T, C), m about each of b pictures -> (m b,) logits."""
        fused = model.fuse({"text": text, "image": image}, trace)["text"]
        highest = fused.states.masked_fill(~fused.mask[..., None], torch.finfo(fused.states.dtype).min).amax(dim=1)
        highest = torch.where(fused.mask.any(dim=1, keepdim=True), highest, 0.0)
        logits: Tensor = self.out(F.gelu(self.up(self.norm(torch.cat([fused.pooled, highest], dim=1)))))
        return logits[:, 0]


def _mine(image: Tensor, text: Tensor, scale: Tensor, ids: Tensor) -> tuple[hard_negatives.Negatives, hard_negatives.Negatives]:
    """A caption for each picture, a picture for each caption. Collective."""
    with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
        first, second = hard_negatives.draw_uniform(len(image), 2, image.device)
        images, texts = distributed.gather_without_grad(image.detach()), distributed.gather_without_grad(text.detach())
        same, offset = hard_negatives.shares_id(ids), distributed.rank() * len(image)
        forth, back = scale * image @ texts.T, scale * text @ images.T
        return hard_negatives.draw_negatives(forth, same, first, offset), hard_negatives.draw_negatives(back, same, second, offset)


class _Foils(NamedTuple):
    """F foils of each of b samples."""

    tokens: TokenSequence
    """(b F, T, C), those of a sample side by side."""
    real: Tensor
    """(b, F) bool: which are foils and do not fill up."""
    ahead: Tensor
    """(b, F): a foil's contrastive logit less that of the right text."""


def _foils(model: FusionModel, image: Tensor, text: Tensor, given: tuple[Tensor, Tensor, Tensor], draw: int) -> _Foils:
    """Draws among the given ones (ids and mask (b, P, T), real (b, P)), by the softmax of their contrastive logits. Collective.

    Args:
        image: (b, D) embeddings times the logit scale.
        text: (b, D) embeddings of the right texts.
    """
    ids, mask, real = given
    b, P = real.shape
    if draw == P:  # all of them: one pass through the tower, nothing to draw
        every, rows = model.tokens_and_embedding("text", ids, mask)
        return _Foils(every, real, _ahead(image, text, cast(Tensor, rows)))
    with torch.no_grad():
        ahead = _ahead(image, text, model.embed("text", ids, mask))
        chance = torch.stack(hard_negatives.draw_uniform(b, P, ids.device), dim=1).double().clamp(min=1e-12)
        # The first F by logit + Gumbel noise are F draws without replacement (Gumbel top-k, arXiv 1903.06059).
        noisy = (ahead.double() - (-chance.log()).log()).masked_fill(~real, -math.inf)
        chosen = noisy.topk(draw, dim=1).indices
    places = chosen[..., None].expand(-1, -1, ids.shape[2])
    tokens = model.tokens("text", ids.gather(1, places), mask.gather(1, places))
    return _Foils(tokens, real.gather(1, chosen), ahead.gather(1, chosen))


@torch.no_grad()
def _ahead(image: Tensor, text: Tensor, foils: Tensor) -> Tensor:
    """(b, D) as in _foils, foils' embeddings (b P, D) -> (b, P): a foil's contrastive logit less that of the right text."""
    ahead: Tensor = (image[:, None] * (foils.unflatten(0, (len(image), -1)) - text[:, None])).sum(dim=2)
    return ahead


def _interleaved(texts: list[TokenSequence]) -> TokenSequence:
    """Several texts a picture, each (b, T, C) -> (b m, T, C), those about a picture side by side."""
    states = torch.stack([text.states for text in texts], dim=1).flatten(0, 1)
    mask = torch.stack([text.mask for text in texts], dim=1).flatten(0, 1)
    return texts[0]._replace(states=states, mask=mask)


# ---------------------------------------------------------------------------------------------------------------------
# The task


class Retrieval(Task):
    """See the file."""

    primary_metric = "reranked_R@1"
    can_split = False  # a sample's negatives come from the whole batch

    def __init__(self, config: Config) -> None:
        self.config = config
        self.contrast: dict[bool, nn.Module] = {}
        for biased, name in ((False, "clip"), (True, "siglip")):
            part = registry.get_component("losses", name)
            self.contrast[biased] = part.build(part.Config(name=name, same_caption=config.same_caption))
        self._above: list[Tensor] = []  # matching loss less that of a constant answer, of the last steps
        self._warned = False

    def build_decoders(self, towers: dict[str, Any]) -> dict[str, Any]:
        for name in ("image", "text"):
            if name not in towers:
                raise ConfigError(f"task.name=retrieval needs an {name} tower; the model has {', '.join(towers)}")
        found = {"image": towers["image"], "text": towers["text"]}
        if self.config.foils is not None:
            found["foils"] = NegativeCaptions(towers["text"], self.config.foils, self.config.pool or self.config.draw)
        return found

    def build_head(self, model: FusionModel) -> MatchingHead:
        if model.fusion is None or (model.fusion.config.query, model.fusion.config.context) != ("text", "image"):
            raise ConfigError(
                "task.name=retrieval asks pictures with texts: it needs a fusion with fusion.query=text, fusion.context=image"
            )
        return MatchingHead(model.widths["text"], self.config)

    def export_spec(self) -> ExportSpec:
        return ExportSpec("match", "sigmoid", [], {"score": self.config.score})

    def encode(self, model: nn.Module, batch: Batch) -> Features:
        """Names each sample, so that the model can tell negatives from what is right."""
        ids = hard_negatives.hash_sample_ids(batch.keys, batch.targets["caption_id"])
        features: Features = model(batch.inputs, batch.masks, {**batch.targets, "ids": ids})
        return features

    def loss(self, features: Features, targets: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Contrastive + matching (a binary cross-entropy, its weighted mean over the pairs of all processes)."""
        match = _wide(features["match"])
        weights = features["valid"].to(match.dtype)
        if self.config.score == "sum":
            wrong = weights[:, 1:] * features["difficulty"][:, 1:]
            weights = torch.cat([wrong.sum(dim=1, keepdim=True), wrong], dim=1)
        labels = torch.zeros_like(match)
        labels[:, 0] = 1
        each = F.binary_cross_entropy_with_logits(match, labels, reduction="none")
        matching = global_weighted_mean(each.flatten(), weights.flatten())
        report = self._matching_report(match.detach(), each.detach(), labels, weights)
        loss = self.config.matching * matching
        if self.config.contrastive:
            pairs = {name: _wide(features[name]) for name in ("image", "text")}
            bias = features.get("logit_bias")
            contrast, more = self.contrast[bias is not None](pairs, features["logit_scale"], bias, targets)
            loss = loss + self.config.contrastive * contrast
            scalars = {name: features[name].detach().squeeze() for name in SCALARS if name in features}
            report |= {"contrastive_loss": contrast.detach(), **more, **scalars}
        return loss, report

    @torch.no_grad()
    def _matching_report(self, match: Tensor, each: Tensor, labels: Tensor, weights: Tensor) -> dict[str, Tensor]:
        count = weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
        loss = (each * weights).sum() / count
        accuracy = (((match > 0) == (labels > 0.5)) * weights).sum() / count
        p = weights[:, 0].sum() / count  # the share of right pairs: all that a constant answer can know
        constant = -(torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p))
        self._watch(loss - constant, constant)
        return {"matching_loss": loss, "matching_accuracy": accuracy}

    def _watch(self, above: Tensor, constant: Tensor) -> None:
        """Warns once where the loss of the last steps is that of a constant answer; looks at it rarely, as looking waits."""
        if self._warned:
            return
        self._above.append(above)
        if len(self._above) < WINDOW:
            return
        mean = float(torch.stack(self._above).mean())
        self._above.clear()
        if mean > -0.01 and float(constant) > 0.05:  # below, embeddings left nothing open
            self._warned = True
            log_info(
                f"warning: over the last {WINDOW} steps the matching loss was {mean + float(constant):.4f}; a constant answer "
                f"has {float(constant):.4f}, so nothing is learned from the pairs. Raise optim.lr_scale of fusion and task, or "
                "lengthen optim.warmup; see whether captions and pictures belong together"
            )

    def evaluate(self, model: FusionModel, shards: Any, setup: EvalSetup) -> dict[str, float]:
        """`image_to_text_R@K`, `text_to_image_R@K` by embeddings, the same `reranked_...`, and for both their mean: `R@1`,
        `reranked_R@1`; `..._ceiling`, the recall that no order of the candidates can exceed; `rerank_k`, candidates a query,
        and `rerank_ms`, milliseconds a query; `samples`, `captions`, `bad_samples`. Collective."""
        head = cast(MatchingHead, model.head)
        return search(model, shards, setup, head.match, self.config.rerank, self.config.score == "sum")

    def predict(
        self, model: FusionModel, inputs: dict[str, Tensor], masks: dict[str, Tensor], trace: Trace | None = None, top: int = 5
    ) -> Prediction:
        """How likely text and picture belong together, with score=sum of those that embeddings find alike; `score` is the
        matching logit."""
        logits = model({name: inputs[name] for name in ("image", "text")}, masks, {}, trace)["match"].float()
        return Prediction([[("match", p)] for p in logits.detach().sigmoid().tolist()], logits)


def _wide(values: Tensor) -> Tensor:
    """Half precisions as float32."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def build(config: Config, survey: Survey | None) -> Retrieval:
    """Nothing is learnt from the data before training."""
    return Retrieval(config)
