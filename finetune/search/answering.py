"""Questions about an image: a fine-tuned vqa run answers them, and maps show where it looked for each word.

Answerer(loading.load("runs/vqa"), device).answer(data, "what color is the car?", notes) -> WordMaps
"""

from __future__ import annotations

import torch

from finetune.explain.word_maps import WordMaps, compute_word_maps, find_decoders
from finetune.loading import Finetuned
from finetune.search.query import describe_cut
from pretrain.data.captions import normalize_whitespace
from pretrain.errors import ConfigError, UserError


class Answerer:
    """A vqa run, ready for questions."""

    def __init__(self, tuned: Finetuned, device: torch.device) -> None:
        """Raises UserError for a run of another task."""
        if str(tuned.config.task.name) != "vqa":
            raise UserError(f"--vqa {tuned.folder} is a run of {tuned.config.task.name}; questions need one of vqa")
        self.tuned = tuned
        tuned.model.to(device).eval()

    def answer(self, data: bytes, question: str, notes: list[str]) -> WordMaps:
        """Return the answers, best first with their probabilities, and a map for each word of the question.

        Args:
            data: an image file.
            question: what is asked about it.
            notes: is extended by what the user should know.

        Raises:
            ConfigError: the question is empty.
            UserError: the image is none.
        """
        question = normalize_whitespace(question)
        if not question:
            raise ConfigError("the question is empty")
        decoder = find_decoders(self.tuned.decoders)[1]
        if note := describe_cut(decoder, question, "question"):
            notes.append(note)
        return compute_word_maps(self.tuned, data, question)
