"""Find the words of a text that name objects of its image, which maps of these words should highlight.

    find_mentions("a red car left of a black sofa", objects)     red, car -> (0,), black, sofa -> (1,), left -> (0, 1)

`objects` is the json field of that name: dicts with a `name`, and any of `color`, `surface`, `size`. A phrase is words of
color, surface and size in any order and then a name (or "thing"): "a small striped red car". It names all objects that every
word of it describes; a phrase that describes none is left out. The vocabulary holds the words of other samples of the data
set, so that a "blue car" is not taken for a red one. A word that is both a name and an attribute ("orange") is an attribute
where a name or another attribute follows. May import pretrain.
"""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from pretrain.data.vocabulary import ATTRIBUTES, Vocabulary, normalize_word

Kind = Literal["thing", "colour", "surface", "relation", "text"]
WORD_KINDS: tuple[Kind, ...] = ("thing", "colour", "surface", "relation", "text")
"""Parts of metric names. thing: a word that is an object's name; text: all words of a text that names one set of objects."""

Objects = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Mention:
    """One word that names objects."""

    word: str
    start: int
    """Its characters in the text are [start, end)."""
    end: int
    kind: Kind
    objects: tuple[int, ...]
    """Positions in the sample's `objects`; for the word of a relation, those of the objects on both sides."""


@dataclass(frozen=True)
class Swap:
    """A text, and the same text with one color exchanged, so that it names another object."""

    before: str
    after: str
    old: Mention
    """The color in `before`; it names one object."""
    new: Mention
    """The color in `after`; it names one other object."""


_WORD = re.compile(r"[^\W_]+")
_KIND_OF_FIELD: dict[str, Kind] = {"color": "colour", "surface": "surface"}
_NO_VOCABULARY = Vocabulary()
_THING = "thing"
_LEFT_OR_RIGHT = re.compile(r",?\s*(?:is\s+)?(?:to the\s+)?(left|right)\s+of\s+(?:an?\s+|the\s+)?$", re.IGNORECASE)
_PREPOSITION = re.compile(
    r"\s*(?:is\s+)?(on|under|above|below|behind|beside|near|next to|in front of)\s+(?:an?\s+|the\s+)?$", re.IGNORECASE
)


@dataclass
class _Phrase:
    """The attributes and the name of an object in a text."""

    attributes: list[tuple[str, str, re.Match[str]]]
    """(field, value, word in the text)."""
    name: str
    """Empty for the word "thing"."""
    start: int
    """The characters of the phrase in the text are [start, end), those of the name [name_start, end)."""
    name_start: int
    end: int

    def find_objects(self, objects: Objects, changed: tuple[int, str] | None = None) -> tuple[int, ...]:
        """Return the positions of the objects that the phrase describes.

        `changed` = (index, value) replaces the value of one attribute.
        """
        values = [(field, value) for field, value, _ in self.attributes]
        if changed:
            values[changed[0]] = (values[changed[0]][0], changed[1])
        return tuple(
            i
            for i, item in enumerate(objects)
            if (not self.name or normalize_word(item.get("name")) == self.name)
            and all(normalize_word(item.get(field)) == value for field, value in values)
        )


def find_mentions(text: str, objects: Objects, vocabulary: Vocabulary = _NO_VOCABULARY) -> list[Mention]:
    """Return the words of `text` that name `objects`, in order.

    `vocabulary` holds words for objects of the whole data set.
    """
    phrases = _parse_phrases(text, objects, vocabulary)
    named = [phrase.find_objects(objects) for phrase in phrases]
    mentions = []
    for phrase, positions in zip(phrases, named, strict=True):
        if not positions:
            continue
        for field, _, match in phrase.attributes:
            kind = _KIND_OF_FIELD.get(field)
            if kind:
                mentions.append(Mention(match.group().lower(), match.start(), match.end(), kind, positions))
        if phrase.name:
            word = text[phrase.name_start : phrase.end].lower()
            mentions.append(Mention(word, phrase.name_start, phrase.end, "thing", positions))
    for (first, second), (a, b) in zip(pairwise(phrases), pairwise(named), strict=True):
        between = text[first.end : second.start]
        relation = _LEFT_OR_RIGHT.fullmatch(between) or _PREPOSITION.fullmatch(between)
        if relation and a and b:
            start, end = (first.end + offset for offset in relation.span(1))
            mentions.append(Mention(relation.group(1).lower(), start, end, "relation", tuple(sorted({*a, *b}))))
    return sorted(mentions, key=lambda mention: mention.start)


def build_text_mention(text: str, mentions: Sequence[Mention]) -> list[Mention]:
    """Return the whole text as one mention if all of its mentions name the same objects; else []."""
    named = {mention.objects for mention in mentions}
    return [Mention(text, 0, len(text), "text", named.pop())] if len(named) == 1 else []


def find_color_swaps(text: str, objects: Objects, vocabulary: Vocabulary = _NO_VOCABULARY) -> list[Swap]:
    """Return each exchange of one color of `text` after which the phrase names exactly one other object.

    No other phrase of the text may name either object, since the map would then have a second reason to highlight it.
    """
    phrases = _parse_phrases(text, objects, vocabulary)
    colors = list(dict.fromkeys(normalize_word(item.get("color")) for item in objects if item.get("color")))
    swaps = []
    for phrase in phrases:
        old = phrase.find_objects(objects)
        others = {i for other in phrases if other is not phrase for i in other.find_objects(objects)}
        if len(old) != 1 or old[0] in others:
            continue
        for index, (field, value, match) in enumerate(phrase.attributes):
            for color in colors if field == "color" else []:
                new = phrase.find_objects(objects, (index, color))
                if color == value or len(new) != 1 or new[0] in others:
                    continue
                after, start = _replace_word(text, match, color)
                old_mention = Mention(value, match.start(), match.end(), "colour", old)
                new_mention = Mention(color, start, start + len(color), "colour", new)
                swaps.append(Swap(text, after, old_mention, new_mention))
    return swaps


def build_caption_swaps(objects: Objects, vocabulary: Vocabulary = _NO_VOCABULARY) -> list[Swap]:
    """Build swaps for models that read captions: "a red car" -> "a blue car".

    There is one for each two colors that objects of the same name have.
    """
    swaps: list[Swap] = []
    for name in dict.fromkeys(normalize_word(item.get("name")) for item in objects):
        colors = dict.fromkeys(
            normalize_word(item["color"]) for item in objects if normalize_word(item.get("name")) == name and item.get("color")
        )
        for color in colors:
            caption = f"{_indefinite_article(color)} {color} {name}"
            swaps += [swap for swap in find_color_swaps(caption, objects, vocabulary) if swap.new.word in colors]
    return swaps


# ---------------------------------------------------------------------------------------------------------------------
# Parsing


def _parse_phrases(text: str, objects: Objects, vocabulary: Vocabulary) -> list[_Phrase]:
    """Return the runs of attributes that a name follows; attributes without a name do not name an object."""
    attributes = ChainMap(_map_attributes_to_fields(objects), vocabulary.attribute_fields)
    object_names = vocabulary.forms(normalize_word(item.get("name")) for item in objects if normalize_word(item.get("name")))
    names = ChainMap(object_names, vocabulary.name_forms, dict.fromkeys((_THING, f"{_THING}s"), ""))
    longest = max(1, vocabulary.longest_name, *(name.count(" ") + 1 for name in object_names))
    words = list(_WORD.finditer(text))
    phrases: list[_Phrase] = []
    run: list[tuple[str, str, re.Match[str]]] = []
    i = 0
    while i < len(words):
        word = words[i].group().lower()
        length = _find_name_length(text, words, i, names, longest)
        if length == 1 and word in attributes and i + 1 < len(words) and _are_adjacent(text, words[i], words[i + 1]):
            is_attribute = words[i + 1].group().lower() in attributes or _find_name_length(text, words, i + 1, names, longest)
            length = 0 if is_attribute else length
        if length:
            last = words[i + length - 1]
            start = run[0][2].start() if run else words[i].start()
            phrases.append(_Phrase(run, names[_join_words(text, words[i : i + length])], start, words[i].start(), last.end()))
            run, i = [], i + length
        elif word in attributes and (not run or _are_adjacent(text, run[-1][2], words[i])):
            run, i = [*run, (attributes[word], word, words[i])], i + 1
        else:
            run = [(attributes[word], word, words[i])] if word in attributes else []
            i += 1
    return phrases


def _map_attributes_to_fields(objects: Objects) -> dict[str, str]:
    return {normalize_word(item[key]): key for key in ATTRIBUTES for item in objects if normalize_word(item.get(key))}


def _find_name_length(text: str, words: list[re.Match[str]], i: int, names: Mapping[str, str], longest: int) -> int:
    """Return the number of words of the longest name that begins with word `i`; 0 where none does."""
    lengths = range(min(longest, len(words) - i), 0, -1)
    return next((n for n in lengths if _join_words(text, words[i : i + n]) in names), 0)


def _join_words(text: str, words: list[re.Match[str]]) -> str:
    """Join words in lower case; returns "" where the text has more than space between them."""
    if not words or any(text[a.end() : b.start()].strip() for a, b in pairwise(words)):
        return ""
    return " ".join(word.group().lower() for word in words)


def _are_adjacent(text: str, a: re.Match[str], b: re.Match[str]) -> bool:
    return not text[a.end() : b.start()].strip()


def _replace_word(text: str, match: re.Match[str], word: str) -> tuple[str, int]:
    """Replace a word of the text and adapt the article before it; also return where the new word begins."""
    before = text[: match.start()]
    article = re.search(r"\ban?\s+$", before, re.IGNORECASE)
    if article:
        is_capital = article.group()[0].isupper()
        new_article = _indefinite_article(word)
        before = f"{before[: article.start()]}{new_article.capitalize() if is_capital else new_article} "
    return f"{before}{word}{text[match.end() :]}", len(before)


def _indefinite_article(word: str) -> str:
    return "an" if word[:1] in "aeiou" else "a"
