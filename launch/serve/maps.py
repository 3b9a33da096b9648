"""What the page shows of an image or a sound: its file, its thumbnail, and heat maps of words.

Maps are of where a re-ranker looked for a query, and a vqa run for a question.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from finetune.explain.word_maps import METHOD, find_text_decoder
from finetune.search.answering import Answerer
from finetune.search.item_sources import Location, read_content
from finetune.search.maps import compute_maps
from finetune.search.query import Searcher
from launch.serve.uploads import Uploads
from pretrain.data import BadSample
from pretrain.data.thumbnails import encode_jpeg
from pretrain.errors import UserError

MAX_WORDS = 24
"""Most words of a text that have heat maps."""
MAP_SIDE = 320
"""Pixels of a heat map's longer side."""
_REMEMBERED = 128
"""Texts on images whose maps are remembered."""


class ItemReference(NamedTuple):
    """An image or a sound of the index by its key, or an upload by its name."""

    key: str
    upload: str = ""


@dataclass
class DrawnMaps:
    """What a model says about a text and an image or a sound."""

    tiles: list[tuple[str, bytes]]
    """Each word with its heat map as a JPEG."""
    answers: list[tuple[str, float]]
    """Of a vqa run: answers with their probabilities, best first."""
    milliseconds: dict[str, float]
    """Of reading the file, the model, and drawing the maps."""
    notes: list[str] = field(default_factory=list)


class MapDrawer:
    """Draws heat maps, and remembers the latest."""

    def __init__(self, searcher: Searcher, answerer: Answerer | None, uploads: Uploads, lock: threading.RLock) -> None:
        """lock: is held while models, index and uploads are used."""
        self.searcher, self.answerer, self.uploads, self._lock = searcher, answerer, uploads, lock
        self._remembered: OrderedDict[tuple[ItemReference, str, str, str], DrawnMaps] = OrderedDict()

    @property
    def noun(self) -> str:
        """What the index holds."""
        return self.searcher.index.describe().noun

    def draw(self, image: ItemReference, text: str, by: str, method: str = METHOD) -> DrawnMaps:
        """Return the maps of a text on an image or a sound. Raises UserError.

        Args:
            image: which one.
            text: a query or a question.
            by: rerank or vqa.
            method: of rerank, see finetune.explain.word_maps.
        """
        question = (image, text, by, method)
        with self._lock:
            if question not in self._remembered:
                self._remembered[question] = self._draw(image, text, by, method)
            self._remembered.move_to_end(question)
            while len(self._remembered) > _REMEMBERED:
                self._remembered.popitem(last=False)
            return self._remembered[question]

    def _draw(self, image: ItemReference, text: str, by: str, method: str) -> DrawnMaps:
        begin = time.perf_counter()
        data = self.read(image)
        read = time.perf_counter()
        notes: list[str] = []
        try:
            if by == "vqa":
                if self.answerer is None:
                    raise UserError("the page was started without --vqa RUN, which answers questions")
                maps = self.answerer.answer(data, text, notes)
            else:
                if self.searcher.reranker is None:
                    raise UserError("the page was started without --rerank RUN, whose attention maps show")
                maps = compute_maps(self.searcher, data, text, method)
            if self.noun == "sound":  # as its thumbnail is
                maps = replace(maps, image=maps.image.resize((MAP_SIDE, MAP_SIDE // 2)))
            computed = time.perf_counter()
            tiles = [(word, encode_jpeg(tile)) for word, tile in maps.tiles(MAP_SIDE)[:MAX_WORDS]]
        except BadSample as error:
            raise UserError(f"{image.key or 'the upload'} is not a usable {self.noun}: {error}") from error
        times = zip(("fetch", "answer", "draw"), (begin, read, computed), (read, computed, time.perf_counter()), strict=True)
        milliseconds = {stage: round(1000 * (end - start), 2) for stage, start, end in times}
        return DrawnMaps(tiles, maps.answers if by == "vqa" else [], milliseconds, notes)

    def read(self, image: ItemReference) -> bytes:
        """Return the file of an image or a sound. Raises UserError where it is no longer there."""
        with self._lock:
            if image.upload:
                upload = self.uploads.get(image.upload)
                if upload is None:
                    raise UserError("the uploaded file is no longer in memory: upload it again")
                return upload[0]
            found = self._find(image.key)
        return read_content(Location(found.source, found.offset, found.size))

    def _find(self, key: str) -> Any:
        found = self.searcher.index.get([key])[0] if key else None
        if found is None:
            raise UserError(f"{self.searcher.index.place} has no {self.noun} {key}")
        return found

    def describe(self, image: ItemReference) -> str:
        """Return the caption of an image or a sound. Raises UserError where it is not there."""
        with self._lock:
            if not image.upload:
                return str(self._find(image.key).caption_line)
            self.read(image)
            return "the uploaded file"

    def read_thumbnail(self, image: ItemReference) -> bytes:
        """Return the thumbnail of an image; empty where there is none."""
        with self._lock:
            if image.upload:
                upload = self.uploads.get(image.upload)
                return upload[1] if upload is not None else b""
            found = self.searcher.index.get([image.key])[0]
            return found.thumbnail if found is not None else b""

    def shorten(self, text: str, by: str) -> str:
        """Return a text without the words that the model does not read, for addresses: each word has at least one token."""
        tuned = self.answerer.tuned if by == "vqa" and self.answerer is not None else self.searcher.reranker
        if tuned is None:
            return text
        words = text.split()
        length = find_text_decoder(tuned.decoders).length
        return " ".join(words[:length]) if len(words) > length else text
