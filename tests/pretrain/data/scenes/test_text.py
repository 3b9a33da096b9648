"""Captions and answers of drawn scenes are true, and questions alone do not reveal the answers."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from functools import cache
from typing import Any

import numpy as np
import pytest

from pretrain.data.scenes.dataset import BACKGROUNDS, CLASSES, COLORS, SPLITS, SURFACES, UNSEEN, build_scene, draw_scene
from pretrain.data.scenes.text import build_captions, build_negative_captions, build_questions

KIND = {**{kind: kind for kind in CLASSES}, **{f"{kind}s": kind for kind in CLASSES}}
NUMBER = {"two": 2, "three": 3, "four": 4}
OBJECT = re.compile(
    r"\b(?:(two|three|four) |an? )?(?:(small|medium|large) )?(?:(plain|striped) )?"
    rf"({'|'.join(COLORS)})(?: (leather))? ({'|'.join(sorted(KIND, key=len, reverse=True))})\b"
)


@cache
def describe_one(split: str, index: int) -> dict[str, Any]:
    """Return the description of a scene that is not drawn. A box holds its object's index four times."""
    scene = build_scene(0, split, index)
    specs = [item.spec for item in scene.objects]
    return {
        "objects": [{"name": x.kind, "color": x.color, "surface": x.surface, "size": x.size} for x in specs],
        "place": scene.background,
        "captions": build_captions(scene),
        "foils": build_negative_captions(scene),
        "questions": build_questions(scene, [[i] * 4 for i in range(len(specs))]),
        "columns": [item.column for item in scene.objects],
        "on": [item.supported_by for item in scene.objects],
        "changed": scene.changed,
    }


def describe(split: str, count: int) -> list[dict[str, Any]]:
    """Return the descriptions of the first `count` scenes of a split."""
    return [describe_one(split, index) for index in range(count)]


def find_objects(text: str) -> list[tuple[str, str, str | None, str | None]]:
    """Return (kind, color, surface or None, size or None) of each object that a text names.

    "two red cars" gives two objects.
    """
    out = []
    for number, size, before, color, after, kind in OBJECT.findall(text):
        out += [(KIND[kind], color, before or after or None, size or None)] * NUMBER.get(number, 1)
    return out


def is_match(named: tuple[str, str, str | None, str | None], item: dict[str, Any]) -> bool:
    """Return whether an object of the scene can be the one that a text names."""
    kind, color, surface, size = named
    return (
        (kind, color) == (item["name"], item["color"]) and surface in (None, item["surface"]) and size in (None, item["size"])
    )


def infer_relation(a: list[int], b: list[int]) -> str:
    """Return the relation of `a` to `b` from their boxes alone.

    Objects are next to each other if their boxes hardly share columns of pixels; else one stands on the other.
    """
    shared = min(a[2], b[2]) - max(a[0], b[0])
    if shared <= 0.2 * min(a[2] - a[0], b[2] - b[0]):
        return "left of" if a[0] + a[2] < b[0] + b[2] else "right of"
    return "on" if a[3] < b[3] else "under"  # the lower edge of `a` is higher


@pytest.mark.parametrize("split", SPLITS)
def test_captions_name_only_objects_of_the_scene(split: str) -> None:
    for scene in describe(split, 400):
        assert len(set(scene["captions"])) == len(scene["captions"])
        for text in scene["captions"]:
            named, unmatched = find_objects(text), list(scene["objects"])
            assert named, text
            # In a caption of several objects, one that is not called striped or leather is plain
            is_complete = text == scene["captions"][0] or len(named) > 1
            for kind, color, surface, size in sorted(named, key=lambda x: x[3] is None):
                expected = (kind, color, surface or ("plain" if is_complete else None), size)
                match = next((x for x in unmatched if is_match(expected, x)), None)
                assert match, (text, expected)
                unmatched.remove(match)
            # Each color and kind in the text belongs to one of the objects found
            words = re.findall(r"[a-z]+", text)
            assert sum(w in COLORS for w in words) == len(OBJECT.findall(text))
            assert sum(w in KIND for w in words) == len(OBJECT.findall(text))
            backgrounds = [
                name for name, x in BACKGROUNDS.items() if any(re.search(rf"\b{phrase}\b", text) for phrase in x.phrases)
            ]
            assert backgrounds in ([], [scene["place"]]), text
        assert len(find_objects(scene["captions"][0])) == len(scene["objects"])


def test_the_first_caption_states_the_true_relations() -> None:
    counts = Counter()
    for scene in describe("train", 600):
        text, order = scene["captions"][0], []
        for named in find_objects(text):
            order.append([i for i, x in enumerate(scene["objects"]) if is_match(named, x)])
        if any(len(x) != 1 for x in order):
            continue  # two objects with the same name
        columns = [scene["columns"][x[0]] for x in order]
        if scene["columns"] == [0, 0]:
            i, j = (x[0] for x in order)
            first, second = OBJECT.finditer(text)
            stated = text[first.end() : second.start()].strip()
            assert scene["on"][i if stated == "on" else j] == (j if stated == "on" else i), text
            counts[stated] += 1
        if "from left to right" in text or "left of" in text:
            assert columns == sorted(columns), text
            counts["left"] += 1
        elif "right of" in text:
            assert columns == sorted(columns, reverse=True), text
            counts["right"] += 1
    assert min(counts.values()) > 20
    assert len(counts) == 4


def test_negative_captions_are_wrong_in_one_respect() -> None:
    counts = Counter()
    for scene in describe("train", 300) + describe("hard", 100):
        objects = Counter((x["name"], x["color"], x["surface"]) for x in scene["objects"])
        pairs = Counter((kind, color) for kind, color, _ in objects.elements())
        for negative in scene["foils"]:
            named = Counter((kind, color) for kind, color, _, _ in find_objects(negative["caption"]))
            counts[negative["changed"]] += 1
            assert negative["caption"] not in scene["captions"]
            if negative["changed"] == "relation":
                assert named == pairs
            else:
                ((removed, _),), ((added, _),) = (pairs - named).items(), (named - pairs).items()
                changed = 1 if negative["changed"] == "colour" else 0  # of (kind, color) only this one changed
                assert removed[1 - changed] == added[1 - changed]
    assert set(counts) == {"colour", "kind", "relation"}


def find_matching(objects: list[dict[str, Any]], words: str) -> list[int]:
    """Return the indices of the objects that "striped red car", "red thing", "cars", "things", ... fits."""
    out = []
    for i, item in enumerate(objects):
        true_words = {item["name"], item["color"], item["surface"], "thing"}
        if all(KIND.get(word, word.removesuffix("s") if word == "things" else word) in true_words for word in words.split()):
            out.append(i)
    return out


def find_only(objects: list[dict[str, Any]], words: str) -> int:
    """Return the index of the one object that fits."""
    (i,) = find_matching(objects, words)
    return i


@pytest.mark.parametrize("split", SPLITS)
def test_answers_follow_from_the_description(split: str) -> None:
    types = Counter()
    for index in range(100):
        _, content = draw_scene(0, split, index, size=64)
        objects = content["objects"]
        boxes = [x["box"] for x in objects]
        for item in content["questions"]:
            question, (answer,), box = item["question"], item["answers"], item["box"]
            types[item["type"]] += 1
            if m := re.fullmatch(r"what colour is the (.+)\?", question):
                i = find_only(objects, m[1])
                assert (item["type"], answer, box) == ("colour", objects[i]["color"], boxes[i])
            elif m := re.fullmatch(r"what is the (.+)\?", question):
                i = find_only(objects, m[1])
                assert (item["type"], answer, box) == ("kind", objects[i]["name"], boxes[i])
            elif m := re.fullmatch(r"is the (.+) plain, striped or leather\?", question):
                i = find_only(objects, m[1])
                assert (item["type"], answer, box) == ("surface", objects[i]["surface"], boxes[i])
            elif m := re.fullmatch(r"how many (.+) are there\?", question):
                assert (item["type"], answer, box) == ("count", str(len(find_matching(objects, m[1]))), None)
            elif m := re.fullmatch(r"is there an? (.+)\?", question):
                matches = find_matching(objects, m[1])
                assert (item["type"], answer) == ("existence", "yes" if matches else "no")
                assert box == (boxes[matches[0]] if len(matches) == 1 else None)
            elif m := re.fullmatch(r"where is the (.+), seen from the (.+)\?", question):
                i, j = find_only(objects, m[1]), find_only(objects, m[2])
                actual = infer_relation(boxes[i], boxes[j])
                assert (item["type"], answer, box) == ("relation", actual.removesuffix(" of"), boxes[i])
            elif m := re.fullmatch(r"is the (.+) (on|under|left of|right of) the (.+)\?", question):
                i, j = find_only(objects, m[1]), find_only(objects, m[3])
                assert (item["type"], box) == ("relation", boxes[i])
                assert answer == ("yes" if infer_relation(boxes[i], boxes[j]) == m[2] else "no")
            else:
                pytest.fail(question)
        for r in content["relations"]:
            assert r["relation"] == infer_relation(boxes[r["subject"]], boxes[r["object"]])
        largest = CLASSES[content["label"]]
        assert largest in {x["name"] for x in objects}
    assert set(types) == {"colour", "kind", "surface", "count", "existence", "relation"}


def test_a_question_alone_reveals_little_of_its_answer() -> None:
    """Answering each wording with its most frequent training answer is about as good as chance."""
    train_answers: dict[str, Counter[str]] = defaultdict(Counter)
    for scene in describe("train", 2000):
        for item in scene["questions"]:
            train_answers[item["question"]][item["answers"][0]] += 1
    is_correct: dict[str, list[bool]] = defaultdict(list)
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for scene in describe("test", 1000):
        for item in scene["questions"]:
            guess = train_answers[item["question"]].most_common(1)
            is_correct[item["type"]].append(bool(guess) and guess[0][0] == item["answers"][0])
            answers[item["type"]][item["answers"][0]] += 1
    accuracy = {kind: float(np.mean(x)) for kind, x in is_correct.items()}
    ceilings = {"colour": 0.2, "kind": 0.14, "surface": 0.42, "count": 0.4, "existence": 0.53, "relation": 0.42}
    assert all(accuracy[kind] < ceiling for kind, ceiling in ceilings.items()), accuracy
    assert answers["existence"]["yes"] == answers["existence"]["no"]
    assert set(answers["colour"]) == set(COLORS)
    assert set(answers["kind"]) == set(CLASSES)
    assert set(answers["surface"]) == set(SURFACES)
    for kind in ("colour", "kind", "surface"):
        counts = answers[kind].values()
        assert max(counts) < 1.35 * min(counts), answers[kind]
    backgrounds = Counter(scene["place"] for scene in describe("train", 800))
    assert set(backgrounds) == set(BACKGROUNDS)
    assert min(backgrounds.values()) > 60


# ---------------------------------------------------------------------------------------------------------------------
# The splits


def test_only_the_unseen_split_shows_or_mentions_unseen_pairs() -> None:
    assert {kind for _, kind in UNSEEN} == set(CLASSES)
    assert {color for color, _ in UNSEEN} == set(COLORS)
    for split in SPLITS:
        for scene in describe(split, 400):
            pairs = {(x["color"], x["name"]) for x in scene["objects"]}
            assert pairs <= UNSEEN if split == "unseen" else not pairs & UNSEEN
            if split != "unseen":
                texts = scene["captions"] + [x["caption"] for x in scene["foils"]] + [x["question"] for x in scene["questions"]]
                named = {(color, kind) for text in texts for kind, color, _, _ in find_objects(text)}
                assert not named & UNSEEN


def test_unseen_asks_about_absent_unseen_pairs_too() -> None:
    counts = Counter()
    for scene in describe("unseen", 500):
        for item in scene["questions"]:
            if item["type"] == "existence" and (named := find_objects(item["question"])):
                counts[(named[0][1], named[0][0]) in UNSEEN, item["answers"][0]] += 1
    assert set(counts) == {(True, "yes"), (True, "no")}
    assert counts[True, "no"] > 100


def test_scenes_of_a_hard_group_differ_in_one_respect() -> None:
    scenes = describe("hard", 400)
    for first in range(0, 400, 4):
        group = scenes[first : first + 4]
        assert [x["changed"] for x in group] == ["", "colour", "kind", "relation"]
        assert len({x["captions"][0] for x in group}) == 4
        assert len({x["place"] for x in group}) == 1
        base, color, kind, relation = ([(x["color"], x["surface"], x["name"]) for x in s["objects"]] for s in group)
        assert [sum(a != b for a, b in zip(base, other, strict=True)) for other in (color, kind)] == [1, 1]
        assert [x[1:] for x in base] == [x[1:] for x in color]
        assert [x[:2] for x in base] == [x[:2] for x in kind]
        assert sorted(base) == sorted(relation)
        assert base != relation


def test_scenes_are_the_same_in_all_versions_of_python() -> None:
    """The scenes of a seed never change by accident.

    If they change on purpose, raise `_VERSION` in dataset.py.
    """
    digest = hashlib.sha256()
    for split in SPLITS:
        for scene in describe(split, 40):
            digest.update(json.dumps(scene, sort_keys=True).encode())
    assert digest.hexdigest()[:16] == "9cc88bb28a067c69"
