"""Questions about an image or a sound: a fine-tuned vqa run answers them, and maps show where it looked for each word.

Answerer(loading.load("runs/vqa"), device).answer(data, "what color is the car?", notes) -> WordMaps
"""

from __future__ import annotations

import torch

from finetune.explain.word_maps import WordMaps, compute_word_maps, find_text_decoder
from finetune.loading import Finetuned
from finetune.search.query import describe_cut
from finetune.search.reranking import check_subject
from finetune.search.vector_index import VectorIndex
from pretrain.data.captions import normalize_whitespace
from pretrain.errors import ConfigError, UserError


class Answerer:
    """A vqa run, ready for questions."""

    def __init__(self, tuned: Finetuned, device: torch.device, index: VectorIndex | None = None) -> None:
        """Raises UserError for a run of another task, or one that reads what the index does not hold; None = no index."""
        if str(tuned.config.task.name) != "vqa":
            raise UserError(f"--vqa {tuned.folder} is a run of {tuned.config.task.name}; questions need one of vqa")
        if index is not None:
            check_subject("--vqa", tuned, index)
        self.tuned = tuned
        tuned.model.to(device).eval()

    def answer(self, data: bytes, question: str, notes: list[str]) -> WordMaps:
        """Return the answers, best first with their probabilities, and a map for each word of the question.

        Args:
            data: an image file, or a sound where the run reads those.
            question: what is asked about it.
            notes: is extended by what the user should know.

        Raises:
            ConfigError: the question is empty.
            UserError: the file is none.
        """
        question = normalize_whitespace(question)
        if not question:
            raise ConfigError("the question is empty")
        decoder = find_text_decoder(self.tuned.decoders)
        if note := describe_cut(decoder, question, "question"):
            notes.append(note)
        return compute_word_maps(self.tuned, data, question)
