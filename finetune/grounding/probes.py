"""A batch of pictures with boxes -> records of how each word's map fares, for grounding.py to average.

A probe is a text put to a picture, and the words of it whose maps are held against boxes. May import attend.py, phrases,
pointing, words and all before them. Shapes: H, W = cells of a map; a record is one number about one word.
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
from finetune.explain.token_spans import TokenSpans, word_map
from finetune.explain.word_maps import readers, token_maps
from finetune.grounding.phrases import Mention, Objects, Swap, mentions, pairs, swaps, whole
from finetune.grounding.pointing_game import Array, centre_map, covered, hit, lift, reached, to_cells
from finetune.loading import Finetuned
from finetune.model import FusionModel
from pretrain.data.decode import EXTENSIONS, read_header
from pretrain.data.images import visible_box
from pretrain.data.loader import Batch
from pretrain.data.vocabulary import Vocabulary
from pretrain.errors import UserError

SWAP = "swap"


class Record(NamedTuple):
    """One number about one word."""

    key: str
    """The picture's."""
    kind: str
    """A class of words, or SWAP."""
    measure: str
    value: float


@dataclass(frozen=True)
class Probe:
    """A text put to a picture of the batch, and words of it."""

    image: int
    text: str
    words: tuple[Mention, ...]


class Sides:
    """A decoder: the height and width of a sample's picture as stored, in whose pixels its boxes are."""

    def __init__(self, max_pixels: int) -> None:
        self.max_pixels = max_pixels

    def __call__(self, sample: Any, rng: np.random.Generator, train: bool) -> Tensor:
        """(2,) int64. A sample without a picture is refused by the image decoder beside this one."""
        data = next((sample.members[e] for e in EXTENSIONS if e in sample.members), b"")
        header = read_header(data, self.max_pixels)
        return torch.tensor([header.height, header.width])

    def collate(self, items: list[Tensor]) -> tuple[Tensor, None]:
        """(b, 2)."""
        return torch.stack(items), None


def objects_of(json: dict[str, Any], key: str) -> Objects:
    """The objects of a sample that have a box. Raises UserError for a field of another form."""
    found = json.get("objects") or []
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise UserError(f"{key}: `objects` in its json must be a list of {{name, color, box}}")
    out = [each for each in found if each.get("box") is not None]
    for each in out:
        box = each["box"]
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(edge, int | float) for edge in box):
            raise UserError(f"{key}: the box {box!r} of {each.get('name')!r} must be [x0, y0, x1, y1] in pixels of the picture")
    return out


def untrained(tuned: Finetuned, seed: int) -> FusionModel:
    """The same encoder with a new fusion and head. Gates, which start at zero, are opened, or its maps would say nothing."""
    config = tuned.config
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh = models.build(tuned.model.encoder, config.fusion, config.context, config.tokens)
        fresh.forks = tuned.model.forks
        fresh.head = tuned.task.head(fresh)
        for part in fresh.modules():
            if isinstance(part, ZeroInitLinear):
                nn.init.normal_(part.weight, std=part.in_features**-0.5)
    return fresh


class Prober:
    """Runs probes through a model and holds the maps against boxes."""

    def __init__(
        self,
        tuned: Finetuned,
        fresh: FusionModel | None,
        method: str,
        layer: int | None,
        at_once: int,
        device: torch.device,
        vocabulary: Vocabulary,
    ) -> None:
        """`fresh`: the untrained control, None to leave out the controls that need the model; `at_once`: texts a pass.

        `vocabulary`: words for objects that the data set has, whether or not the sample has them.
        """
        self.tuned, self.fresh, self.method, self.layer = tuned, fresh, method, layer
        self.at_once, self.device, self.vocabulary = at_once, device, vocabulary
        self.image, self.text = readers(tuned)

    def records(self, batch: Batch, texts: int) -> Iterator[Record]:
        """Of up to `texts` texts of each picture that speak of its objects, spread over all it has."""
        objects = [objects_of(json, key) for json, key in zip(batch.targets["json"], batch.keys, strict=True)]
        yield from self._words(batch, objects, self._probes(batch, objects, texts))
        yield from self._swaps(batch, objects, texts)

    # -----------------------------------------------------------------------------------------------------------------

    def _texts(self, batch: Batch, i: int) -> list[str]:
        """Questions or captions of a sample, whatever the task reads."""
        if not self.tuned.task.text_is_question:
            captions: list[str] = batch.targets["captions"][i]
            return captions
        return [question.text for question in self.tuned.task.questions(batch.targets["json"][i])]

    def _probes(self, batch: Batch, objects: list[Objects], texts: int) -> list[Probe]:
        out = []
        for i, own in enumerate(objects):
            said = [(text, mentions(text, own, self.vocabulary)) for text in self._texts(batch, i)]
            probes = [Probe(i, text, (*found, *whole(text, found))) for text, found in said if found]
            out += _spread(probes, texts)
        return out

    def _words(self, batch: Batch, objects: list[Objects], probes: list[Probe]) -> Iterator[Record]:
        images = batch.inputs["image"]
        own = self.maps(self.tuned.model, images, probes)
        scored = [own]
        names = ["", "_centre"]
        if self.fresh is not None:
            names += ["_untrained", "_shuffled"]
            others, partner = _exchanged(probes)
            theirs = self.maps(self.tuned.model, images, others)
            shuffled = [[theirs[p][w] if w is not None else None for w in partner[p]] for p in range(len(probes))]
            scored += [self.maps(self.fresh, images, probes), shuffled]
        for p, probe in enumerate(probes):
            for w, mention in enumerate(probe.words):
                values = own[p][w]
                if values is None:
                    continue
                grid = (values.shape[0], values.shape[1])
                where = self._cells(batch, objects, probe.image, mention, grid)
                if len(where) == 0:
                    continue
                near, inside = reached(where, grid), covered(where, grid)
                these = [values, centre_map(grid), *(each[p][w] for each in scored[1:])]
                key = batch.keys[probe.image]
                yield Record(key, mention.kind, "pointing_area", float(near.mean()))
                for name, values_of in zip(names, these, strict=True):
                    if values_of is not None:
                        yield Record(key, mention.kind, f"pointing{name}", hit(values_of, near))
                        yield Record(key, mention.kind, f"lift{name}", lift(values_of, inside))

    def _swaps(self, batch: Batch, objects: list[Objects], texts: int) -> Iterator[Record]:
        """The counterfactual."""
        found: list[tuple[int, Swap]] = []
        for i, own in enumerate(objects):
            asks = self.tuned.task.text_is_question
            if asks:
                own_swaps = [swap for text in self._texts(batch, i) for swap in swaps(text, own, self.vocabulary)]
            else:
                own_swaps = pairs(own, self.vocabulary)
            found += [(i, swap) for swap in _spread(own_swaps, texts)]
        images = batch.inputs["image"]
        before = self.maps(self.tuned.model, images, [Probe(i, swap.before, (swap.old,)) for i, swap in found])
        after = self.maps(self.tuned.model, images, [Probe(i, swap.after, (swap.new,)) for i, swap in found])
        for (i, swap), (first,), (second,) in zip(found, before, after, strict=True):
            if first is None or second is None:
                continue
            grid = (first.shape[0], first.shape[1])
            old, new = (self._cells(batch, objects, i, mention, grid) for mention in (swap.old, swap.new))
            if len(old) == 0 or len(new) == 0:
                continue
            was, now = reached(old, grid), reached(new, grid)
            for measure, value in (
                ("before", hit(first, was)),
                ("after", hit(second, now)),
                ("moved", hit(first, was) * hit(second, now)),
                ("stayed", hit(second, was & ~now)),
                ("area", float(now.mean())),
            ):
                yield Record(batch.keys[i], SWAP, measure, value)

    def _cells(self, batch: Batch, objects: list[Objects], i: int, mention: Mention, grid: tuple[int, int]) -> Array:
        """The boxes that a word speaks of, in cells."""
        height, width = batch.inputs["sides"][i].tolist()
        part = visible_box(height, width, self.image.size, self.image.resize)
        boxes = np.array([objects[i][o]["box"] for o in mention.objects], dtype=np.float64)
        return to_cells(boxes, part, grid)

    def maps(self, model: FusionModel, images: Tensor, probes: Sequence[Probe]) -> list[list[Array | None]]:
        """For each probe the map (H, W) of each of its words; None where the text was cut off before the word."""
        out: list[list[Array | None]] = []
        for start in range(0, len(probes), self.at_once):
            some = probes[start : start + self.at_once]
            ids, mask = self.tuned.decoders["text"].encode([probe.text for probe in some])
            pictures = images[[probe.image for probe in some]].to(self.device)
            maps, _ = token_maps(
                model, self.tuned.task, pictures, ids.to(self.device), mask.to(self.device), self.method, self.layer
            )
            for probe, own in zip(some, maps, strict=True):
                cut = TokenSpans(self.text, probe.text)
                tokens = [cut.tokens(mention.start, mention.end) for mention in probe.words]
                out.append([word_map(own, each).double().numpy() if each else None for each in tokens])
        return out


def _spread(items: list[Any], most: int) -> list[Any]:
    """At most so many, evenly from the first to the last: questions come sorted by type."""
    count = min(most, len(items))
    return [items[i * (len(items) - 1) // max(1, count - 1)] for i in range(count)]


def _exchanged(probes: list[Probe]) -> tuple[list[Probe], list[list[int | None]]]:
    """Each picture with the text of the next picture but for its own; and for each word one of its class in that text.

    Of the next picture's texts the one that has most of the classes; None where it has none of a word's class.
    """
    by_picture = [list(group) for _, group in groupby(probes, key=lambda probe: probe.image)]
    out: list[Probe] = []
    partner: list[list[int | None]] = []
    for n, own in enumerate(by_picture):
        next_texts = by_picture[(n + 1) % len(by_picture)]
        for probe in own:
            wanted = {mention.kind for mention in probe.words}
            other = max(next_texts, key=lambda each: len(wanted & {mention.kind for mention in each.words}))
            classes: dict[str, list[int]] = {}
            for w, mention in enumerate(other.words):
                classes.setdefault(mention.kind, []).append(w)
            used: dict[str, int] = {}
            chosen: list[int | None] = []
            for mention in probe.words:
                among = classes.get(mention.kind, [])
                turn = used.get(mention.kind, 0)
                used[mention.kind] = turn + 1
                chosen.append(among[turn % len(among)] if among and other.image != probe.image else None)
            out.append(Probe(probe.image, other.text, other.words))
            partner.append(chosen)
    return out, partner
