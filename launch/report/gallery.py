"""What the model answers on held-out pairs: captions that ask for pictures, pictures that ask for captions.

The queries shown are drawn by a fixed seed, half from those whose first answer is right and half from those whose first
answer is wrong (fewer where one kind runs short): the page states the recall beside them, so that they cannot flatter.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from launch.report import figures
from pretrain.checkpoints.loading import LoadedModel
from pretrain.data import loader
from pretrain.data.loader import Batch
from pretrain.embedding.split import EmbeddedSplit, embed_split
from pretrain.evaluation.retrieval import answer_ranks, retrieval_metrics

SHOWN = 5  # answers per query
EDGE = 160  # px of a thumbnail's longer side


@dataclass
class Answer:
    """One place of a ranking: a picture (data URI) or a caption."""

    place: int
    score: float
    right: bool
    picture: str = ""
    caption: str = ""


@dataclass
class Query:
    """A question and what came first; `answers` ends with the right one where it came later."""

    caption: str
    picture: str
    answers: list[Answer]
    rank: int
    """Where the right answer stands, from 1."""


@dataclass
class Gallery:
    """Both directions, over the first `pictures` of the shards."""

    pictures: int
    captions: int
    data: str
    by_caption: list[Query]
    by_picture: list[Query]
    metrics: dict[str, float]

    def line(self, step: int) -> dict[str, Any]:
        """The metrics as an evaluation line of metrics.jsonl."""
        named = {f"val/{name}": value for name, value in self.metrics.items()}
        return {"step": step, **named, "val/samples": self.pictures, "val/captions": self.captions}


def build(loaded: LoadedModel, shards: Any, device: torch.device, workers: int = 2, pictures: int = 2000) -> Gallery | None:
    """Embeds the first `pictures` of `shards` with a loaded checkpoint; None where no sample is usable.

    Args:
        shards: what data.val may say.
    """
    thumbnails: list[bytes] = []

    def watched(batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            thumbnails.extend(thumbnail(picture) for picture in batch.inputs["image"])
            yield batch

    batches = loader.build_eval_loader(shards, loaded.decoders, 64, workers=workers, max_samples=pictures)
    split = embed_split(loaded.model.to(device), watched(batches), loaded.decoders, device)
    if len(split.image) == 0 or len(split.text) == 0:
        return None
    return Gallery(
        pictures=len(split.image),
        captions=len(split.text),
        data=", ".join(figures.shards(shards)),
        by_caption=by_caption(split, thumbnails, 12),
        by_picture=by_picture(split, thumbnails, 6),
        metrics=retrieval_metrics(split.image, split.text, split.image_index),
    )


def by_caption(split: EmbeddedSplit, thumbnails: list[bytes], count: int) -> list[Query]:
    """Captions that ask: the first pictures, and where their own picture stands."""
    _, rank_m = answer_ranks(split.image, split.text, split.image_index)
    queries = []
    for j in choose(rank_m, count):
        own = int(split.image_index[j])
        scores = split.image.double() @ split.text[j].double()
        order = _order(scores, {own})
        answers = [
            Answer(place, float(scores[i]), i == own, uri(thumbnails[i]), _first_caption(split, i))
            for place, i in _shown(order, {own})
        ]
        queries.append(Query(split.captions[j], uri(thumbnails[own]), answers, order.index(own) + 1))
    return queries


def by_picture(split: EmbeddedSplit, thumbnails: list[bytes], count: int) -> list[Query]:
    """Pictures that ask: the first captions, and where the best of their own stands."""
    rank_n, _ = answer_ranks(split.image, split.text, split.image_index)
    queries = []
    for i in choose(rank_n, count):
        own = set((split.image_index == i).nonzero().flatten().tolist())
        scores = split.text.double() @ split.image[i].double()
        order = _order(scores, own)
        answers = [Answer(place, float(scores[j]), j in own, caption=split.captions[j]) for place, j in _shown(order, own)]
        rank = 1 + min(order.index(j) for j in own)
        queries.append(Query(split.captions[min(own)], uri(thumbnails[i]), answers, rank))
    return queries


def choose(rank: Tensor, count: int) -> list[int]:
    """`count` queries by a fixed seed: half found at once, half not; the found ones first, then by rising rank."""
    random = np.random.Generator(np.random.Philox(key=0))
    first = (rank <= 1).numpy()
    right, wrong = random.permutation(np.flatnonzero(first)), random.permutation(np.flatnonzero(~first))
    num_wrong = min(len(wrong), max(count // 2, count - len(right)))
    chosen = [*right[: count - num_wrong], *wrong[:num_wrong]]
    return sorted((int(q) for q in chosen), key=lambda q: float(rank[q]))


def _order(scores: Tensor, own: set[int]) -> list[int]:
    """Best first; of equal scores the right answer comes last, as the figures may not flatter either."""
    values = scores.tolist()
    return sorted(range(len(values)), key=lambda i: (-values[i], i in own, i))


def _shown(order: list[int], own: set[int]) -> list[tuple[int, int]]:
    """(place, index) of the first SHOWN, and of the best right one where it is not among them."""
    shown = list(enumerate(order[:SHOWN], start=1))
    if not own.intersection(order[:SHOWN]):
        place = next(p for p, i in enumerate(order, start=1) if i in own)
        shown.append((place, order[place - 1]))
    return shown


def _first_caption(split: EmbeddedSplit, i: int) -> str:
    return split.captions[int((split.image_index == i).nonzero()[0])]


def thumbnail(picture: Tensor) -> bytes:
    """(3, H, W) uint8, as the model sees it, -> JPEG of at most EDGE px."""
    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().cpu().numpy())
    image.thumbnail((EDGE, EDGE), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=82)
    return out.getvalue()


def uri(jpeg: bytes) -> str:
    """A picture inside the page."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
