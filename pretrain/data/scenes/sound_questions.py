"""Questions about what is heard in a scene, with answers. A sound tells kinds by their patterns, colors by their pitch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from pretrain.data.scenes.layout import CLASSES, Scene
from pretrain.data.scenes.sounds import Sound
from pretrain.data.scenes.text import add_article


def build_sound_questions(scene: Scene, sounds: Sequence[Sound]) -> list[dict[str, Any]]:
    """Return questions with their `answers`, `type` and `span`, in the order of their types.

    Types: order (what is heard first, last, after another), `colour`, count, existence (one yes and one no). `span` is when the
    sound asked about is heard, [start, end] in seconds; None if it is not exactly one sound.
    """
    rng = scene.build_rng("sound questions")
    specs = [scene.objects[sound.index].spec for sound in sounds]
    kinds = [spec.kind for spec in specs]
    counts = Counter(kinds)
    out: list[dict[str, Any]] = []

    def add(type_: str, question: str, answer: str, sound: Sound | None) -> None:
        span = None if sound is None else [sound.start, sound.end]
        out.append({"question": question, "answers": [answer], "type": type_, "span": span})

    if len(sounds) > 1:
        last = max(range(len(sounds)), key=lambda i: sounds[i].end)
        add("order", "what is heard first?", kinds[0], sounds[0])
        add("order", "what is heard last?", kinds[last], sounds[last])
        followed = [i for i in range(len(sounds) - 1) if counts[kinds[i]] == 1 and sounds[i + 1].start >= sounds[i].end]
        if followed:
            i = rng.choice(followed)
            add("order", f"what is heard after the {kinds[i]}?", kinds[i + 1], sounds[i + 1])
    for i in rng.shuffled([i for i, kind in enumerate(kinds) if counts[kind] == 1])[:2]:
        add("colour", f"what colour is the {kinds[i]}?", specs[i].color, sounds[i])
    add("count", "how many things are heard?", str(len(sounds)), None)
    i = rng.randbelow(len(sounds))
    add("existence", f"is {add_article(kinds[i])} heard?", "yes", sounds[i] if counts[kinds[i]] == 1 else None)
    add("existence", f"is {add_article(rng.choice([kind for kind in CLASSES if kind not in counts]))} heard?", "no", None)
    return out
