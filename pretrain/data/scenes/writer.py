"""Writes drawn samples as shards, by any number of processes, with the settings they were drawn with.

What is drawn is a function of (split, index) alone, so shards have the same bytes however many processes draw them. A shard is
complete or it does not exist, and a second call draws only the missing ones.
"""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import os
import tarfile
from collections import deque
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from pathlib import Path
from typing import Any

from PIL import Image

from pretrain.errors import UserError
from pretrain.runtime.files import flush, partial_path

SHARD_SIZE = 1000  # samples
_CHUNK = 50  # samples that a process draws in one call
_QUALITY = 92  # JPEG, without chroma subsampling because stripes are two pixels wide

Progress = Callable[[int, int], None]
Members = dict[str, bytes]
"""The files of one sample, by extension."""
Draw = Callable[[str, int], tuple[Image.Image, dict[str, Any]] | tuple[Image.Image, dict[str, Any], Members]]
"""(split, index) -> image, content of KEY.json, whose first of `captions` becomes KEY.txt, and further files of the sample.
Sent to other processes."""


def write_dataset(
    folder: Path,
    name: str,
    settings: Mapping[str, Any],
    counts: Mapping[str, int],
    draw: Draw,
    texts: Mapping[str, str],
    workers: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Draw `folder`/SPLIT-0000.tar ..., 1,000 samples per shard, and write the texts that are not there yet.

    Args:
        name: file in the folder that holds the settings.
        settings: all that determines the drawn bytes, besides split and index.
        counts: number of samples in each split.
        texts: content of other files, by name.
        workers: processes that draw; None means one per core.
        progress: called with (samples done, all samples).
    Raises:
        UserError: the folder holds other shards, or it cannot be written.
    """
    try:
        _claim_folder(folder, name, {**settings, "counts": dict(counts)})
        shards = [
            (folder / f"{name_shard(split, first)}.tar", split, first, min(first + SHARD_SIZE, count))
            for split, count in counts.items()
            for first in range(0, count, SHARD_SIZE)
        ]
        missing = [shard for shard in shards if not shard[0].exists()]
        total = sum(counts.values())
        done = total - sum(last - first for _, _, first, last in missing)
        with closing(_draw_chunks(draw, missing, workers)) as chunks:
            for path, _, first, last in missing:
                with _ShardWriter(path) as writer:
                    for start in range(first, last, _CHUNK):
                        for offset, members in enumerate(next(chunks)):
                            writer.add(name_sample(start + offset), members)
                        done += min(_CHUNK, last - start)
                        if progress:
                            progress(done, total)
        for file, text in texts.items():
            if not (folder / file).exists():
                _write_text(folder / file, text)
    except OSError as error:
        raise UserError(f"cannot draw into {folder}: {error.strerror or error}") from error
    except BrokenProcessPool as error:
        raise UserError(
            "a process that drew scenes died, perhaps because memory ran out; try again with fewer workers"
        ) from error


def name_shard(split: str, index: int) -> str:
    """Return the name, without .tar, of the shard that holds a sample."""
    return f"{split}-{index // SHARD_SIZE:04d}"


def name_sample(index: int) -> str:
    """Return the key of a sample within its shard."""
    return f"{index:07d}"


def _claim_folder(folder: Path, name: str, settings: Mapping[str, Any]) -> None:
    """Write the settings into the folder.

    Raises:
        UserError: the folder holds scenes with other settings, or other shards.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    expected = json.dumps(settings, indent=1)
    if path.exists():
        if json.loads(expected) != _read_json(path):
            raise UserError(f"{folder} holds scenes drawn with other settings (see {path}): choose another folder")
        return
    if others := sorted(shard.name for split in settings["counts"] for shard in folder.glob(f"{split}-*.tar")):
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


def _draw_chunk(draw: Draw, split: str, first: int, last: int) -> list[Members]:
    """Draw samples `first` to `last` - 1 and return the files of each."""
    out = []
    for index in range(first, last):
        image, content, *others = draw(split, index)
        jpeg = io.BytesIO()
        image.save(jpeg, "JPEG", quality=_QUALITY, subsampling=0)
        text = json.dumps(content, separators=(",", ":")).encode()
        members = {"jpg": jpeg.getvalue(), "txt": content["captions"][0].encode(), "json": text}
        out.append({**members, **(others[0] if others else {})})
    return out


def _draw_chunks(
    draw: Draw, shards: list[tuple[Path, str, int, int]], workers: int | None
) -> Generator[list[Members], None, None]:
    """Yield the chunks of all shards in order, while `workers` processes draw ahead."""
    jobs = [
        (split, start, min(start + _CHUNK, last)) for _, split, first, last in shards for start in range(first, last, _CHUNK)
    ]
    workers = min(len(os.sched_getaffinity(0)) if workers is None else workers, math.ceil(len(jobs) / 2))
    if workers < 2:
        for job in jobs:
            yield _draw_chunk(draw, *job)
        return
    # spawn, not fork: the caller may hold threads or a device
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        ahead: deque[Future[list[Members]]] = deque()
        try:
            for job in jobs:
                ahead.append(pool.submit(_draw_chunk, draw, *job))
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
