"""Example queries of a retrieval run: the order by embeddings, and the order after re-ranking.

Images are ranked for the captions of the samples, or for CAPTIONS of them, drawn by a fixed seed. Shown are some, drawn too,
whose right image re-ranking moved up, some whose right image it moved down, and some whose right image it left where it was.
The page states how many there are of each, so the choice cannot flatter the model. Of a model of sounds, the images are
spectrograms. Shapes: q = captions, k = candidates of a caption.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.explain import spectrogram
from finetune.loading import Finetuned
from finetune.tasks import EvalConfig, EvalSetup
from finetune.tasks.reranking import Ranking, encode_gallery
from finetune.tasks.retrieval import Retrieval
from launch.report import figures
from launch.report.gallery import Answer, select_answers, sort_answers
from pretrain.data.loader import Batch
from pretrain.data.thumbnails import SIDE, Thumbnail, ThumbnailDecoder, encode_jpeg
from pretrain.errors import UserError
from pretrain.model import DualEncoder

IMAGES = 300
"""Samples that are ranked, by default."""
CAPTIONS = 300
"""Captions for which they are ranked, by default: each passes the fusion with its k candidates, which takes nearly all the
time. With five captions a sample, all would take five times as long and show no more."""
EXAMPLES = 3
"""Queries of each kind on the page."""
KINDS = (("up", "Moved up by re-ranking"), ("down", "Moved down by re-ranking"), ("same", "Left where it was"))
"""What re-ranking did to the right image, and titles."""


@dataclass
class RerankedQuery:
    """A caption, and its first images in both orders; the right image is added at the end where it is not among them."""

    caption: str
    kind: str
    """One of KINDS."""
    by_embeddings: list[Answer]
    reranked: list[Answer]
    rank_before: int
    """Rank of the right image by embeddings, from 1."""
    rank_after: int


@dataclass
class RerankedGallery:
    """Queries by caption, over the first `images` samples of the shards."""

    data: str
    images: int
    captions: int
    """Of the images; those that were ranked are the sum of `counts`."""
    candidates: int
    """k, images of a caption that are re-ranked."""
    counts: dict[str, int]
    """Ranked captions by what re-ranking did to their right image: up, down, same, and missed: not among the candidates."""
    first_before: float
    """Fraction of the ranked captions whose right image is first by embeddings."""
    first_after: float
    queries: list[RerankedQuery]

    @property
    def ranked(self) -> int:
        """Number of captions that were ranked."""
        return sum(self.counts.values())

    def groups(self) -> list[tuple[str, int, list[RerankedQuery]]]:
        """Return (title, captions of this kind, those on the page) for each kind that occurs."""
        by_kind = [(title, self.counts[kind], [q for q in self.queries if q.kind == kind]) for kind, title in KINDS]
        return [group for group in by_kind if group[2]]


def build_reranked_gallery(
    tuned: Finetuned, shards: Any, workers: int = 2, images: int = IMAGES, most: int = CAPTIONS
) -> RerankedGallery | None:
    """Rank the first `images` samples of `shards` for some of their captions; None where the task is no retrieval.

    Args:
        tuned: a model on the device that computes.
        shards: any value that data.val accepts.
        workers: processes that read the shards.
        images: samples to rank.
        most: captions to rank them for, drawn by a fixed seed where there are more.

    Raises:
        UserError: no sample can be used.
    """
    if not isinstance(tuned.task, Retrieval):
        return None
    thumbnails: list[Thumbnail] = []
    captions: list[str] = []

    subject, encoder = tuned.model.subject, tuned.model.encoder

    def collect(batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            thumbnails.extend(
                [draw_thumbnail(encoder, waveform) for waveform in batch.inputs["audio"]]
                if subject == "audio"
                else batch.targets["thumbnails"]
            )
            captions.extend(caption for of_image in batch.targets["captions"] for caption in of_image)
            yield batch

    device = next(tuned.model.parameters()).device
    decoders = {name: tuned.decoders[name] for name in (subject, "text")}
    setup = EvalSetup(decoders, device, config=EvalConfig(workers=workers, max_samples=images))
    previews = {} if subject == "audio" else {"thumbnail": ThumbnailDecoder(decoders["image"].max_pixels)}
    batches = setup.batches(shards, {**decoders, **previews})
    with setup.inference_mode(tuned.model):
        gallery = encode_gallery(tuned.model, collect(batches), setup)
        if gallery is None:
            raise UserError(f"nothing to rank in {shards}")
        rows = draw_captions(len(captions), most)
        ranking = tuned.task.rank_images(tuned.model, gallery, device, torch.tensor(rows, dtype=torch.int64))
    before, after = rank_right_answers(ranking)
    kinds = classify_queries(before, after)
    return RerankedGallery(
        data=", ".join(figures.list_shards(shards)),
        images=len(gallery.image),
        captions=len(captions),
        candidates=ranking.candidates.shape[1],
        counts={kind: kinds.count(kind) for kind in ("up", "down", "same", "missed")},
        first_before=before.count(1) / len(before),
        first_after=after.count(1) / len(after),
        queries=[
            RerankedQuery(
                captions[rows[j]],
                kinds[j],
                _list_answers(ranking, ranking.similarity, j, thumbnails),
                _list_answers(ranking, ranking.scores, j, thumbnails),
                before[j],
                after[j],
            )
            for j in choose_queries(kinds)
        ],
    )


def draw_thumbnail(encoder: DualEncoder, waveform: Tensor) -> Thumbnail:
    """Draw the spectrogram of a sound (S,) int16 that the encoder hears, as a thumbnail. Raises UserError."""
    picture = spectrogram.draw_spectrogram(encoder, waveform)
    picture.thumbnail((SIDE, SIDE))
    return Thumbnail(encode_jpeg(picture), picture.height, picture.width)


def rank_right_answers(ranking: Ranking) -> tuple[list[int], list[int]]:
    """Return the rank of each query's right answer before and after re-ranking, from 1; 0 where it is no candidate."""
    ranks: tuple[list[int], list[int]] = ([], [])
    for out, values in zip(ranks, (ranking.similarity, ranking.scores), strict=True):
        for row, right in zip(values, ranking.right, strict=True):
            best = row[right].max() if right.any() else row.new_tensor(torch.inf)
            out.append(int((row[~right] >= best).sum()) + 1 if right.any() else 0)  # equal scores count against it
    return ranks


def classify_queries(before: list[int], after: list[int]) -> list[str]:
    """Return for each query what re-ranking did to the right answer: up, down, same, or missed (no candidate)."""
    return [
        "missed" if not old else "up" if new < old else "down" if new > old else "same"
        for old, new in zip(before, after, strict=True)
    ]


def draw_captions(count: int, most: int) -> list[int]:
    """Draw `most` of `count` captions by a fixed seed, in order; all where there are no more."""
    if count <= most:
        return list(range(count))
    rows: list[int] = np.random.Generator(np.random.Philox(key=1)).permutation(count)[:most].tolist()
    return sorted(rows)


def choose_queries(kinds: list[str], count: int = EXAMPLES) -> list[int]:
    """Draw `count` queries of each of KINDS by a fixed seed."""
    rng = np.random.Generator(np.random.Philox(key=0))
    chosen: list[int] = []
    for kind, _ in KINDS:
        chosen += rng.permutation([q for q, other in enumerate(kinds) if other == kind])[:count].astype(int).tolist()
    return chosen


def _list_answers(ranking: Ranking, values: torch.Tensor, query: int, thumbnails: list[Thumbnail]) -> list[Answer]:
    """Return the first answers of a query ordered by `values` (q, k), and the right one."""
    right = set(ranking.right[query].nonzero().flatten().tolist())
    answers = []
    for rank, position in select_answers(sort_answers(values[query], right), right):
        image = thumbnails[int(ranking.candidates[query, position])].data_uri()
        answers.append(Answer(rank, float(values[query, position]), position in right, image))
    return answers
