"""The captions of a sample as cleaned text, from KEY.txt or a field of KEY.json."""

from __future__ import annotations

import hashlib
import unicodedata
from typing import Any

from pretrain.data import BadSample
from pretrain.data.sample_json import read_json


def normalize_whitespace(text: str) -> str:
    """Replace each run of white space by one space; strip the ends and a leading byte-order mark."""
    return " ".join(text.removeprefix("\ufeff").split())


def caption_id(text: str) -> int:
    """Return a signed 64-bit hash of a caption.

    It is equal for captions that differ only in case, white space or Unicode composition. It is the same on every machine
    and in every version, so it may be stored.
    """
    canonical = normalize_whitespace(unicodedata.normalize("NFC", text).casefold())
    return int.from_bytes(
        hashlib.blake2b(canonical.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big", signed=True
    )


def read_captions(members: dict[str, bytes], source: str = "txt") -> list[str]:
    """Return all captions of a sample, at least one, with white space normalized.

    Args:
        members: the content of each member, by extension.
        source: "txt", or the name of a json field that holds a string or a list of strings.

    Raises:
        BadSample: the sample has no caption, only empty ones, or one that cannot be read.
    """
    member = "txt" if source == "txt" else "json"
    data = members.get(member)
    if data is None:
        raise BadSample("no caption", f"no {member} member, only {', '.join(sorted(members)) or 'nothing'}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSample("caption not UTF-8", str(error)) from error
    values: list[Any] = [text] if member == "txt" else _read_field(members, source)
    if not all(isinstance(caption, str) for caption in values):
        raise BadSample("caption not text", f"{source}={values!r}"[:200])
    cleaned = [caption for caption in map(normalize_whitespace, values) if caption]
    if not cleaned:
        raise BadSample("empty caption", f"{source} holds {values!r}"[:200])
    return cleaned


def _read_field(members: dict[str, bytes], source: str) -> list[Any]:
    """Return the value of a json field as a list.

    Raises:
        BadSample: the field is absent, null or an empty list.
    """
    fields = read_json(members)
    value = fields.get(source) if isinstance(fields, dict) else None
    if value is None or value == []:
        present = f"fields {', '.join(sorted(map(str, fields)))[:150]}" if isinstance(fields, dict) else "no fields"
        raise BadSample("no caption", f"json has no {source}, but {present}")
    return value if isinstance(value, list) else [value]
