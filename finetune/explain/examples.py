"""Maps of some images or sounds of a data set, with one text each, for a report."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from finetune.explain import heatmap, spectrogram
from finetune.explain.token_spans import TokenSpans
from finetune.explain.word_maps import (
    METHOD,
    WordMaps,
    build_word_maps,
    compute_token_maps,
    find_decoders,
    find_text_decoder,
)
from finetune.loading import Finetuned
from pretrain.data import loader
from pretrain.data.audio import AudioDecoder
from pretrain.data.images import ImageDecoder, visible_box
from pretrain.data.thumbnails import Thumbnail, ThumbnailDecoder
from pretrain.errors import UserError

_MOST_BYTES = 1 << 27  # of the sounds that are held until some of them are drawn


def sample_examples(
    tuned: Finetuned, shards: Any, count: int = 8, method: str = METHOD, max_samples: int = 400, workers: int = 0
) -> list[WordMaps]:
    """Compute maps of `count` images, or sounds, of `shards`, with one text each.

    The samples are drawn with a fixed seed from the first `max_samples`, of long sounds fewer. For a task that reads questions,
    the types of question take turns, and the right answer is included. For others the text is the sample's first caption.
    Whether the model is right plays no part in the choice.

    Raises UserError for a model without images or sounds, or without texts.
    """
    subject = tuned.model.subject
    if subject == "audio":
        audio_decoder = tuned.decoders["audio"]
        if not isinstance(audio_decoder, AudioDecoder):
            raise UserError("maps of sounds need waveforms; the audio tower of this model brings a decoder of its own")
        decoders: dict[str, Any] = {"audio": audio_decoder}
        max_samples = min(max_samples, max(count, _MOST_BYTES // (2 * audio_decoder.samples)))
    else:
        image_decoder = find_decoders(tuned.decoders)[0]
        decoders = {"image": image_decoder, "thumbnail": ThumbnailDecoder(image_decoder.max_pixels)}
    text_decoder = find_text_decoder(tuned.decoders)
    if not tuned.task.text_is_question:
        decoders["text"] = text_decoder
    candidates: list[tuple[Tensor, Thumbnail | None, list[tuple[str, str, str]]]] = []
    for batch in loader.build_eval_loader(shards, decoders, 64, workers, max_samples=max_samples):
        thumbnails = batch.targets.get("thumbnails", [None] * len(batch))
        for i, (item, thumbnail) in enumerate(zip(batch.inputs[subject], thumbnails, strict=True)):
            if tuned.task.text_is_question:
                texts = [(q.kind, q.text, q.answers[0]) for q in tuned.task.questions(batch.targets["json"][i])]
            else:
                texts = [("caption", caption, "") for caption in batch.targets["captions"][i][:1]]
            candidates += [(item, thumbnail, texts)] if texts else []
    kinds = list(dict.fromkeys(kind for _, _, texts in candidates for kind, _, _ in texts))
    random = np.random.Generator(np.random.Philox(key=0))
    examples: list[WordMaps] = []
    for index in random.permutation(len(candidates)).tolist():
        item, thumbnail, texts = candidates[index]
        of_kind = [text for text in texts if text[0] == kinds[len(examples) % len(kinds)]]
        if len(examples) == count:
            break
        if of_kind:
            _, text, truth = of_kind[int(random.integers(len(of_kind)))]
            maps = replace(_compute_decoded_word_maps(tuned, item, TokenSpans(text_decoder, text), method), truth=truth)
            if thumbnail is not None:
                visible = find_visible(image_decoder, thumbnail.height, thumbnail.width)
                maps = replace(maps, whole=thumbnail.open(), visible=visible)
            examples.append(maps)
    return examples


def find_visible(decoder: ImageDecoder, height: int, width: int) -> heatmap.Box:
    """Return the part of a stored image that the model's input shows, (x0, y0, x1, y1) as shares of the image's sides."""
    x0, y0, x1, y1 = visible_box(height, width, decoder.size, decoder.resize)
    return x0 / width, y0 / height, x1 / width, y1 / height


def _compute_decoded_word_maps(tuned: Finetuned, item: Tensor, spans: TokenSpans, method: str) -> WordMaps:
    """Compute the maps of a decoded image (3, h, w) uint8 or sound (S,) int16, which is shown as the model's input."""
    model = tuned.model
    device = next(model.parameters()).device
    ids, mask = tuned.decoders["text"].encode([spans.text])
    maps, prediction = compute_token_maps(model, tuned.task, item[None].to(device), ids.to(device), mask.to(device), method)
    if model.subject == "audio":
        picture = spectrogram.draw_spectrogram(model.encoder, item)
    else:
        picture = Image.fromarray(item.permute(1, 2, 0).contiguous().numpy())
    return build_word_maps(picture, spans, maps[0], prediction, tuned.task.text_is_question, method, model.subject)
