"""FinetunedModel: the encoders of a fine-tuned run, and its task: answers, matches, classes or captions, and word maps."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune.loading import Finetuned
from pretrain.data import BadSample
from pretrain.errors import UserError
from pretrain.printable import format_count, get_noun

from .images import ImageLike, as_list, to_bytes
from .model import Model, batches, save_maps
from .sounds import SoundLike, as_sounds, to_sound_bytes

if TYPE_CHECKING:
    from finetune.explain.word_maps import WordMaps


class FinetunedModel(Model):
    """A fine-tuned model. Made by `clipfuse.load`. `encode_images` and `encode_texts` use its encoders alone."""

    def __init__(
        self, finetuned: Finetuned, decoders: dict[str, Any], source: str, device: torch.device, precision: str = "fp32"
    ) -> None:
        """decoders: of the encoders, by modality."""
        super().__init__(finetuned.model.encoder, decoders, source, device, precision, finetuned.config.performance)
        self._finetuned = finetuned
        finetuned.model.to(device).eval()

    @property
    def task(self) -> str:
        """The task it was fine-tuned for: vqa, retrieval, classification, captioning, or one of the user's own."""
        return str(self._finetuned.config.task.name)

    def predict(
        self,
        images: Iterable[ImageLike] | ImageLike,
        texts: Iterable[str] | str | None = None,
        top: int = 5,
        batch_size: int = 32,
    ) -> list[list[tuple[str, float]]]:
        """Return what the task says about each image, or each pair of an image and a text.

        Args:
            images: as for `encode_images`, or sounds as for `encode_audio` where texts attend to those.
            texts: one text for each image, or one for all: a question for vqa, a caption for retrieval; None where the task
                reads images alone.
            top: answers per image, at most.
            batch_size: images at a time.

        Returns:
            For each image a list of (answer, number), best first. The number is a probability for vqa and classification, and
            the mean log-probability per token for captioning. For retrieval it is what evaluation orders pairs by, so that
            sorting by it gives the measured ranking: ("score", logit), without bounds, or with task.score=matching
            ("match", probability).

        Raises:
            UserError: an image cannot be read, or there is not one text for each image.
        """
        is_sound = self._finetuned.model.subject == "audio"
        name, noun = "audio" if is_sound else "images", get_noun(self._finetuned.model.subject)
        pictures = as_sounds(images) if is_sound else as_list(images, name)
        if texts is None:
            sentences = [""] * len(pictures)
        elif isinstance(texts, str):
            sentences = [texts] * len(pictures)
        else:
            sentences = list(texts)
        if len(sentences) != len(pictures):
            count = f"{format_count(len(pictures), noun)} and {format_count(len(sentences), 'text')}"
            raise UserError(f"{count}: give one text for each {noun}, or one for all")
        answers: list[list[tuple[str, float]]] = []
        for positions in batches(range(len(pictures)), batch_size):
            files = [self._to_bytes(pictures[i], f"{name}[{i}]") for i in positions]
            try:
                with self._settings():
                    prediction = self._finetuned.predict(files, [sentences[i] for i in positions], top=top)
            except BadSample as error:
                first, last = f"{name}[{positions[0]}]", f"{name}[{positions[-1]}]"
                where = first if first == last else f"one of {first} to {last}"
                raise UserError(f"{where} is not a usable {noun}: {error}") from error
            answers += [row[:top] for row in prediction.best]
        return answers

    def _to_bytes(self, item: ImageLike | SoundLike, name: str) -> bytes:
        """Return an image, or a sound where texts attend to those, as an encoded file. Raises UserError."""
        return to_sound_bytes(item, name) if self._finetuned.model.subject == "audio" else to_bytes(item, name)

    def attend(
        self,
        image: ImageLike,
        text: str,
        out: str | Path | None = None,
        method: str = "raw",
        layer: int | None = None,
    ) -> WordMaps:
        """Return what each word of a text attends to in an image.

        Args:
            image: one image, as for `encode_images`, or a sound as for `encode_audio` where texts attend to those.
            text: a caption of it, or for vqa a question about it.
            out: a PNG file to write the figure to.
            method: raw, rollout, gradcam, relevance, or similarity, which reads the encoders alone and no cross-attention.
            layer: raw and gradcam: one layer, -1 the last; None = the mean of all.

        Returns:
            WordMaps: `words`, `maps` (words, H, W) on the grid of image regions, `answers`, and `figure()`, a PIL image.

        Raises:
            UserError: the image cannot be used, the text has no word, or `out` cannot be written.
        """
        from finetune.explain import word_maps

        data = self._to_bytes(image, "audio" if self._finetuned.model.subject == "audio" else "image")
        with self._settings():
            maps = word_maps.compute_word_maps(self._finetuned, data, text, method, layer)
        save_maps(maps, out)
        return maps
