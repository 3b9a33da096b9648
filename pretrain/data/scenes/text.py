"""Captions, negative captions, and questions with answers for drawn scenes.

Questions are chosen so that their words alone reveal little of the answer. Yes and no come in pairs. Answers that are colors,
kinds or surfaces are uniform. Of a count, the answer is chosen first. A question names an object only by a phrase that fits no
other object of its scene.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pretrain.data.scenes.backgrounds import BACKGROUNDS
from pretrain.data.scenes.layout import (
    CLASSES,
    COLORS,
    OPPOSITE,
    SURFACES,
    ObjectSpec,
    Scene,
    can_mention,
    can_show,
    change_columns,
    get_columns,
    get_relation,
)
from pretrain.data.scenes.objects import KINDS
from pretrain.data.scenes.rng import KeyedRandom

Box = list[int]
NUMBER_WORDS = ("no", "one", "two", "three", "four")


def name_object(spec: ObjectSpec, size: bool = False, surface: bool = True) -> str:
    """Return the name of an object without an article: "small striped red car", "black leather sofa"."""
    words = [spec.size] if size else []
    words += ["striped"] if surface and spec.surface == "striped" else []
    words += [spec.color]
    words += ["leather"] if surface and spec.surface == "leather" else []
    return " ".join([*words, spec.kind])


def add_article(words: str) -> str:
    """Return words with "a" or "an" before them."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _pluralize(words: str) -> str:
    kind = words.split()[-1]
    return words[: -len(kind)] + (KINDS[kind].plural or f"{kind}s" if kind in KINDS else f"{kind}s")


def _join_phrases(phrases: Sequence[str]) -> str:
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


# ---------------------------------------------------------------------------------------------------------------------
# Captions


def build_captions(scene: Scene) -> list[str]:
    """Return the captions of a scene, the complete one first.

    The first (KEY.txt) names all objects, their relations and the background. The others say less: all objects without
    relations, the largest object on the background, and each object alone.
    """
    rng = scene.build_rng("captions")
    columns = get_columns(scene)
    out = [describe_scene(columns, scene.background, scene.build_rng("full"), sizes=scene.split != "hard")]
    if len(scene.objects) > 1:
        counted = Counter(name_object(spec) for column in columns for spec in column)
        phrases = [add_article(words) if n == 1 else f"{NUMBER_WORDS[n]} {_pluralize(words)}" for words, n in counted.items()]
        out.append(_add_background(_join_phrases(rng.shuffled(phrases)), scene.background, rng))
    largest = max(scene.objects, key=lambda item: item.longer_side).spec
    out.append(
        _add_background(
            add_article(name_object(largest, size=rng.bernoulli(0.3), surface=rng.bernoulli(0.7))), scene.background, rng
        )
    )
    out.append(name_object(largest))
    out.extend(name_object(item.spec) for item in scene.objects)
    return list(dict.fromkeys(out))


def describe_scene(columns: list[list[ObjectSpec]], background: str, rng: KeyedRandom, sizes: bool = True) -> str:
    """Return one sentence that names all objects, their relations and the background.

    It makes the same number of random choices whatever the objects are, so that a negative caption has the same wording.
    """
    phrases = []
    for column in columns:
        names = [add_article(name_object(spec, size=rng.bernoulli(0.25) and sizes)) for spec in column]
        is_reversed = rng.bernoulli(0.5)
        phrases.append(names[0])
        if len(names) == 2:
            phrases[-1] = f"{names[0]} under {names[1]}" if is_reversed else f"{names[1]} on {names[0]}"
    is_reversed, prefix = rng.bernoulli(0.5), rng.choice(("", "to the "))
    if len(phrases) == 1:
        text = phrases[0]
    elif len(phrases) == 2 and is_reversed:
        text = f"{phrases[1]}, {prefix}right of {phrases[0]}" if prefix else f"{phrases[1]} right of {phrases[0]}"
    elif len(phrases) == 2:
        text = f"{phrases[0]}, {prefix}left of {phrases[1]}" if prefix else f"{phrases[0]} left of {phrases[1]}"
    else:
        text = f"from left to right: {_join_phrases(phrases)}"
    return _add_background(text, background, rng)


def _add_background(text: str, background: str, rng: KeyedRandom) -> str:
    phrase = rng.choice(BACKGROUNDS[background].phrases)
    form = rng.choice(("after", "after", "before", "picture"))
    if form == "before":
        return f"{phrase}, {text}"
    if form == "picture" and not text.startswith("from"):
        return f"a picture of {text} {phrase}"
    return f"{text}, {phrase}" if ", " in text or " and " in text else f"{text} {phrase}"


def build_negative_captions(scene: Scene) -> list[dict[str, str]]:
    """Return versions of the first caption that are wrong in one respect: [{caption, changed}].

    One color, one kind, or the positions of two objects are wrong.
    """
    out = []
    columns, sizes = get_columns(scene), scene.split != "hard"
    correct = describe_scene(columns, scene.background, scene.build_rng("full"), sizes)
    for changed in ("colour", "kind", "relation"):
        wrong = change_columns(columns, changed, scene.split, scene.build_rng(f"foil {changed}"))
        if wrong:
            text = describe_scene(wrong, scene.background, scene.build_rng("full"), sizes)
            if text != correct:
                out.append({"caption": text, "changed": changed})
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Questions


def build_questions(scene: Scene, boxes: Sequence[Box]) -> list[dict[str, Any]]:
    """Return questions about a scene: [{question, answers, type, box}].

    Types are `colour`, kind, surface, count, existence (one yes, one no) and relation.

    Args:
        boxes: the visible box of each object.
    Returns:
        questions. `box` is that of the object asked about (for a relation: its subject), None if it is not exactly one object.
    """
    rng = scene.build_rng("questions")
    specs = [item.spec for item in scene.objects]
    order = rng.shuffled(range(len(specs)))
    out: list[dict[str, Any]] = []

    def add(type_: str, question: str, answer: str, index: int | None) -> None:
        box = None if index is None else boxes[index]
        out.append({"question": question, "answers": [answer], "type": type_, "box": box})

    for type_, wording, get_answer, forms in (
        ("colour", "what colour is the {}?", lambda spec: spec.color, ("kind", "surface kind")),
        ("kind", "what is the {} thing?", lambda spec: spec.kind, ("color", "surface", "color surface")),
        ("surface", "is the {} plain, striped or leather?", lambda spec: spec.surface, ("kind", "color kind")),
    ):
        count = 0
        for i in order:
            phrase = _choose_unique_phrase(specs, i, forms, rng)
            if phrase and count < 2:
                add(type_, wording.format(phrase), get_answer(specs[i]), i)
                count += 1
    _ask_counts(specs, rng, add)
    _ask_existence(scene.split, specs, rng, add)
    if len(specs) > 1:
        _ask_relations(scene, specs, rng, add)
    return out


# (type, question, answer, index of the object asked about or None)
AddQuestion = Callable[[str, str, str, "int | None"], None]
PHRASE_FORMS: dict[str, Callable[[ObjectSpec], str]] = {
    "kind": lambda spec: spec.kind,
    "color": lambda spec: spec.color,
    "surface": lambda spec: spec.surface,
    "color kind": lambda spec: f"{spec.color} {spec.kind}",
    "surface kind": lambda spec: f"{spec.surface} {spec.kind}",
    "color surface": lambda spec: " ".join(sorted((spec.color, spec.surface), key=lambda word: word == "leather")),
}


def _choose_unique_phrase(specs: list[ObjectSpec], i: int, forms: Sequence[str], rng: KeyedRandom) -> str | None:
    """Return a phrase in one of the forms that fits object `i` and no other; None if there is none."""
    unique = [
        PHRASE_FORMS[form](specs[i])
        for form in forms
        if Counter(map(PHRASE_FORMS[form], specs))[PHRASE_FORMS[form](specs[i])] == 1
    ]
    return rng.choice(unique) if unique else None


def _ask_counts(specs: list[ObjectSpec], rng: KeyedRandom, add: AddQuestion) -> None:
    """Add two or three count questions. The answer is chosen first, then a question that has it."""
    for form, choices, wording in (
        ("kind", CLASSES, "how many {}s are there?"),
        ("color", COLORS, "how many {} things are there?"),
    ):
        counts = Counter(map(PHRASE_FORMS[form], specs))
        words_by_count: dict[int, list[str]] = {}
        for choice in choices:
            words_by_count.setdefault(counts[choice], []).append(choice)
        numbers = sorted(words_by_count)
        number = rng.choice(numbers, [(0.4, 0.45, 2.6, 6.0, 9.0)[n] for n in numbers])
        word = rng.choice(words_by_count[number])
        question = f"how many {_pluralize(word)} are there?" if form == "kind" else wording.format(word)
        add("count", question, str(number), None)
    if rng.bernoulli(0.25):
        add("count", "how many things are there?", str(len(specs)), None)


def _ask_existence(split: str, specs: list[ObjectSpec], rng: KeyedRandom, add: AddQuestion) -> None:
    """Add two questions about existence, one with the answer yes and one with no, in the same form."""
    form = rng.choice(("color kind", "color kind", "kind", "surface kind", "color"))
    counts = Counter(map(PHRASE_FORMS[form], specs))
    index = rng.randbelow(len(specs))
    present = PHRASE_FORMS[form](specs[index])
    wording = f"is there {{}}{' thing' if form == 'color' else ''}?"
    absent = present
    # The first four attempts mostly recombine properties of the scene's objects; later ones choose at random
    for attempt in itertools.count():
        recombine = rng.bernoulli(0.6) and attempt < 4
        template = rng.choice(specs)
        candidate = replace(
            template,
            kind=rng.choice(specs).kind if recombine else rng.choice(CLASSES),
            color=rng.choice(specs).color if recombine else rng.choice((template.color, rng.choice(COLORS))),
            surface=rng.choice(specs).surface if recombine else rng.choice((template.surface, rng.choice(SURFACES))),
        )
        absent = PHRASE_FORMS[form](candidate)
        # In `unseen`, absent pairs must be unseen pairs too, or the pair alone would reveal the answer
        is_allowed = can_show if form == "color kind" else can_mention
        if absent not in counts and is_allowed(split, candidate.color, candidate.kind):
            break
    add("existence", wording.format(add_article(present)), "yes", index if counts[present] == 1 else None)
    add("existence", wording.format(add_article(absent)), "no", None)


def _ask_relations(scene: Scene, specs: list[ObjectSpec], rng: KeyedRandom, add: AddQuestion) -> None:
    """Add a question about which of four relations holds, and one about whether a named one holds."""
    pairs = []
    for i in range(len(specs)):
        for j in range(len(specs)):
            first, second = (_choose_unique_phrase(specs, k, ("kind", "color kind"), rng) for k in (i, j))
            if i != j and first and second:
                pairs.append((i, j, first, second))
    if not pairs:
        return
    stacked = [pair for pair in pairs if get_relation(scene, pair[0], pair[1]) in ("on", "under")]
    for form in ("where", "is"):
        candidates = stacked if stacked and rng.bernoulli(0.6) else pairs
        i, j, first, second = rng.choice(candidates)
        actual = get_relation(scene, i, j)
        if form == "where":
            add("relation", f"where is the {first}, seen from the {second}?", actual.removesuffix(" of"), i)
        else:
            stated = actual if rng.bernoulli(0.5) else OPPOSITE[actual]
            add("relation", f"is the {first} {stated} the {second}?", "yes" if stated == actual else "no", i)
