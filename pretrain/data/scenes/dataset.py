"""The built-in data set: drawn scenes with captions, questions and boxes.

A scene is a place (grass, beach, room, ...) with one to four things (a red car, a black leather sofa, ...) that stand
on or beside each other. Everything follows from (seed, split, index) alone, so that shards are the same byte for byte
however many processes draw them.

    scene_plan.py     what is in a scene and where          scene_things.py, scene_pen.py   how each kind is drawn
    scene_words.py    captions, questions, wrong captions   scene_places.py   how each place is drawn
    scene_paint.py    the picture and the boxes             scene_dice.py     random choices that never change

Splits: `train`, `val`, `test`; `unseen`, where every thing is a pair of colour and kind that the others neither show
nor speak of (UNSEEN); `hard`, in groups of four scenes that differ in one colour, one kind, or two things' places
exchanged, for retrieval among near misses.
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

from pretrain.data.scenes.backgrounds import PLACES
from pretrain.data.scenes.layout import CLASSES, COLORS, GROUP, SIZES, SPLITS, SURFACES, UNSEEN, Scene, plan, relation
from pretrain.data.scenes.objects import KINDS
from pretrain.data.scenes.render import paint
from pretrain.data.scenes.text import captions, foils, questions
from pretrain.data.vocabulary import FILE, Vocabulary
from pretrain.errors import UserError
from pretrain.runtime.files import flush, partial_path

__all__ = [
    "CLASSES", "COLORS", "PLACES", "SIZES", "SPLITS", "SURFACES", "UNSEEN",
    "VOCABULARY", "Scene", "contact_sheet", "draw", "draw_dataset", "plan", "split_sizes",
]  # fmt: skip

SHARD = 1000  # scenes
_CHUNK = 50  # scenes that a process draws at a time
_VERSION = 2  # of the drawing: a folder drawn by another one is not taken for this one's
_QUALITY = 92  # JPEG, without colour subsampling: stripes are two pixels wide

VOCABULARY = Vocabulary(
    CLASSES,
    {"color": COLORS, "surface": SURFACES, "size": tuple(SIZES)},
    {name: kind.plural for name, kind in KINDS.items() if kind.plural},
)
"""All words for objects; vocabularies/scenes.json is the same, for those who read scenes and draw none."""

Progress = Callable[[int, int], None]
Files = dict[str, bytes]


def draw(
    seed: int, split: str, index: int, size: int = 96, scale: float = 1.0, things: tuple[int, int] = (1, 4)
) -> tuple[Image.Image, dict[str, Any]]:
    """One scene: its picture, `size` pixels square, and what KEY.json says of it.

    The description holds `captions` (KEY.txt is the first), `foils` (that caption with one thing wrong: caption,
    changed), `questions` (question, answers, type, box), `objects` (name, color, surface, size, on: the object it
    stands on or null, box: x0, y0, x1, y1 in pixels of what is seen of it), `relations` (subject, relation, object:
    positions in `objects`), `label` (position in CLASSES of the largest thing), `place`, and where it comes from.
    """
    scene = plan(seed, split, index, scale, things)
    image, boxes = paint(scene, size)
    count = len(scene.things)
    main = max(scene.things, key=lambda thing: thing.extent)
    return image, {
        "captions": captions(scene),
        "foils": foils(scene),
        "questions": questions(scene, boxes),
        "objects": [
            {
                "name": thing.look.kind,
                "color": thing.look.color,
                "surface": thing.look.surface,
                "size": thing.look.size,
                "on": thing.on,
                "box": box,
            }
            for thing, box in zip(scene.things, boxes, strict=True)
        ],
        "relations": [
            {"subject": i, "relation": relation(scene, i, j), "object": j} for i in range(count) for j in range(count) if i != j
        ],
        "label": CLASSES.index(main.look.kind),
        "place": scene.place,
        "group": index // GROUP if split == "hard" else None,
        "changed": scene.changed or None,
        "split": split,
        "seed": seed,
        "index": index,
    }


def contact_sheet(
    n: int = 100,
    size: int = 96,
    seed: int = 0,
    split: str = "train",
    scale: float = 1.0,
    things: tuple[int, int] = (1, 4),
) -> Image.Image:
    """The first `n` scenes of a split side by side."""
    across, step = math.ceil(math.sqrt(n)), size + 4
    sheet = Image.new("RGB", (across * step + 4, math.ceil(n / across) * step + 4), "white")
    for i in range(n):
        picture, _ = paint(plan(seed, split, i, scale, things), size)
        sheet.paste(picture, (4 + i % across * step, 4 + i // across * step))
    return sheet


# ---------------------------------------------------------------------------------------------------------------------
# The data set


@dataclass(frozen=True)
class _Settings:
    """All that decides what is drawn; kept beside the shards."""

    version: int
    size: int
    seed: int
    scale: float
    things: tuple[int, int]


def split_sizes(num: int) -> dict[str, int]:
    """Scenes of each split beside `num` of training: a tenth, within 100 and 2,000, never more than `num`."""
    part = min(max(num // 10, 100), 2000, num)
    return {"train": num, "val": part, "test": part, "unseen": part, "hard": max(GROUP, part - part % GROUP)}


def draw_dataset(
    out: str | Path,
    num: int | dict[str, int] = 4000,
    size: int = 96,
    seed: int = 0,
    workers: int | None = None,
    *,
    scale: float = 1.0,
    things: tuple[int, int] = (1, 4),
    progress: Progress | None = None,
) -> dict[str, int]:
    """Draw the data set into `out`/{train,val,test,unseen,hard}-0000.tar ..., 1,000 scenes a shard.

    Beside them lie classes.txt, one name a line in the order of `label`, and vocabulary.json, all words for objects.
    A shard appears whole or not at all. Called again with the same settings, only what is missing is drawn.

    Args:
        num: training scenes (the other splits follow, see split_sizes), or the scenes of each split that is wanted.
        size: side of the pictures in pixels, 64 to 2,048.
        workers: processes that draw; None: one a core.
        scale: multiplies the size of every thing: 0.25 gives small things in large pictures.
        things: how few and how many things a scene holds, within 1 to 4 (`hard` has two or three, where allowed).
        progress: called with (scenes done, scenes in all).
    Returns:
        scenes of each split.
    Raises:
        UserError: a setting out of range, a folder that holds other shards, or one that cannot be written.
    """
    counts = _checked(num, size, scale, things)
    folder = Path(out)
    settings = _Settings(_VERSION, size, seed, scale, (things[0], things[1]))
    try:
        _claim(folder, settings, counts)
        shards = [
            (folder / f"{split}-{first // SHARD:04d}.tar", split, first, min(first + SHARD, count))
            for split, count in counts.items()
            for first in range(0, count, SHARD)
        ]
        missing = [shard for shard in shards if not shard[0].exists()]
        total = sum(counts.values())
        done = total - sum(last - first for _, _, first, last in missing)
        with closing(_drawn(settings, missing, workers)) as chunks:
            for path, _, first, last in missing:
                with _Tar(path) as tar:
                    for start in range(first, last, _CHUNK):
                        for offset, files in enumerate(next(chunks)):
                            tar.add(f"{start + offset:07d}", files)
                        done += min(_CHUNK, last - start)
                        if progress:
                            progress(done, total)
        for name, text in (("classes.txt", "".join(f"{name}\n" for name in CLASSES)), (FILE, VOCABULARY.to_json())):
            if not (folder / name).exists():
                _write(folder / name, text)
    except OSError as error:
        raise UserError(f"cannot draw into {folder}: {error.strerror or error}") from error
    except BrokenProcessPool as error:
        raise UserError("a drawing process was killed (out of memory?); try again with fewer workers") from error
    return counts


def _checked(num: int | dict[str, int], size: int, scale: float, things: tuple[int, int]) -> dict[str, int]:
    counts = split_sizes(num) if isinstance(num, int) else dict(num)
    if unknown := sorted(set(counts) - set(SPLITS)):
        raise UserError(f"no split is called {unknown[0]!r}; there are {', '.join(SPLITS)}")
    if bad := [f"{split}={count}" for split, count in counts.items() if count < 1]:
        raise UserError(f"number of scenes: {bad[0]}; at least 1 is needed")
    if not 64 <= size <= 2048:
        raise UserError(f"size {size}: pictures are 64 to 2048 pixels square")
    if not 0.1 <= scale <= 1:
        raise UserError(f"scale {scale}: things are drawn at 0.1 to 1 times their size")
    if scale * size < 48:
        raise UserError(f"scale {scale} at size {size}: too small to be recognised; scale times size is at least 48")
    if not 1 <= things[0] <= things[1] <= 4:
        raise UserError(f"things {things[0]} to {things[1]}: a scene holds 1 to 4, the lower number first")
    if "hard" in counts and things[1] < 2:
        counts.pop("hard")  # one thing alone has no places to exchange
    return counts


def _claim(folder: Path, settings: _Settings, counts: dict[str, int]) -> None:
    """Note in the folder what is drawn there; refuse one that holds anything else by our shards' names."""
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "scenes.json"
    ours = json.dumps({**asdict(settings), "counts": counts}, indent=1)
    if note.exists():
        if json.loads(ours) != _read(note):
            raise UserError(f"{folder} holds scenes drawn with other settings (see {note}): choose another folder")
        return
    if taken := sorted(path.name for split in SPLITS for path in folder.glob(f"{split}-*.tar")):
        raise UserError(f"{folder} holds other shards ({taken[0]}): choose another folder")
    _write(note, ours)


def _write(path: Path, text: str) -> None:
    """A small text file, whole or not at all."""
    partial = partial_path(path)
    partial.write_text(text)
    partial.replace(path)


def _read(note: Path) -> Any:
    try:
        return json.loads(note.read_text())
    except ValueError:
        return None


def _draw_chunk(settings: _Settings, split: str, first: int, last: int) -> list[Files]:
    """The files of some scenes, by extension."""
    out = []
    for index in range(first, last):
        image, said = draw(settings.seed, split, index, settings.size, settings.scale, settings.things)
        jpeg = io.BytesIO()
        image.save(jpeg, "JPEG", quality=_QUALITY, subsampling=0)
        text = json.dumps(said, separators=(",", ":")).encode()
        out.append({"jpg": jpeg.getvalue(), "txt": said["captions"][0].encode(), "json": text})
    return out


def _drawn(
    settings: _Settings, shards: list[tuple[Path, str, int, int]], workers: int | None
) -> Generator[list[Files], None, None]:
    """The chunks of all shards in order, drawn ahead by `workers` processes."""
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
        ahead: deque[Future[list[Files]]] = deque()
        try:
            for job in jobs:
                ahead.append(pool.submit(_draw_chunk, settings, *job))
                if len(ahead) >= 4 * workers:  # a bounded number of finished chunks in memory
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class _Tar:
    """A shard being written: under another name until it is complete; the same bytes for the same samples."""

    def __init__(self, path: Path) -> None:
        self._path, self._partial = path, partial_path(path)

    def __enter__(self) -> _Tar:
        self._file = open(self._partial, "wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        return self

    def add(self, key: str, files: Files) -> None:
        for extension, data in files.items():
            member = tarfile.TarInfo(f"{key}.{extension}")  # owner 0, time 0, mode 0644
            member.size = len(data)
            self._tar.addfile(member, io.BytesIO(data))

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
