"""Questions about drawn sounds: each answer is found again in what the json says of the sounds."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from pretrain.data.scenes.dataset import draw_scene_with_sounds


def find_answer(question: str, sounds: list[dict[str, Any]], objects: list[dict[str, Any]]) -> str:
    """Answer a question by its words alone."""
    names = [sound["name"] for sound in sounds]
    if question == "what is heard first?":
        return str(min(sounds, key=lambda sound: sound["start"])["name"])
    if question == "what is heard last?":
        return str(max(sounds, key=lambda sound: sound["end"])["name"])
    if question == "how many things are heard?":
        return str(len(sounds))
    if match := re.fullmatch(r"what is heard after the (\w+)\?", question):
        (before,) = (sound for sound in sounds if sound["name"] == match[1])
        return str(min((s for s in sounds if s["start"] >= before["end"]), key=lambda sound: sound["start"])["name"])
    if match := re.fullmatch(r"what colour is the (\w+)\?", question):
        (sound,) = (sound for sound in sounds if sound["name"] == match[1])
        return str(objects[sound["object"]]["color"])
    match = re.fullmatch(r"is an? (\w+) heard\?", question)
    assert match, question
    return "yes" if match[1] in names else "no"


def test_answers_are_what_is_heard() -> None:
    types: Counter[str] = Counter()
    for index in range(150):
        for split in ("train", "unseen"):
            _, content, _ = draw_scene_with_sounds(3, split, index, 64)
            by_span = {(sound["start"], sound["end"]): sound["name"] for sound in content["sounds"]}
            for item in content["sound_questions"]:
                assert item["answers"] == [find_answer(item["question"], content["sounds"], content["objects"])], item
                types[item["type"]] += 1
                if item["span"] is not None:
                    name = by_span[tuple(item["span"])]
                    assert name in item["question"] or [name] == item["answers"]
    assert set(types) == {"order", "colour", "count", "existence"}
    assert types["existence"] == 2 * types["count"] == 600
