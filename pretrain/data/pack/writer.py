"""One shard being packed: samples of a source -> checked, perhaps smaller pictures -> a tar. What a worker process does.

Imports no torch: worker processes start anew and should do so quickly.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import simplejpeg
from PIL import Image

from pretrain.data import BadSample
from pretrain.data.decode import Header, decode_image, read_header
from pretrain.errors import UserError
from pretrain.runtime import files

STORED = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
"""Formats stored as they come, and their extension. Any other (GIF, BMP, TIFF, ...) becomes a PNG."""

_QUALITY = 95  # of pictures made smaller; what is lost by it cannot be seen
_EXAMPLES = 3  # names kept of each kind of bad sample, a shard


@dataclass
class Item:
    """A sample as the source has it, in memory."""

    image: bytes
    captions: list[str] | None = None
    """Cleaned; None where `others` holds what there is."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What becomes KEY.json."""
    others: dict[str, bytes] = field(default_factory=dict)
    """Further members by extension, stored as they are."""


class Job(Protocol):
    """The samples of one shard; small enough to be sent to a process."""

    def __len__(self) -> int:
        """Samples."""
        ...

    def name(self, i: int) -> str:
        """How sample i is called where a person looks for it."""
        ...

    def key(self, i: int, shard: int) -> str:
        """KEY of sample i in shard number `shard`, unique in it."""
        ...

    def load(self, i: int) -> Item:
        """Raises BadSample."""
        ...


@dataclass(frozen=True)
class Style:
    """How pictures are stored."""

    size: int | None = None
    """Pixels; larger pictures are made smaller. None keeps every file's bytes."""
    side: str = "shortest"
    """Which side `size` limits: shortest or longest."""
    caption_field: str = "captions"
    """Json field for the whole list where a sample has several captions."""


@dataclass
class Result:
    """What became of a shard's samples; also its NAME_stats.json, in the manner of img2dataset."""

    count: int
    written: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def skip(self, name: str, bad: BadSample) -> None:
        """Counts a sample that cannot be used."""
        self.skipped[bad.reason] += 1
        named = self.examples.setdefault(bad.reason, [])
        if len(named) < _EXAMPLES:
            named.append(plain(f"{name} ({bad.detail})" if bad.detail else name))

    def to_json(self) -> str:
        """The fields that img2dataset's readers look for, and examples of what was skipped."""
        status = {"success": self.written, **dict(sorted(self.skipped.items()))}
        failed = {"failed_to_download": 0, "failed_to_resize": self.count - self.written}
        stats = {"count": self.count, "successes": self.written, **failed, "status_dict": status, "examples": self.examples}
        return json.dumps(stats, indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Result:
        """Raises ValueError, KeyError, TypeError for what `to_json` did not write."""
        stats = json.loads(text)
        skipped = Counter({reason: n for reason, n in stats["status_dict"].items() if reason != "success"})
        return cls(stats["count"], stats["successes"], skipped, stats["examples"])


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def store(item: Item, style: Style) -> dict[str, bytes]:
    """The members of a sample by extension. Raises BadSample for a picture that cannot be decoded to its end."""
    header = read_header(item.image)
    height, width = smaller(header, style)
    if (height, width) != (header.height, header.width):
        pixels = decode_image(item.image)
        extension, data = _encode(pixels, header, height, width)
        item = Item(data, item.captions, _scaled(item.notes, header, height, width), item.others)
        if "json" in item.others:
            item.others["json"] = _scaled_json(item.others["json"], header, height, width)
    elif header.format in STORED:
        decode_image(item.image, min_size=1)  # to the end, but no larger than needed: truncation shows
        extension, data = STORED[header.format], item.image
    else:
        extension, data = "png", _png(decode_image(item.image))
    members = {extension: data}
    if item.captions is not None:
        members["txt"] = item.captions[0].encode("utf-8", "replace")
        if len(item.captions) > 1:
            item.notes = {**item.notes, style.caption_field: item.captions}
    if item.notes:
        members["json"] = json.dumps(plain(item.notes), ensure_ascii=False).encode()
    return {**members, **item.others}


def smaller(header: Header, style: Style) -> tuple[int, int]:
    """(height, width) the picture is stored at."""
    if style.size is None:
        return header.height, header.width
    side = (min if style.side == "shortest" else max)(header.height, header.width)
    share = min(1.0, style.size / side)
    return max(1, round(header.height * share)), max(1, round(header.width * share))


def _encode(pixels: np.ndarray, header: Header, height: int, width: int) -> tuple[str, bytes]:
    image = Image.fromarray(np.ascontiguousarray(pixels)).resize((width, height), Image.Resampling.LANCZOS)
    if header.format == "WEBP":
        out = io.BytesIO()
        image.save(out, "WEBP", quality=_QUALITY)
        return "webp", out.getvalue()
    if header.format == "JPEG":
        return "jpg", simplejpeg.encode_jpeg(np.array(image), quality=_QUALITY, colorsubsampling="420")
    return "png", _png(np.asarray(image))


def _png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(out, "PNG")
    return out.getvalue()


def _scaled(notes: dict[str, Any], header: Header, height: int, width: int) -> dict[str, Any]:
    """Notes of a picture made smaller: boxes (xyxy) and stated sizes are in pixels of the stored picture."""
    x, y = width / header.width, height / header.height

    def boxes(value: Any, name: str = "") -> Any:
        if name == "box" and isinstance(value, list) and len(value) == 4 and all(isinstance(v, int | float) for v in value):
            return [round(v * factor, 2) for v, factor in zip(value, (x, y, x, y), strict=True)]
        if isinstance(value, dict):
            return {key: boxes(inner, key) for key, inner in value.items()}
        return [boxes(inner) for inner in value] if isinstance(value, list) else value

    changed: dict[str, Any] = boxes(notes)
    if "width" in changed and "height" in changed:
        changed |= {"width": width, "height": height}
    return changed


def _scaled_json(data: bytes, header: Header, height: int, width: int) -> bytes:
    try:
        notes = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample("json unreadable", str(error)) from error
    return json.dumps(_scaled(notes, header, height, width), ensure_ascii=False).encode() if isinstance(notes, dict) else data


def plain(value: Any) -> Any:
    """What json can hold, in UTF-8: numbers that are none become null, bytes text, anything unknown its text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):  # file names that are no UTF-8 come as halves of surrogate pairs
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else str(value)


# ---------------------------------------------------------------------------------------------------------------------
# The tar


def write_shard(job: Job, shard: int, path: Path, style: Style) -> Result:
    """Writes the samples of a job into the tar `path`, and what became of them into NAME_stats.json.

    Both appear only when they are whole, the stats last: a shard with stats is finished. The same job gives the same bytes.
    A shard of which nothing can be used has stats and no tar.

    Raises:
        UserError: the disk is full, or something cannot be read or written.
    """
    result = Result(len(job))
    partial = files.partial_path(path)
    try:
        with open(partial, "wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for key, members in _samples(job, shard, style, result):
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"{key}.{extension}")  # owner 0, time 0, mode 0644: nothing that differs by run
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        if result.written:
            files.flush(partial)
            partial.replace(path)
        files.write_text(stats_path(path), result.to_json())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return result


def _samples(job: Job, shard: int, style: Style, result: Result) -> Iterator[tuple[str, dict[str, bytes]]]:
    for i in range(len(job)):
        try:
            members = store(job.load(i), style)
        except BadSample as bad:
            result.skip(job.name(i), bad)
            continue
        except OSError as error:
            raise UserError(f"cannot read {job.name(i)}: {error.strerror or error}") from error
        result.written += 1
        yield job.key(i, shard), members


def stats_path(tar: Path) -> Path:
    """shard-0001.tar -> shard-0001_stats.json"""
    return tar.with_name(f"{tar.stem}_stats.json")
