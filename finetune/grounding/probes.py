"""Probes: one batch of images with boxes -> scores of words' maps, which evaluate.py averages.

A probe is an image with a text, and the words of the text whose maps are compared with boxes. May import phrases.py,
pointing_game.py, finetune.explain and the layers below it. Shapes: H, W = cells of a map.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from finetune import model as models
from finetune.attention.multihead import ZeroInitLinear
from finetune.explain.token_spans import TokenSpans, average_tokens
from finetune.explain.word_maps import compute_token_maps, find_decoders
from finetune.grounding.phrases import (
    Mention,
    Objects,
    Swap,
    build_caption_swaps,
    build_text_mention,
    find_color_swaps,
    find_mentions,
)
from finetune.grounding.pointing_game import (
    Array,
    boxes_to_cells,
    build_center_map,
    compute_coverage,
    compute_lift,
    mark_near_cells,
    score_hit,
)
from finetune.loading import Finetuned
from finetune.model import FusionModel
from pretrain.data.decode import EXTENSIONS, read_header
from pretrain.data.images import visible_box
from pretrain.data.loader import Batch
from pretrain.data.vocabulary import Vocabulary
from pretrain.errors import UserError

SWAP = "swap"
"""The kind of records about an exchanged color."""


class Record(NamedTuple):
    """One score of one word's map."""

    key: str
    """The key of the image's sample."""
    kind: str
    """One of phrases.WORD_KINDS, or SWAP."""
    measure: str
    value: float


@dataclass(frozen=True)
class Probe:
    """An image of the batch with a text, and words of that text."""

    image: int
    text: str
    words: tuple[Mention, ...]


class ImageSizeDecoder:
    """A decoder for the height and width of a sample's stored image, in whose pixels its boxes are given."""

    def __init__(self, max_pixels: int) -> None:
        self.max_pixels = max_pixels

    def __call__(self, sample: Any, rng: np.random.Generator, train: bool) -> Tensor:
        """Return (2,) int64. The image decoder, which runs too, refuses samples without an image."""
        data = next((sample.members[e] for e in EXTENSIONS if e in sample.members), b"")
        header = read_header(data, self.max_pixels)
        return torch.tensor([header.height, header.width])

    def collate(self, items: list[Tensor]) -> tuple[Tensor, None]:
        """Stack the sizes into (b, 2)."""
        return torch.stack(items), None


def read_objects(json: dict[str, Any], key: str) -> Objects:
    """Return the objects of a sample that have a box. Raises UserError for an invalid field or box."""
    objects = json.get("objects") or []
    if not isinstance(objects, list) or not all(isinstance(item, dict) for item in objects):
        raise UserError(f"{key}: `objects` in its json must be a list of {{name, color, box}}")
    with_box = [item for item in objects if item.get("box") is not None]
    for item in with_box:
        box = item["box"]
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(edge, int | float) for edge in box):
            raise UserError(f"{key}: the box {box!r} of {item.get('name')!r} must be [x0, y0, x1, y1] in pixels of the image")
    return with_box


def build_untrained(tuned: Finetuned, seed: int) -> FusionModel:
    """Build a model with the same encoders and a new fusion and head.

    Its zero-initialized projections are drawn at random: with zeros, fusion would not influence the prediction.
    """
    config = tuned.config
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        untrained = models.build(tuned.model.encoder, config.fusion, config.context, config.tokens)
        untrained.forks = tuned.model.forks
        untrained.head = tuned.task.build_head(untrained)
        for layer in untrained.modules():
            if isinstance(layer, ZeroInitLinear):
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    return untrained


class Prober:
    """Passes probes through a model and compares the maps with boxes."""

    def __init__(
        self,
        tuned: Finetuned,
        untrained: FusionModel | None,
        shuffles: bool,
        method: str,
        layer: int | None,
        chunk_size: int,
        device: torch.device,
        vocabulary: Vocabulary,
    ) -> None:
        """Keep the models and settings.

        Args:
            tuned: the model to measure.
            untrained: the control of build_untrained(); None leaves it out.
            shuffles: whether to measure the control of texts of other images.
            method: one of word_maps.METHODS.
            layer: see compute_attention_maps().
            chunk_size: texts per pass through the model.
            device: of the models.
            vocabulary: words for objects of the whole data set.
        """
        self.tuned, self.untrained, self.shuffles, self.method, self.layer = tuned, untrained, shuffles, method, layer
        self.chunk_size, self.device, self.vocabulary = chunk_size, device, vocabulary
        self.image_decoder, self.text_decoder = find_decoders(tuned.decoders)

    def measure(self, batch: Batch, texts: int) -> Iterator[Record]:
        """Yield the records of up to `texts` texts per image that name its objects, evenly spread."""
        objects = [read_objects(json, key) for json, key in zip(batch.targets["json"], batch.keys, strict=True)]
        yield from self._measure_words(batch, objects, self._build_probes(batch, objects, texts))
        yield from self._measure_swaps(batch, objects, texts)

    # -----------------------------------------------------------------------------------------------------------------

    def _list_texts(self, batch: Batch, i: int) -> list[str]:
        """Return the questions or captions of sample `i`, depending on what the task reads."""
        if not self.tuned.task.text_is_question:
            captions: list[str] = batch.targets["captions"][i]
            return captions
        return [question.text for question in self.tuned.task.questions(batch.targets["json"][i])]

    def _build_probes(self, batch: Batch, objects: list[Objects], texts: int) -> list[Probe]:
        chosen = []
        for i, sample_objects in enumerate(objects):
            pairs = [(text, find_mentions(text, sample_objects, self.vocabulary)) for text in self._list_texts(batch, i)]
            probes = [Probe(i, text, (*mentions, *build_text_mention(text, mentions))) for text, mentions in pairs if mentions]
            chosen += _pick_evenly(probes, texts)
        return chosen

    def _measure_words(self, batch: Batch, objects: list[Objects], probes: list[Probe]) -> Iterator[Record]:
        images = batch.inputs["image"]
        maps = self.compute_maps(self.tuned.model, images, probes)
        controls: list[list[list[Array | None]]] = []
        names = ["", "_centre"]
        if self.untrained is not None:
            names.append("_untrained")
            controls.append(self.compute_maps(self.untrained, images, probes))
        if self.shuffles:
            names.append("_shuffled")
            others, partner = _exchange_texts(probes)
            other_maps = self.compute_maps(self.tuned.model, images, others)
            controls.append([[other_maps[p][w] if w is not None else None for w in partner[p]] for p in range(len(probes))])
        for p, probe in enumerate(probes):
            for w, mention in enumerate(probe.words):
                values = maps[p][w]
                if values is None:
                    continue
                grid = (values.shape[0], values.shape[1])
                boxes = self._find_boxes(batch, objects, probe.image, mention, grid)
                if len(boxes) == 0:
                    continue
                near, inside = mark_near_cells(boxes, grid), compute_coverage(boxes, grid)
                candidates = [values, build_center_map(grid), *(control[p][w] for control in controls)]
                key = batch.keys[probe.image]
                yield Record(key, mention.kind, "pointing_area", float(near.mean()))
                for name, candidate in zip(names, candidates, strict=True):
                    if candidate is not None:
                        yield Record(key, mention.kind, f"pointing{name}", score_hit(candidate, near))
                        yield Record(key, mention.kind, f"lift{name}", compute_lift(candidate, inside))

    def _measure_swaps(self, batch: Batch, objects: list[Objects], texts: int) -> Iterator[Record]:
        """Yield the records of the counterfactual: maps of one color before and after it is exchanged."""
        chosen: list[tuple[int, Swap]] = []
        for i, sample_objects in enumerate(objects):
            if self.tuned.task.text_is_question:
                sample_texts = self._list_texts(batch, i)
                swaps = [swap for text in sample_texts for swap in find_color_swaps(text, sample_objects, self.vocabulary)]
            else:
                swaps = build_caption_swaps(sample_objects, self.vocabulary)
            chosen += [(i, swap) for swap in _pick_evenly(swaps, texts)]
        images = batch.inputs["image"]
        before = self.compute_maps(self.tuned.model, images, [Probe(i, swap.before, (swap.old,)) for i, swap in chosen])
        after = self.compute_maps(self.tuned.model, images, [Probe(i, swap.after, (swap.new,)) for i, swap in chosen])
        for (i, swap), (first,), (second,) in zip(chosen, before, after, strict=True):
            if first is None or second is None:
                continue
            grid = (first.shape[0], first.shape[1])
            old, new = (self._find_boxes(batch, objects, i, mention, grid) for mention in (swap.old, swap.new))
            if len(old) == 0 or len(new) == 0:
                continue
            near_old, near_new = mark_near_cells(old, grid), mark_near_cells(new, grid)
            for measure, value in (
                ("before", score_hit(first, near_old)),
                ("after", score_hit(second, near_new)),
                ("moved", score_hit(first, near_old) * score_hit(second, near_new)),
                ("stayed", score_hit(second, near_old & ~near_new)),
                ("area", float(near_new.mean())),
                ("moved_area", float(near_old.mean() * near_new.mean())),
                ("stayed_area", float((near_old & ~near_new).mean())),
            ):
                yield Record(batch.keys[i], SWAP, measure, value)

    def _find_boxes(self, batch: Batch, objects: list[Objects], i: int, mention: Mention, grid: tuple[int, int]) -> Array:
        """Return the boxes (k, 4) of the objects that a word names, in cells.

        Boxes outside the part of the image that the model's input shows are left out.
        """
        height, width = batch.inputs["sides"][i].tolist()
        visible = visible_box(height, width, self.image_decoder.size, self.image_decoder.resize)
        boxes = np.array([objects[i][o]["box"] for o in mention.objects], dtype=np.float64)
        return boxes_to_cells(boxes, visible, grid)

    def compute_maps(self, model: FusionModel, images: Tensor, probes: Sequence[Probe]) -> list[list[Array | None]]:
        """Compute for each probe the map (H, W) of each of its words; None for truncated words."""
        out: list[list[Array | None]] = []
        for start in range(0, len(probes), self.chunk_size):
            chunk = probes[start : start + self.chunk_size]
            ids, mask = self.tuned.decoders["text"].encode([probe.text for probe in chunk])
            chunk_images = images[[probe.image for probe in chunk]].to(self.device)
            maps, _ = compute_token_maps(
                model, self.tuned.task, chunk_images, ids.to(self.device), mask.to(self.device), self.method, self.layer
            )
            for probe, probe_maps in zip(chunk, maps, strict=True):
                spans = TokenSpans(self.text_decoder, probe.text)
                tokens = [spans.find_tokens(mention.start, mention.end) for mention in probe.words]
                out.append([average_tokens(probe_maps, word).double().numpy() if word else None for word in tokens])
        return out


def _pick_evenly(items: list[Any], limit: int) -> list[Any]:
    """Pick at most `limit` items, evenly from the first to the last, because questions are sorted by type."""
    count = min(limit, len(items))
    return [items[i * (len(items) - 1) // max(1, count - 1)] for i in range(count)]


def _exchange_texts(probes: list[Probe]) -> tuple[list[Probe], list[list[int | None]]]:
    """Pair the image of each probe with a text of the next image, and each word with one of its class.

    Of the next image's texts the one with most of the probe's classes of words is taken. Returns the new probes, and for
    each word of the old ones the position of its partner; None where the text has no word of its class.
    """
    by_image = [list(group) for _, group in groupby(probes, key=lambda probe: probe.image)]
    exchanged: list[Probe] = []
    partner: list[list[int | None]] = []
    for n, image_probes in enumerate(by_image):
        next_texts = by_image[(n + 1) % len(by_image)]
        for probe in image_probes:
            kinds = {mention.kind for mention in probe.words}
            other = max(next_texts, key=lambda candidate: len(kinds & {mention.kind for mention in candidate.words}))
            words_of_kind: dict[str, list[int]] = {}
            for w, mention in enumerate(other.words):
                words_of_kind.setdefault(mention.kind, []).append(w)
            used_of_kind: dict[str, int] = {}
            chosen: list[int | None] = []
            for mention in probe.words:
                partners = words_of_kind.get(mention.kind, [])
                count = used_of_kind.get(mention.kind, 0)
                used_of_kind[mention.kind] = count + 1
                chosen.append(partners[count % len(partners)] if partners and other.image != probe.image else None)
            exchanged.append(Probe(probe.image, other.text, other.words))
            partner.append(chosen)
    return exchanged, partner
