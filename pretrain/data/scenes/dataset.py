"""Draws the built-in data set of scenes with captions, questions and boxes, and writes it as shards.

A scene is a background (grass, beach, ...) with one to four objects (a red car, a black leather sofa, ...), which stand next
to or on each other. Everything is a function of (seed, split, index) alone, so shards have the same bytes however many
processes draw them.

The splits are `train`, `val` and `test`, and two more for evaluation. In `unseen`, every object is a pair of color and kind
that the other splits neither show nor mention (UNSEEN). `hard` tests retrieval among near misses: its scenes come in groups
of four that differ in one color, in one kind, or in the positions of two objects.
"""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import os
import tarfile
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass
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
from pretrain.data.scenes.text import build_captions, build_negative_captions, build_questions
from pretrain.data.vocabulary import FILE, Vocabulary
from pretrain.errors import UserError
from pretrain.runtime.files import flush, partial_path

__all__ = [
    "BACKGROUNDS", "CLASSES", "COLORS", "SIZES", "SPLITS", "SURFACES", "UNSEEN",
    "VOCABULARY", "Scene", "build_scene", "compute_split_sizes", "draw_contact_sheet", "draw_dataset", "draw_scene",
]  # fmt: skip

SHARD_SIZE = 1000  # scenes
_CHUNK = 50  # scenes that a process draws in one call
_VERSION = 2  # of the drawing code: a folder drawn by another version is not continued
_QUALITY = 92  # JPEG, without chroma subsampling because stripes are two pixels wide

VOCABULARY = Vocabulary(
    CLASSES,
    {"color": COLORS, "surface": SURFACES, "size": tuple(SIZES)},
    {name: kind.plural for name, kind in KINDS.items() if kind.plural},
)
"""All words for objects. vocabularies/scenes.json has the same content, for code that may not import this package."""

Progress = Callable[[int, int], None]
Members = dict[str, bytes]
"""The files of one sample, by extension."""


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
        progress: called with (scenes done, all scenes).
    Returns:
        number of scenes in each split.
    Raises:
        UserError: a setting is out of range, the folder holds other shards, or it cannot be written.
    """
    counts = _check_settings(num, size, scale, num_objects)
    folder = Path(out)
    settings = _Settings(_VERSION, size, seed, scale, (num_objects[0], num_objects[1]))
    try:
        _claim_folder(folder, settings, counts)
        shards = [
            (folder / f"{split}-{first // SHARD_SIZE:04d}.tar", split, first, min(first + SHARD_SIZE, count))
            for split, count in counts.items()
            for first in range(0, count, SHARD_SIZE)
        ]
        missing = [shard for shard in shards if not shard[0].exists()]
        total = sum(counts.values())
        done = total - sum(last - first for _, _, first, last in missing)
        with closing(_draw_chunks(settings, missing, workers)) as chunks:
            for path, _, first, last in missing:
                with _ShardWriter(path) as writer:
                    for start in range(first, last, _CHUNK):
                        for offset, members in enumerate(next(chunks)):
                            writer.add(f"{start + offset:07d}", members)
                        done += min(_CHUNK, last - start)
                        if progress:
                            progress(done, total)
        for name, text in (("classes.txt", "".join(f"{name}\n" for name in CLASSES)), (FILE, VOCABULARY.to_json())):
            if not (folder / name).exists():
                _write_text(folder / name, text)
    except OSError as error:
        raise UserError(f"cannot draw into {folder}: {error.strerror or error}") from error
    except BrokenProcessPool as error:
        raise UserError(
            "a process that drew scenes died, perhaps because memory ran out; try again with fewer workers"
        ) from error
    return counts


def _check_settings(num: int | dict[str, int], size: int, scale: float, num_objects: tuple[int, int]) -> dict[str, int]:
    """Return the number of scenes in each split. Raises UserError for a setting that is out of range."""
    counts = compute_split_sizes(num) if isinstance(num, int) else dict(num)
    if unknown := sorted(set(counts) - set(SPLITS)):
        raise UserError(f"no split is called {unknown[0]!r}; the splits are {', '.join(SPLITS)}")
    if bad := [f"{split}={count}" for split, count in counts.items() if count < 1]:
        raise UserError(f"number of scenes: {bad[0]} must be at least 1")
    if not 64 <= size <= 2048:
        raise UserError(f"size {size} must be 64 to 2048 pixels")
    if not 0.1 <= scale <= 1:
        raise UserError(f"scale {scale} must be 0.1 to 1")
    if scale * size < 48:
        raise UserError(
            f"scale {scale} at size {size}: objects are too small to recognize; scale times size must be at least 48"
        )
    if not 1 <= num_objects[0] <= num_objects[1] <= 4:
        least, most = num_objects
        raise UserError(f"things {least} to {most}: a scene has 1 to 4 things; give the lower number first")
    if "hard" in counts and num_objects[1] < 2:
        counts.pop("hard")  # a single object cannot be swapped with another
    return counts


def _claim_folder(folder: Path, settings: _Settings, counts: dict[str, int]) -> None:
    """Write the settings to scenes.json in the folder.

    Raises:
        UserError: the folder holds scenes with other settings, or other shards.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "scenes.json"
    expected = json.dumps({**asdict(settings), "counts": counts}, indent=1)
    if path.exists():
        if json.loads(expected) != _read_json(path):
            raise UserError(f"{folder} holds scenes drawn with other settings (see {path}): choose another folder")
        return
    if others := sorted(shard.name for split in SPLITS for shard in folder.glob(f"{split}-*.tar")):
        raise UserError(f"{folder} holds other shards ({others[0]}): choose another folder")
    _write_text(path, expected)


def _write_text(path: Path, text: str) -> None:
    """Write a small text file atomically."""
    partial = partial_path(path)
    partial.write_text(text)
    partial.replace(path)


def _read_json(path: Path) -> Any:
    """Return the content of a JSON file, or None if it is not JSON."""
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


def _draw_chunk(settings: _Settings, split: str, first: int, last: int) -> list[Members]:
    """Draw scenes `first` to `last` - 1 and return the files of each."""
    out = []
    for index in range(first, last):
        image, content = draw_scene(settings.seed, split, index, settings.size, settings.scale, settings.things)
        jpeg = io.BytesIO()
        image.save(jpeg, "JPEG", quality=_QUALITY, subsampling=0)
        text = json.dumps(content, separators=(",", ":")).encode()
        out.append({"jpg": jpeg.getvalue(), "txt": content["captions"][0].encode(), "json": text})
    return out


def _draw_chunks(
    settings: _Settings, shards: list[tuple[Path, str, int, int]], workers: int | None
) -> Generator[list[Members], None, None]:
    """Yield the chunks of all shards in order, while `workers` processes draw ahead."""
    jobs = [
        (split, start, min(start + _CHUNK, last)) for _, split, first, last in shards for start in range(first, last, _CHUNK)
    ]
    workers = min(len(os.sched_getaffinity(0)) if workers is None else workers, math.ceil(len(jobs) / 2))
    if workers < 2:
        for job in jobs:
            yield _draw_chunk(settings, *job)
        return
    # spawn, not fork: the caller may hold threads or a device
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        ahead: deque[Future[list[Members]]] = deque()
        try:
            for job in jobs:
                ahead.append(pool.submit(_draw_chunk, settings, *job))
                if len(ahead) >= 4 * workers:  # a bounded number of finished chunks in memory
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class _ShardWriter:
    """Writes one shard under a temporary name until it is complete. The same samples give the same bytes."""

    def __init__(self, path: Path) -> None:
        self._path, self._partial = path, partial_path(path)

    def __enter__(self) -> _ShardWriter:
        self._file = open(self._partial, "wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        return self

    def add(self, key: str, members: Members) -> None:
        for extension, data in members.items():
            info = tarfile.TarInfo(f"{key}.{extension}")  # owner 0, time 0, mode 0644
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._tar.close()
                self._file.flush()
                flush(self._partial)
            self._file.close()
            if kind is None:
                self._partial.replace(self._path)
        finally:
            self._partial.unlink(missing_ok=True)
