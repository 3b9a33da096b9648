"""Draws the built-in data set of scenes with captions, questions and boxes, and writes it as shards.

A scene is a background (grass, beach, ...) with one to four objects (a red car, a black leather sofa, ...), which stand next
to or on each other. Everything is a function of (seed, split, index) alone, so shards have the same bytes however many
processes draw them.

The splits are `train`, `val` and `test`, and two more for evaluation. In `unseen`, every object is a pair of color and kind
that the other splits neither show nor mention (UNSEEN). `hard` tests retrieval among near misses: its scenes come in groups
of four that differ in one color, in one kind, or in the positions of two objects.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from pretrain.data.scenes.backgrounds import BACKGROUNDS
from pretrain.data.scenes.layout import (
    CLASSES,
    COLORS,
    GROUP_SIZE,
    SIZES,
    SPLITS,
    SURFACES,
    UNSEEN,
    Scene,
    build_scene,
    get_relation,
)
from pretrain.data.scenes.objects import KINDS
from pretrain.data.scenes.render import render_scene
from pretrain.data.scenes.sound_questions import build_sound_questions
from pretrain.data.scenes.sounds import build_sounds, draw_sounds, require_soundfile
from pretrain.data.scenes.text import build_captions, build_negative_captions, build_questions
from pretrain.data.scenes.writer import Members, Progress, write_dataset
from pretrain.data.vocabulary import FILE, Vocabulary
from pretrain.errors import UserError

__all__ = [
    "BACKGROUNDS", "CLASSES", "COLORS", "SIZES", "SPLITS", "SURFACES", "UNSEEN",
    "VOCABULARY", "Scene", "build_scene", "compute_split_sizes", "draw_contact_sheet", "draw_dataset", "draw_scene",
    "draw_scene_with_sounds",
]  # fmt: skip

_VERSION = 2  # of the drawing code: a folder drawn by another version is not continued
_SOUND_VERSION = 2  # of the code that renders sounds

VOCABULARY = Vocabulary(
    CLASSES,
    {"color": COLORS, "surface": SURFACES, "size": tuple(SIZES)},
    {name: kind.plural for name, kind in KINDS.items() if kind.plural},
)
"""All words for objects. vocabularies/scenes.json has the same content, for code that may not import this package."""


def draw_scene(
    seed: int, split: str, index: int, size: int = 96, scale: float = 1.0, num_objects: tuple[int, int] = (1, 4)
) -> tuple[Image.Image, dict[str, Any]]:
    """Draw one scene and return its image, `size` pixels square, and the content of KEY.json.

    The content has these fields:
        captions: KEY.txt is the first.
        foils: negative captions, which are the first caption with one word or relation wrong: caption, changed.
        questions: question, answers, type, box.
        objects: name, color, surface, size; on: index of the object it stands on, or null; box: the visible part, as
            [x0, y0, x1, y1] in pixels.
        relations: subject and object, both indices into `objects`, and relation.
        label: index into CLASSES of the largest object's kind.
        place: the background.
        group, changed, split, seed, index: the scene's position in the data set.
    """
    scene = build_scene(seed, split, index, scale, num_objects)
    image, boxes = render_scene(scene, size)
    count = len(scene.objects)
    largest = max(scene.objects, key=lambda item: item.longer_side)
    return image, {
        "captions": build_captions(scene),
        "foils": build_negative_captions(scene),
        "questions": build_questions(scene, boxes),
        "objects": [
            {
                "name": item.spec.kind,
                "color": item.spec.color,
                "surface": item.spec.surface,
                "size": item.spec.size,
                "on": item.supported_by,
                "box": box,
            }
            for item, box in zip(scene.objects, boxes, strict=True)
        ],
        "relations": [
            {"subject": i, "relation": get_relation(scene, i, j), "object": j}
            for i in range(count)
            for j in range(count)
            if i != j
        ],
        "label": CLASSES.index(largest.spec.kind),
        "place": scene.background,
        "group": index // GROUP_SIZE if split == "hard" else None,
        "changed": scene.changed or None,
        "split": split,
        "seed": seed,
        "index": index,
    }


def draw_scene_with_sounds(
    seed: int, split: str, index: int, size: int = 96, scale: float = 1.0, num_objects: tuple[int, int] = (1, 4)
) -> tuple[Image.Image, dict[str, Any], Members]:
    """Draw one scene and return what draw_scene does, the fields of draw_sounds and sound_questions added, and KEY.flac."""
    image, content = draw_scene(seed, split, index, size, scale, num_objects)
    scene = build_scene(seed, split, index, scale, num_objects)
    flac, fields = draw_sounds(scene)
    questions = build_sound_questions(scene, build_sounds(scene))
    return image, {**content, **fields, "sound_questions": questions}, {"flac": flac}


def draw_contact_sheet(
    n: int = 100,
    size: int = 96,
    seed: int = 0,
    split: str = "train",
    scale: float = 1.0,
    num_objects: tuple[int, int] = (1, 4),
) -> Image.Image:
    """Draw the first `n` scenes of a split side by side into one image."""
    across, step = math.ceil(math.sqrt(n)), size + 4
    sheet = Image.new("RGB", (across * step + 4, math.ceil(n / across) * step + 4), "white")
    for i in range(n):
        image, _ = render_scene(build_scene(seed, split, i, scale, num_objects), size)
        sheet.paste(image, (4 + i % across * step, 4 + i // across * step))
    return sheet


# ---------------------------------------------------------------------------------------------------------------------
# Writing the data set


@dataclass(frozen=True)
class _Settings:
    """All settings that determine the drawn bytes. They are stored in scenes.json next to the shards."""

    version: int
    size: int
    seed: int
    scale: float
    things: tuple[int, int]


def compute_split_sizes(num: int) -> dict[str, int]:
    """Return the number of scenes in each split for `num` training scenes.

    The other splits have a tenth of `num`, but at least 100 and at most 2,000, and never more than `num`.
    """
    size = min(max(num // 10, 100), 2000, num)
    return {"train": num, "val": size, "test": size, "unseen": size, "hard": max(GROUP_SIZE, size - size % GROUP_SIZE)}


def draw_dataset(
    out: str | Path,
    num: int | dict[str, int] = 4000,
    size: int = 96,
    seed: int = 0,
    workers: int | None = None,
    *,
    scale: float = 1.0,
    num_objects: tuple[int, int] = (1, 4),
    sound: bool = False,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Draw the data set into `out`/{train,val,test,unseen,hard}-0000.tar ..., 1,000 scenes per shard.

    It also writes classes.txt, one name per line in the order of `label`, and vocabulary.json, all words for objects. A shard
    is complete or it does not exist. Called again with the same settings, it draws only the missing shards.

    Args:
        num: number of training scenes (compute_split_sizes gives the other splits), or the number of each wanted split.
        size: side of the images in pixels, 64 to 2,048.
        workers: processes that draw; None means one per core.
        scale: multiplies the size of every object: 0.25 gives small objects in large images.
        num_objects: least and largest number of objects in a scene, within 1 to 4 (`hard` has two or three, where allowed).
        sound: add KEY.flac and the fields that draw_sounds returns. Everything else has the same bytes without it.
        progress: called with (scenes done, all scenes).
    Returns:
        number of scenes in each split.
    Raises:
        UserError: a setting is out of range, the folder holds other shards, or it cannot be written; soundfile is missing.
    """
    counts = _check_settings(num, size, scale, num_objects)
    settings = asdict(_Settings(_VERSION, size, seed, scale, (num_objects[0], num_objects[1])))
    if sound:
        require_soundfile()
        settings["sound"] = _SOUND_VERSION
    draw = partial(draw_scene_with_sounds if sound else draw_scene, seed, size=size, scale=scale, num_objects=num_objects)
    texts = {"classes.txt": "".join(f"{name}\n" for name in CLASSES), FILE: VOCABULARY.to_json()}
    write_dataset(Path(out), "scenes.json", settings, counts, draw, texts, workers, progress)
    return counts


def _check_settings(num: int | dict[str, int], size: int, scale: float, num_objects: tuple[int, int]) -> dict[str, int]:
    """Return the number of scenes in each split. Raises UserError for a setting that is out of range."""
    counts = compute_split_sizes(num) if isinstance(num, int) else dict(num)
    if unknown := sorted(set(counts) - set(SPLITS)):
        raise UserError(f"no split is called {unknown[0]!r}; the splits are {', '.join(SPLITS)}")
    if bad := [f"{split}={count}" for split, count in counts.items() if count < 1]:
        raise UserError(f"number of scenes: {bad[0]} must be at least 1")
    check_image_size(size, scale)
    if not 1 <= num_objects[0] <= num_objects[1] <= 4:
        least, most = num_objects
        raise UserError(f"things {least} to {most}: a scene has 1 to 4 things; give the lower number first")
    if "hard" in counts and num_objects[1] < 2:
        counts.pop("hard")  # a single object cannot be swapped with another
    return counts


def check_image_size(size: int, scale: float) -> None:
    """Raise UserError for a side of the images or a scale of the objects that is out of range."""
    if not 64 <= size <= 2048:
        raise UserError(f"size {size} must be 64 to 2048 pixels")
    if not 0.1 <= scale <= 1:
        raise UserError(f"scale {scale} must be 0.1 to 1")
    if scale * size < 48:
        raise UserError(
            f"scale {scale} at size {size}: objects are too small to recognize; scale times size must be at least 48"
        )
