"""Writes one shard: reads the samples of a job, checks or resizes their images, checks their sounds, and writes a tar.

This is what a worker process runs. Worker processes start anew, so import only what they need here, and no torch.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import simplejpeg
from PIL import Image

from pretrain.data import BadSample, job_pool
from pretrain.data.audio_files import check_audio
from pretrain.data.decode import Header, as_contiguous, decode_pixels, read_header, reduction_factor
from pretrain.errors import UserError
from pretrain.runtime import files

STORED_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
"""Image formats that are stored unchanged, and their extensions. Others (GIF, BMP, TIFF, ...) are converted to PNG."""

SOUND_EXTENSIONS = {"WAV": "wav", "FLAC": "flac", "Ogg": "ogg", "MP3": "mp3"}
"""Extensions of sounds by their format. All are stored unchanged."""

_QUALITY = 95  # JPEG and WebP quality of images that are scaled down; the loss is not visible
_MAX_EXAMPLES = 3  # names recorded per shard for each reason of skipping


@dataclass
class SourceSample:
    """A sample as read from the source, in memory."""

    image: bytes | None
    captions: list[str] | None = None
    """With normalized whitespace; None if the captions are in `members`."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """The content of KEY.json."""
    members: dict[str, bytes] = field(default_factory=dict)
    """Further members by extension, stored unchanged."""
    dropped: list[str] = field(default_factory=list)
    """Why captions of the sample are left out, one reason each; others of its captions can be used."""
    odd: list[str] = field(default_factory=list)
    """What is odd about its captions, as `find_oddities` and `SEVERAL_LINES` say it."""
    has_label_conflict: bool = False
    """Whether rows of the image have different labels, of which `metadata` has the first."""
    lists_captions: bool = False
    """Whether KEY.json lists the captions even if there is only one, because other samples have several."""
    sound: bytes | None = None
    """At least one of image and sound is there."""
    sound_extension: str = ""
    """Of the member that the sound becomes; "" = that of its content."""


class ShardJob(Protocol):
    """The samples of one shard, small enough to be sent to a worker process."""

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def describe(self, i: int) -> str:
        """Return how the user finds sample `i` in the source."""
        ...

    def get_key(self, i: int, shard: int) -> str:
        """Return the KEY of sample `i` in shard number `shard`, unique in the shard."""
        ...

    def load(self, i: int) -> SourceSample:
        """Read sample `i`. Raises BadSample."""
        ...


@dataclass(frozen=True)
class StorageOptions:
    """How images and captions are stored."""

    size: int | None = None
    """Pixels; larger images are scaled down to it. None stores the bytes of each file unchanged."""
    side: str = "shortest"
    """Which side `size` limits: "shortest" or "longest"."""
    caption_field: str = "captions"
    """Field of KEY.json for the whole list if a sample has several captions."""


@dataclass
class ShardResult:
    """How many samples of a shard were written or skipped.

    It is stored as NAME_stats.json in the format of img2dataset.
    """

    count: int
    written: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    """Captions that were left out of written samples, by reason."""
    odd: Counter[str] = field(default_factory=Counter)
    """Odd captions of written samples, by kind."""
    label_conflicts: int = 0
    """Written samples whose rows have different labels."""
    tar_bytes: int | None = None
    """Size of the tar, which the start of a run compares; None where there is no tar."""

    def skip(self, name: str, bad: BadSample) -> None:
        """Count a sample that cannot be used."""
        self.skipped[bad.reason] += 1
        names = self.examples.setdefault(bad.reason, [])
        if len(names) < _MAX_EXAMPLES:
            names.append(to_json_value(f"{name} ({bad.detail})" if bad.detail else name))

    def to_json(self) -> str:
        """Return JSON with the fields of img2dataset's statistics and examples of skipped samples."""
        status = {"success": self.written, **dict(sorted(self.skipped.items()))}
        failed = {"failed_to_download": 0, "failed_to_resize": self.count - self.written}
        stats = {"count": self.count, "successes": self.written, **failed, "status_dict": status, "examples": self.examples}
        if self.tar_bytes is not None:
            stats["bytes"] = self.tar_bytes
        if self.dropped:
            stats["captions_left_out"] = dict(sorted(self.dropped.items()))
        if self.odd:
            stats["odd_captions"] = dict(sorted(self.odd.items()))
        if self.label_conflicts:
            stats["label_conflicts"] = self.label_conflicts
        return json.dumps(stats, indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> ShardResult:
        """Read what `to_json` wrote. Raises ValueError, KeyError or TypeError for anything else."""
        stats = json.loads(text)
        skipped = Counter({reason: n for reason, n in stats["status_dict"].items() if reason != "success"})
        dropped, odd = (Counter(dict(stats.get(name, {}))) for name in ("captions_left_out", "odd_captions"))
        conflicts = int(stats.get("label_conflicts", 0))
        return cls(stats["count"], stats["successes"], skipped, stats["examples"], dropped, odd, conflicts, stats.get("bytes"))


# ---------------------------------------------------------------------------------------------------------------------
# Encoding samples


def encode_sample(item: SourceSample, storage: StorageOptions) -> dict[str, bytes]:
    """Return the members of a sample by extension.

    Raises:
        BadSample: the image or the sound cannot be decoded completely.
        ConfigError: there is a sound, and soundfile is not installed.
    """
    members: dict[str, bytes] = {}
    if item.image is not None:
        item, members = _encode_image(item, item.image, storage)
    if item.sound is not None:
        extension = SOUND_EXTENSIONS[check_audio(item.sound)]
        members[item.sound_extension or extension] = item.sound
    if item.captions is not None:
        members["txt"] = item.captions[0].encode("utf-8", "replace")
        if len(item.captions) > 1 or item.lists_captions:
            item.metadata = {**item.metadata, storage.caption_field: item.captions}
    if item.metadata:
        members["json"] = json.dumps(to_json_value(item.metadata), ensure_ascii=False).encode()
    return {**members, **item.members}


def _encode_image(item: SourceSample, image: bytes, storage: StorageOptions) -> tuple[SourceSample, dict[str, bytes]]:
    """Return the sample, with boxes in pixels of the stored image, and the member of the image. Raises BadSample."""
    header = read_header(image)
    height, width = compute_stored_size(header, storage)
    if (height, width) != (header.height, header.width):
        pixels = as_contiguous(decode_pixels(image, header))
        extension, data = _resize_and_encode(pixels, header, height, width)
        item = replace(item, metadata=_scale_metadata(item.metadata, header, height, width))
        if "json" in item.members:
            item.members["json"] = _scale_json(item.members["json"], header, height, width)
    elif header.format in STORED_EXTENSIONS:
        # To the end, at the smallest scale: detects truncated files.
        decode_pixels(image, header, reduction_factor(header, header.height, header.width, 1))
        extension, data = STORED_EXTENSIONS[header.format], image
    else:
        extension, data = "png", _encode_png(as_contiguous(decode_pixels(image, header)))
    return item, {extension: data}


def compute_stored_size(header: Header, storage: StorageOptions) -> tuple[int, int]:
    """Return the (height, width) in pixels at which an image is stored."""
    if storage.size is None:
        return header.height, header.width
    side = (min if storage.side == "shortest" else max)(header.height, header.width)
    scale = min(1.0, storage.size / side)
    return max(1, round(header.height * scale)), max(1, round(header.width * scale))


def _resize_and_encode(pixels: np.ndarray, header: Header, height: int, width: int) -> tuple[str, bytes]:
    image = Image.fromarray(np.ascontiguousarray(pixels)).resize((width, height), Image.Resampling.LANCZOS)
    if header.format == "WEBP":
        out = io.BytesIO()
        image.save(out, "WEBP", quality=_QUALITY)
        return "webp", out.getvalue()
    if header.format == "JPEG":
        return "jpg", simplejpeg.encode_jpeg(np.array(image), quality=_QUALITY, colorsubsampling="420")
    return "png", _encode_png(np.asarray(image))


def _encode_png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(out, "PNG")
    return out.getvalue()


def _scale_metadata(metadata: dict[str, Any], header: Header, height: int, width: int) -> dict[str, Any]:
    """Return metadata with boxes (xyxy) and width and height in pixels of the stored image."""
    x, y = width / header.width, height / header.height

    def scale_boxes(value: Any, name: str = "") -> Any:
        if name == "box" and isinstance(value, list) and len(value) == 4 and all(isinstance(v, int | float) for v in value):
            return [round(v * factor, 2) for v, factor in zip(value, (x, y, x, y), strict=True)]
        if isinstance(value, dict):
            return {key: scale_boxes(inner, key) for key, inner in value.items()}
        return [scale_boxes(inner) for inner in value] if isinstance(value, list) else value

    scaled: dict[str, Any] = scale_boxes(metadata)
    if "width" in scaled and "height" in scaled:
        scaled |= {"width": width, "height": height}
    return scaled


def _scale_json(data: bytes, header: Header, height: int, width: int) -> bytes:
    try:
        metadata = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample("json unreadable", str(error)) from error
    return (
        json.dumps(_scale_metadata(metadata, header, height, width), ensure_ascii=False).encode()
        if isinstance(metadata, dict)
        else data
    )


def to_json_value(value: Any) -> Any:
    """Return a value that JSON in UTF-8 can hold.

    Numbers that are not finite become null, bytes become text, and values of unknown types become their `str`.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):  # file names that are not UTF-8 contain lone surrogates
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, dict):
        return {str(key): to_json_value(inner) for key, inner in value.items()}
    return [to_json_value(inner) for inner in value] if isinstance(value, list | tuple) else str(value)


# ---------------------------------------------------------------------------------------------------------------------
# Writing the tar


def write_shard(job: ShardJob, shard: int, path: Path, storage: StorageOptions) -> ShardResult:
    """Write the samples of a job into the tar `path`, and the result into NAME_stats.json.

    Both files appear only when they are complete, the stats last: a shard with stats is finished. The same job gives the same
    bytes. A shard without a usable sample has stats and no tar.

    Raises:
        UserError: the disk is full, or a file cannot be read or written.
        JobStopped: the parent process stops.
    """
    result = ShardResult(len(job))
    partial = files.partial_path(path)
    try:
        with open(partial, "wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for key, members in _encode_samples(job, shard, storage, result):
                add_members(tar, key, members)
        finish_shard(partial, path, result)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return result


def add_members(tar: tarfile.TarFile, key: str, members: Mapping[str, bytes]) -> None:
    """Add a sample to a tar, by extension, with owner 0, time 0 and mode 0644: the same bytes in every run."""
    for extension, data in members.items():
        info = tarfile.TarInfo(f"{key}.{extension}")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


def finish_shard(partial: Path, path: Path, result: ShardResult) -> None:
    """Give a written tar its name, where it holds a sample, and write its statistics. Raises OSError."""
    if result.written:
        files.flush(partial)
        result.tar_bytes = partial.stat().st_size
        partial.replace(path)
    files.write_text(get_stats_path(path), result.to_json())


def _encode_samples(
    job: ShardJob, shard: int, storage: StorageOptions, result: ShardResult
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield (KEY, members by extension) of each usable sample, and count them in `result`."""
    for i in range(len(job)):
        job_pool.raise_if_stopped()
        try:
            item = job.load(i)
            members = encode_sample(item, storage)
        except BadSample as bad:
            result.skip(job.describe(i), bad)
            continue
        except OSError as error:
            raise UserError(f"cannot read {job.describe(i)}: {error.strerror or error}") from error
        result.written += 1
        result.dropped.update(item.dropped)
        result.odd.update(item.odd)
        result.label_conflicts += item.has_label_conflict
        yield job.get_key(i, shard), members


def describe_caption_field(name: str) -> str:
    """Return the line that tells the user where the captions of samples with several captions are."""
    return f"the field {name!r} of each json lists all captions, txt has the first: train with data.caption={name}"


def get_stats_path(tar: Path) -> Path:
    """Return the path of a shard's statistics: shard-0001_stats.json for shard-0001.tar."""
    return tar.with_name(f"{tar.stem}_stats.json")
