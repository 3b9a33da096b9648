"""Find the words of a text that name objects of its image: what a map of these words should highlight.

    mentions("a red car left of a black sofa", objects)     red -> (0,), car -> (0,), black, sofa -> (1,), left -> (0, 1)

`objects` is the json field of that name: dicts with a `name`, and any of `color`, `surface`, `size`. A phrase is words of
color, surface and size in any order and then a name (or "thing"): "a small striped red car". It names all objects that fit
every word of it; words that fit none are left out. The vocabulary holds words that other samples of the data set have, so
that a "blue car" is not taken for the red one. A word that is both a name and an attribute ("orange") is an attribute where
a name or another attribute follows. May import pretrain's floors.
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
KINDS_OF_WORDS: tuple[Kind, ...] = ("thing", "colour", "surface", "relation", "text")
"""text: all words together, of a text that speaks of the same objects throughout."""

Objects = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Mention:
    """One word that speaks of objects."""

    word: str
    start: int
    """Its characters in the text: [start, end)."""
    end: int
    kind: Kind
    objects: tuple[int, ...]
    """Positions in the sample's `objects`; of a relation's word those on both sides."""


@dataclass(frozen=True)
class Swap:
    """A text and the same with one colour exchanged, so that it speaks of another object."""

    before: str
    after: str
    old: Mention
    """The colour's word in `before`; speaks of one object."""
    new: Mention
    """The colour's word in `after`; speaks of one other object."""


_WORD = re.compile(r"[^\W_]+")
_MEASURED: dict[str, Kind] = {"color": "colour", "surface": "surface"}
_EMPTY = Vocabulary()
_THING = "thing"
_BESIDE = re.compile(r",?\s*(?:is\s+)?(?:to the\s+)?(left|right)\s+of\s+(?:an?\s+|the\s+)?$", re.IGNORECASE)
_UPON = re.compile(
    r"\s*(?:is\s+)?(on|under|above|below|behind|beside|near|next to|in front of)\s+(?:an?\s+|the\s+)?$", re.IGNORECASE
)


@dataclass
class _Phrase:
    """Attributes (field, value, word) and the object's name ("": a thing), with where its words stand."""

    attributes: list[tuple[str, str, re.Match[str]]]
    head: str
    start: int
    head_start: int
    end: int

    def fitting(self, objects: Objects, changed: tuple[int, str] | None = None) -> tuple[int, ...]:
        """Positions of the objects that fit; `changed`: with another value for one of the attributes."""
        values = [(field, value) for field, value, _ in self.attributes]
        if changed:
            values[changed[0]] = (values[changed[0]][0], changed[1])
        return tuple(
            i
            for i, each in enumerate(objects)
            if (not self.head or normalize_word(each.get("name")) == self.head)
            and all(normalize_word(each.get(field)) == value for field, value in values)
        )


def mentions(text: str, objects: Objects, vocabulary: Vocabulary = _EMPTY) -> list[Mention]:
    """The words of `text` that name `objects`, in its order; `vocabulary`: further words that name others."""
    phrases = _phrases(text, objects, vocabulary)
    fitting = [phrase.fitting(objects) for phrase in phrases]
    out = []
    for phrase, found in zip(phrases, fitting, strict=True):
        if not found:
            continue
        for field, _, match in phrase.attributes:
            kind = _MEASURED.get(field)
            if kind:
                out.append(Mention(match.group().lower(), match.start(), match.end(), kind, found))
        if phrase.head:
            head = text[phrase.head_start : phrase.end].lower()
            out.append(Mention(head, phrase.head_start, phrase.end, "thing", found))
    for (first, second), (a, b) in zip(pairwise(phrases), pairwise(fitting), strict=True):
        between = text[first.end : second.start]
        joins = _BESIDE.fullmatch(between) or _UPON.fullmatch(between)
        if joins and a and b:
            start, end = (first.end + at for at in joins.span(1))
            out.append(Mention(joins.group(1).lower(), start, end, "relation", tuple(sorted({*a, *b}))))
    return sorted(out, key=lambda mention: mention.start)


def whole(text: str, found: Sequence[Mention]) -> list[Mention]:
    """The text as one mention, where all of `found`, its words, speak of the same objects; else nothing."""
    spoken = {mention.objects for mention in found}
    return [Mention(text, 0, len(text), "text", spoken.pop())] if len(spoken) == 1 else []


def swaps(text: str, objects: Objects, vocabulary: Vocabulary = _EMPTY) -> list[Swap]:
    """`text` with one colour exchanged, for every way in which it then speaks of exactly one other object.

    Neither object may be spoken of elsewhere in the text, or the map would have a second reason to be there.
    """
    phrases = _phrases(text, objects, vocabulary)
    colors = list(dict.fromkeys(normalize_word(each.get("color")) for each in objects if each.get("color")))
    out = []
    for phrase in phrases:
        found = phrase.fitting(objects)
        others = {i for other in phrases if other is not phrase for i in other.fitting(objects)}
        if len(found) != 1 or found[0] in others:
            continue
        for at, (field, value, match) in enumerate(phrase.attributes):
            for color in colors if field == "color" else []:
                then = phrase.fitting(objects, (at, color))
                if color == value or len(then) != 1 or then[0] in others:
                    continue
                after, start = _exchange(text, match, color)
                new = Mention(color, start, start + len(color), "colour", then)
                out.append(Swap(text, after, Mention(value, match.start(), match.end(), "colour", found), new))
    return out


def pairs(objects: Objects, vocabulary: Vocabulary = _EMPTY) -> list[Swap]:
    """Swaps for models that read captions: "a red car" -> "a blue car", for each two that their colour alone tells apart."""
    out = []
    for name in dict.fromkeys(normalize_word(each.get("name")) for each in objects):
        among = dict.fromkeys(
            normalize_word(each["color"]) for each in objects if normalize_word(each.get("name")) == name and each.get("color")
        )
        for color in among:
            out += [s for s in swaps(f"{_article(color)} {color} {name}", objects, vocabulary) if s.new.word in among]
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def _phrases(text: str, objects: Objects, vocabulary: Vocabulary) -> list[_Phrase]:
    """Runs of attributes with the name behind them; attributes without one speak of nothing we could point at."""
    attributes = ChainMap(_attribute_fields(objects), vocabulary.attribute_fields)
    own_names = vocabulary.forms(normalize_word(item.get("name")) for item in objects if normalize_word(item.get("name")))
    names = ChainMap(own_names, vocabulary.name_forms, dict.fromkeys((_THING, f"{_THING}s"), ""))
    longest = max(1, vocabulary.longest_name, *(name.count(" ") + 1 for name in own_names))
    words = list(_WORD.finditer(text))
    out: list[_Phrase] = []
    run: list[tuple[str, str, re.Match[str]]] = []
    i = 0
    while i < len(words):
        word = words[i].group().lower()
        length = _name_length(text, words, i, names, longest)
        if length == 1 and word in attributes and i + 1 < len(words) and _adjacent(text, words[i], words[i + 1]):
            follows = words[i + 1].group().lower() in attributes or _name_length(text, words, i + 1, names, longest)
            length = 0 if follows else length
        if length:
            last = words[i + length - 1]
            start = run[0][2].start() if run else words[i].start()
            out.append(_Phrase(run, names[_joined(text, words[i : i + length])], start, words[i].start(), last.end()))
            run, i = [], i + length
        elif word in attributes and (not run or _adjacent(text, run[-1][2], words[i])):
            run, i = [*run, (attributes[word], word, words[i])], i + 1
        else:
            run = [(attributes[word], word, words[i])] if word in attributes else []
            i += 1
    return out


def _attribute_fields(objects: Objects) -> dict[str, str]:
    return {normalize_word(item[key]): key for key in ATTRIBUTES for item in objects if normalize_word(item.get(key))}


def _name_length(text: str, words: list[re.Match[str]], i: int, names: Mapping[str, str], longest: int) -> int:
    """Words of the longest name that begins with word `i`; 0 where none does."""
    lengths = range(min(longest, len(words) - i), 0, -1)
    return next((n for n in lengths if _joined(text, words[i : i + n]) in names), 0)


def _joined(text: str, words: list[re.Match[str]]) -> str:
    """The words as they stand, if nothing but space is between them."""
    if not words or any(text[a.end() : b.start()].strip() for a, b in pairwise(words)):
        return ""
    return " ".join(word.group().lower() for word in words)


def _adjacent(text: str, a: re.Match[str], b: re.Match[str]) -> bool:
    return not text[a.end() : b.start()].strip()


def _exchange(text: str, match: re.Match[str], word: str) -> tuple[str, int]:
    """The text with another word in its place, the article before it put right, and where that word begins."""
    before = text[: match.start()]
    article = re.search(r"\ban?\s+$", before, re.IGNORECASE)
    if article:
        capital = article.group()[0].isupper()
        fitting = _article(word)
        before = f"{before[: article.start()]}{fitting.capitalize() if capital else fitting} "
    return f"{before}{word}{text[match.end() :]}", len(before)


def _article(word: str) -> str:
    return "an" if word[:1] in "aeiou" else "a"
