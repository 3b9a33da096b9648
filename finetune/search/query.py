"""Queries: a text, an image or both, without other words, filtered, and re-ranked by a fine-tuned retrieval run.

    searcher = Searcher(index, load_query_model(index, None), device)
    result = searcher.search(Query(text="black leather sofa", filter="price < 900"))

The query's embedding is the mean of those of text and image, less NOT_WEIGHT times the mean of those of the words that are
not wanted. With a re-ranker, the first `candidates` of this order are scored again from their images, where text and image
meet in cross-attention, and ordered by score(text) - NOT_WEIGHT x mean score(unwanted words). The rest keeps its order, and
so does all of a query without a text.

Legend: k = results, c = candidates, D = width of the shared space.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from finetune.loading import Finetuned
from finetune.search.image_sources import Location, read_image
from finetune.search.indexing import check_model, describe_model
from finetune.search.vector_index import Hit, VectorIndex, Vectors
from pretrain.checkpoints.loading import LoadedModel, load_model
from pretrain.data import BadSample
from pretrain.data.captions import normalize_whitespace
from pretrain.embedding.encoder import build_text_encoder, eval_mode
from pretrain.errors import ConfigError, UserError
from pretrain.runtime.console import log_info

NOT_WEIGHT = 0.5
"""Weight of the words that are not wanted."""
CANDIDATES = 32
"""Images that are re-ranked."""
_PAIRS = 32
"""Pairs of text and image per forward pass of the re-ranker."""


@dataclass
class Query:
    """What is searched for."""

    text: str = ""
    image: bytes = b""
    """An image file; empty = none."""
    like: str = ""
    """Key of an image in the index, whose embedding is used; empty = none."""
    unwanted: list[str] = field(default_factory=list)
    """Texts of what the images should not show."""
    filter: str | None = None
    """A condition on the fields."""
    k: int = 10
    """Results."""
    candidates: int = CANDIDATES
    """Images that the re-ranker orders, at least k."""

    def validate(self) -> None:
        """Refuse a query that asks for nothing. Raises ConfigError."""
        if not self.text.strip() and not self.image and not self.like:
            raise ConfigError("the query is empty: give a text, --image FILE, or both")
        if any(not text.strip() for text in self.unwanted):
            raise ConfigError("--not is empty: give words that the images should not show")
        if self.k < 1 or self.candidates < 1:
            raise ConfigError(f"--k {self.k} and --candidates {self.candidates} must be at least 1")


@dataclass
class Result:
    """One image that a query found."""

    hit: Hit
    rank: int
    """Position by embeddings alone, from 1."""
    match: float | None = None
    """The re-ranker's score; None where it did not see the image."""


@dataclass
class Results:
    """What a query found, best first."""

    results: list[Result]
    milliseconds: dict[str, float]
    """Of each stage: encode, search, rerank."""
    notes: list[str] = field(default_factory=list)
    """What the user should know: a query that was cut, images that could not be read."""

    def to_records(self) -> list[dict[str, Any]]:
        """Return the results as plain values, for JSON."""
        return [
            {
                "key": result.hit.image.key,
                "score": round(result.hit.score, 6),
                "rank_by_embedding": result.rank,
                "match": result.match,
                "caption": result.hit.image.caption,
                "fields": result.hit.image.fields,
                "source": result.hit.image.source,
                "offset": result.hit.image.offset,
                "size": result.hit.image.size,
            }
            for result in self.results
        ]


def load_query_model(index: VectorIndex, run: str | None) -> LoadedModel:
    """Load the model that made an index: from where it was then, or from `run`. Raises UserError where it is another one."""
    model = index.describe().model
    try:
        loaded = load_model(run or model["from"])
    except UserError as error:
        if run:
            raise
        raise UserError(
            f"{index.place} was made with {model['from']}, which cannot be loaded: {error}; --run names it"
        ) from error
    check_model(index.describe(), describe_model(loaded), index.place)
    return loaded


class Searcher:
    """An index, the model that made it, and perhaps a re-ranker, ready for queries."""

    def __init__(
        self, index: VectorIndex, loaded: LoadedModel, device: torch.device, reranker: Finetuned | None = None
    ) -> None:
        """Raises UserError where the model lacks the text tower, or the re-ranker is not one of retrieval."""
        self.index, self.loaded, self.device, self.reranker = index, loaded, device, reranker
        if reranker is not None and str(reranker.config.task.name) != "retrieval":
            raise UserError(
                f"--rerank {reranker.folder} is a run of {reranker.config.task.name}; re-ranking needs one of retrieval"
            )
        loaded.model.to(device)
        if reranker is not None:
            reranker.model.to(device).eval()

    def search(self, query: Query) -> Results:
        """Return the best images. Raises UserError for an image that is none, and ConfigError for a filter that is none."""
        query.validate()
        results = Results([], {})
        with _timed(results, "encode"):
            vector = self.encode(query, results.notes)
        is_reranked = self.reranker is not None and bool(query.text.strip())
        number = max(query.k, query.candidates) if is_reranked else query.k
        with _timed(results, "search"):
            hits = self.index.search(vector[None], number, query.filter)[0]
        results.results = [Result(hit, rank) for rank, hit in enumerate(hits, start=1)]
        if is_reranked and hits:
            with _timed(results, "rerank"):
                results.results = self._rerank(query, results.results, results.notes)
        results.results = results.results[: query.k]
        return results

    # -----------------------------------------------------------------------------------------------------------------
    # The embedding of a query

    def encode(self, query: Query, notes: list[str]) -> Vectors:
        """Return the embedding (D,) of a query, of unit length. Raises UserError."""
        wanted = []
        if query.text.strip():
            wanted.append(self._encode_texts([query.text], notes)[0])
        if query.image:
            wanted.append(self._encode_image(query.image))
        if query.like:
            image = self.index.get([query.like])[0]
            if image is None or image.vector is None:
                raise UserError(f"{self.index.place} has no image {query.like}")
            wanted.append(image.vector)
        vector = np.mean(wanted, axis=0)
        if query.unwanted:
            vector = vector - NOT_WEIGHT * self._encode_texts(query.unwanted, notes).mean(axis=0)
        norm = float(np.linalg.norm(vector))
        if not np.isfinite(norm) or norm < 1e-6:
            raise UserError("nothing is left of the query: --not takes away all of it")
        return np.asarray(vector / norm, dtype=np.float32)

    def _encode_texts(self, texts: list[str], notes: list[str]) -> Vectors:
        decoder = self.loaded.decoders.get("text")
        if decoder is None:
            raise UserError(f"{self.loaded.folder} has no text tower: search with --image FILE")
        texts = [normalize_whitespace(text) for text in texts]
        for text in texts:
            if note := describe_cut(decoder, text):
                notes.append(note)
        encode = build_text_encoder(self.loaded.model, self.loaded.decoders, self.device)
        return np.asarray(encode(texts).numpy())

    def _encode_image(self, data: bytes) -> Vectors:
        try:
            pixels = self.loaded.decoders["image"].decode_eval(data)
        except BadSample as error:
            raise UserError(f"--image is not a usable image: {error}") from error
        with torch.inference_mode(), eval_mode(self.loaded.model):
            features = self.loaded.model.encode("image", pixels[None].to(self.device))
        return np.asarray(F.normalize(features.float(), dim=-1)[0].cpu().numpy())

    # -----------------------------------------------------------------------------------------------------------------
    # Re-ranking

    def _rerank(self, query: Query, results: list[Result], notes: list[str]) -> list[Result]:
        """Return the results with the first candidates in the order of the re-ranker's scores."""
        first = results[: query.candidates]
        images: list[bytes | None]
        with ThreadPoolExecutor(8) as pool:
            images = list(pool.map(self._read, first))
        usable = [(result, image) for result, image in zip(first, images, strict=True) if image is not None]
        if len(usable) < len(first):
            notes.append(f"{len(first) - len(usable)} of {len(first)} candidates could not be read, and are not re-ranked")
        files = [image for _, image in usable]
        scores = self._score(files, query.text)
        for text in query.unwanted:
            scores = scores - NOT_WEIGHT / len(query.unwanted) * self._score(files, text)
        for (result, _), score in zip(usable, scores.tolist(), strict=True):
            result.match = score
        ordered = sorted((result for result, _ in usable), key=lambda result: -(result.match or 0.0))
        return ordered + [result for result in results if result.match is None]

    def _read(self, result: Result) -> bytes | None:
        """Return the file of an image that can be decoded, else None."""
        image = result.hit.image
        assert self.reranker is not None
        try:
            data = read_image(Location(image.source, image.offset, image.size))
            self.reranker.decoders["image"].decode_eval(data)
        except (UserError, BadSample) as error:
            log_info(f"{image.key} is not re-ranked: {error}")
            return None
        return data

    def _score(self, files: list[bytes], text: str) -> torch.Tensor:
        """Return (c,) the scores of images with a text: what the run's evaluation orders by."""
        assert self.reranker is not None
        scores = [torch.zeros(0, dtype=torch.float64)]
        for begin in range(0, len(files), _PAIRS):
            part = files[begin : begin + _PAIRS]
            scores.append(self.reranker.predict(part, [text] * len(part)).score.double().cpu())
        return torch.cat(scores)


def describe_cut(decoder: Any, text: str) -> str:
    """Return a note where a text is longer than what the text tower reads, else ""."""
    tokens = len(decoder.tokenizer(text, truncation=False, verbose=False)["input_ids"]) + (decoder.appended_id is not None)
    if tokens <= decoder.length:
        return ""
    return f"the query has {tokens:,} tokens and the model reads {decoder.length}: what comes after them does not count"


@contextmanager
def _timed(results: Results, stage: str) -> Iterator[None]:
    begin = time.perf_counter()
    try:
        yield
    finally:
        results.milliseconds[stage] = round(1000 * (time.perf_counter() - begin), 2)
