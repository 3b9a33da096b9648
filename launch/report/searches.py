"""Searches in an index: what some sentences find, as `clipfuse search` and the page of `clipfuse serve` do.

build_searches(place, ["a red car", "a dog on a beach"], tuned) -> SearchSection
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.loading import Finetuned
from finetune.search import places
from finetune.search.query import Query, Searcher, load_query_model
from launch.report.gallery import Answer
from pretrain.data.thumbnails import to_data_uri
from pretrain.runtime import distributed

SHOWN = 5
"""Images shown for a search."""


@dataclass
class Search:
    """A sentence, and the first images that it finds."""

    text: str
    answers: list[Answer]
    milliseconds: dict[str, float]
    """Of each stage, and total."""


@dataclass
class SearchSection:
    """Some searches in one index."""

    place: str
    images: int
    searches: list[Search]
    is_reranked: bool
    noun: str = "image"
    """What the index holds."""


def build_searches(place: str, texts: Sequence[str], tuned: Finetuned | None = None) -> SearchSection:
    """Search an index for some sentences.

    Args:
        place: of the index, whose own model encodes them.
        texts: the sentences.
        tuned: a fine-tuned run: one of retrieval re-ranks what it reads, others play no part.

    Raises:
        UserError: there is no index at this place, it is empty, or its model cannot be loaded.
    """
    with places.open_index(place) as index:
        reranker, description = tuned, index.describe()
        if tuned is None or (str(tuned.config.task.name), tuned.model.subject) != ("retrieval", description.modality):
            reranker = None
        total = index.count()
        places.check_not_empty(index)
        searcher = Searcher(index, load_query_model(index, None), distributed.device(), reranker)
        searcher.search(Query(texts[0], k=SHOWN))  # the first one pays for what later ones find ready
        searches = []
        for text in texts:
            results = searcher.search(Query(text, k=SHOWN))
            images = index.get([result.hit.item.key for result in results.results])
            answers = []
            for rank, (result, image) in enumerate(zip(results.results, images, strict=True), start=1):
                score = result.hit.score if result.match is None else result.match
                thumbnail = to_data_uri(image.thumbnail) if image is not None and image.thumbnail else ""
                answers.append(Answer(rank, score, False, thumbnail, result.hit.item.caption_line))
            searches.append(Search(text, answers, results.milliseconds))
        return SearchSection(place, total, searches, reranker is not None, description.noun)
