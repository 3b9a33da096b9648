"""What is said and asked about a drawn scene: captions, captions that are wrong in one word, questions with answers.

Questions are drawn so that the words alone give little away: yes and no come in pairs, colours, kinds and surfaces are
even, counts are drawn by answer first. A thing is only asked about in words that fit no other thing of its scene.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pretrain.data.scenes.backgrounds import PLACES
from pretrain.data.scenes.layout import (
    CLASSES,
    COLORS,
    OPPOSITE,
    SURFACES,
    Look,
    Scene,
    change,
    columns_of,
    relation,
    shows,
    speaks_of,
)
from pretrain.data.scenes.objects import KINDS
from pretrain.data.scenes.rng import Dice

Box = list[int]
NUMBERS = ("no", "one", "two", "three", "four")


def name(look: Look, size: bool = False, surface: bool = True) -> str:
    """A thing in words without an article: "small striped red car", "black leather sofa"."""
    words = [look.size] if size else []
    words += ["striped"] if surface and look.surface == "striped" else []
    words += [look.color]
    words += ["leather"] if surface and look.surface == "leather" else []
    return " ".join([*words, look.kind])


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _plural(words: str) -> str:
    kind = words.split()[-1]
    return words[: -len(kind)] + (KINDS[kind].plural or f"{kind}s" if kind in KINDS else f"{kind}s")


def _listed(phrases: Sequence[str]) -> str:
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


# ---------------------------------------------------------------------------------------------------------------------
# Captions


def captions(scene: Scene) -> list[str]:
    """The first names every thing, how they stand and the place (KEY.txt); the others say less, each in another way, down to
    one thing alone, for every thing."""
    dice = scene.dice("captions")
    columns = columns_of(scene)
    out = [full(columns, scene.place, scene.dice("full"), sizes=scene.split != "hard")]
    if len(scene.things) > 1:
        counted = Counter(name(look) for column in columns for look in column)
        phrases = [_a(words) if n == 1 else f"{NUMBERS[n]} {_plural(words)}" for words, n in counted.items()]
        out.append(_placed(_listed(dice.shuffled(phrases)), scene.place, dice))
    main = max(scene.things, key=lambda thing: thing.extent).look
    out.append(_placed(_a(name(main, size=dice.chance(0.3), surface=dice.chance(0.7))), scene.place, dice))
    out.append(name(main))
    out.extend(name(thing.look) for thing in scene.things)
    return list(dict.fromkeys(out))


def full(columns: list[list[Look]], place: str, dice: Dice, sizes: bool = True) -> str:
    """One sentence that names everything. Throws the dice equally often whatever the things are."""
    phrases = []
    for column in columns:
        said = [_a(name(look, size=dice.chance(0.25) and sizes)) for look in column]
        turned = dice.chance(0.5)
        phrases.append(said[0])
        if len(said) == 2:
            phrases[-1] = f"{said[0]} under {said[1]}" if turned else f"{said[1]} on {said[0]}"
    turned, way = dice.chance(0.5), dice.pick(("", "to the "))
    if len(phrases) == 1:
        text = phrases[0]
    elif len(phrases) == 2 and turned:
        text = f"{phrases[1]}, {way}right of {phrases[0]}" if way else f"{phrases[1]} right of {phrases[0]}"
    elif len(phrases) == 2:
        text = f"{phrases[0]}, {way}left of {phrases[1]}" if way else f"{phrases[0]} left of {phrases[1]}"
    else:
        text = f"from left to right: {_listed(phrases)}"
    return _placed(text, place, dice)


def _placed(text: str, place: str, dice: Dice) -> str:
    where = dice.pick(PLACES[place].phrases)
    form = dice.pick(("after", "after", "before", "picture"))
    if form == "before":
        return f"{where}, {text}"
    if form == "picture" and not text.startswith("from"):
        return f"a picture of {text} {where}"
    return f"{text}, {where}" if ", " in text or " and " in text else f"{text} {where}"


def foils(scene: Scene) -> list[dict[str, str]]:
    """The first caption with one colour, one kind or the places of two things wrong: [{caption, changed}]."""
    out = []
    columns, sizes = columns_of(scene), scene.split != "hard"
    right = full(columns, scene.place, scene.dice("full"), sizes)
    for what in ("colour", "kind", "relation"):
        wrong = change(columns, what, scene.split, scene.dice(f"foil {what}"))
        if wrong:
            text = full(wrong, scene.place, scene.dice("full"), sizes)
            if text != right:
                out.append({"caption": text, "changed": what})
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Questions


def questions(scene: Scene, boxes: Sequence[Box]) -> list[dict[str, Any]]:
    """[{question, answers, type, box}]: colour, kind, surface, count, existence (one yes, one no), relation.

    Args:
        boxes: of each thing of the scene.
    Returns:
        a box where one thing is asked about (for a relation: the one whose place is asked), else None.
    """
    dice = scene.dice("questions")
    looks = [thing.look for thing in scene.things]
    order = dice.shuffled(range(len(looks)))
    out: list[dict[str, Any]] = []

    def ask(kind: str, question: str, answer: str, thing: int | None) -> None:
        box = None if thing is None else boxes[thing]
        out.append({"question": question, "answers": [answer], "type": kind, "box": box})

    for kind, wording, answer, by in (
        ("colour", "what colour is the {}?", lambda look: look.color, ("kind", "surface kind")),
        ("kind", "what is the {} thing?", lambda look: look.kind, ("color", "surface", "color surface")),
        ("surface", "is the {} plain, striped or leather?", lambda look: look.surface, ("kind", "color kind")),
    ):
        asked = 0
        for i in order:
            words = _words(looks, i, by, dice)
            if words and asked < 2:
                ask(kind, wording.format(words), answer(looks[i]), i)
                asked += 1
    _count(looks, dice, ask)
    _existence(scene.split, looks, dice, ask)
    if len(looks) > 1:
        _relation(scene, looks, dice, ask)
    return out


Ask = Callable[[str, str, str, "int | None"], None]
WORDS: dict[str, Callable[[Look], str]] = {
    "kind": lambda look: look.kind,
    "color": lambda look: look.color,
    "surface": lambda look: look.surface,
    "color kind": lambda look: f"{look.color} {look.kind}",
    "surface kind": lambda look: f"{look.surface} {look.kind}",
    "color surface": lambda look: " ".join(sorted((look.color, look.surface), key=lambda word: word == "leather")),
}


def _words(looks: list[Look], i: int, by: Sequence[str], dice: Dice) -> str | None:
    """Words that fit thing `i` and no other, of the given forms; None if there are none."""
    fitting = [WORDS[form](looks[i]) for form in by if Counter(map(WORDS[form], looks))[WORDS[form](looks[i])] == 1]
    return dice.pick(fitting) if fitting else None


def _count(looks: list[Look], dice: Dice, ask: Ask) -> None:
    """Two questions; first the answer is drawn, then a question that has it."""
    for form, choices, wording in (
        ("kind", CLASSES, "how many {}s are there?"),
        ("color", COLORS, "how many {} things are there?"),
    ):
        counts = Counter(map(WORDS[form], looks))
        by_number: dict[int, list[str]] = {}
        for choice in choices:
            by_number.setdefault(counts[choice], []).append(choice)
        numbers = sorted(by_number)
        number = dice.pick(numbers, [(0.4, 0.45, 2.6, 6.0, 9.0)[n] for n in numbers])
        word = dice.pick(by_number[number])
        question = f"how many {_plural(word)} are there?" if form == "kind" else wording.format(word)
        ask("count", question, str(number), None)
    if dice.chance(0.25):
        ask("count", "how many things are there?", str(len(looks)), None)


def _existence(split: str, looks: list[Look], dice: Dice, ask: Ask) -> None:
    form = dice.pick(("color kind", "color kind", "kind", "surface kind", "color"))
    there = Counter(map(WORDS[form], looks))
    thing = dice.below(len(looks))
    yes = WORDS[form](looks[thing])
    wording = f"is there {{}}{' thing' if form == 'color' else ''}?"
    no = yes
    for attempt in itertools.count():  # first of what the scene holds, put together anew; then more and more at random
        near = dice.chance(0.6) and attempt < 4
        model = dice.pick(looks)
        made = replace(
            model,
            kind=dice.pick(looks).kind if near else dice.pick(CLASSES),
            color=dice.pick(looks).color if near else dice.pick((model.color, dice.pick(COLORS))),
            surface=dice.pick(looks).surface if near else dice.pick((model.surface, dice.pick(SURFACES))),
        )
        no = WORDS[form](made)
        # `unseen` asks for unseen pairs in vain as often as not, or a pair would give its answer away
        sayable = shows if form == "color kind" else speaks_of
        if no not in there and sayable(split, made.color, made.kind):
            break
    ask("existence", wording.format(_a(yes)), "yes", thing if there[yes] == 1 else None)
    ask("existence", wording.format(_a(no)), "no", None)


def _relation(scene: Scene, looks: list[Look], dice: Dice, ask: Ask) -> None:
    """Where a thing stands to another (of four), and whether it stands so or just the other way round."""
    pairs = []
    for i in range(len(looks)):
        for j in range(len(looks)):
            first, second = (_words(looks, k, ("kind", "color kind"), dice) for k in (i, j))
            if i != j and first and second:
                pairs.append((i, j, first, second))
    if not pairs:
        return
    stacked = [pair for pair in pairs if relation(scene, pair[0], pair[1]) in ("on", "under")]
    for form in ("where", "is"):
        among = stacked if stacked and dice.chance(0.6) else pairs
        i, j, first, second = dice.pick(among)
        true = relation(scene, i, j)
        if form == "where":
            ask("relation", f"where is the {first}, seen from the {second}?", true.removesuffix(" of"), i)
        else:
            said = true if dice.chance(0.5) else OPPOSITE[true]
            ask("relation", f"is the {first} {said} the {second}?", "yes" if said == true else "no", i)
