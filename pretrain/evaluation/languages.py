"""Retrieval within each language of a multilingual split, beside that of the whole.

    metrics_by_language(image (n,D), text (m,D), image_index (m,), ["de", "en", ...])
        -> {"image_to_text_R@1_de": 0.62, "chance_image_to_text_R@1_de": 0.1, "samples_de": 10, ...}

Candidates are of the same language: the captions in it, and the images that have one. The field eval.language of a sample's
json holds the language of all its captions, or a list of one for each; embedding/split.py reads it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.errors import UserError
from pretrain.evaluation.chance import with_chance
from pretrain.evaluation.retrieval import retrieval_metrics


def metrics_by_language(
    image: Tensor,
    text: Tensor,
    image_index: Tensor,
    languages: Sequence[str],
    field: str,
    names: tuple[str, str] = ("image", "text"),
) -> dict[str, float]:
    """Return the metrics of retrieval_metrics() with _LANGUAGE behind their names, their levels of chance, and counts.

    Args:
        image: (n, D) L2-normalized.
        text: (m, D) L2-normalized.
        image_index: (m,) the row of `image` that each caption describes.
        languages: m codes; "" = unknown, in no language.
        field: that held them, for the message.
        names: of the two modalities.

    Raises:
        UserError: no caption has a language.
    """
    counts = Counter(filter(None, languages))
    if not counts:
        raise UserError(
            f"eval.language={field}: no sample has a language there; it is a code such as de or pt-BR, or a list of one for "
            "each caption"
        )
    metrics: dict[str, float] = {}
    for language in sorted(counts):
        rows = torch.tensor([i for i, code in enumerate(languages) if code == language])
        samples, index = image_index[rows.to(image_index.device)].unique(return_inverse=True)
        ranks = retrieval_metrics(image[samples.to(image.device)], text[rows.to(text.device)], index, names=names)
        within = with_chance({"samples": len(samples), "captions": len(rows), **ranks})
        metrics |= {f"{name}_{language}": value for name, value in within.items()}
    return metrics
