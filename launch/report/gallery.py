"""Example queries on held-out pairs: images found by caption, and captions found by image.

The queries are drawn by a fixed seed: half of them have the right answer first and half do not, as far as there are enough of
both kinds. The page states the recall beside them, so they cannot flatter the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from launch.report import figures
from pretrain.checkpoints.loading import LoadedModel
from pretrain.data import loader
from pretrain.data.loader import Batch
from pretrain.data.thumbnails import Thumbnail, ThumbnailDecoder
from pretrain.embedding.split import EmbeddedSplit, embed_split
from pretrain.errors import UserError
from pretrain.evaluation.chance import chance_levels
from pretrain.evaluation.retrieval import answer_ranks, retrieval_metrics
from pretrain.model import on_device

ANSWERS = 5
"""Answers shown for a query."""


@dataclass
class Answer:
    """One answer of a ranking: an image (data URI) or a caption."""

    rank: int
    """From 1."""
    score: float
    is_right: bool
    image: str = ""
    caption: str = ""


@dataclass
class Query:
    """A query and its first answers; the right answer is added at the end where it is not among them."""

    caption: str
    image: str
    answers: list[Answer]
    rank: int
    """Rank of the right answer, from 1."""


@dataclass
class Gallery:
    """Queries in both directions, over the first `images` samples of the shards."""

    images: int
    captions: int
    data: str
    by_caption: list[Query]
    by_image: list[Query]
    metrics: dict[str, float]
    """Retrieval metrics over all samples of the gallery, not only the queries shown."""

    def levels(self) -> dict[str, float]:
        """Return the level of chance of each metric."""
        return chance_levels({**self.metrics, "samples": self.images, "captions": self.captions})

    def as_evaluation(self, step: int) -> dict[str, Any]:
        """Return the metrics as an evaluation line of metrics.jsonl."""
        metrics = {f"val/{name}": value for name, value in self.metrics.items()}
        return {"step": step, **metrics, "val/samples": self.images, "val/captions": self.captions}


def build_gallery(
    loaded: LoadedModel, shards: Any, device: torch.device, workers: int = 2, images: int = 2000
) -> Gallery | None:
    """Embed the first `images` samples of `shards` and build the gallery; None where no sample is usable.

    Args:
        shards: any value that data.val accepts.

    Raises:
        UserError: the model does not encode images and texts, or shards cannot be read.
    """
    if not {"image", "text"} <= loaded.decoders.keys():
        raise UserError(f"A gallery shows images and captions; this model encodes {', '.join(loaded.decoders)}.")
    thumbnails: list[Thumbnail] = []

    def collect_thumbnails(batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            thumbnails.extend(batch.targets["thumbnails"])
            yield batch

    decoders = {**loaded.decoders, "thumbnail": ThumbnailDecoder(loaded.decoders["image"].max_pixels)}
    batches = loader.build_eval_loader(shards, decoders, 64, workers=workers, max_samples=images)
    with on_device(loaded.model, loaded.config, device) as model:
        split = embed_split(model, collect_thumbnails(batches), loaded.decoders, device)
    if len(split.image) == 0 or len(split.text) == 0:
        return None
    return Gallery(
        images=len(split.image),
        captions=len(split.text),
        data=", ".join(figures.list_shards(shards)),
        by_caption=build_caption_queries(split, thumbnails, 12),
        by_image=build_image_queries(split, thumbnails, 6),
        metrics=retrieval_metrics(split.image, split.text, split.image_index),
    )


def build_caption_queries(split: EmbeddedSplit, thumbnails: list[Thumbnail], count: int) -> list[Query]:
    """Build `count` queries by caption: the first images, and the rank of the caption's own image."""
    _, rank_m = answer_ranks(split.image, split.text, split.image_index)
    queries = []
    for j in choose_queries(rank_m, count):
        right = int(split.image_index[j])
        scores = split.image.double() @ split.text[j].double()
        order = sort_answers(scores, {right})
        answers = [
            Answer(rank, float(scores[i]), i == right, thumbnails[i].data_uri(), _first_caption(split, i))
            for rank, i in select_answers(order, {right})
        ]
        queries.append(Query(split.captions[j], thumbnails[right].data_uri(), answers, order.index(right) + 1))
    return queries


def build_image_queries(split: EmbeddedSplit, thumbnails: list[Thumbnail], count: int) -> list[Query]:
    """Build `count` queries by image: the first captions, and the best rank of the image's captions."""
    rank_n, _ = answer_ranks(split.image, split.text, split.image_index)
    queries = []
    for i in choose_queries(rank_n, count):
        right = set((split.image_index == i).nonzero().flatten().tolist())
        scores = split.text.double() @ split.image[i].double()
        order = sort_answers(scores, right)
        answers = [
            Answer(rank, float(scores[j]), j in right, caption=split.captions[j]) for rank, j in select_answers(order, right)
        ]
        best_rank = 1 + min(order.index(j) for j in right)
        queries.append(Query(split.captions[min(right)], thumbnails[i].data_uri(), answers, best_rank))
    return queries


def choose_queries(ranks: Tensor, count: int) -> list[int]:
    """Choose `count` queries by a fixed seed, half with the right answer first and half without.

    ranks: (q,), the rank of each query's right answer. Returns the queries by rising rank.
    """
    rng = np.random.Generator(np.random.Philox(key=0))
    is_first = (ranks <= 1).numpy()
    right, wrong = rng.permutation(np.flatnonzero(is_first)), rng.permutation(np.flatnonzero(~is_first))
    wrong_count = min(len(wrong), max(count // 2, count - len(right)))
    chosen = [*right[: count - wrong_count], *wrong[:wrong_count]]
    return sorted((int(q) for q in chosen), key=lambda q: float(ranks[q]))


def sort_answers(scores: Tensor, right: set[int]) -> list[int]:
    """Sort answers, best first; of equal scores right answers come last, to not flatter the model."""
    values = scores.tolist()
    return sorted(range(len(values)), key=lambda i: (-values[i], i in right, i))


def select_answers(order: list[int], right: set[int]) -> list[tuple[int, int]]:
    """Return (rank, index) of the first answers, and of the best right one where it is not among them."""
    selected = list(enumerate(order[:ANSWERS], start=1))
    if not right.intersection(order[:ANSWERS]):
        rank = next(rank for rank, i in enumerate(order, start=1) if i in right)
        selected.append((rank, order[rank - 1]))
    return selected


def _first_caption(split: EmbeddedSplit, i: int) -> str:
    return split.captions[int((split.image_index == i).nonzero()[0])]
