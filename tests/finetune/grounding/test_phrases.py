"""Words and the objects they speak of, against sentences read by a person and against the scenes' own records."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from finetune.grounding.phrases import Mention, mentions, pairs, swaps
from pretrain.data.scenes import dataset
from pretrain.data.vocabulary import Vocabulary, vocabulary_from_objects

OBJECTS = [
    {"name": "car", "color": "red", "surface": "striped", "size": "small"},
    {"name": "sofa", "color": "black", "surface": "leather", "size": "large"},
    {"name": "car", "color": "blue", "surface": "plain", "size": "small"},
    {"name": "fish", "color": "orange", "surface": "plain", "size": "medium"},
]


def said(
    text: str, objects: Any = OBJECTS, vocabulary: Vocabulary = dataset.VOCABULARY
) -> list[tuple[str, str, tuple[int, ...]]]:
    found = mentions(text, objects, vocabulary)
    for mention in found:
        assert text[mention.start : mention.end].lower() == mention.word
    return [(mention.word, mention.kind, mention.objects) for mention in found]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a car", [("car", "thing", (0, 2))]),
        ("A Red CAR.", [("red", "colour", (0,)), ("car", "thing", (0,))]),
        ("two cars, in a meadow", [("cars", "thing", (0, 2))]),
        ("what is the plain orange thing?", [("plain", "surface", (3,)), ("orange", "colour", (3,))]),
        ("how many red things are there?", [("red", "colour", (0,))]),
        ("is there a green car?", []),
        ("is there a striped black sofa?", []),
        ("what colour is the dog?", []),
        ("is the small red car plain, striped or leather?", [("red", "colour", (0,)), ("car", "thing", (0,))]),
        (
            "a striped red car on a black leather sofa, on the beach",
            [
                ("striped", "surface", (0,)),
                ("red", "colour", (0,)),
                ("car", "thing", (0,)),
                ("on", "relation", (0, 1)),
                ("black", "colour", (1,)),
                ("leather", "surface", (1,)),
                ("sofa", "thing", (1,)),
            ],
        ),
        ("a fish, to the left of a sofa", [("fish", "thing", (3,)), ("left", "relation", (1, 3)), ("sofa", "thing", (1,))]),
        ("is the fish right of the sofa?", [("fish", "thing", (3,)), ("right", "relation", (1, 3)), ("sofa", "thing", (1,))]),
        ("from left to right: a fish, a sofa", [("fish", "thing", (3,)), ("sofa", "thing", (1,))]),
        ("a sofa on the grass", [("sofa", "thing", (1,))]),
        ("on the beach, a sofa", [("sofa", "thing", (1,))]),
        ("red, a fish", [("fish", "thing", (3,))]),
        ("", []),
    ],
)
def test_words_and_what_they_speak_of(text: str, expected: list[tuple[str, str, tuple[int, ...]]]) -> None:
    assert said(text) == expected


def test_objects_of_other_data() -> None:
    objects = [{"name": "Teddy bear", "color": "beige", "box": [0, 0, 1, 1]}, {"name": "box", "box": [0, 0, 1, 1]}]
    assert said("a beige teddy bear behind two boxes", objects) == [
        ("beige", "colour", (0,)),
        ("teddy bear", "thing", (0,)),
        ("boxes", "thing", (1,)),
    ]
    assert said("a teddy bear next to a box", objects)[1] == ("next to", "relation", (0, 1))
    assert said("anything", []) == []


FIELD = [
    {"name": "tractor", "color": "turquoise", "surface": "rusty", "size": "huge"},
    {"name": "tractor", "color": "beige"},
    {"name": "sheep", "color": "beige"},
    {"name": "hay bale"},
]
WORDS = Vocabulary(("tractor", "sheep", "hay bale", "barn"), {"color": ("turquoise", "beige", "pink")}, {"sheep": "sheep"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a huge turquoise tractor", [("turquoise", "colour", (0,)), ("tractor", "thing", (0,))]),
        ("two tractors, three sheep", [("tractors", "thing", (0, 1)), ("sheep", "thing", (2,))]),
        ("is the pink tractor rusty?", []),  # the data has something pink and a barn, this image has not
        ("a beige barn", []),
        ("a red tractor", [("tractor", "thing", (0, 1))]),  # red is no word of this data
        ("a green car", []),
        ("a sheep on a hay bale", [("sheep", "thing", (2,)), ("on", "relation", (2, 3)), ("hay bale", "thing", (3,))]),
    ],
)
def test_the_vocabulary_is_that_of_the_data(text: str, expected: list[tuple[str, str, tuple[int, ...]]]) -> None:
    assert said(text, FIELD, WORDS) == expected


def test_colors_of_other_data_exchanged() -> None:
    (one,) = swaps("a turquoise tractor", FIELD, WORDS)
    assert (one.after, one.new.objects) == ("a beige tractor", (1,))
    assert [(each.before, each.after) for each in pairs(FIELD, WORDS)] == [
        ("a turquoise tractor", "a beige tractor"),
        ("a beige tractor", "a turquoise tractor"),
    ]


def test_words_of_scenes_are_none_of_other_data() -> None:
    """A leather boat is a boat where leather names nothing; the drawn scenes know "leather" as a surface."""
    boats = [{"name": "boat", "surface": "wooden"}]
    assert said("a leather boat", boats, vocabulary_from_objects(boats)) == [("boat", "thing", (0,))]
    assert said("a leather boat", boats) == []


def test_a_word_that_names_an_object_and_a_color() -> None:
    fruit = [{"name": "orange"}, {"name": "box", "color": "orange"}, {"name": "box", "color": "blue"}]
    assert said("an orange box", fruit, vocabulary_from_objects(fruit)) == [("orange", "colour", (1,)), ("box", "thing", (1,))]
    assert said("an orange, a blue box", fruit, vocabulary_from_objects(fruit)) == [
        ("orange", "thing", (0,)),
        ("blue", "colour", (2,)),
        ("box", "thing", (2,)),
    ]


def test_a_colour_exchanged() -> None:
    (one,) = swaps("is the red car plain?", OBJECTS)
    assert (one.after, one.old.objects, one.new) == ("is the blue car plain?", (0,), Mention("blue", 7, 11, "colour", (2,)))
    # nothing blue is striped; no sofa is red; both cars are spoken of
    assert swaps("a striped red car", OBJECTS) == swaps("a black sofa", OBJECTS) == []
    assert swaps("a red car left of a blue car", OBJECTS) == []
    answers = {each.after for each in swaps("What is a black thing?", OBJECTS)}
    assert answers == {"What is a red thing?", "What is a blue thing?", "What is an orange thing?"}
    (back,) = [each for each in swaps("An orange thing", OBJECTS) if each.new.word == "red"]
    assert (back.after, back.after[back.new.start : back.new.end]) == ("A red thing", "red")
    assert [(each.before, each.after) for each in pairs(OBJECTS)] == [("a red car", "a blue car"), ("a blue car", "a red car")]


def test_scenes_speak_of_what_they_record() -> None:
    """Questions about one thing come with its box: the words must lead to it. The first caption names every thing."""
    kinds: Counter[str] = Counter()
    checked = moved = 0
    for i in range(60):
        _, said_of = dataset.draw_scene(7, "train", i)
        objects = said_of["objects"]
        for asked in said_of["questions"]:
            found = [
                mention for mention in mentions(asked["question"], objects, dataset.VOCABULARY) if mention.kind != "relation"
            ]
            if asked["box"] is not None and asked["type"] != "relation":
                assert {mention.objects for mention in found} == {(index_of(objects, asked["box"]),)}, asked
                checked += 1
            if asked["type"] == "existence" and asked["answers"] == ["no"]:
                assert not found, asked
            moved += len(swaps(asked["question"], objects, dataset.VOCABULARY))
        found = mentions(said_of["captions"][0], objects, dataset.VOCABULARY)
        assert {i for mention in found if mention.kind == "thing" for i in mention.objects} == set(range(len(objects)))
        kinds.update(mention.kind for mention in found)
    assert checked > 100
    assert moved > 50
    assert min(kinds[kind] for kind in ("thing", "colour", "surface", "relation")) > 15


def index_of(objects: list[dict[str, Any]], box: list[int]) -> int:
    return next(i for i, each in enumerate(objects) if each["box"] == box)
