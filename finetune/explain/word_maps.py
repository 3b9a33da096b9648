"""Maps of what each word of a text attends to in an image.

    tuned = finetune.load("runs/vqa")
    maps = compute_word_maps(tuned, Path("dog.jpg").read_bytes(), "what color is the dog?")
    maps.figure().save("dog.png")                   the image, a heat map per word, and the answer

Used by `clipfuse attend`, the report and grounding. compute_token_maps() is the core: it passes a batch through the task's
predict() and its trace through attribution.py, or for similarity maps its tokens through similarity.py. Encoders without a
task have similarity maps alone, from compute_encoder_maps(). The model's weights do not change. May import finetune.loading and
the layers below it, and the other files of this package.

Shapes: b images, each with one text; T tokens; H, W = cells of the image's grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from finetune.attention.trace import Trace
from finetune.explain import heatmap, spectrogram
from finetune.explain.attribution import METHODS as ATTENTION_METHODS
from finetune.explain.attribution import compute_attention_maps
from finetune.explain.similarity import compute_similarity_maps
from finetune.explain.token_spans import TokenSpans, average_words
from finetune.loading import Finetuned, encode_inputs
from finetune.model import FusionModel
from finetune.tasks import Prediction, Task
from pretrain.data import BadSample
from pretrain.data.audio_files import find_media_type
from pretrain.data.decode import decode_image
from pretrain.data.images import ImageDecoder, crop_visible
from pretrain.data.text import TextDecoder
from pretrain.embedding.split import eval_mode
from pretrain.errors import ConfigError, UserError, closest
from pretrain.model import DualEncoder
from pretrain.printable import get_noun
from pretrain.runtime.files import replace_atomically

METHOD = "raw"
"""The default method. To choose one for another model, compare them with `evaluate --task grounding --maps`.

Measured: after a short training on scenes (300 steps of 16 images), peaks lay on the named object most often with raw.
"""
SIMILARITY = "similarity"
"""The method that reads no fusion."""
METHODS: tuple[str, ...] = (*ATTENTION_METHODS, SIMILARITY)


@dataclass
class WordMaps:
    """One image, one text, and a map of the image for each word of the text."""

    image: Image.Image
    """The part of the image that the model's input shows, in the image's own pixels."""
    text: str
    words: list[str]
    maps: NDArray[np.float64]
    """(words, H, W), nowhere negative, comparable within this text."""
    answers: list[tuple[str, float]] = field(default_factory=list)
    """The task's predictions, best first, with their probability or score."""
    text_is_question: bool = False
    """Whether the text is a question."""
    truth: str = ""
    """The right answer, where it is known; else empty."""
    has_probabilities: bool = True
    """Whether the numbers in `answers` are probabilities; see tasks.Prediction."""
    method: str = METHOD
    """How the maps were computed, one of METHODS."""
    whole: Image.Image | None = None
    """The whole image, small; None where it was not asked for."""
    visible: heatmap.Box = (0.0, 0.0, 1.0, 1.0)
    """The part of `whole` that the model's input shows, (x0, y0, x1, y1) as shares of its sides; borders exceed 0 to 1."""
    note: str = ""
    """A line above the figure that says what `image` is, where it is no photograph."""

    def format_answers(self) -> tuple[str, str]:
        """Return the best answer with its probability or score, and the next two probable answers with theirs, or ""."""
        texts = [f"{name}, {format_share(value) if self.has_probabilities else f'{value:.2f}'}" for name, value in self.answers]
        others = [f"{name} {format_share(value)}" for name, value in self.answers[1:3] if value >= 0.005]
        return texts[0] if texts else "", ", ".join(others) if self.has_probabilities else ""

    def caption_lines(self) -> list[str]:
        """Return the lines of text above the figure: the text, the prediction, and whether it is right."""
        lines = [f"“{self.text}”" if not self.text_is_question else self.text]
        if self.answers:
            answer, others = self.format_answers()
            lead = "answer: " if self.text_is_question else ""
            lines.append(f"{lead}{answer}{f' (then {others})' if others else ''}")
        if self.truth:
            lines.append(
                "which is right" if self.answers and self.answers[0][0] == self.truth else f"right would be: {self.truth}"
            )
        if self.note:
            lines.append(self.note)
        H, W = self.maps.shape[1:]
        if max(H, W) <= heatmap.COARSE_CELLS:
            lines.append(f"{H} x {W} regions: a map tells no smaller parts of the image apart")
        return lines

    def figure(self) -> Image.Image:
        """Draw the image and one tile per word, under the text, the prediction and what the colors mean."""
        legend = heatmap.SIMILARITY_LEGEND if self.method == SIMILARITY else heatmap.LEGEND
        return heatmap.draw_figure(self.image, self.words, self.maps, [*self.caption_lines(), legend])

    def tiles(self, side: int = heatmap.TILE) -> list[tuple[str, Image.Image]]:
        """Draw (word, its heat map on the image) for each word, for pages with their own layout.

        It is drawn on the whole image where that is known. `side` is the longer side in px.
        """
        image, visible = (self.image, (0.0, 0.0, 1.0, 1.0)) if self.whole is None else (self.whole, self.visible)
        strengths = heatmap.compute_strengths(self.maps)
        pairs = zip(self.words, self.maps, strengths, strict=True)
        return [(word, heatmap.draw_on_picture(image, visible, values, float(s), side)) for word, values, s in pairs]


# ---------------------------------------------------------------------------------------------------------------------
# Maps of a batch


def check_method(method: str, layer: int | None = None) -> None:
    """Raise ConfigError for a method that there is not, or a layer where the method has none."""
    if method not in METHODS:
        raise ConfigError(f"no map method {method!r}{closest(method, list(METHODS))}; the choices are {', '.join(METHODS)}")
    if method == SIMILARITY and layer is not None:
        raise ConfigError(f"layer {layer}: similarity maps come from the encoders and have no layers; raw and gradcam do")


def compute_token_maps(
    model: FusionModel,
    task: Task,
    images: Tensor,
    ids: Tensor,
    mask: Tensor,
    method: str = METHOD,
    layer: int | None = None,
) -> tuple[Tensor, Prediction]:
    """Compute a map per token, (b, T, H, W) float32 on the CPU, and the task's predictions.

    Args:
        model: the model.
        task: its task.
        images: (b, 3, h, w) uint8, or what else the model's texts are about.
        ids: (b, T), one text per image.
        mask: (b, T), True for real tokens.
        method: one of METHODS. Negative similarities become 0.
        layer: see compute_attention_maps().

    Raises:
        ConfigError: a wrong method or layer, or a model whose fusion reads no images.
        UserError: a task without predictions, or towers without similarity maps.
    """
    check_method(method, layer)
    if method == SIMILARITY:
        maps, _ = compute_similarity_maps(model.encoder, images, ids, mask, model.subject)
        with eval_mode(model), torch.no_grad():
            prediction = task.predict(model, {model.subject: images, "text": ids}, {"text": mask})
        return maps.clamp(min=0).float().cpu(), prediction
    trace = Trace()
    with _frozen_eval(model), torch.enable_grad():
        prediction = task.predict(model, {model.subject: images, "text": ids}, {"text": mask}, trace)
        maps = compute_attention_maps(trace, method, prediction.score, image=model.subject, layer=layer)
    if getattr(model.fusion and model.fusion.config, "causal", False):
        # A decoder predicts a word at the position before it, so the map of a token is the one of that position.
        maps = torch.cat([torch.zeros_like(maps[:, :1]), maps[:, :-1]], dim=1)
    return maps.float().cpu(), prediction


@contextmanager
def _frozen_eval(model: nn.Module) -> Iterator[None]:
    """Set eval mode and disable gradients of the weights, and restore both at the end.

    Maps need the gradients of the attention weights alone.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    with eval_mode(model):
        for p in trainable:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in trainable:
                p.requires_grad_(True)


def compute_word_maps(tuned: Finetuned, data: bytes, text: str, method: str = METHOD, layer: int | None = None) -> WordMaps:
    """Compute the maps of one text on one encoded image (JPEG, PNG, WebP, ...), or sound (WAV, FLAC, Ogg, MP3).

    Raises:
        ConfigError: a wrong method or layer, or a tokenizer that does not report the characters of its tokens.
        UserError: an image that cannot be decoded, a text without words, or a model that maps do not apply to.
    """
    check_method(method, layer)
    device = next(tuned.model.parameters()).device
    image, spans, batch = _read_pair(tuned.decoders, device, data, text, tuned.model.encoder, tuned.model.subject)
    maps, prediction = compute_token_maps(tuned.model, tuned.task, *batch, method, layer)
    return build_word_maps(image, spans, maps[0], prediction, tuned.task.text_is_question, method, tuned.model.subject)


def compute_encoder_maps(
    encoder: DualEncoder, decoders: dict[str, Any], data: bytes, text: str, subject: str | None = None
) -> WordMaps:
    """Compute the similarity maps of one text on one encoded image or sound, with the cosine of the embeddings as the answer.

    decoders: of the encoder, by modality. subject: that of `data`; None = audio for a sound, or where the encoder reads no
    images. Raises as compute_word_maps().
    """
    if subject is None:
        is_sound = "audio" in decoders and ("image" not in decoders or bool(find_media_type(data)))
        subject = "audio" if is_sound else "image"
    image, spans, batch = _read_pair(decoders, encoder.logit_scale.device, data, text, encoder, subject)
    maps, cosines = compute_similarity_maps(encoder, *batch, subject)
    prediction = Prediction([[("cosine", float(cosines[0]))]], cosines, has_probabilities=False)
    return build_word_maps(image, spans, maps[0].clamp(min=0).float().cpu(), prediction, False, SIMILARITY, subject)


def _read_pair(
    decoders: dict[str, Any], device: torch.device, data: bytes, text: str, encoder: DualEncoder, subject: str = "image"
) -> tuple[Image.Image, TokenSpans, tuple[Tensor, Tensor, Tensor]]:
    """Return what a model sees of an image or sound file, the tokens of a text, and both as a batch: images, ids, mask."""
    text_decoder = find_text_decoder(decoders) if subject == "audio" else find_decoders(decoders)[1]
    spans = TokenSpans(text_decoder, text)
    if not spans.find_words():
        raise UserError(f"the text {text!r} has no word to draw a map for")
    try:
        inputs, masks = encode_inputs(decoders, device, [data], [spans.text], subject)
        batch = inputs[subject], inputs["text"], masks["text"]
        if subject == "audio":
            return spectrogram.draw_spectrogram(encoder, inputs[subject][0]), spans, batch
        pixels = decode_image(data)
    except BadSample as error:
        raise UserError(f"the {get_noun(subject)} cannot be used: {error.reason}: {error.detail}") from error
    image_decoder = find_decoders(decoders)[0]
    visible = crop_visible(pixels, image_decoder.size, image_decoder.resize, image_decoder.pad_color)
    return visible, spans, batch


def build_word_maps(
    image: Image.Image,
    spans: TokenSpans,
    maps: Tensor,
    prediction: Prediction,
    is_question: bool,
    method: str,
    subject: str = "image",
) -> WordMaps:
    """Average the maps (T, H, W) of one text over the tokens of its words."""
    words = spans.find_words()
    values, labels = average_words(maps, words).double().numpy(), [word.text for word in words]
    is_sound = subject == "audio"
    return WordMaps(
        image,
        spans.text,
        labels,
        spectrogram.turn_maps(values) if is_sound else values,
        prediction.best[0],
        is_question,
        has_probabilities=prediction.has_probabilities,
        method=method,
        note=spectrogram.LINE if is_sound else "",
    )


def find_decoders(decoders: dict[str, Any]) -> tuple[ImageDecoder, TextDecoder]:
    """Return the image decoder and the text decoder among the decoders of a model, by modality.

    A task may have wrapped the text decoder in its own. Raises UserError for a model without images or texts.
    """
    image = decoders.get("image")
    if not isinstance(image, ImageDecoder):
        raise UserError(f"maps need images and texts; this model reads {', '.join(decoders)}")
    return image, find_text_decoder(decoders)


def find_text_decoder(decoders: dict[str, Any]) -> TextDecoder:
    """Return the text decoder among the decoders of a model, also where a task has wrapped it. Raises UserError."""
    text = decoders.get("text")
    text = text if isinstance(text, TextDecoder) else getattr(text, "text", None)
    if not isinstance(text, TextDecoder):
        raise UserError(f"maps need texts; this model reads {', '.join(decoders)}")
    return text


def format_share(value: float) -> str:
    """Format a probability as "93 %"."""
    return f"{100 * value:.0f} %"


# ---------------------------------------------------------------------------------------------------------------------
# clipfuse attend


def read_file(path: str | Path, subject: str = "image") -> bytes:
    """Read an image file, or a sound where the subject is audio. Raises ConfigError where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the {get_noun(subject)} {path}: {error.strerror or error}") from error


def save_figure(maps: WordMaps, out: str | Path) -> None:
    """Write the figure of one image and one text to `out`, as PNG. Raises UserError where it cannot be written."""
    path = Path(out)
    try:
        with replace_atomically(path) as partial:
            partial.write_bytes(heatmap.encode_png(maps.figure()))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
