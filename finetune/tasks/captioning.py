"""Captioning: a causal decoder whose words look at the picture, and the sentences it writes.

    task: {name: captioning, search: beam}
    fusion: {name: cross, causal: true}

The state of word t, which has seen words up to t and the picture, predicts word t + 1. Where the text tower itself looks only
to the left (CLIP's), its states are what the fusion reads; a tower that looks both ways (BERT) would tell the answer, so its
place is taken by new word embeddings. generate.py searches, wording.py scores. Sentences about the picture only: generative
open-ended question answering, momentum distillation and masked language modelling are not included.

Shapes: b = pictures, T = tokens of a caption, V = tokens in the vocabulary, C = width of a token, n = sequences.
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
from finetune.tasks import Prediction, Setting, Survey, Task, caption_metrics, per_item
from finetune.tasks.decoding import Generated, beam, greedy, nucleus
from pretrain.data.text import TextDecoder
from pretrain.errors import ConfigError, UserError
from pretrain.runtime import distributed
from pretrain.runtime.agree import gather_or_raise, on_main
from pretrain.towers import TokenSequence, masked_mean


@dataclass
class Config:
    """Describing pictures."""

    name: str = "captioning"
    """This file."""
    words: Literal["auto", "tower", "new"] = "auto"
    """What the decoder reads: the text tower's states, or new word embeddings; auto takes the tower where it is causal."""
    smoothing: float = 0.1
    """Label smoothing: this share of a target's weight goes to all other tokens."""
    search: Literal["greedy", "beam", "nucleus"] = "beam"
    """How sentences are written in evaluation and prediction; any checkpoint can be read with another."""
    length: int = 0
    """Most new tokens of a sentence; 0 = as many as the text tower reads."""
    beams: int = 3
    """beam: sequences kept."""
    penalty: float = 1.0
    """beam: sums of log-probabilities are divided by (tokens ** penalty); 0 = not, larger = longer sentences."""
    top_p: float = 0.9
    """nucleus: drawn from the likeliest tokens that together reach this probability."""
    temperature: float = 1.0
    """nucleus: above 1 flatter, below 1 sharper."""
    seed: int = 0
    """nucleus: with the sample's key all there is to its chance."""
    generate: bool = True
    """Write sentences in evaluation, for CIDEr and BLEU; false measures the likelihood of the given ones only."""

    def check(self) -> None:
        """Raises ConfigError."""
        if not 0 <= self.smoothing < 1 or self.length < 0:
            raise ConfigError(f"task.smoothing={self.smoothing} (0 to below 1), task.length={self.length} (from 0) do not fit")
        if self.beams < 1 or self.penalty < 0 or not 0 < self.top_p <= 1 or self.temperature <= 0:
            raise ConfigError(
                f"task.beams={self.beams} (from 1), task.penalty={self.penalty} (from 0), task.top_p={self.top_p} (above 0, at "
                f"most 1), task.temperature={self.temperature} (above 0) do not fit together"
            )


class Captions(TextDecoder):
    """A text decoder whose captions always begin with the tokens a sentence is started from."""

    def __init__(self, text: TextDecoder) -> None:
        super().__init__(text.tokenizer, text.length, text.caption, text.trim, text.multiple)
        ids, mask = super().encode([""])
        special = ids[0][mask[0]].tolist()
        if not special:
            raise ConfigError("task.name=captioning needs a tokenizer with a token that ends texts; this one has none")
        self.end: int = special[-1]
        self.start: list[int] = special[:-1] or [self.end]
        """Begins every sentence; the end token where the tokenizer writes nothing in front (GPT-2, SigLIP)."""
        self._missing = [] if special[:-1] else [self.end]
        self.banned = sorted({int(i) for i in text.tokenizer.all_special_ids} - {self.end})
        """Tokens that no sentence has."""

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        ids, mask = super().encode(texts)
        if self._missing:
            ids = torch.cat([torch.full((len(ids), 1), self.end), ids], dim=1)[:, : self.length]
            mask = torch.cat([torch.ones(len(mask), 1, dtype=torch.bool), mask], dim=1)[:, : self.length]
        return ids, mask

    def decode(self, ids: list[int]) -> str:
        """Tokens -> text."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()


# ---------------------------------------------------------------------------------------------------------------------
# The model


class Writer(Head):
    """Fused words -> norm -> a logit for each token of the vocabulary."""

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
        """text (b, T), image -> of each position that predicts the next token, (b, T - 1), float32: `losses` (smoothed
        cross-entropy), `likelihood` (logarithm of the token's probability), `weights` (1 where there is a next token)."""
        image = model.tokens("image", inputs["image"])
        ids, mask = inputs["text"], masks["text"]
        logits = self.logits(model, image, ids, mask, trace)[:, :-1]
        scores = logits.float().log_softmax(dim=-1) if logits.dtype != torch.float64 else logits.log_softmax(dim=-1)
        likelihood = scores.gather(-1, ids[:, 1:, None])[..., 0]
        losses = -(1 - self.smoothing) * likelihood - self.smoothing * scores.mean(dim=-1)
        return {"losses": losses, "likelihood": likelihood, "weights": mask[:, 1:].to(losses.dtype)}

    def logits(self, model: FusionModel, image: TokenSequence, ids: Tensor, mask: Tensor, trace: Trace | None = None) -> Tensor:
        """ids (n, T), n a multiple of the pictures -> (n, T, V): what follows each token."""
        text = self._words(model, ids, mask)
        fused = model.fuse({"text": text, "image": image}, trace)["text"].states
        out: Tensor = self.out(self.norm(fused))
        return out

    def _words(self, model: FusionModel, ids: Tensor, mask: Tensor) -> TokenSequence:
        if self.embedding is None or self.positions is None:
            return model.tokens("text", ids, mask)
        states = self.embedding(ids) + self.positions[: ids.shape[1]]
        return TokenSequence(states, mask, None, masked_mean(states, mask))


class Captioning(Task):
    """See the file."""

    primary_metric = "likelihood"
    """Not CIDEr: it is there on every machine, and small sets rank by it with less noise."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.captions: Captions | None = None

    def decoders(self, towers: dict[str, Any]) -> dict[str, Any]:
        for name in ("image", "text"):
            if name not in towers:
                raise ConfigError(f"task.name=captioning needs an {name} tower; the model has {', '.join(towers)}")
        self.captions = Captions(towers["text"])
        return {"image": towers["image"], "text": self.captions}

    def head(self, model: FusionModel) -> Writer:
        fusion = cast(Any, model.fusion)
        asks = fusion is not None and (fusion.config.query, fusion.config.context) == ("text", "image")
        if not asks or not getattr(fusion, "causal", False):
            raise ConfigError(
                "task.name=captioning writes word after word, each looking at the picture: set fusion.name=cross "
                "fusion.causal=true fusion.query=text fusion.context=image"
            )
        tower = cast(Any, model.encoder.tower("text"))
        causal = bool(getattr(tower, "causal", False))
        if self.config.words == "tower" and not causal:
            raise ConfigError("task.words=tower: the text tower looks both ways, its states would tell the next word; use new")
        words = "tower" if causal and self.config.words != "new" else "new"
        vocabulary = tower.model.get_input_embeddings().weight.shape[0]
        return Writer(model.widths["text"], vocabulary, tower.length, words, self.config.smoothing)

    def loss(self, features: Features, targets: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over the words of all processes."""
        weights = features["weights"].detach()
        with torch.no_grad():
            likelihood = (features["likelihood"] * weights).sum() / weights.sum().clamp(min=1)
        return per_item(features["losses"].flatten(), weights.flatten()), {"likelihood": likelihood}

    # -----------------------------------------------------------------------------------------------------------------
    # Writing

    def write(self, model: FusionModel, images: Tensor, keys: list[str]) -> Generated:
        """Pictures (b, 3, H, W) -> a sentence each, by config.search. `keys`: names that nucleus draws by."""
        config, captions, writer = self.config, self._captions(), cast(Writer, model.head)
        image = model.tokens("image", images)
        start = torch.tensor([captions.start], device=images.device).repeat(len(images), 1)
        room = captions.length - start.shape[1]
        length = min(config.length or room, room)

        def step(ids: Tensor) -> Tensor:
            logits = writer.logits(model, image, ids, torch.ones_like(ids, dtype=torch.bool))[:, -1].float()
            logits[:, captions.banned] = -torch.inf
            logits[:, len(cast(Any, captions.tokenizer)) :] = -torch.inf  # embeddings that no token has
            return logits.log_softmax(dim=-1)

        if config.search == "beam":
            return beam(step, start, captions.end, length, config.beams, config.penalty)
        if config.search == "greedy":
            return greedy(step, start, captions.end, length)
        uniform = np.stack([_uniform(config.seed, key, length) for key in keys])
        drawn = torch.from_numpy(uniform).to(images.device)
        return nucleus(step, start, captions.end, length, drawn, config.top_p, config.temperature)

    def _captions(self) -> Captions:
        assert self.captions is not None, "decoders() comes first"
        return self.captions

    def predict(
        self, model: FusionModel, inputs: dict[str, Tensor], masks: dict[str, Tensor], trace: Trace | None = None, top: int = 5
    ) -> Prediction:
        """`score`: the log-probability of the given text. `best`: the sentence the model writes itself, with its mean
        log-probability a token; with a trace, the given text alone. In maps, position t looked in order to predict t + 1."""
        found = model(inputs, masks, {}, trace)
        score = (found["likelihood"] * found["weights"]).sum(dim=1)
        captions = self._captions()
        if trace is not None:
            rows = [row[mask].tolist() for row, mask in zip(inputs["text"], masks["text"], strict=True)]
            mean = (score / found["weights"].sum(dim=1).clamp(min=1)).tolist()
            return Prediction([[(captions.decode(row), value)] for row, value in zip(rows, mean, strict=True)], score)
        with torch.no_grad():
            written = self.write(model, inputs["image"], [str(i) for i in range(len(score))])
        best = [
            [(captions.decode(ids), value / (len(ids) + 1))]
            for ids, value in zip(written.ids, written.scores.tolist(), strict=True)
        ]
        return Prediction(best, score)

    # -----------------------------------------------------------------------------------------------------------------
    # Figures

    def evaluate(self, model: FusionModel, shards: Any, setting: Setting) -> dict[str, float]:
        """`likelihood`, the mean log-probability of a token of the first given caption, and `perplexity`, its exp(-x); CIDEr
        and BLEU_1 to BLEU_4 of the written sentences against all given ones (see wording.py); `samples`, `bad_samples`."""
        batches = setting.batches(shards)
        rows = [row for part in gather_or_raise(lambda: self._scored(model, batches, setting)) for row in part]
        bad = sum(distributed.gather_objects(batches.bad.total()))
        if not rows:
            raise UserError(f"no caption to evaluate in {shards}: {bad} samples were left out because of their content")
        rows.sort()  # by key: the same sums on any number of processes
        likelihood = sum(row[1] for row in rows) / max(1.0, sum(row[2] for row in rows))
        figures = {"likelihood": likelihood, "perplexity": math.exp(min(-likelihood, 700.0))}
        if self.config.generate:
            # Computed once: it starts a program of its own.
            figures |= on_main(lambda: caption_metrics.scores([row[3] for row in rows], [row[4] for row in rows]))
        return {**figures, "samples": len(rows), "bad_samples": bad}

    def _scored(self, model: FusionModel, batches: Any, setting: Setting) -> list[tuple[str, float, float, str, list[str]]]:
        """Of each sample of this process's share: key, log-probability of its first caption, its tokens, what was written,
        all captions."""
        found: list[tuple[str, float, float, str, list[str]]] = []
        captions = self._captions()
        with setting.measuring(model):
            for batch in batches:
                batch = batch.to(setting.device, non_blocking=True)
                out = self.encode(model, batch)
                sums = (out["likelihood"] * out["weights"]).double().sum(dim=1).tolist()
                counts = out["weights"].double().sum(dim=1).tolist()
                said = [""] * len(batch)
                if self.config.generate:
                    said = [captions.decode(ids) for ids in self.write(model, batch.inputs["image"], batch.keys).ids]
                found.extend(zip(batch.keys, sums, counts, said, batch.targets["captions"], strict=True))
        return found


def _uniform(seed: int, key: str, count: int) -> np.ndarray:
    """(count,) numbers in [0, 1) that depend on seed and key alone."""
    digest = hashlib.blake2b(f"{seed} {key}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))).random(count)


def build(config: Config, survey: Survey | None) -> Captioning:
    """The task; it needs to know nothing of the data."""
    return Captioning(config)
