"""Captioning: a causal decoder that attends to the image and generates sentences about it.

    task: {name: captioning, search: beam}
    fusion: {name: cross, causal: true}

The state of token t, which depends on tokens up to t and on the image, predicts token t + 1. The fusion reads the states of
the text tower where that is causal (CLIP). A bidirectional tower (BERT) would reveal the next token, so new token embeddings
replace it. decoding.py searches, caption_metrics.py scores. Generative open-ended question answering, momentum distillation
and masked language modeling are not included.

Shapes: b = images, T = tokens of a caption, V = tokens in the vocabulary, C = width of a token, n = sequences.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from finetune.attention.trace import Trace
from finetune.model import Features, FusionModel, Head
from finetune.tasks import EvalSetup, Prediction, Survey, Task, caption_metrics, global_weighted_mean, require_towers
from finetune.tasks.decoding import Generated, beam_search, greedy_search, nucleus_sampling
from pretrain.config import SEED, check_numbers
from pretrain.data.text import TextDecoder
from pretrain.errors import ConfigError, UserError
from pretrain.printable import get_noun
from pretrain.runtime import distributed
from pretrain.runtime.agree import gather_or_raise, on_main
from pretrain.towers import TokenSequence, masked_mean


@dataclass
class Config:
    """Input of the decoder, label smoothing, and how sentences are generated."""

    name: str = "captioning"
    """Name of the task, which is the name of this file."""
    words: Literal["auto", "tower", "new"] = "auto"
    """Input of the decoder: the text tower's states, or new token embeddings; auto = the tower where it is causal."""
    smoothing: float = 0.1
    """Label smoothing: fraction of a target's weight that is spread over all tokens."""
    search: Literal["greedy", "beam", "nucleus"] = "beam"
    """How sentences are generated in evaluation and prediction; it can be changed for any checkpoint."""
    length: int = 0
    """Maximum number of new tokens of a sentence; 0 = as many as the text tower can read."""
    beams: int = 3
    """beam: number of beams."""
    penalty: float = 1.0
    """beam: length penalty; sums of log-probabilities are divided by tokens ** penalty. 0 = none, larger = longer sentences."""
    top_p: float = 0.9
    """nucleus: sample from the most likely tokens whose probabilities add up to this."""
    temperature: float = 1.0
    """nucleus: divides the logits; above 1 flattens the distribution, below 1 sharpens it."""
    seed: int = 0
    """nucleus: seed; the random numbers of a sample depend on it and the sample's key alone."""
    generate: bool = True
    """Generate sentences in evaluation, for CIDEr and BLEU; false = measure only the likelihood of the reference captions."""

    def check(self) -> None:
        """Refuse values out of range. Raises ConfigError."""
        if not 0 <= self.smoothing < 1 or self.length < 0:
            raise ConfigError(
                f"task.smoothing={self.smoothing} must be from 0 to below 1, task.length={self.length} at least 0"
            )
        if self.beams < 1 or self.penalty < 0 or not 0 < self.top_p <= 1 or self.temperature <= 0:
            raise ConfigError(
                f"task.beams={self.beams} must be at least 1, task.penalty={self.penalty} at least 0, task.top_p={self.top_p} "
                f"above 0 and at most 1, task.temperature={self.temperature} above 0"
            )
        check_numbers(self, "task", penalty="[0, inf)", temperature="(0, inf)", seed=SEED)


class Captions(TextDecoder):
    """A text decoder whose captions always start with the tokens from which generation starts."""

    def __init__(self, text: TextDecoder) -> None:
        super().__init__(text.tokenizer, text.length, text.caption, text.trim, text.multiple)
        ids, mask = super().encode([""])
        special = ids[0][mask[0]].tolist()
        if not special:
            raise ConfigError("task.name=captioning needs a tokenizer that appends an end token to texts; this one does not")
        self.end: int = special[-1]
        self.start: list[int] = special[:-1] or [self.end]
        """First tokens of every sentence; the end token where the tokenizer has no start token (GPT-2, SigLIP)."""
        self._lacks_start = not special[:-1]
        self.banned = sorted({int(i) for i in text.tokenizer.all_special_ids} - {self.end})
        """Tokens that are never generated."""

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        ids, mask = super().encode(texts)
        if self._lacks_start:
            ids = torch.cat([torch.full((len(ids), 1), self.end), ids], dim=1)[:, : self.length]
            mask = torch.cat([torch.ones(len(mask), 1, dtype=torch.bool), mask], dim=1)[:, : self.length]
        return ids, mask

    def decode(self, ids: list[int]) -> str:
        """Turn token ids into text, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()


# ---------------------------------------------------------------------------------------------------------------------
# The head


class CaptionHead(Head):
    """Turns fused text tokens into a logit for each token of the vocabulary."""

    def __init__(self, width: int, vocabulary: int, length: int, words: str, smoothing: float) -> None:
        super().__init__()
        self.smoothing = smoothing
        self.embedding = self.positions = None
        if words == "new":
            self.embedding = nn.Embedding(vocabulary, width)
            nn.init.normal_(self.embedding.weight, std=width**-0.5)
            self.positions = nn.Parameter(torch.randn(length, width) * 0.02)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, vocabulary)
        nn.init.normal_(self.out.weight, std=width**-0.5)
        nn.init.zeros_(self.out.bias)

    def forward(
        self,
        model: FusionModel,
        inputs: dict[str, Tensor],
        masks: dict[str, Tensor],
        targets: dict[str, Any],
        trace: Trace | None = None,
    ) -> Features:
        """Score each next token of text (b, T).

        Returns:
            losses: (b, T - 1) smoothed cross-entropy, at least float32.
            likelihood: (b, T - 1) log-probability of the next token.
            weights: (b, T - 1), 1 where there is a next token, else 0.
        """
        image = model.tokens(model.subject, inputs[model.subject])
        ids, mask = inputs["text"], masks["text"]
        logits = self.logits(model, image, ids, mask, trace)[:, :-1]
        scores = logits.float().log_softmax(dim=-1) if logits.dtype != torch.float64 else logits.log_softmax(dim=-1)
        likelihood = scores.gather(-1, ids[:, 1:, None])[..., 0]
        losses = -(1 - self.smoothing) * likelihood - self.smoothing * scores.mean(dim=-1)
        return {"losses": losses, "likelihood": likelihood, "weights": mask[:, 1:].to(losses.dtype)}

    def logits(self, model: FusionModel, image: TokenSequence, ids: Tensor, mask: Tensor, trace: Trace | None = None) -> Tensor:
        """Compute next-token logits (n, T, V) of ids (n, T); n is a multiple of the number of images."""
        text = self._text_tokens(model, ids, mask)
        fused = model.fuse({"text": text, model.subject: image}, trace)["text"].states
        out: Tensor = self.out(self.norm(fused))
        return out

    def _text_tokens(self, model: FusionModel, ids: Tensor, mask: Tensor) -> TokenSequence:
        if self.embedding is None or self.positions is None:
            return model.tokens("text", ids, mask)
        states = self.embedding(ids) + self.positions[: ids.shape[1]]
        return TokenSequence(states, mask, None, masked_mean(states, mask))


class Captioning(Task):
    """The captioning task; see the module."""

    primary_metric = "likelihood"
    """Not CIDEr: likelihood needs no extra package, and ranks checkpoints with less noise on small sets."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.captions: Captions | None = None

    def build_decoders(self, towers: dict[str, Any]) -> dict[str, Any]:
        require_towers("captioning", towers, self.subject, "text")
        self.captions = Captions(towers["text"])
        return {self.subject: towers[self.subject], "text": self.captions}

    def build_head(self, model: FusionModel) -> CaptionHead:
        fusion = cast(Any, model.fusion)
        is_text_to_image = fusion is not None and (fusion.config.query, fusion.config.context) == ("text", self.subject)
        if not is_text_to_image or not getattr(fusion, "causal", False):
            raise ConfigError(
                f"task.name=captioning needs causal text tokens that attend to the {get_noun(self.subject)}: set "
                f"fusion.name=cross fusion.causal=true fusion.query=text fusion.context={self.subject}"
            )
        tower = cast(Any, model.encoder.tower("text"))
        causal = bool(getattr(tower, "causal", False))
        if self.config.words == "tower" and not causal:
            raise ConfigError(
                "task.words=tower: the text tower is bidirectional, its states would reveal the next word; use new"
            )
        words = "tower" if causal and self.config.words != "new" else "new"
        vocabulary = tower.model.get_input_embeddings().weight.shape[0]
        return CaptionHead(model.widths["text"], vocabulary, tower.length, words, self.config.smoothing)

    def loss(self, features: Features, targets: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the mean loss over the tokens of all processes, and this process's mean log-probability."""
        weights = features["weights"].detach()
        with torch.no_grad():
            likelihood = (features["likelihood"] * weights).sum() / weights.sum().clamp(min=1)
        return global_weighted_mean(features["losses"].flatten(), weights.flatten()), {"likelihood": likelihood}

    # -----------------------------------------------------------------------------------------------------------------
    # Generation

    def generate(self, model: FusionModel, images: Tensor, keys: list[str]) -> Generated:
        """Generate a sentence for each image (b, 3, H, W) by config.search.

        `keys` name the samples; nucleus sampling derives its random numbers from them.
        """
        config, captions, head = self.config, self._text_decoder(), cast(CaptionHead, model.head)
        image = model.tokens(model.subject, images)
        start = torch.tensor([captions.start], device=images.device).repeat(len(images), 1)
        max_length = captions.length - start.shape[1]
        length = min(config.length or max_length, max_length)

        def step(ids: Tensor) -> Tensor:
            logits = head.logits(model, image, ids, torch.ones_like(ids, dtype=torch.bool))[:, -1].float()
            logits[:, captions.banned] = -torch.inf
            logits[:, len(cast(Any, captions.tokenizer)) :] = -torch.inf  # rows beyond the tokenizer's tokens
            return logits.log_softmax(dim=-1)

        if config.search == "beam":
            return beam_search(step, start, captions.end, length, config.beams, config.penalty)
        if config.search == "greedy":
            return greedy_search(step, start, captions.end, length)
        uniform = torch.from_numpy(np.stack([_uniform(config.seed, key, length) for key in keys])).to(images.device)
        return nucleus_sampling(step, start, captions.end, length, uniform, config.top_p, config.temperature)

    def _text_decoder(self) -> Captions:
        assert self.captions is not None, "build_decoders() comes first"
        return self.captions

    def predict(
        self, model: FusionModel, inputs: dict[str, Tensor], masks: dict[str, Tensor], trace: Trace | None = None, top: int = 5
    ) -> Prediction:
        """Generate a sentence, and score the given text.

        `score` is the log-probability of the given text. `best` is the generated sentence with its mean log-probability per
        token. With a trace nothing is generated and `best` is the given text. Attention at position t predicts token t + 1.
        """
        features = model(inputs, masks, {}, trace)
        score = (features["likelihood"] * features["weights"]).sum(dim=1)
        captions = self._text_decoder()
        if trace is not None:
            rows = [row[mask].tolist() for row, mask in zip(inputs["text"], masks["text"], strict=True)]
            mean = (score / features["weights"].sum(dim=1).clamp(min=1)).tolist()
            best = [[(captions.decode(row), value)] for row, value in zip(rows, mean, strict=True)]
            return Prediction(best, score, has_probabilities=False)
        with torch.no_grad():
            generated = self.generate(model, inputs[model.subject], [str(i) for i in range(len(score))])
        best = [
            [(captions.decode(ids), value / (len(ids) + 1))]
            for ids, value in zip(generated.ids, generated.scores.tolist(), strict=True)
        ]
        return Prediction(best, score, has_probabilities=False)

    # -----------------------------------------------------------------------------------------------------------------
    # Evaluation

    def evaluate(self, model: FusionModel, shards: Any, setup: EvalSetup) -> dict[str, float]:
        """Compute the captioning metrics on `shards`. Collective. Raises UserError.

        Returns:
            likelihood: mean log-probability of a token of the first reference caption; perplexity: exp(-likelihood).
            CIDEr, BLEU_1 to BLEU_4: of the generated sentences against all reference captions, see caption_metrics.py.
            samples, bad_samples: counts.
        """
        batches = setup.batches(shards)
        rows = [row for part in gather_or_raise(lambda: self._score_samples(model, batches, setup)) for row in part]
        bad = sum(distributed.gather_objects(batches.bad.total()))
        if not rows:
            raise UserError(f"no caption to evaluate in {shards}: {bad} samples were left out because of their content")
        rows.sort()  # by key, so that sums are the same on any number of processes
        likelihood = sum(row[1] for row in rows) / max(1.0, sum(row[2] for row in rows))
        metrics = {"likelihood": likelihood, "perplexity": math.exp(min(-likelihood, 700.0))}
        if self.config.generate:
            # On one process only: it starts a Java process.
            metrics |= on_main(lambda: caption_metrics.score_captions([row[3] for row in rows], [row[4] for row in rows]))
        return {**metrics, "samples": len(rows), "bad_samples": bad}

    def _score_samples(
        self, model: FusionModel, batches: Any, setup: EvalSetup
    ) -> list[tuple[str, float, float, str, list[str]]]:
        """Score this process's share of the samples.

        Returns:
            Per sample: key, log-probability and number of tokens of its first caption, generated sentence, all captions.
        """
        rows: list[tuple[str, float, float, str, list[str]]] = []
        captions = self._text_decoder()
        with setup.inference_mode(model):
            for batch in batches:
                batch = batch.to(setup.device, non_blocking=True)
                features = self.encode(model, batch)
                sums = (features["likelihood"] * features["weights"]).double().sum(dim=1).tolist()
                counts = features["weights"].double().sum(dim=1).tolist()
                sentences = [""] * len(batch)
                if self.config.generate:
                    sentences = [
                        captions.decode(ids) for ids in self.generate(model, batch.inputs[model.subject], batch.keys).ids
                    ]
                rows.extend(zip(batch.keys, sums, counts, sentences, batch.targets["captions"], strict=True))
        return rows


def _uniform(seed: int, key: str, count: int) -> np.ndarray:
    """Return (count,) numbers in [0, 1) that depend on seed and key alone."""
    digest = hashlib.blake2b(f"{seed} {key}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))).random(count)


def build(config: Config, survey: Survey | None) -> Captioning:
    """Build the task, which needs nothing from the training data."""
    return Captioning(config)
