"""What each word of a text looks at in a picture: for `clipfuse attend`, for the report, for grounding.

    tuned = finetune.load("runs/vqa")
    seen = look(tuned, Path("dog.jpg").read_bytes(), "what colour is the dog?")
    seen.figure().save("dog.png")                   the picture, a heat map a word, and the answer

`token_maps` is the core: a batch through the task's own predict(), its trace through maps.py. The model's weights are
not touched. May import tasks, inference, maps, words, drawing.
Shapes: b pictures, each with one text; T tokens; H, W cells of the picture's grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from finetune.attention.trace import Trace
from finetune.explain import heatmap
from finetune.explain.attribution import compute_attention_maps
from finetune.explain.token_spans import TokenSpans, word_maps
from finetune.loading import Finetuned
from finetune.model import FusionModel
from finetune.tasks import Prediction, Task
from pretrain.data import BadSample, loader
from pretrain.data.decode import decode_image
from pretrain.data.images import ImageDecoder, visible_box
from pretrain.data.text import TextDecoder
from pretrain.embedding.split import eval_mode
from pretrain.errors import UserError
from pretrain.runtime.files import replace_atomically

METHOD = "raw"
"""How maps are made unless somebody says otherwise: after a short training on scenes (300 steps of 16 pictures) raw attention
found things more often than the others did; `evaluate --task grounding --maps` says which does so for a model of yours."""


@dataclass
class WordMaps:
    """One picture and one text, and where each word of it looked."""

    picture: Image.Image
    """The part of the picture that the model saw, in the picture's own pixels."""
    text: str
    words: list[str]
    maps: NDArray[np.float64]
    """(words, H, W), nowhere negative, comparable within this text."""
    answers: list[tuple[str, float]] = field(default_factory=list)
    """What the task says, best first, with its probability or score."""
    text_is_question: bool = False
    """Whether the text is a question."""
    truth: str = ""
    """The right answer, where it is known."""

    def lines(self) -> list[str]:
        """What stands above the figure."""
        out = [f"“{self.text}”" if not self.text_is_question else self.text]
        if self.answers:
            name, value = self.answers[0]
            others = ", ".join(f"{other} {share_of(score)}" for other, score in self.answers[1:3] if score >= 0.005)
            lead = "answer: " if self.text_is_question else ""
            out.append(f"{lead}{name}, {share_of(value)}{f' (then {others})' if others else ''}")
        if self.truth:
            out.append(
                "which is right" if self.answers and self.answers[0][0] == self.truth else f"right would be: {self.truth}"
            )
        return out

    def figure(self) -> Image.Image:
        """The picture and one tile a word."""
        return heatmap.figure(self.picture, self.words, self.maps, self.lines())

    def tiles(self, side: int = heatmap.TILE) -> list[tuple[str, Image.Image]]:
        """(word, its heat map on the picture), for pages that do their own layout."""
        strong = heatmap.strengths(self.maps)
        pairs = zip(self.words, self.maps, strong, strict=True)
        return [(word, heatmap.tile(self.picture, values, float(s), side)) for word, values, s in pairs]


# ---------------------------------------------------------------------------------------------------------------------
# The core


def token_maps(
    model: FusionModel,
    task: Task,
    images: Tensor,
    ids: Tensor,
    mask: Tensor,
    method: str = METHOD,
    layer: int | None = None,
) -> tuple[Tensor, Prediction]:
    """(b, 3, H, W) uint8 and (b, T) -> (b, T, H, W) float32 on the CPU, and what the task says.

    Raises ConfigError for a wrong method or layer, and for a model whose fusion has no picture in it; UserError for a
    task without predictions.
    """
    trace = Trace()
    with _still(model), torch.enable_grad():
        prediction = task.predict(model, {"image": images, "text": ids}, {"text": mask}, trace)
        maps = compute_attention_maps(trace, method, prediction.score, layer=layer)
    if getattr(model.fusion and model.fusion.config, "causal", False):
        # A decoder looks for a word at the position before it.
        maps = torch.cat([torch.zeros_like(maps[:, :1]), maps[:, :-1]], dim=1)
    return maps.float().cpu(), prediction


@contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """In eval mode and without gradients for the weights: maps need those of the attention alone."""
    trains = [p for p in model.parameters() if p.requires_grad]
    with eval_mode(model):
        for p in trains:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in trains:
                p.requires_grad_(True)


def look(tuned: Finetuned, picture: bytes, text: str, method: str = METHOD, layer: int | None = None) -> WordMaps:
    """One encoded picture (JPEG, PNG, WebP, ...) and one text. Raises UserError for either that cannot be used."""
    image, reader = readers(tuned)
    cut = TokenSpans(reader, text)
    words = cut.words()
    if not words:
        raise UserError(f"the text {text!r} has no word to draw a map for")
    try:
        inputs, masks = tuned.encode_inputs([picture], [cut.text])
        whole = decode_image(picture)
    except BadSample as error:
        raise UserError(f"the picture cannot be used: {error.reason}: {error.detail}") from error
    maps, said = token_maps(tuned.model, tuned.task, inputs["image"], inputs["text"], masks["text"], method, layer)
    box = [round(edge) for edge in visible_box(whole.shape[0], whole.shape[1], image.size, image.resize)]
    shown = Image.fromarray(whole).crop((box[0], box[1], box[2], box[3]))
    values = word_maps(maps[0], words).double().numpy()
    return WordMaps(shown, cut.text, [word.text for word in words], values, said.best[0], tuned.task.text_is_question)


def readers(tuned: Finetuned) -> tuple[ImageDecoder, TextDecoder]:
    """What turns a picture and a text into the model's inputs, under whatever a task has put around it.

    Raises UserError for a model without pictures or texts.
    """
    image, text = tuned.decoders.get("image"), tuned.decoders.get("text")
    text = text if isinstance(text, TextDecoder) else getattr(text, "text", None)
    if not isinstance(image, ImageDecoder) or not isinstance(text, TextDecoder):
        raise UserError(f"maps need pictures and words; this model reads {', '.join(tuned.decoders)}")
    return image, text


def share_of(value: float) -> str:
    """0.93 -> "93 %"; what is no probability, as a number."""
    return f"{100 * value:.0f} %" if 0 <= value <= 1 else f"{value:.2f}"


# ---------------------------------------------------------------------------------------------------------------------
# A sheet for the report


def examples(
    tuned: Finetuned, shards: Any, count: int = 8, method: str = METHOD, pictures: int = 400, workers: int = 0
) -> list[WordMaps]:
    """`count` pictures of the first `pictures` of `shards`, drawn by a fixed seed, with a text each.

    Where the task reads questions: one of each type in turn, with the right answer. Else the first caption. Whether the
    model is right plays no part in the choice.
    """
    image, text = readers(tuned)
    decoders: dict[str, Any] = {"image": image} if tuned.task.text_is_question else {"image": image, "text": text}
    batches = loader.build_eval_loader(shards, decoders, 64, workers, max_samples=pictures)
    found: list[tuple[Tensor, list[tuple[str, str, str]]]] = []
    for batch in batches:
        for i, picture in enumerate(batch.inputs["image"]):
            if tuned.task.text_is_question:
                said = [(q.kind, q.text, q.answers[0]) for q in tuned.task.questions(batch.targets["json"][i])]
            else:
                said = [("caption", caption, "") for caption in batch.targets["captions"][i][:1]]
            found += [(picture, said)] if said else []
    kinds = list(dict.fromkeys(kind for _, said in found for kind, _, _ in said))
    random = np.random.Generator(np.random.Philox(key=0))
    out: list[WordMaps] = []
    for at in random.permutation(len(found)).tolist():
        picture, said = found[at]
        wanted = [each for each in said if each[0] == kinds[len(out) % len(kinds)]]
        if len(out) == count:
            break
        if wanted:
            _, words, truth = wanted[int(random.integers(len(wanted)))]
            out.append(replace(_seen(tuned, picture, TokenSpans(text, words), method), truth=truth))
    return out


def _seen(tuned: Finetuned, picture: Tensor, cut: TokenSpans, method: str) -> WordMaps:
    """Of a decoded picture (3, H, W) uint8, shown as the model sees it."""
    device = next(tuned.model.parameters()).device
    ids, mask = tuned.decoders["text"].encode([cut.text])
    maps, said = token_maps(tuned.model, tuned.task, picture[None].to(device), ids.to(device), mask.to(device), method)
    words = cut.words()
    shown = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    values = word_maps(maps[0], words).double().numpy()
    return WordMaps(shown, cut.text, [word.text for word in words], values, said.best[0], tuned.task.text_is_question)


# ---------------------------------------------------------------------------------------------------------------------
# clipfuse attend


def attend(
    tuned: Finetuned, image: str | Path, text: str, out: str | Path, method: str = METHOD, layer: int | None = None
) -> WordMaps:
    """Writes the figure of one picture and one text to `out`. Raises UserError for files that cannot be read or written."""
    try:
        data = Path(image).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the picture {image}: {error.strerror or error}") from error
    seen = look(tuned, data, text, method, layer)
    path = Path(out)
    try:
        with replace_atomically(path) as partial:
            partial.write_bytes(heatmap.png(seen.figure()))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return seen
