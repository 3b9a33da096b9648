"""Queries: a text, an image, a sound or several, without other words, filtered, and re-ranked by a retrieval run.

    searcher = Searcher(index, load_query_model(index, None), device)
    result = searcher.search(Query(text="black leather sofa", filter="price < 900"))

Any modality of the model may ask for any other: what is said of images holds for an index of sounds.

The query's embedding is the mean of those of text, image and sound, less NOT_WEIGHT times the mean of those of the words that
are not wanted. With a re-ranker, the first `candidates` of this order are scored again by cross-attention between the words and
the tokens of each image (reranking.py), and ordered by score(text) - NOT_WEIGHT x mean score(unwanted words). The rest keeps
its order, and so does all of a query without a text.

A hybrid query fuses the order of embeddings with that of BM25 over captions by reciprocal rank (captions.py), before the
re-ranker. Words that are not wanted do not count there. It is not the default: many collections have no captions, those of
others are about other things than images show, and the order would no longer be that of the cosines.

Legend: k = results, c = candidates, D = width of the shared space.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from finetune.loading import Finetuned
from finetune.search.captions import fuse_ranks
from finetune.search.filters import bind
from finetune.search.opening import check_model, describe_model
from finetune.search.reranking import Reranker
from finetune.search.vector_index import Hit, VectorIndex, Vectors
from pretrain.checkpoints.loading import LoadedModel, load_model
from pretrain.data import BadSample
from pretrain.data.audio_files import open_audio
from pretrain.data.captions import normalize_whitespace
from pretrain.data.filter_parser import parse_filter
from pretrain.embedding.encoder import build_text_encoder, eval_mode
from pretrain.errors import ConfigError, UserError
from pretrain.losses import cut_to_width
from pretrain.printable import get_noun

NOT_WEIGHT = 0.5
"""Weight of the words that are not wanted."""
CANDIDATES = 32
"""Images that are re-ranked."""
HYBRID_DEPTH = 100
"""Images that are taken from each of two rankings to fuse them, at least."""


@dataclass(frozen=True)
class InputNames:
    """What messages call the inputs of a query: by default the options of `clipfuse search`."""

    text: str = "a text"
    image: str = "--image"
    audio: str = "--audio"
    unwanted: str = "--not"
    filter: str = "--filter"
    hybrid: str = "--hybrid"
    value: str = " FILE"
    """Follows the name of a file's input, where messages list what can be given."""

    def list_choices(self, modalities: Iterable[str]) -> list[str]:
        """Return what can be searched with, of texts, images and sounds."""
        names = {"text": self.text, "image": f"{self.image}{self.value}", "audio": f"{self.audio}{self.value}"}
        return list(dict.fromkeys(names[name] for name in modalities if name in names))


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
    is_hybrid: bool = False
    """Whether captions that hold the words of the text count, too."""
    audio: bytes = b""
    """A sound file; empty = none."""
    names: InputNames = field(default_factory=InputNames)

    def validate(self) -> None:
        """Refuse a query that asks for nothing. Raises ConfigError."""
        names = self.names
        if not self.text.strip() and not self.image and not self.audio and not self.like:
            raise ConfigError(
                f"the query is empty: give {', '.join(names.list_choices(('text', 'image', 'audio')))}, or several"
            )
        if self.is_hybrid and not self.text.strip():
            raise ConfigError(f"{names.hybrid} needs a text, whose words are looked up in the captions")
        if any(not text.strip() for text in self.unwanted):
            raise ConfigError(f"{names.unwanted} is empty: give words of what should not be found")
        if self.k < 1 or self.candidates < 1:
            raise ConfigError(f"--k {self.k} and --candidates {self.candidates} must be at least 1")


@dataclass
class Result:
    """One image or sound that a query found."""

    hit: Hit
    rank: int
    """Position before re-ranking, from 1."""
    embedding_rank: int | None = None
    """Position by embeddings alone; None where only its caption was found."""
    caption_rank: int | None = None
    """Position by the words of captions alone; None where these were not asked for, or did not find it."""
    match: float | None = None
    """The re-ranker's score; None where it did not see the image."""


@dataclass
class Results:
    """What a query found, best first."""

    results: list[Result]
    milliseconds: dict[str, float]
    """Of each stage: encode (the query), search, captions, fetch (the candidates' token features), rerank; and total."""
    notes: list[str] = field(default_factory=list)
    """What the user should know: a query that was cut, images that could not be read."""
    before: list[Result] = field(default_factory=list)
    """As many of the results in the order before re-ranking; empty where nothing was re-ranked."""

    def to_record(self, query: Query) -> dict[str, Any]:
        """Return a query and what it found as plain values, for a log."""
        return {
            "text": query.text,
            "like": query.like or None,
            "not": query.unwanted,
            "filter": query.filter,
            "hybrid": query.is_hybrid,
            "results": self.to_records(),
            "milliseconds": self.milliseconds,
            "notes": self.notes,
        }

    def to_records(self) -> list[dict[str, Any]]:
        """Return the results as plain values, for JSON."""
        return [
            {
                "key": result.hit.item.key,
                "score": round(result.hit.score, 6),
                "rank_by_embedding": result.embedding_rank,
                "rank_by_captions": result.caption_rank,
                "match": result.match,
                "caption": result.hit.item.caption,
                "fields": result.hit.item.fields,
                "source": result.hit.item.source,
                "offset": result.hit.item.offset,
                "size": result.hit.item.size,
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
    check_model(index.describe(), describe_model(loaded, index.describe().modality), index.place)
    return loaded


class Searcher:
    """An index, the model that made it, and perhaps a re-ranker, ready for queries."""

    def __init__(
        self, index: VectorIndex, loaded: LoadedModel, device: torch.device, reranker: Finetuned | None = None
    ) -> None:
        """Raises UserError where the re-ranker is not one of retrieval, or reads what the index does not hold."""
        self.index, self.loaded, self.device, self.reranker = index, loaded, device, reranker
        self._reranker = Reranker(reranker, index, device) if reranker is not None else None
        loaded.model.to(device)

    def search(self, query: Query) -> Results:
        """Return the best images or sounds.

        Raises UserError for an image or a sound that is none, and ConfigError for a filter that is none.
        """
        query.validate()
        if query.filter is not None:
            parsed = parse_filter(query.filter, query.names.filter)
            bind(parsed, self.index.describe().kinds, query.names.filter)  # as the index will, for errors with this name
        results = Results([], {})
        with _timed(results, "total"):
            with _timed(results, "encode"):
                vector = self.encode(query, results.notes)
            reranker = self._reranker if query.text.strip() else None
            number = max(query.k, query.candidates) if reranker is not None else query.k
            with _timed(results, "search"):
                depth = max(number, HYBRID_DEPTH) if query.is_hybrid else number
                hits = self.index.search(vector[None], depth, query.filter)[0]
                results.results = [Result(hit, rank, embedding_rank=rank) for rank, hit in enumerate(hits, start=1)]
            if query.is_hybrid:
                with _timed(results, "captions"):
                    results.results = self._fuse(query, vector, results)[:number]
            if reranker is not None and results.results:
                self._rerank(query, results, reranker)
        results.milliseconds["total"] = results.milliseconds.pop("total")  # in the order of time
        results.results = results.results[: query.k]
        return results

    def _fuse(self, query: Query, vector: Vectors, results: Results) -> list[Result]:
        """Return the results and what captions found, by reciprocal rank."""
        hits = self.index.search_captions(query.text, max(len(results.results), HYBRID_DEPTH), query.filter)
        if not hits:
            results.notes.append("no caption holds a word of the query: the order is that of embeddings alone")
        by_key = {result.hit.item.key: result for result in results.results}
        by_embedding, by_caption = list(by_key), [hit.item.key for hit in hits]
        others = {hit.item.key: hit.item for hit in hits if hit.item.key not in by_key}
        for key, item in zip(others, self.index.get(list(others)), strict=True):
            if item is not None and item.vector is not None:
                by_key[key] = Result(Hit(others[key], float(item.vector @ vector)), 0)
        for rank, key in enumerate(by_caption, start=1):
            by_key[key].caption_rank = rank
        fused = [by_key[key] for key in fuse_ranks([by_embedding, by_caption])]
        for rank, result in enumerate(fused, start=1):
            result.rank = rank
        return fused

    # -----------------------------------------------------------------------------------------------------------------
    # The embedding of a query

    def encode(self, query: Query, notes: list[str]) -> Vectors:
        """Return the embedding (D,) of a query, of unit length. Raises UserError."""
        wanted = []
        if query.text.strip():
            wanted.append(self._encode_texts([query.text], query.names, notes)[0])
        for modality, content in (("image", query.image), ("audio", query.audio)):
            if content:
                wanted.append(self._encode_file(modality, content, query.names, notes))
        if query.like:
            item = self.index.get([query.like])[0]
            if item is None or item.vector is None:
                raise UserError(f"{self.index.place} has no {self.index.describe().noun} {query.like}")
            wanted.append(item.vector)
        vector = np.mean(wanted, axis=0)
        if query.unwanted:
            vector = vector - NOT_WEIGHT * self._encode_texts(query.unwanted, query.names, notes).mean(axis=0)
        norm = float(np.linalg.norm(vector))
        if not np.isfinite(norm) or norm < 1e-6:
            raise UserError(f"nothing is left of the query: {query.names.unwanted} takes away all of it")
        return np.asarray(vector / norm, dtype=np.float32)

    def _encode_texts(self, texts: list[str], names: InputNames, notes: list[str]) -> Vectors:
        decoder = self.loaded.decoders.get("text")
        if decoder is None:
            raise self._lacks("text", names)
        texts = [normalize_whitespace(text) for text in texts]
        for text in texts:
            if note := describe_cut(decoder, text):
                notes.append(note)
        encode = build_text_encoder(self.loaded.model, self.loaded.decoders, self.device)
        return np.asarray(cut_to_width(encode(texts), self.index.describe().dim).numpy())

    def _encode_file(self, modality: str, data: bytes, names: InputNames, notes: list[str]) -> Vectors:
        decoder = self.loaded.decoders.get(modality)
        if decoder is None:
            raise self._lacks(modality, names)
        try:
            item = decoder.decode_eval(data)
            if modality == "audio" and (note := describe_crop(decoder, data)):
                notes.append(note)
        except BadSample as error:
            raise UserError(f"{getattr(names, modality)} is not a usable {get_noun(modality)}: {error}") from error
        with torch.inference_mode(), eval_mode(self.loaded.model):
            features = self.loaded.model.encode(modality, item[None].to(self.device))
        return np.asarray(cut_to_width(F.normalize(features.float(), dim=-1), self.index.describe().dim)[0].cpu().numpy())

    def _lacks(self, modality: str, names: InputNames) -> UserError:
        """Return the error of a query that the model cannot encode."""
        usable = " or ".join(names.list_choices(self.loaded.decoders))
        return UserError(f"{self.loaded.folder} has no {modality} tower: search with {usable}")

    # -----------------------------------------------------------------------------------------------------------------
    # Re-ranking

    def _rerank(self, query: Query, results: Results, reranker: Reranker) -> None:
        """Put the first candidates into the order of the re-ranker's scores."""
        first = results.results[: query.candidates]
        with _timed(results, "fetch"):
            positions, items = reranker.fetch([result.hit.item for result in first], results.notes)
        if items is None:
            return
        with _timed(results, "rerank"):
            scores = reranker.score(items, query.text)
            for text in query.unwanted:
                scores = scores - NOT_WEIGHT / len(query.unwanted) * reranker.score(items, text)
        for position, score in zip(positions, scores.tolist(), strict=True):
            first[position].match = score
        results.before = results.results[: query.k]
        scored = [result for result in first if result.match is not None]
        ordered = sorted(scored, key=lambda result: (-(result.match or 0.0), result.rank))
        results.results = ordered + [result for result in results.results if result.match is None]


def describe_cut(decoder: Any, text: str, what: str = "query") -> str:
    """Return a note where a text is longer than what the text tower reads, else ""; what: how the note names it."""
    tokens = len(decoder.tokenizer(text, truncation=False, verbose=False)["input_ids"]) + (decoder.appended_id is not None)
    if tokens <= decoder.length:
        return ""
    return f"the {what} has {tokens:,} tokens and the model reads {decoder.length}: what comes after them does not count"


def describe_crop(decoder: Any, data: bytes) -> str:
    """Return a note where an encoded sound is longer than what the audio tower hears, else "". Raises BadSample."""
    with open_audio(data) as sound:
        seconds = sound.frames / sound.rate
    heard = getattr(decoder, "seconds", seconds)
    return f"the sound has {seconds:.1f} s and the model hears {heard:g} s: its middle counts" if seconds > heard + 0.05 else ""


@contextmanager
def _timed(results: Results, stage: str) -> Iterator[None]:
    begin = time.perf_counter()
    try:
        yield
    finally:
        results.milliseconds[stage] = round(1000 * (time.perf_counter() - begin), 2)
