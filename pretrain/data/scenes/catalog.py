"""A catalog of drawn products, with queries and graded judgments that are exact by construction.

A product is a scene with one thing. The json of a sample holds its attributes as fields: thing, color, material, size and
place, which the image shows, and price and room, which only filters use.

A query asks for a thing with one to four of the other attributes that images show: "large striped red car on the beach". A
third of the queries have a filter on price or room. Judgments follow from the fields alone:

    3    all attributes of the query hold
    1    exactly one is wrong
    0    more are wrong, or the filter rejects the product

So a model that sees every attribute reaches an nDCG of 1. Everything is a function of (seed, split, index), and queries are
one of (seed, number of products).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from pretrain.data.scenes.backgrounds import BACKGROUNDS
from pretrain.data.scenes.dataset import VOCABULARY, check_image_size
from pretrain.data.scenes.layout import CLASSES, COLORS, SIZES, SURFACES, build_scene, can_mention
from pretrain.data.scenes.render import render_scene
from pretrain.data.scenes.rng import KeyedRandom
from pretrain.data.scenes.writer import Progress, name_sample, name_shard, write_dataset
from pretrain.data.vocabulary import FILE
from pretrain.errors import UserError

SPLITS = ("train", "val", "catalog")
QUERIES = "queries.jsonl"
JUDGMENTS = "qrels.tsv"

_VERSION = 2  # of the drawing code: a folder drawn by another version is not continued
_MOST_QUERIES = 200
_PRICES = (5.0, 2000.0)
ROOMS = ("living", "bedroom", "kitchen", "study", "garden")
ATTRIBUTES: Mapping[str, Sequence[str]] = {
    "thing": CLASSES,
    "color": COLORS,
    "material": SURFACES,
    "size": tuple(SIZES),
    "place": tuple(BACKGROUNDS),
}
"""What an image shows, and its values."""

_ASKED = (
    ("color",),
    ("material",),
    ("place",),
    ("color", "material"),
    ("color", "place"),
    ("color", "size"),
    ("color", "material", "place"),
    ("color", "material", "size"),
    ("color", "material", "size", "place"),
)
"""What queries and captions say besides the thing."""

Product = dict[str, Any]
"""The fields of a product: ATTRIBUTES, price and room."""


@dataclass(frozen=True)
class CatalogQuery:
    """A query and what it asks for."""

    id: str
    text: str
    attributes: dict[str, str]
    room: str | None = None
    """The filter keeps products of this room; None = of all."""
    prices: tuple[float, float] | None = None
    """The filter keeps products with low <= price < high; None = at any price."""

    @property
    def filter(self) -> str | None:
        """The filter, in the language of `clipfuse search --filter`."""
        conditions = [] if self.prices is None else [f"price >= {self.prices[0]}", f"price < {self.prices[1]}"]
        conditions += [] if self.room is None else [f'room == "{self.room}"']
        return " and ".join(conditions) or None

    def judge(self, product: Product) -> int:
        """Return the grade of a product: 3, 1 or 0."""
        if self.room not in (None, product["room"]):
            return 0
        if self.prices is not None and not self.prices[0] <= product["price"] < self.prices[1]:
            return 0
        wrong = sum(product[name] != value for name, value in self.attributes.items())
        return (3, 1)[wrong] if wrong < 2 else 0

    def to_json(self) -> str:
        """Return the query's line of queries.jsonl."""
        condition = {} if self.filter is None else {"filter": self.filter}
        return json.dumps({"id": self.id, "text": self.text, **condition, "attributes": self.attributes})


# ---------------------------------------------------------------------------------------------------------------------
# Products


def build_product(seed: int, split: str, index: int, scale: float = 1.0) -> Product:
    """Return the fields of a product, without drawing it."""
    scene = build_scene(seed, split, index, scale, (1, 1))
    spec = scene.objects[0].spec
    rng = KeyedRandom(seed, split, index, "product")
    low, high = _PRICES
    return {
        "thing": spec.kind,
        "color": spec.color,
        "material": spec.surface,
        "size": spec.size,
        "place": scene.background,
        "price": round(low * (high / low) ** rng.random(), 2),  # each factor of two holds as many products
        "room": rng.choice(ROOMS),
    }


def draw_product(seed: int, split: str, index: int, size: int = 96, scale: float = 1.0) -> tuple[Image.Image, dict[str, Any]]:
    """Draw a product and return its image, `size` pixels square, and the content of KEY.json.

    Besides the fields of the product, the content has:
        captions: the first names all attributes and is KEY.txt; up to four others name some of them, as queries do.
        foils: negative captions, which are the first caption with one attribute wrong: caption, changed.
        caption_foils: two for each of `captions`, in their order: it with one of the attributes that it names wrong.
        label: index of the thing in classes.txt.
        split, seed, index: the product's position in the data set.
    """
    image, _ = render_scene(build_scene(seed, split, index, scale, (1, 1)), size)
    product = build_product(seed, split, index, scale)
    return image, {
        **write_captions(product, KeyedRandom(seed, split, index, "captions")),
        **product,
        "label": CLASSES.index(product["thing"]),
        "split": split,
        "seed": seed,
        "index": index,
    }


def write_captions(product: Product, rng: KeyedRandom) -> dict[str, list[Any]]:
    """Return the captions and negative captions of a product, see draw_product.

    A negative caption names the same attributes as the caption that it belongs to. Otherwise the words that it has, and not
    those that are wrong, would tell a model which captions are negative.
    """
    captions = {describe_product({name: product[name] for name in ATTRIBUTES}, rng): tuple(ATTRIBUTES)}
    for _ in range(4):
        attributes = _select(product, rng.choice(_ASKED))
        captions.setdefault(describe_product(attributes, rng), tuple(attributes))
    pairs = [(names, changed) for names in captions.values() for changed in rng.shuffled(names)[:2]]
    return {
        "captions": list(captions),
        "foils": [_build_negative(product, tuple(ATTRIBUTES), changed, rng) for changed in ATTRIBUTES],
        "caption_foils": [_build_negative(product, names, changed, rng) for names, changed in pairs],
    }


def describe_product(attributes: Mapping[str, str], rng: KeyedRandom) -> str:
    """Return a phrase that names some attributes: "large striped red car on the beach"."""
    material = attributes.get("material")
    words = [
        attributes.get("size"),
        material if material != "leather" else None,
        attributes.get("color"),
        material if material == "leather" else None,
        attributes["thing"],
        rng.choice(BACKGROUNDS[attributes["place"]].phrases) if "place" in attributes else None,
    ]
    return " ".join(filter(None, words))


def _select(product: Product, names: Sequence[str]) -> dict[str, str]:
    return {name: product[name] for name in ATTRIBUTES if name == "thing" or name in names}


def _build_negative(product: Product, names: Sequence[str], changed: str, rng: KeyedRandom) -> dict[str, str]:
    """Return a phrase that names some attributes, of which one is wrong, and that attribute: {caption, changed}."""
    values = [value for value in ATTRIBUTES[changed] if value != product[changed]]
    pairs = [{**product, changed: value} for value in values]
    allowed = [pair[changed] for pair in pairs if can_mention("train", pair["color"], pair["thing"])]
    attributes = {**{name: product[name] for name in names}, changed: rng.choice(allowed)}
    return {"caption": describe_product(attributes, rng), "changed": changed}


# ---------------------------------------------------------------------------------------------------------------------
# Queries


def build_queries(seed: int, products: Sequence[Product]) -> list[CatalogQuery]:
    """Return queries that differ from each other, at most 200. Each is made from a product, so that one has grade 3."""
    rng = KeyedRandom(seed, "catalog", len(products), "queries")
    queries: dict[tuple[Any, ...], CatalogQuery] = {}
    for number, index in enumerate(rng.shuffled(range(len(products)))[:_MOST_QUERIES]):
        product = products[index]
        attributes = _select(product, rng.choice(_ASKED))
        room, prices = None, None
        if number % 3 == 2:
            kind = rng.choice(("room", "price", "narrow price", "room and price"))
            room = product["room"] if "room" in kind else None
            width = 1.1 if kind == "narrow price" else 1 + 9 * rng.random()
            prices = (round(product["price"] / width, 2), round(product["price"] * width, 2)) if "price" in kind else None
        text = describe_product(attributes, rng)
        query = CatalogQuery(f"q{len(queries):03d}", text, attributes, room, prices)
        queries.setdefault((*sorted(attributes.items()), room, prices), query)
    return list(queries.values())


def format_judgments(queries: Sequence[CatalogQuery], keys: Sequence[str], products: Sequence[Product]) -> str:
    """Return judgments in TREC's format, one line each: query, 0, key, grade. Grades of 0 are left out."""
    lines = []
    for query in queries:
        grades = ((key, query.judge(product)) for key, product in zip(keys, products, strict=True))
        lines += [f"{query.id}\t0\t{key}\t{grade}\n" for key, grade in grades if grade]
    return "".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Writing the catalog


def draw_catalog(
    out: str | Path,
    num: int | dict[str, int] = 4000,
    size: int = 96,
    seed: int = 0,
    workers: int | None = None,
    *,
    scale: float = 1.0,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Draw products into `out`/{train,val,catalog}-0000.tar ..., and write queries.jsonl and qrels.tsv about `catalog`.

    Keys of the judgments are those of `clipfuse index RUN --data out/catalog-*.tar`. Also writes classes.txt and
    vocabulary.json. Called again with the same settings, it draws only the missing shards.

    Args:
        num: number of products to train on, or the number of each split. `catalog` has a quarter of the former, val a tenth;
            both at least 100 and at most 2,000, but never more than `num`.
        size, scale, workers, progress: as of draw_dataset.
    Returns:
        number of products in each split, and of queries.
    Raises:
        UserError: a setting is out of range, the folder holds other shards, or it cannot be written.
    """
    counts = _compute_counts(num) if isinstance(num, int) else dict(num)
    if sorted(counts) != sorted(SPLITS) or min(counts.values()) < 1:
        raise UserError(f"number of products: {counts} must give each of {', '.join(SPLITS)} at least 1")
    check_image_size(size, scale)
    indices = range(counts["catalog"])
    products = [build_product(seed, "catalog", index, scale) for index in indices]
    queries = build_queries(seed, products)
    keys = [f"{name_shard('catalog', index)}/{name_sample(index)}" for index in indices]
    texts = {
        "classes.txt": "".join(f"{name}\n" for name in CLASSES),
        FILE: VOCABULARY.to_json(),
        QUERIES: "".join(f"{query.to_json()}\n" for query in queries),
        JUDGMENTS: format_judgments(queries, keys, products),
    }
    settings = {"version": _VERSION, "size": size, "seed": seed, "scale": scale}
    draw = partial(draw_product, seed, size=size, scale=scale)
    write_dataset(Path(out), "catalog.json", settings, counts, draw, texts, workers, progress)
    return {**counts, "queries": len(queries)}


def _compute_counts(num: int) -> dict[str, int]:
    return {"train": num, **{name: min(max(num // n, 100), 2000, num) for name, n in (("val", 10), ("catalog", 4))}}
