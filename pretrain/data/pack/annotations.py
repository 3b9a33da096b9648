"""Reads annotation files that are one JSON object: COCO's captions, and Karpathy's splits of COCO and Flickr.

COCO: {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1, "caption": "a cat"}]}
Karpathy: {"images": [{"filename": "1.jpg", "split": "train", "sentences": [{"raw": "a cat"}]}]}

Such a file is read into memory as a whole. COCO's largest takes about half a gigabyte.
"""

from __future__ import annotations

import gzip
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

from pretrain.errors import ConfigError, UserError

_SPLIT_IN_NAME = re.compile(r"(train|val|test)(20\d\d)?", re.IGNORECASE)
_PROBES = 20  # images looked for in a folder before the next folder is tried


class Annotations:
    """The images of an annotation file, with all captions of each.

    Args:
        path: the file.
        content: its parsed JSON object.
        splits: names of the splits to read, for files that have splits; () = all.
    """

    def __init__(self, path: Path, content: dict[str, Any], splits: tuple[str, ...] = ()) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        """For each image: "image" is its path, "caption" the list of its captions, and further fields."""
        self.notes: list[str] = []
        """Lines for the user about what the file holds."""
        if _is_karpathy(content):
            self._read_karpathy(content, splits)
        else:
            self._read_coco(content, splits)

    def _read_coco(self, content: dict[str, Any], splits: tuple[str, ...]) -> None:
        if splits:
            raise ConfigError(f"--split {','.join(splits)}: {self.path} has no splits")
        annotations = [a for a in content["annotations"] if isinstance(a, dict)]
        if annotations and not any("caption" in a for a in annotations):
            raise UserError(
                f"{self.path} holds COCO annotations without captions (fields {', '.join(map(str, annotations[0]))}): "
                "give captions_*.json"
            )
        captions: dict[str, list[Any]] = {}
        for annotation in annotations:
            captions.setdefault(str(annotation.get("image_id")), []).append(annotation.get("caption"))
        for image in content["images"]:
            if not isinstance(image, dict):
                self.rows.append({"image": None, "caption": None})
                continue
            name, number = image.get("file_name"), image.get("id")
            self.rows.append({"image": name, "caption": captions.pop(str(number), None), "image_id": number})
        if captions:
            lost = sum(map(len, captions.values()))
            self.notes.append(f"{lost:,} captions of {self.path.name} name an image that the file does not list")

    def _read_karpathy(self, content: dict[str, Any], splits: tuple[str, ...]) -> None:
        images = [image if isinstance(image, dict) else {} for image in content["images"]]
        counts = Counter(str(image.get("split")) for image in images)
        unknown = [split for split in splits if split not in counts]
        if unknown:
            raise ConfigError(f"--split {unknown[0]}: {self.path} has the splits {', '.join(sorted(counts))}")
        for image in images:
            if splits and str(image.get("split")) not in splits:
                continue
            sentences = image.get("sentences")
            captions = [_read_sentence(s) for s in sentences] if isinstance(sentences, list) else None
            name, folder = image.get("filename"), image.get("filepath")
            path = f"{folder}/{name}" if isinstance(folder, str) and folder and isinstance(name, str) else name
            number = image.get("cocoid", image.get("imgid"))
            self.rows.append({"image": path, "caption": captions, "image_id": number, "split": image.get("split")})
        if len(counts) > 1 and not splits:
            sizes = ", ".join(f"{count:,} {name}" for name, count in counts.most_common())
            self.notes.append(f"{self.path.name} holds several splits, all of them packed ({sizes}): --split NAME packs one")

    def find_root(self, outside: bool) -> Path:
        """Return the folder that the paths of the images are relative to.

        COCO's images lie beside the folder of the annotations, in a folder named for the split.

        Args:
            outside: whether paths may lead out of that folder.

        Raises:
            UserError: no such folder contains one of the first images.
        """
        names = [row["image"] for row in self.rows if isinstance(row["image"], str)][:_PROBES]
        here = self.path.absolute().parent
        folders = [here, here / "images"]
        split = _SPLIT_IN_NAME.search(self.path.name)
        if split:
            folders += [folder / split[0] for folder in (here, here / "images")]
        folders += [here.parent, here.parent / "images"]
        if split:
            folders += [folder / split[0] for folder in (here.parent, here.parent / "images")]
        for folder in folders:
            if any((outside or _is_inside(name)) and os.path.isfile(folder / name) for name in names):
                return folder
        example = f" ({names[0]})" if names else ""
        raise UserError(
            f"{self.path}: its images{example} are in none of {', '.join(map(str, folders))}: "
            "name their folder with --image-root"
        )


def read_annotations(path: Path, splits: tuple[str, ...] = ()) -> Annotations | None:
    """Return the content of an annotation file, or None if the file is not one, but may be JSON lines.

    A row of JSON lines may have the fields of an annotation file. One line is an annotation file only if no other line follows
    and the file is not called .jsonl or .ndjson.

    Raises:
        UserError: the file is one JSON object of another kind.
    """
    if path.name.lower().removesuffix(".gz").endswith((".jsonl", ".ndjson")):
        return None
    with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as file:
        first = next((line for line in file if line.strip()), b"").removeprefix(b"\xef\xbb\xbf").strip()
        content = _parse(first)
        is_one_line = content is not None
        if is_one_line and any(line.strip() for line in file):
            return None
        if not is_one_line and first.startswith(b"{") and path.name.lower().removesuffix(".gz").endswith(".json"):
            file.seek(0)
            content = _parse(file.read().removeprefix(b"\xef\xbb\xbf"))
    if not isinstance(content, dict):
        return None
    if _is_karpathy(content) or _is_coco(content):
        return Annotations(path, content, splits)
    if not is_one_line:
        raise UserError(
            f"{path} is one json object with the fields {', '.join(list(content)[:10])}: pack reads COCO's captions_*.json "
            "(images, annotations), Karpathy's splits (images with sentences), and one object per line"
        )
    return None


def _parse(text: bytes) -> Any:
    """Return the JSON value of a text, or None if it is not JSON."""

    def drop_tokens(value: dict[str, Any]) -> dict[str, Any]:
        if "raw" in value:  # Karpathy's sentences also list their words, which take most of the memory
            value.pop("tokens", None)
        return value

    try:
        return json.loads(text, object_hook=drop_tokens)
    except (ValueError, RecursionError):
        return None


def _is_coco(content: dict[str, Any]) -> bool:
    return isinstance(content.get("images"), list) and isinstance(content.get("annotations"), list)


def _is_karpathy(content: dict[str, Any]) -> bool:
    images = content.get("images")
    return isinstance(images, list) and any(isinstance(image, dict) and "sentences" in image for image in images[:100])


def _read_sentence(sentence: Any) -> Any:
    return sentence.get("raw", sentence.get("caption")) if isinstance(sentence, dict) else sentence


def _is_inside(name: str) -> bool:
    """Whether a path stays below the folder that it is relative to."""
    path = os.path.normpath(name)
    return "\0" not in name and not os.path.isabs(path) and path.split(os.sep)[0] != ".."
