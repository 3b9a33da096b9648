"""Words and the objects they name, compared with hand-labeled sentences and records of drawn scenes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from finetune.grounding.phrases import Mention, build_caption_swaps, find_color_swaps, find_mentions
from pretrain.data.scenes import dataset
from pretrain.data.vocabulary import Vocabulary, vocabulary_from_objects

OBJECTS = [
    {"name": "car", "color": "red", "surface": "striped", "size": "small"},
    {"name": "sofa", "color": "black", "surface": "leather", "size": "large"},
    {"name": "car", "color": "blue", "surface": "plain", "size": "small"},
    {"name": "fish", "color": "orange", "surface": "plain", "size": "medium"},
]


def list_mentions(
    text: str, objects: Any = OBJECTS, vocabulary: Vocabulary = dataset.VOCABULARY
) -> list[tuple[str, str, tuple[int, ...]]]:
    mentions = find_mentions(text, objects, vocabulary)
    for mention in mentions:
        assert text[mention.start : mention.end].lower() == mention.word
    return [(mention.word, mention.kind, mention.objects) for mention in mentions]


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
def test_words_name_objects(text: str, expected: list[tuple[str, str, tuple[int, ...]]]) -> None:
    assert list_mentions(text) == expected


def test_objects_of_another_data_set() -> None:
    objects = [{"name": "Teddy bear", "color": "beige", "box": [0, 0, 1, 1]}, {"name": "box", "box": [0, 0, 1, 1]}]
    assert list_mentions("a beige teddy bear behind two boxes", objects) == [
        ("beige", "colour", (0,)),
        ("teddy bear", "thing", (0,)),
        ("boxes", "thing", (1,)),
    ]
    assert list_mentions("a teddy bear next to a box", objects)[1] == ("next to", "relation", (0, 1))
    assert list_mentions("anything", []) == []


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
        ("is the pink tractor rusty?", []),  # other samples have something pink and a barn, this one does not
        ("a beige barn", []),
        ("a red tractor", [("tractor", "thing", (0, 1))]),  # red is not a word of this data set
        ("a green car", []),
        ("a sheep on a hay bale", [("sheep", "thing", (2,)), ("on", "relation", (2, 3)), ("hay bale", "thing", (3,))]),
    ],
)
def test_the_vocabulary_is_that_of_the_data_set(text: str, expected: list[tuple[str, str, tuple[int, ...]]]) -> None:
    assert list_mentions(text, FIELD, WORDS) == expected


def test_colors_of_another_data_set_are_exchanged() -> None:
    (swap,) = find_color_swaps("a turquoise tractor", FIELD, WORDS)
    assert (swap.after, swap.new.objects) == ("a beige tractor", (1,))
    assert [(swap.before, swap.after) for swap in build_caption_swaps(FIELD, WORDS)] == [
        ("a turquoise tractor", "a beige tractor"),
        ("a beige tractor", "a turquoise tractor"),
    ]


def test_words_of_scenes_do_not_apply_to_another_data_set() -> None:
    """Where "leather" is no known word, a leather boat is a boat; in drawn scenes "leather" is a surface."""
    boats = [{"name": "boat", "surface": "wooden"}]
    assert list_mentions("a leather boat", boats, vocabulary_from_objects(boats)) == [("boat", "thing", (0,))]
    assert list_mentions("a leather boat", boats) == []


def test_a_word_that_names_an_object_and_a_color() -> None:
    fruit = [{"name": "orange"}, {"name": "box", "color": "orange"}, {"name": "box", "color": "blue"}]
    assert list_mentions("an orange box", fruit, vocabulary_from_objects(fruit)) == [
        ("orange", "colour", (1,)),
        ("box", "thing", (1,)),
    ]
    assert list_mentions("an orange, a blue box", fruit, vocabulary_from_objects(fruit)) == [
        ("orange", "thing", (0,)),
        ("blue", "colour", (2,)),
        ("box", "thing", (2,)),
    ]


def test_a_color_is_exchanged() -> None:
    (swap,) = find_color_swaps("is the red car plain?", OBJECTS)
    assert (swap.after, swap.old.objects, swap.new) == ("is the blue car plain?", (0,), Mention("blue", 7, 11, "colour", (2,)))
    # nothing blue is striped; no sofa is red; both cars are named
    assert find_color_swaps("a striped red car", OBJECTS) == find_color_swaps("a black sofa", OBJECTS) == []
    assert find_color_swaps("a red car left of a blue car", OBJECTS) == []
    answers = {swap.after for swap in find_color_swaps("What is a black thing?", OBJECTS)}
    assert answers == {"What is a red thing?", "What is a blue thing?", "What is an orange thing?"}
    (back,) = [swap for swap in find_color_swaps("An orange thing", OBJECTS) if swap.new.word == "red"]
    assert (back.after, back.after[back.new.start : back.new.end]) == ("A red thing", "red")
    assert [(swap.before, swap.after) for swap in build_caption_swaps(OBJECTS)] == [
        ("a red car", "a blue car"),
        ("a blue car", "a red car"),
    ]


def test_texts_of_scenes_name_the_recorded_objects() -> None:
    """The words of a question about one object name its box; the first caption names every object."""
    kinds: Counter[str] = Counter()
    checked = moved = 0
    for i in range(60):
        _, record = dataset.draw_scene(7, "train", i)
        objects = record["objects"]
        for question in record["questions"]:
            named = [
                mention
                for mention in find_mentions(question["question"], objects, dataset.VOCABULARY)
                if mention.kind != "relation"
            ]
            if question["box"] is not None and question["type"] != "relation":
                assert {mention.objects for mention in named} == {(index_of(objects, question["box"]),)}, question
                checked += 1
            if question["type"] == "existence" and question["answers"] == ["no"]:
                assert not named, question
            moved += len(find_color_swaps(question["question"], objects, dataset.VOCABULARY))
        mentions = find_mentions(record["captions"][0], objects, dataset.VOCABULARY)
        assert {i for mention in mentions if mention.kind == "thing" for i in mention.objects} == set(range(len(objects)))
        kinds.update(mention.kind for mention in mentions)
    assert checked > 100
    assert moved > 50
    assert min(kinds[kind] for kind in ("thing", "colour", "surface", "relation")) > 15


def index_of(objects: list[dict[str, Any]], box: list[int]) -> int:
    return next(i for i, item in enumerate(objects) if item["box"] == box)
